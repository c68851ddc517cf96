"""Compares a fused attention kernel with plain XLA attention, in speed and in error relative to float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.accelerator_rows import row_context
from rlhf_jax import lm
from rlhf_jax.lm import attention, kernels


class Mask(NamedTuple):
    """The keys that each query attends to, and the real tokens, segments and window from which kernels derive them."""

    seen_BLL: jax.Array
    mask_BL: jax.Array
    segments_BL: jax.Array | None = None
    window: int = 0


def fused_attention(context: row_context.Context) -> None:
    """Measures the forward and backward pass in bfloat16 for each kind of mask.

    The kernel is the one that `lm` selects for these heads. On a CPU, for which there is no kernel,
    ``jax.nn.dot_product_attention`` is used.
    """
    shapes = context.shapes
    for width in shapes.head_widths:
        for kind, mask in _masks(shapes).items():
            _compare(context, f"attention, {kind}, head width {width}", width, mask)


def _masks(shapes: row_context.Shapes) -> dict[str, Mask]:
    B, L = shapes.attention_rows, shapes.attention_length
    real_BL = jnp.ones((B, L), bool)
    padded_BL = jnp.arange(L)[None, :] >= (jnp.arange(B) * L // (2 * B))[:, None]
    segments_BL = jnp.broadcast_to(1 + jnp.arange(L) * 4 // L, (B, L))
    gaps_LL = jnp.arange(L)[:, None] - jnp.arange(L)[None, :]
    windowed_BLL = attention.causal(real_BL) & (gaps_LL < shapes.window)
    return {
        "left padding": Mask(attention.causal(padded_BL), padded_BL),
        "packed segments": Mask(attention.causal(real_BL, segments_BL), real_BL, segments_BL),
        "sliding window": Mask(windowed_BLL, real_BL, window=shapes.window),
    }


def _compare(context: row_context.Context, measure: str, width: int, mask: Mask) -> None:
    (B, L), H = mask.mask_BL.shape, context.shapes.attention_heads
    cfg = lm.LMConfig(
        vocab_size=8, n_layers=1, d_model=H * width, n_heads=H, sliding_window=mask.window, dtype="bfloat16"
    )
    plain = lm.LMConfig(vocab_size=8, n_layers=1, d_model=H * width, n_heads=H, attention="einsum", dtype="bfloat16")
    *heads, weights = (jax.random.normal(key, (B, H, L, width)) for key in jax.random.split(jax.random.key(0), 4))
    rounded = [x.astype(jnp.bfloat16) for x in heads]
    kernel = kernels.choose(cfg, rounded[0], backend=jax.default_backend())
    if kernel == "einsum" and jax.default_backend() != "cpu":
        context.record(measure, note="no kernel on this device supports this width and mask")
        return

    def attend(cfg: lm.LMConfig, mask: Mask, *heads: Any) -> jax.Array:
        queries, keys, values = heads
        return kernels.attend_rows(queries, keys, values, mask.seen_BLL, mask.mask_BL, mask.segments_BL, cfg=cfg)

    def fused(mask: Mask, *heads: jax.Array) -> jax.Array:
        if kernel == "einsum":
            return attention.attend_by("xla", *heads, seen_BLS=mask.seen_BLL, cfg=cfg)
        return attend(cfg, mask, *heads)

    def written_out(mask: Mask, *heads: jax.Array) -> jax.Array:
        return attend(plain, mask, *heads)

    functions = {"fused": _gradients(fused), "plain": _gradients(written_out)}
    arrays = mask._replace(window=0)  # not used here: the window is in cfg
    with jax.default_matmul_precision("highest"):  # otherwise a GPU computes float32 products in TF32
        exact = _gradients(written_out)(weights, arrays, *(x.astype(jnp.float32) for x in rounded))
    seconds, fields = {}, {}
    for name, function in functions.items():
        error, gradient_error = _largest_differences(function(weights, arrays, *rounded), exact)
        fields |= {f"{name}_error": float(error), f"{name}_gradient_error": float(gradient_error)}
        seconds[name], times = row_context.seconds(
            lambda f=function: jax.block_until_ready(f(weights, arrays, *rounded)), repeats=context.shapes.repeats
        )
        fields[f"{name}_seconds"] = times["seconds"]
    errors = f"largest error {fields['fused_error']:.1e}, plain XLA {fields['plain_error']:.1e}"
    used = "xla" if kernel == "einsum" else kernel
    note = f"{used} {1e3 * seconds['fused']:.2f} ms; {errors}"
    context.record(measure, seconds["plain"] / seconds["fused"], "x", note=note, **fields)


def _gradients(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns a jitted function of weights, mask and heads that returns outputs at real tokens, and gradients."""

    def loss(heads: tuple[jax.Array, ...], weights: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
        out = jnp.where(mask.mask_BL[:, None, :, None], attend(mask, *heads), 0).astype(jnp.float32)
        return jnp.sum(out * weights), out

    def both(weights: jax.Array, mask: Mask, *heads: jax.Array) -> Any:
        grads, out = jax.grad(loss, has_aux=True)(heads, weights, mask)
        return out, grads

    return jax.jit(both)


@jax.jit
def _largest_differences(got: Any, exact: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the largest absolute differences of the outputs and of the gradients."""
    gaps = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x.astype(jnp.float32) - y)), got, exact)
    return gaps[0], jnp.max(jnp.stack(gaps[1]))
