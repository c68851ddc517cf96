"""Low-rank adapters (LoRA, Hu et al. 2021): a kernel W becomes W + scale A B, of which only A and B are trained.

Adapters are a pytree separate from the model, such as ``{"layers": {"q": {"lora_a": ..., "lora_b": ...}}}``. For N
layers and rank r, ``lora_a`` (A) has shape ``[N, in, r]``, and ``lora_b`` (B) has shape ``[N, r, out]``, where ``in``
and ``out`` are the sizes of the kernel's flattened input and output axes. Attaching adapters does not copy the model::

    adapters = lora.init(rng, cfg, rank=8, pattern="layers/(q|v)/kernel")
    params = lora.attach(base, adapters, scale=2.0)      # the arrays of base, plus the adapters
    lm.token_logprobs(params, tokens_BL, cfg=cfg)        # or any other function that runs the model
    whole = lora.merge(base, adapters, scale=2.0)        # an ordinary model

``scale`` is alpha / r in the paper. To train adapters, pass ``join=partial(lora.attach, scale=2.0)`` to a function such
as `sft.make_train_step`; the train state then contains only the adapters, and the base model is the step's argument
``frozen``. Since B is initialised to 0, a policy with new adapters is equal to its base model, which can therefore be
the reference model (see `train.ppo.Models.join`).

A reward model or critic is trained as adapters plus head. Its pytree contains the head of :mod:`rlhf_jax.lm.heads`
beside the adapters, and `attach` and `merge` replace the head of the base model, if it has one::

    trained = {**adapters, "head": lm.with_head(rng, base, cfg)["head"]}
    lm.score(lora.attach(base, trained, scale=2.0), tokens_BL, mask_BL=mask_BL, cfg=cfg)

:mod:`rlhf_jax.lm.hub.peft` reads and writes adapters in the format of PEFT.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import types
from rlhf_jax.lm import config
from rlhf_jax.lm import params as lm_params


class Pair(NamedTuple):
    """An adapter and the kernel that it modifies."""

    node: str
    """Path that kernel and adapter share, such as ``layers/q``."""
    kernel: Any
    """Kernel of the model, ``[N, ...]``."""
    a: jax.Array
    """The matrices A, ``[N, in, r]``."""
    b: jax.Array
    """The matrices B, ``[N, r, out]``."""


def init(rng: jax.Array, cfg: config.LMConfig, *, rank: int, pattern: str | Sequence[str]) -> types.Params:
    """Returns new float32 adapters, with B = 0 and A uniform in [-1 / sqrt(in), 1 / sqrt(in)], as in PEFT.

    >>> import jax
    >>> from rlhf_jax import lm
    >>> cfg = lm.LMConfig.preset("tiny")
    >>> adapters = lm.lora.init(jax.random.key(0), cfg, rank=4, pattern="layers/(q|v)/kernel")
    >>> adapters["layers"]["q"]["lora_a"].shape
    (2, 64, 4)

    Args:
        rng: Random key, consumed. The key of each array is derived from its name.
        cfg: Architecture of the base model.
        rank: Rank r, at least 1. To use several ranks, call `init` once per rank and merge the nested dicts.
        pattern: One or several regular expressions that match the kernels to adapt (see `table`).

    Returns:
        Nested dict of adapters.

    Raises:
        ValueError: The rank is below 1, or a pattern matches no kernel.
    """
    return lm_params.draw(rng, table(cfg, rank=rank, pattern=pattern))


def table(cfg: config.LMConfig, *, rank: int, pattern: str | Sequence[str]) -> dict[str, lm_params.Spec]:
    """Returns the shape, logical axes and initialiser of every array of the adapters, keyed by its path.

    ``pattern`` is one or several regular expressions that match whole paths of kernels, such as
    ``"layers/(q|k|v|out)/kernel"`` or ``"layers/.*"``. The dimension of size r has the logical axis ``rank``.

    Raises:
        ValueError: The rank is below 1, or a pattern matches no kernel.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be at least 1")
    kernels = {name: row for name, row in lm_params.table(cfg).items() if re.fullmatch("layers/.*/kernel", name)}
    patterns = [pattern] if isinstance(pattern, str) else pattern
    chosen = set().union(*(_matching(one, list(kernels)) for one in patterns))
    if not chosen:
        raise ValueError("no pattern was given: name the kernels to adapt, such as 'layers/(q|v)/kernel'")
    rows = {}
    for name, kernel in kernels.items():
        if name in chosen:
            rows |= _rows(name.removesuffix("/kernel"), kernel, rank)
    return rows


