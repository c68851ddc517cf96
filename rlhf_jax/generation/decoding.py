"""One step of decoding, the same for every way of running it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import parallel, types
from rlhf_jax.generation import sampling as sampling_lib
from rlhf_jax.lm import config, heads, transformer


class Drawn(NamedTuple):
    """The next token of every row."""

    tokens_B: jax.Array
    """int32; the pad id where the row is not live."""
    logprobs_B: jax.Array
    """float32, of the distribution drawn from; 0 where the row is not live."""
    values_B: jax.Array | None
    """float32, the scalar head's value before the token, where asked for."""
    stopped_B: jax.Array
    """bool: the token ends its response."""
    tail_BK: jax.Array
    """The last tokens, this one among them."""


def no_tail(batch: int, sampling: sampling_lib.Sampling) -> jax.Array:
    """The tail of responses that have no token yet."""
    return jnp.full((batch, sampling.longest_stop), sampling_lib.NOTHING, jnp.int32)


def draw(
    params: types.Params,
    hidden_BD: jax.Array,
    rng_B: jax.Array,
    *,
    step_B: jax.Array,
    live_B: jax.Array,
    tail_BK: jax.Array,
    cfg: config.LMConfig,
    sampling: sampling_lib.Sampling,
    values: bool,
) -> Drawn:
    """Draw token ``step_B`` of each row from the hidden state of the token before, with ``fold_in(rng_B[i], step)``."""
    # On a mesh a row's whole distribution comes together on the devices that draw from it.
    logits_BV = parallel.constrain(transformer.logits(params, hidden_BD, cfg=cfg), "batch", None)
    keys_B = jax.vmap(jax.random.fold_in)(rng_B, step_B)
    drawn_B, logprobs_B = sampling_lib.choose(keys_B, logits_BV, sampling, step=step_B)
    tokens_B = jnp.where(live_B, drawn_B, sampling.pad_id)
    tail_BK = jnp.concatenate([tail_BK[:, 1:], tokens_B[:, None]], axis=1)
    values_B = jnp.where(live_B, heads.scalar(params, hidden_BD), 0.0) if values else None
    stopped_B = live_B & sampling_lib.ends(tail_BK, sampling, length=step_B + 1)
    return Drawn(tokens_B, jnp.where(live_B, logprobs_B, 0.0), values_B, stopped_B, tail_BK)
