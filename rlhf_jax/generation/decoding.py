"""One decoding step, shared by static and continuous batching."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import parallel, types
from rlhf_jax.generation import sampling as sampling_lib
from rlhf_jax.lm import config, embedding, heads, transformer


class Drawn(NamedTuple):
    """The next token of each row."""

    tokens_B: jax.Array
    """int32 ids; the pad id for rows that had already ended."""
    logprobs_B: jax.Array
    """float32 log-probabilities under the sampling distribution; 0 for rows that had already ended."""
    values_B: jax.Array | None
    """float32 values of the scalar head before the token; None if not requested."""
    stopped_B: jax.Array
    """bool, True for rows in which this token is a stop id or completes a stop sequence."""
    tail_BK: jax.Array
    """The last K tokens of each response, including the new token; K is ``sampling.longest_stop``."""


def empty_tail(batch: int, sampling: sampling_lib.Sampling) -> jax.Array:
    """Returns ``tail_BK`` for responses that have no tokens yet."""
    return jnp.full((batch, sampling.longest_stop), sampling_lib.NO_TOKEN, jnp.int32)


def draw(
    params: types.Params,
    hidden_BD: jax.Array,
    rng_B: jax.Array,
    *,
    step_B: jax.Array,
    live_B: jax.Array,
    tail_BK: jax.Array,
    cfg: config.LMConfig | types.ApplyFn,
    sampling: sampling_lib.Sampling,
    values: bool,
) -> Drawn:
    """Draws the next token of each row from the hidden state of the previous token.

    Args:
        params: Parameters of the model.
        hidden_BD: Hidden states of the previous tokens.
        rng_B: One key per row; token t of row i is drawn with ``fold_in(rng_B[i], t)``.
        step_B: int32, number of tokens that each response already has.
        live_B: bool, True for rows that have not ended.
        tail_BK: The last K tokens of each response, before the new token; K is ``sampling.longest_stop``.
        cfg: `LMConfig` of the model, or an `ApplyFn`.
        sampling: Sampling distribution and stop conditions.
        values: Whether to compute the scalar head's values.

    Returns:
        A `Drawn`.
    """
    if isinstance(cfg, types.ApplyFn):
        logits_BV = cfg.logits(params, hidden_BD[:, None])[:, 0]
    else:  # sampling reads all logits of a row, so they are not sharded over the vocabulary
        logits_BV = parallel.constrain(transformer.logits(params, hidden_BD, cfg=cfg), "batch", None)
    keys_B = jax.vmap(jax.random.fold_in)(rng_B, step_B)
    drawn_B, logprobs_B = sampling_lib.choose(keys_B, logits_BV, sampling, step=step_B)
    tokens_B = jnp.where(live_B, drawn_B, sampling.pad_id)
    tail_BK = jnp.concatenate([tail_BK[:, 1:], tokens_B[:, None]], axis=1)
    values_B = jnp.where(live_B, heads.scalar(params, hidden_BD), 0.0) if values else None
    stopped_B = live_B & sampling_lib.ends(tail_BK, sampling, length=step_B + 1)
    return Drawn(tokens_B, jnp.where(live_B, logprobs_B, 0.0), values_B, stopped_B, tail_BK)


def varying_like(tree: Any, *inputs: Any) -> Any:
    """Returns ``tree`` with the same values, marked as varying over the mesh axes of ``inputs``.

    The mark matters only under `jax.shard_map` with ``check_vma``.
    The initial state of a loop must have the same type as its later states, which depend on the inputs.
    """

    def zero(x: jax.Array) -> jax.Array:
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return jnp.zeros_like(x.reshape(-1)[0], jnp.int32)

    # Adding a zero that depends on all inputs changes the type but no values.
    mark = sum(map(zero, jax.tree.leaves(inputs)), jnp.zeros((), jnp.int32))
    return jax.tree.map(lambda x: x | (mark > 0) if x.dtype == jnp.bool_ else x + mark.astype(x.dtype), tree)


def any_member(live: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns whether any member of the ``jax.vmap`` axis is live, or ``live`` unchanged if there is no axis."""
    return live if axis_name is None else lax.pmax(live.astype(jnp.int32), axis_name) > 0


def check(
    rng_B: jax.Array,
    prompts_BP: jax.Array,
    mask_BP: jax.Array,
    sampling: sampling_lib.Sampling,
    *,
    cfg: config.LMConfig | types.ApplyFn,
    n: int = 1,
) -> None:
    """Checks the arguments of `generate`.

    Args:
        rng_B: Random keys, ``n`` per prompt.
        prompts_BP: Prompts.
        mask_BP: Mask of the prompts.
        sampling: Sampling distribution and stop conditions.
        cfg: The model; the length and the ids of a row are checked only for an `LMConfig`.
        n: Number of responses to each prompt.

    Raises:
        ValueError: If a shape or dtype is wrong, ``n`` is less than 1, rows would exceed ``cfg.max_length``, or a
            prompt in host memory or ``sampling`` has an id outside the vocabulary.
    """
    if prompts_BP.ndim != 2 or mask_BP.shape != prompts_BP.shape:
        raise ValueError(
            f"prompts_BP {prompts_BP.shape} and mask_BP {mask_BP.shape} must have the same shape and rank 2"
        )
    if mask_BP.dtype != jnp.bool_:
        raise ValueError(f"mask_BP has dtype {mask_BP.dtype}; it must be bool")
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    keys_shape = rng_B.shape if jnp.issubdtype(rng_B.dtype, jax.dtypes.prng_key) else rng_B.shape[:-1]
    if keys_shape != (prompts_BP.shape[0] * n,):
        raise ValueError(
            f"rng_B has shape {rng_B.shape}; it must have {prompts_BP.shape[0] * n} keys, one per response"
        )
    if isinstance(cfg, types.ApplyFn):
        return
    width = prompts_BP.shape[1] + sampling.max_new_tokens
    if width > cfg.max_length:
        raise ValueError(
            f"a prompt and its response can have {width} tokens together, more than cfg.max_length = {cfg.max_length}"
        )
    embedding.check_ids(prompts_BP, cfg.vocab_size, mask=mask_BP, name="prompts_BP")
    sampling_lib.check_ids(sampling, cfg.vocab_size)