def attach(params: types.Params, adapters: types.Params, *, scale: Any) -> types.Params:
    """Returns ``params`` with ``adapters`` added; `lm.forward` and the functions that call it accept the result.

    A head in ``adapters`` becomes the head of the result. Layers then compute x W + scale (x A) B without forming the
    merged kernel. The result shares the arrays of ``params`` and is differentiable with respect to all arguments.

    Raises:
        ValueError: An adapter is incomplete, has no kernel in ``params`` or does not fit the kernel's shape, or
            ``params`` already have an adapter for the kernel.
    """
    attached = lm_params.flatten(_with_own_head(params, adapters))
    for node, _, a, b in pairs(params, adapters):
        attached |= {f"{node}/lora_a": a, f"{node}/lora_b": b * scale}
    return lm_params.nest(attached)


def merge(params: types.Params, adapters: types.Params, *, scale: Any) -> types.Params:
    """Returns ordinary parameters with W + scale A B in place of every adapted W, in the dtype of W.

    A head in ``adapters`` becomes the head of the result. All other arrays are shared with ``params``.

    Raises:
        ValueError: As in `attach`.
    """
    merged = lm_params.flatten(_with_own_head(params, adapters))
    for node, kernel, a, b in pairs(params, adapters):
        # Accelerators do not multiply in full float32 precision by default.
        change = scale * jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
        merged[f"{node}/kernel"] = (kernel + change.reshape(kernel.shape)).astype(kernel.dtype)
    return lm_params.nest(merged)


def pairs(params: types.Params, adapters: types.Params) -> Iterator[Pair]:
    """Yields each adapter with its kernel, but no head; the leaves of ``params`` may be shapes. Raises as `attach`."""
    kernels = lm_params.flatten(params)
    leaves = lm_params.flatten({name: node for name, node in adapters.items() if name != "head"})
    for node in dict.fromkeys(name.rpartition("/")[0] for name in leaves):
        names = f"{node}/kernel", f"{node}/lora_a", f"{node}/lora_b"
        pair = Pair(node, kernels.get(names[0]), leaves.pop(names[1], None), leaves.pop(names[2], None))
        for name, part in zip(names, pair[1:]):
            if part is None:
                raise ValueError(f"the adapter at {node} requires {name}, which is missing")
        if names[1] in kernels:
            raise ValueError(
                f"params already have an adapter at {node}: merge it first, or attach the new one to the base model"
            )
        if not _fits(pair):
            raise ValueError(
                f"the adapter at {node} has shapes {pair.a.shape} and {pair.b.shape}, which do not fit its kernel of "
                f"shape {pair.kernel.shape}"
            )
        yield pair
    if leaves:
        raise ValueError(
            f"adapters may contain only lora_a and lora_b, but have {', '.join(sorted(leaves))}; a head belongs under "
            '"head"'
        )


def sides(kernel: lm_params.Spec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the input and output shapes of a kernel in one layer, such as ``(D,), (H, C)`` for queries."""
    split = 2 if kernel.axes[1] == "embed" else len(kernel.axes) - 1
    return kernel.shape[1:split], kernel.shape[split:]


def _with_own_head(params: types.Params, adapters: types.Params) -> types.Params:
    return {**params, "head": adapters["head"]} if "head" in adapters else params


def _rows(node: str, kernel: lm_params.Spec, rank: int) -> dict[str, lm_params.Spec]:
    inputs, outputs = sides(kernel)
    wide, N = math.prod(inputs), kernel.shape[0]
    # A flattened axis has the logical name of the first axis in it, so that it is sharded by whole heads.
    ends = kernel.axes[1], kernel.axes[1 + len(inputs)]
    bound = 1 / math.sqrt(wide)

    def uniform(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(rng, shape, jnp.float32, -bound, bound)

    return {
        f"{node}/lora_a": lm_params.Spec((N, wide, rank), ("layers", ends[0], "rank"), uniform),
        f"{node}/lora_b": lm_params.Spec(
            (N, rank, math.prod(outputs)), ("layers", "rank", ends[1]), lm_params.constant(0.0)
        ),
    }


def _matching(pattern: str, names: Sequence[str]) -> set[str]:
    try:
        matched = {name for name in names if re.fullmatch(pattern, name)}
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is not a valid regular expression: {error}") from error
    if not matched:
        raise ValueError(f"the pattern {pattern!r} matches none of the kernels: {', '.join(names)}")
    return matched


def _fits(pair: Pair) -> bool:
    (N, *kernel), a, b = pair.kernel.shape, pair.a.shape, pair.b.shape
    if len(a) != 3 or len(b) != 3 or {a[0], b[0]} != {N} or a[2] != b[1]:
        return False
    return a[1] * b[2] == math.prod(kernel) and a[1] in itertools.accumulate(kernel, lambda x, y: x * y)
