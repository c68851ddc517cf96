"""Compares a fused attention kernel with plain XLA attention, in speed and in error relative to float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator_rows import row_context
from rlhf_jax import lm
from rlhf_jax.lm import attention, kernels


def fused_attention(context: row_context.Context) -> None:
    """Measures the forward and backward pass in bfloat16 for each kind of mask.

    The fused kernel is that of ``jax.nn.dot_product_attention``: ``cudnn`` on a GPU and ``xla`` otherwise.
    """
    shapes = context.shapes
    kernel = "cudnn" if jax.default_backend() == "gpu" else "xla"
    for width in shapes.head_widths:
        for kind, (seen_BLL, mask_BL) in _masks(shapes).items():
            measure = f"attention, {kind}, head width {width}"
            try:
                _compare(context, measure, kernel, width, seen_BLL, mask_BL)
            except Exception as error:  # a kernel need not support every width and mask
                context.record(measure, note=f"{kernel}: {str(error).splitlines()[0][:100]}")


def _masks(shapes: row_context.Shapes) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns, for each kind of mask, which keys each query attends to and which tokens are real."""
    B, L = shapes.attention_rows, shapes.attention_length
    real_BL = jnp.ones((B, L), bool)
    padded_BL = jnp.arange(L)[None, :] >= (jnp.arange(B) * L // (2 * B))[:, None]
    segments_BL = jnp.broadcast_to(1 + jnp.arange(L) * 4 // L, (B, L))
    gaps_LL = jnp.arange(L)[:, None] - jnp.arange(L)[None, :]
    return {
        "left padding": (attention.causal(padded_BL), padded_BL),
        "packed segments": (attention.causal(real_BL, segments_BL), real_BL),
        "sliding window": (attention.causal(real_BL) & (gaps_LL < shapes.window), real_BL),
    }


def _compare(
    context: row_context.Context, measure: str, kernel: Any, width: int, seen_BLL: jax.Array, mask_BL: jax.Array
) -> None:
    shapes = context.shapes
    (B, L), H = mask_BL.shape, shapes.attention_heads
    cfg = lm.LMConfig(vocab_size=8, n_layers=1, d_model=H * width, n_heads=H, attention="einsum", dtype="bfloat16")
    *heads, weights = (jax.random.normal(key, (B, H, L, width)) for key in jax.random.split(jax.random.key(0), 4))
    weights *= mask_BL[:, None, :, None]
    rounded = [x.astype(jnp.bfloat16) for x in heads]

    def written_out(*heads: jax.Array) -> jax.Array:
        return kernels.attend_rows(*heads, seen_BLL=seen_BLL, mask_BL=mask_BL, segments_BL=None, cfg=cfg)

    def fused(*heads: jax.Array) -> jax.Array:
        return attention.attend_by(kernel, *heads, seen_BLS=seen_BLL, cfg=cfg)

    def gradients(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
        """Returns a jitted function of queries, keys and values. It returns outputs at real tokens, and gradients."""

        def loss(*heads: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = jnp.where(mask_BL[:, None, :, None], attend(*heads), 0).astype(jnp.float32)
            return jnp.sum(out * weights), out

        def both(*heads: jax.Array) -> Any:
            grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*heads)
            return out, grads

        return jax.jit(both)

    functions = {"fused": gradients(fused), "plain": gradients(written_out)}
    with jax.default_matmul_precision("highest"):  # otherwise a GPU computes float32 products in TF32
        exact = gradients(written_out)(*(x.astype(jnp.float32) for x in rounded))
    seconds, fields = {}, {}
    for name, function in functions.items():
        out, grads = function(*rounded)
        fields[f"{name}_error"] = _largest_difference(out, exact[0])
        fields[f"{name}_gradient_error"] = max(map(_largest_difference, grads, exact[1]))
        seconds[name], _ = row_context.seconds(lambda f=function: jax.block_until_ready(f(*rounded)), repeats=5)
    errors = f"largest error {fields['fused_error']:.1e}, plain XLA {fields['plain_error']:.1e}"
    context.record(
        measure,
        seconds["plain"] / seconds["fused"],
        "x",
        note=f"{kernel} {1e3 * seconds['fused']:.2f} ms; {errors}",
        seconds=seconds["fused"],
        plain_seconds=seconds["plain"],
        **fields,
    )


def _largest_difference(x: jax.Array, y: jax.Array) -> float:
    return float(np.max(np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32))))
