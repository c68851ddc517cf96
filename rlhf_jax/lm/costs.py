"""The work that a model must do: FLOPs of a forward pass and bytes read by a decoding step.

FLOPs include only matmuls, and bytes include only the weights, keys and values that the matmuls read. These dominate in
large models.
"""

from __future__ import annotations

import math

from rlhf_jax.lm import config
from rlhf_jax.lm import params as lm_params


def layer_kernels(cfg: config.LMConfig) -> int:
    """Returns the total number of kernel parameters in all layers; every token is multiplied by all of them."""
    rows = lm_params.table(cfg).items()
    return sum(math.prod(row.shape) for name, row in rows if name.startswith("layers/") and name.endswith("kernel"))


def forward_flops(cfg: config.LMConfig, *, rows: int, length: int, logits: int | None = None) -> float:
    """Returns the FLOPs of a forward pass; a forward and a backward pass together take three times as many.

    Attention matmuls are counted at half their cost, because attention is causal. Recomputation is not counted.

    Args:
        cfg: Architecture.
        rows: Number of rows.
        length: Number of tokens per row.
        logits: Number of positions per row at which logits are computed; all by default.

    Returns:
        ``rows * (length * (2 * kernels + attention) + 2 * logits * d_model * vocab_size)``, where ``kernels`` is the
        result of `layer_kernels`, and ``attention`` is ``2 * n_layers * n_heads * d_head * length``.

    Example:
        >>> from rlhf_jax import lm
        >>> cfg = lm.LMConfig.preset("pythia-1b")
        >>> print(f"{lm.costs.forward_flops(cfg, rows=8, length=2048):.3g}")
        3.2e+13
    """
    columns = length if logits is None else logits
    attention = 2 * cfg.n_layers * cfg.n_heads * cfg.d_head * length
    unembed = cfg.d_model * cfg.vocab_size
    return float(rows * (length * (2 * layer_kernels(cfg) + attention) + 2 * columns * unembed))


def decode_bytes(cfg: config.LMConfig, *, batch: int, columns: float, itemsize: int) -> float:
    """Returns the bytes that a decoding step must read: all kernels, and the cached keys and values of all rows.

    Args:
        cfg: Architecture.
        batch: Number of rows decoded together.
        columns: Number of cached tokens per row, which may be a mean over rows.
        itemsize: Bytes per element, such as 2 for bfloat16.

    Returns:
        ``itemsize * (kernels + 2 * n_layers * batch * columns * n_kv_heads * d_head)``, where ``kernels`` is the number
        of parameters in the kernels of all layers and in the unembedding.
    """
    kernels = layer_kernels(cfg) + cfg.d_model * cfg.vocab_size
    return itemsize * (kernels + 2 * cfg.n_layers * batch * columns * cfg.n_kv_heads * cfg.d_head)
