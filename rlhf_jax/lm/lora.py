"""Low-rank adapters (LoRA, Hu et al. 2021): W + scale A B, of which only A and B are trained.

Adapters are a pytree of their own, ``{"layers": {"q": {"lora_a", "lora_b"}}}``, with the layers' leading axis and the
kernel's other axes made into one input and one output axis: ``lora_a [N, in, r]`` and ``lora_b [N, r, out]``. The model
is never copied::

    adapters = lora.init(rng, cfg, rank=8, pattern="layers/(q|v)/kernel")
    params = lora.attach(base, adapters, scale=2.0)      # the arrays of base, and the adapters beside them
    lm.token_logprobs(params, tokens_BL, cfg=cfg)        # or anything else that takes params
    whole = lora.merge(base, adapters, scale=2.0)        # new arrays where W changed: an ordinary model

``scale`` is the paper's alpha / r. A trainer's state holds the adapters alone, and the base is its ``frozen`` argument:
``sft.make_train_step(..., join=partial(lora.attach, scale=2.0))``. Since B starts at 0, a policy of fresh adapters
equals its base, which serves as its reference as well (`train.ppo.Models.join`).

:mod:`rlhf_jax.lm.hub.peft` writes adapters for other libraries and reads theirs.
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
    """One adapter and where it belongs."""

    node: str
    """Such as ``layers/q``."""
    kernel: Any
    """``[N, ...]``, of the model."""
    a: jax.Array
    """``[N, in, r]``."""
    b: jax.Array
    """``[N, r, out]``."""


def init(rng: jax.Array, cfg: config.LMConfig, *, rank: int, pattern: str | Sequence[str]) -> types.Params:
    """Draw adapters: A uniform within 1 / sqrt(in) as PEFT does, B zero; float32. ``pattern`` as in :func:`table`.

    Each leaf has a key of its own made from its name. ``rng`` is consumed. Adapters of several ranks are drawn apart
    and their dicts joined.

    Raises ``ValueError`` for a rank below 1 and for a pattern that matches nothing, naming it.
    """
    return lm_params.draw(rng, table(cfg, rank=rank, pattern=pattern))


def table(cfg: config.LMConfig, *, rank: int, pattern: str | Sequence[str]) -> dict[str, lm_params.Spec]:
    """Return shape, logical axes and initialiser of every adapter by its path, as `lm.params.table` does.

    ``pattern`` is a regular expression, or several, for whole paths of kernels in the layers, such as
    ``"layers/(q|k|v|out)/kernel"`` or ``"layers/.*"``. The rank's axis has the logical name ``rank``.

    Raises as :func:`init`.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be at least 1")
    kernels = {name: row for name, row in lm_params.table(cfg).items() if re.fullmatch("layers/.*/kernel", name)}
    patterns = [pattern] if isinstance(pattern, str) else pattern
    chosen = set().union(*(_matching(one, list(kernels)) for one in patterns))
    if not chosen:
        raise ValueError("no pattern was given, so there is nothing to adapt")
    rows = {}
    for name, kernel in kernels.items():
        if name in chosen:
            rows |= _rows(name.removesuffix("/kernel"), kernel, rank)
    return rows


def attach(params: types.Params, adapters: types.Params, *, scale: Any) -> types.Params:
    """Return a model with ``adapters`` beside its kernels, for every function that takes parameters.

    The arrays of ``params`` are in it as they are; its layers compute W x + scale B (A x), and no merged kernel is
    made. Differentiable in everything, ``scale`` included.

    Raises ``ValueError`` for an adapter whose kernel ``params`` lack, that does not fit it, or is there already.
    """
    attached = lm_params.flatten(params)
    for node, _, a, b in pairs(params, adapters):
        attached |= {f"{node}/lora_a": a, f"{node}/lora_b": b * scale}
    return lm_params.nest(attached)


def merge(params: types.Params, adapters: types.Params, *, scale: Any) -> types.Params:
    """Return an ordinary model with W + scale A B in the place of every adapted W, in W's dtype.

    ``params`` stay as they were; what is not adapted is shared with them. Raises as :func:`attach`.
    """
    merged = lm_params.flatten(params)
    for node, kernel, a, b in pairs(params, adapters):
        # In full precision, which accelerators do not multiply in by themselves: this is done once.
        change = scale * jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
        merged[f"{node}/kernel"] = (kernel + change.reshape(kernel.shape)).astype(kernel.dtype)
    return lm_params.nest(merged)


def pairs(params: types.Params, adapters: types.Params) -> Iterator[Pair]:
    """Go through ``adapters`` with the kernels of ``params`` (arrays, or their shapes); raises as :func:`attach`."""
    kernels, leaves = lm_params.flatten(params), lm_params.flatten(adapters)
    for node in dict.fromkeys(name.rpartition("/")[0] for name in leaves):
        names = f"{node}/kernel", f"{node}/lora_a", f"{node}/lora_b"
        pair = Pair(node, kernels.get(names[0]), leaves.pop(names[1], None), leaves.pop(names[2], None))
        for name, part in zip(names, pair[1:]):
            if part is None:
                raise ValueError(f"the adapter at {node} has no {name}")
        if names[1] in kernels:
            raise ValueError(f"params have an adapter at {node} already: merge it, or attach both to their base")
        if not _fits(pair):
            raise ValueError(
                f"the adapter at {node} has shapes {pair.a.shape} and {pair.b.shape}, its kernel {pair.kernel.shape}"
            )
        yield pair
    if leaves:
        raise ValueError(f"adapters hold what is neither lora_a nor lora_b: {', '.join(sorted(leaves))}")


def sides(kernel: lm_params.Spec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a kernel's input and output in one layer: ``(D,), (H, C)`` for queries."""
    split = 2 if kernel.axes[1] == "embed" else len(kernel.axes) - 1
    return kernel.shape[1:split], kernel.shape[split:]


def _rows(node: str, kernel: lm_params.Spec, rank: int) -> dict[str, lm_params.Spec]:
    inputs, outputs = sides(kernel)
    wide, N = math.prod(inputs), kernel.shape[0]
    # Axes that are made one go by the first one's name: whole heads are what can be put on different devices.
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
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    if not matched:
        raise ValueError(f"the pattern {pattern!r} matches none of the kernels: {', '.join(names)}")
    return matched


def _fits(pair: Pair) -> bool:
    (N, *kernel), a, b = pair.kernel.shape, pair.a.shape, pair.b.shape
    if len(a) != 3 or len(b) != 3 or {a[0], b[0]} != {N} or a[2] != b[1]:
        return False
    return a[1] * b[2] == math.prod(kernel) and a[1] in itertools.accumulate(kernel, lambda x, y: x * y)
