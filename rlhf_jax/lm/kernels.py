"""Attention over whole rows with platform-specific kernels, which never store the full score matrix.

TPUs use splash attention from Pallas, and GPUs use cuDNN. Both compute the same function as `attention.attend`, with a
different order of operations. The kernel is chosen when a program is lowered, so a program that is compiled ahead of
time for a TPU topology uses the TPU kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax

from rlhf_jax import parallel
from rlhf_jax.lm import attention, config

_LANES = 128
"""Splash attention requires rows whose length is a multiple of this."""
_BLOCKS = (512, 256, 128)
"""Block sizes of splash attention; the first that divides the row length is used."""


def attend_rows(
    queries_BHLC: jax.Array,
    keys_BGLC: jax.Array,
    values_BGLC: jax.Array,
    seen_BLL: jax.Array,
    mask_BL: jax.Array,
    segments_BL: jax.Array | None,
    *,
    cfg: config.LMConfig,
) -> jax.Array:
    """Computes `attention.attend` for whole rows, with a platform-specific kernel if ``cfg.attention`` is "auto".

    Kernels are used for 16-bit dtypes if they support the architecture and the row length. Their output at padding is
    finite but may differ from the output of `attention.attend`.

    Args:
        queries_BHLC: Queries.
        keys_BGLC: Keys.
        values_BGLC: Values.
        seen_BLL: The result of `attention.causal` for ``mask_BL`` and ``segments_BL``, restricted to the sliding window
            if the layer has one.
        mask_BL: bool, True at real tokens.
        segments_BL: int32 segment ids of packed rows, or None.
        cfg: Architecture.

    Returns:
        Attention output ``[B,H,L,C]``.
    """

    # The backward pass recomputes the scores, so that they are not stored.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def einsum(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return attention.attend(queries, keys, values, seen_BLL, cfg=cfg)

    heads = (queries_BHLC, keys_BGLC, values_BGLC)
    if cfg.attention != "auto":
        return einsum(*heads)
    kernels: dict[str, Any] = {}
    if choose(cfg, queries_BHLC, backend="tpu") == "splash":
        ids_BL = segment_ids(mask_BL, segments_BL)
        kernels["tpu"] = functools.partial(_splash_on_mesh, ids_BL, cfg=cfg)
    if choose(cfg, queries_BHLC, backend="gpu") == "cudnn":
        kernels["cuda"] = lambda *heads: attention.attend_by("cudnn", *heads, seen_BLS=seen_BLL, cfg=cfg)
    return lax.platform_dependent(*heads, **kernels, default=einsum) if kernels else einsum(*heads)


def choose(cfg: config.LMConfig, queries_BHLC: Any, *, backend: str) -> str:
    """Returns the implementation that `attend_rows` uses on a backend ("cpu", "gpu" or "tpu").

    This is ``cfg.attention`` unless that is "auto"; then it is "splash", "cudnn" or, without a kernel, "einsum".
    ``queries_BHLC`` may be a `jax.ShapeDtypeStruct`.
    """
    if cfg.attention != "auto":
        return cfg.attention
    if queries_BHLC.dtype.itemsize == 2:
        if backend == "tpu" and _splash_supports(cfg, queries_BHLC):
            return "splash"
        if backend == "gpu" and _cudnn_supports(cfg, queries_BHLC):
            return "cudnn"
    return "einsum"


def segment_ids(mask_BL: jax.Array, segments_BL: jax.Array | None) -> jax.Array:
    """Combines mask and segments into int32 segment ids ``[B,L]``, which are 0 at padding and positive elsewhere."""
    ids_BL = jnp.ones(mask_BL.shape, jnp.int32) if segments_BL is None else segments_BL.astype(jnp.int32) + 1
    return jnp.where(mask_BL, ids_BL, 0)


def splash(
    queries_BHLC: jax.Array,
    keys_BGLC: jax.Array,
    values_BGLC: jax.Array,
    ids_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    interpret: bool = False,
) -> jax.Array:
    """Computes causal attention within segments with splash attention on a single TPU; the result is differentiable.

    Args:
        queries_BHLC: Queries; L must be a multiple of 128.
        keys_BGLC: Keys.
        values_BGLC: Values.
        ids_BL: Segment ids from `segment_ids`.
        cfg: Architecture; ``attn_scale`` and ``attn_softcap`` are used.
        interpret: Whether to interpret the kernel, which is slow but works on any platform.

    Returns:
        Attention output ``[B,H,L,C]``.
    """
    # Importing Pallas is slow and necessary only on a TPU.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    H, L = queries_BHLC.shape[1:3]
    block = next(size for size in _BLOCKS if L % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    mask = kernels.MultiHeadMask([kernels.CausalMask((L, L))] * H)
    attend = kernels.make_splash_mha_single_device(
        mask, block_sizes=sizes, attn_logits_soft_cap=cfg.attn_softcap or None, interpret=interpret
    )
    scaled: jax.Array = queries_BHLC * jnp.asarray(cfg.attn_scale, queries_BHLC.dtype)

    def one_row(*row: Any) -> Any:
        *heads, ids = row
        return attend(*heads, kernels.SegmentIds(ids, ids))

    return jax.vmap(one_row)(scaled, keys_BGLC, values_BGLC, ids_BL)


def _splash_on_mesh(ids_BL: jax.Array, *heads: jax.Array, cfg: config.LMConfig) -> jax.Array:
    """Runs `splash` on each device for its rows and heads, because XLA cannot partition a Pallas kernel."""
    mesh = parallel.active_mesh()
    if mesh is None:
        return splash(*heads, ids_BL=ids_BL, cfg=cfg)
    names = [("batch", "heads", None, None), *[("batch", "kv_heads", None, None)] * 2, ("batch", None)]
    specs = tuple(parallel.spec(axes, mesh, shape=x.shape) for axes, x in zip(names, (*heads, ids_BL), strict=True))

    def attend(*shards: Any) -> jax.Array:
        queries, keys, values, ids = shards
        return splash(queries, keys, values, ids, cfg=cfg)

    return jax.shard_map(attend, in_specs=specs, out_specs=specs[0], check_vma=False)(*heads, ids_BL)


def _splash_supports(cfg: config.LMConfig, queries_BHLC: jax.Array) -> bool:
    L, C = queries_BHLC.shape[2:]
    # `sliding_window` counts real tokens, but the window of a kernel would count columns, including padding.
    windowed = cfg.windowed and cfg.sliding_window < L
    # Each device must have the key heads that its query heads use.
    apart = parallel.num_shards("heads")
    together = cfg.n_heads % apart != 0 or cfg.n_kv_heads % apart == 0
    return L % _LANES == 0 and C % 64 == 0 and not windowed and together and parallel.num_shards("length") == 1


def _cudnn_supports(cfg: config.LMConfig, queries_BHLC: jax.Array) -> bool:
    """Returns whether cuDNN supports the architecture and the row length, which must be even for the backward pass."""
    widest = {9: 256, 8: 128}.get(min(_cuda_generation(), 9), 0)
    return cfg.d_head % 8 == 0 and cfg.d_head <= widest and cfg.attn_softcap == 0 and queries_BHLC.shape[2] % 2 == 0


def _cuda_generation() -> int:
    """Returns the major compute capability of the GPU (9 for Hopper), or 0 if JAX does not run on a CUDA GPU."""
    # Without a CUDA GPU, `jax.nn.dot_product_attention` cannot be traced with cuDNN.
    if jax.default_backend() != "gpu" or "cuda" not in jax.extend.backend.get_backend().platform_version:
        return 0
    return int(str(jax.local_devices()[0].compute_capability).partition(".")[0])
