"""A pre-norm decoder-only transformer as a pure function of a nested dict of parameters.

`forward` returns hidden states, and `logits` maps them to logits over the vocabulary. :mod:`rlhf_jax.lm.logprobs` uses
both to compute the log-probabilities of given tokens, and computes logits only for the columns that are needed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import parallel, types
from rlhf_jax.lm import attention, config, embedding, kernels
from rlhf_jax.lm import cache as kv_cache
from rlhf_jax.lm import params as lm_params
from rlhf_jax.lm import weights as weights_lib

Weights = Any
"""Parameters of one layer: ``params["layers"]`` without the leading axis."""

Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""Maps queries, keys and values of new tokens to the attention output and the layer's new cache entry, if any."""

Pick = Callable[[jax.Array, int], jax.Array]
"""Selects columns along the given axis of an array."""


class _View(NamedTuple):
    """Attention mask and rotary angles of a layer."""

    seen_BLS: jax.Array
    rotation: embedding.Angles | None


Columns = tuple[int, int] | jax.Array
"""Columns whose hidden states are needed, as a range (start, stop) or as int32 ``[B]`` with one column per row."""

_FEW_LAYERS = 8
"""In models with at most this many layers, the last layer computes only the needed columns. It must
then run outside the scan, and the scan requires a copy of the other layers' parameters; in deeper models, the copy
costs more than this saves."""

# The backward pass recomputes functions with this decorator instead of storing their residuals, because they are cheap.
# In a small model, storing the residuals would take longer than the matmuls.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def forward(
    params: types.Params,
    tokens_BL: jax.Array,
    *,
    cfg: config.LMConfig,
    mask_BL: jax.Array | None = None,
    positions_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    columns: Columns | None = None,
    cache: kv_cache.KVCache | None = None,
    used_slots: int | None = None,
) -> types.LMOutput:
    """Returns the final hidden states and the updated cache.

    >>> import jax, jax.numpy as jnp
    >>> from rlhf_jax import lm
    >>> cfg = lm.LMConfig.preset("tiny")
    >>> params = lm.init(jax.random.key(0), cfg)
    >>> out = lm.forward(params, jnp.array([[5, 6, 7]]), cfg=cfg)
    >>> lm.logits(params, out.hidden_BLD, cfg=cfg).shape
    (1, 3, 256)

    Args:
        params: Parameters of the model.
        tokens_BL: int32 tokens.
        cfg: Architecture.
        mask_BL: bool, True at real tokens; by default, all tokens are real. Padding may be in any column and have any
            id. Real tokens do not attend to padding.
        positions_BL: int32 positions; by default, the number of real tokens before each column, including cached ones.
        segments_BL: int32 segment ids of packed rows. Segments are contiguous, tokens attend only to tokens of the same
            segment, and default positions restart at 0 in each segment.
        columns: Columns that the caller needs. In a model of at most 8 layers, the last layer computes only these, and
            the hidden states of the other columns are then undefined. Ignored if there is a cache.
        cache: Keys and values of the preceding tokens.
        used_slots: Upper bound on the number of cache slots that are filled after this call; later slots are not read.
            By default, all slots are read.

    Returns:
        `LMOutput` with hidden states ``[B,L,D]`` after the final norm, in the compute dtype, and the updated cache if
        one was given. Hidden states at padding are finite but meaningless. A real token with an id outside the
        vocabulary makes the hidden states of its row NaN.

    Raises:
        ValueError: An argument has the wrong rank, shape or dtype, rows or cache are longer than ``cfg.max_length``,
            ``tokens_BL`` has more columns than the cache has slots, segments are combined with a cache, or a real
            token of an array in host memory has an id outside the vocabulary.
    """
    _check(tokens_BL, mask_BL, positions_BL, segments_BL, cache, cfg)
    embedding.check_ids(tokens_BL, cfg.vocab_size, mask=mask_BL, name="tokens_BL")
    if cache is None:
        return types.LMOutput(_read(params, tokens_BL, mask_BL, positions_BL, segments_BL, columns, cfg))
    return _continue(params, tokens_BL, mask_BL, positions_BL, cache, used_slots or cache.slots, cfg)


def logits(params: types.Params, hidden_BLD: jax.Array, *, cfg: config.LMConfig) -> jax.Array:
    """Returns float32 logits over the vocabulary, ``[..., D] -> [..., V]``."""
    here = weights_lib.whole(params, "embed" if cfg.tie_embeddings else "unembed", cfg=cfg)
    kernel_DV = here["embed"]["tokens"].T if cfg.tie_embeddings else here["unembed"]["kernel"]
    scores = _matmul(hidden_BLD, kernel_DV.astype(cfg.compute_dtype), out=jnp.float32)
    scores = parallel.constrain(scores, "batch", *["length"] * (scores.ndim - 2), "vocab")
    return attention.soft_cap(scores, cfg.final_softcap)


def default_positions(mask_BL: jax.Array, segments_BL: jax.Array | None = None) -> jax.Array:
    """Returns the number of real tokens before each column, counted within its segment if segments are given."""
    real_BL = mask_BL.astype(jnp.int32)
    before_BL = jnp.cumsum(real_BL, axis=1) - real_BL
    if segments_BL is None:
        return before_BL
    starts_BL = jnp.pad(segments_BL[:, 1:] != segments_BL[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return before_BL - lax.cummax(jnp.where(starts_BL, before_BL, 0), axis=1)


def _read(
    params: types.Params,
    tokens_BL: jax.Array,
    mask_BL: jax.Array | None,
    positions_BL: jax.Array | None,
    segments_BL: jax.Array | None,
    columns: Columns | None,
    cfg: config.LMConfig,
) -> jax.Array:
    if mask_BL is None:
        mask_BL = jnp.ones(tokens_BL.shape, bool)
    if positions_BL is None:
        positions_BL = default_positions(mask_BL, segments_BL)
    far, near = _views(attention.causal(mask_BL, segments_BL), positions_BL, positions_BL, cfg)
    axes = lm_params.layer_axes(cfg)

    @_recomputed
    def attend(queries, keys, values, seen_BQL):
        return attention.attend(queries, keys, values, seen_BQL, cfg=cfg)

    def step(x_BLD, layer, pick=None):
        weights, is_local = layer
        weights = weights_lib.gathered(weights, axes, cfg)
        # Layers with and without a sliding window share the scanned body, which selects one of the two views.
        view = near if is_local is None else jax.tree.map(lambda a, b: jnp.where(is_local, a, b), near, far)

        def mix(queries, keys, values):
            if pick is None:
                rows = (view.seen_BLS, mask_BL, segments_BL)
                return kernels.attend_rows(queries, keys, values, *rows, cfg=cfg), None
            return attend(queries, keys, values, pick(view.seen_BLS, 1)), None

        x_BLD, _ = _layer(weights, x_BLD, view.rotation, mix, cfg, pick=pick)
        return x_BLD, None

    x_BLD = _row(embedding.embed(params, tokens_BL, mask_BL, positions_BL, cfg))
    layers = (params["layers"], jnp.array(cfg.local_layers) if cfg.mixed_layers else None)
    if columns is None or cfg.n_layers > _FEW_LAYERS:
        x_BLD, _ = lax.scan(_rematerialised(step, cfg), x_BLD, layers)
        return _final_norm(params, x_BLD, cfg)
    pick, place = _selection(columns, tokens_BL.shape[1])
    x_BLD, _ = lax.scan(_rematerialised(step, cfg), x_BLD, jax.tree.map(lambda x: x[:-1], layers))
    last = _rematerialised(functools.partial(step, pick=pick), cfg)
    x_BQD, _ = last(x_BLD, jax.tree.map(lambda x: x[-1], layers))
    return place(_final_norm(params, x_BQD, cfg))


def _selection(columns: Columns, width: int) -> tuple[Pick, Callable[[jax.Array], jax.Array]]:
    """Returns a function that selects ``columns`` and a function that puts them back into an array of zeros."""
    if isinstance(columns, tuple):
        start, stop = columns
        around = ((0, 0), (start, width - stop), (0, 0))
        return lambda x, axis: lax.slice_in_dim(x, start, stop, axis=axis), lambda x_BQD: jnp.pad(x_BQD, around)

    def pick(x: jax.Array, axis: int) -> jax.Array:
        return jnp.take_along_axis(x, columns.reshape(-1, *[1] * (x.ndim - 1)), axis=axis)

    here_BL = jnp.arange(width)[None, :] == columns[:, None]
    return pick, lambda x_BQD: jnp.where(here_BL[:, :, None], x_BQD, jnp.zeros((), x_BQD.dtype))


def _continue(
    params: types.Params,
    tokens_BL: jax.Array,
    mask_BL: jax.Array | None,
    positions_BL: jax.Array | None,
    cache: kv_cache.KVCache,
    used: int,
    cfg: config.LMConfig,
) -> types.LMOutput:
    if mask_BL is None:
        mask_BL = jnp.ones(tokens_BL.shape, bool)
    if positions_BL is None:
        read_B = cache.mask_BS.sum(axis=1, dtype=jnp.int32)
        positions_BL = read_B[:, None] + default_positions(mask_BL)
    grown = kv_cache.append_tokens(cache, mask_BL, positions_BL)
    columns_BL = jnp.atleast_1d(cache.length)[:, None] + jnp.arange(tokens_BL.shape[1])[None, :]
    seen_BLS = attention.visible(columns_BL, jnp.arange(used), grown.mask_BS[:, :used])
    far, near = _views(seen_BLS, positions_BL, grown.positions_BS[:, :used], cfg)

    x_BLD = _row(embedding.embed(params, tokens_BL, mask_BL, positions_BL, cfg))
    cached = []
    # Layers are unrolled because a scan would copy the cache of every layer at every token.
    for i, weights in enumerate(weights_lib.unstack(params, cfg)["layers"]):
        view = near if cfg.is_local(i) else far

        def mix(queries, keys, values, i=i, view=view):
            keys = kv_cache.append_layer(cache.keys[i], keys, cache.length)
            values = kv_cache.append_layer(cache.values[i], values, cache.length)
            seen_keys, seen_values = keys[:, :, :used], values[:, :, :used]
            return attention.attend(queries, seen_keys, seen_values, view.seen_BLS, cfg=cfg), (keys, values)

        x_BLD, entry = _layer(weights, x_BLD, view.rotation, mix, cfg)
        cached.append(entry)
    keys, values = zip(*cached, strict=True)
    grown = dataclasses.replace(grown, keys=keys, values=values)
    return types.LMOutput(_final_norm(params, x_BLD, cfg), grown)


def _views(
    seen_BLS: jax.Array, positions_BL: jax.Array, key_positions_BS: jax.Array, cfg: config.LMConfig
) -> tuple[_View, _View]:
    """Returns the view of layers without a sliding window and the view of layers with one."""
    far = _View(seen_BLS, embedding.rotary_angles(positions_BL, cfg.rope_theta, cfg.rope_scaling, cfg))
    if not cfg.windowed:
        return far, far
    # The window is measured in positions, which count only real tokens, so padding does not shorten it.
    within_BLS = positions_BL[:, :, None] - key_positions_BS[:, None, :] < cfg.sliding_window
    rotation = far.rotation
    if cfg.local_rope_theta > 0:
        rotation = embedding.rotary_angles(positions_BL, cfg.local_rope_theta, None, cfg)
    return far, _View(seen_BLS & within_BLS, rotation)


def _layer(
    weights: Weights,
    x_BLD: jax.Array,
    rotation: embedding.Angles | None,
    mix: Mix,
    cfg: config.LMConfig,
    pick: Pick | None = None,
) -> tuple[jax.Array, Any]:
    """Returns one layer's output, only for the selected columns if ``pick`` is given, and its new cache entry."""
    attended_BLD, entry = _attention(weights, _norm(weights["attn_norm"], x_BLD, cfg), rotation, mix, cfg, pick)
    x_BLD = x_BLD if pick is None else pick(x_BLD, 1)
    if cfg.parallel_residual:
        inner_BLD = _mlp(weights, _norm(weights["mlp_norm"], x_BLD, cfg), cfg)
        return _row(x_BLD + attended_BLD + inner_BLD), entry
    if cfg.post_norms:
        attended_BLD = _norm(weights["attn_post_norm"], attended_BLD, cfg)
    x_BLD = _row(x_BLD + attended_BLD)
    inner_BLD = _mlp(weights, _norm(weights["mlp_norm"], x_BLD, cfg), cfg)
    if cfg.post_norms:
        inner_BLD = _norm(weights["mlp_post_norm"], inner_BLD, cfg)
    return _row(x_BLD + inner_BLD), entry


def _attention(
    weights: Weights,
    x_BLD: jax.Array,
    rotation: embedding.Angles | None,
    mix: Mix,
    cfg: config.LMConfig,
    pick: Pick | None,
) -> tuple[jax.Array, Any]:
    query_input_BLD = x_BLD if pick is None else pick(x_BLD, 1)
    queries, keys, values = (
        _heads(weights["q"], query_input_BLD),
        _heads(weights["k"], x_BLD),
        _heads(weights["v"], x_BLD),
    )
    if cfg.qk_norm:
        queries, keys = _rms_norm(weights["q_norm"], queries, cfg), _rms_norm(weights["k_norm"], keys, cfg)
    if rotation is not None:
        query_rotation = rotation if pick is None else (pick(rotation[0], 2), pick(rotation[1], 2))
        queries, keys = embedding.rotate(queries, query_rotation), embedding.rotate(keys, rotation)
    queries = parallel.constrain(queries, "batch", "heads", "length", None)
    # Keys and values are gathered over columns because a query may attend to any column.
    keys, values = (parallel.constrain(x, "batch", "kv_heads", None, None) for x in (keys, values))
    mixed_BHLC, entry = mix(queries, keys, values)
    D, H, C = x_BLD.shape[-1], cfg.n_heads, cfg.d_head
    mixed_BLO = jnp.swapaxes(mixed_BHLC, 1, 2).reshape(*query_input_BLD.shape[:-1], H * C)
    out = weights["out"]
    return _biased(_linear(out, mixed_BLO, out["kernel"].reshape(H * C, D)), out), entry


def _heads(dense: Weights, x_BLD: jax.Array) -> jax.Array:
    D, H, C = dense["kernel"].shape
    out_BLHC = _linear(dense, x_BLD, dense["kernel"].reshape(D, H * C)).reshape(*x_BLD.shape[:-1], H, C)
    if "bias" in dense:
        out_BLHC = out_BLHC + dense["bias"].astype(x_BLD.dtype)[None, None, :, :]
    return jnp.swapaxes(out_BLHC, 1, 2)


def _mlp(weights: Weights, x_BLD: jax.Array, cfg: config.LMConfig) -> jax.Array:
    if cfg.gated_mlp:
        inner_BLF = _gated(_dense(weights["gate"], x_BLD), _dense(weights["up"], x_BLD), cfg)
    else:
        inner_BLF = _activated(_dense(weights["up"], x_BLD), cfg)
    return _dense(weights["down"], parallel.constrain(inner_BLF, "batch", "length", "mlp"))


def _row(x_BLD: jax.Array) -> jax.Array:
    """Constrains the residual stream to be sharded over rows and columns but not over features."""
    return parallel.constrain(x_BLD, "batch", "length", None)


def _dense(dense: Weights, x_BLI: jax.Array) -> jax.Array:
    return _biased(_linear(dense, x_BLI, dense["kernel"]), dense)


def _linear(dense: Weights, x_BLI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    made_BLO = _matmul(x_BLI, kernel_IO)
    if "lora_a" in dense:
        # Low-rank adapters; see `lm.lora`.
        made_BLO = made_BLO + _matmul(_matmul(x_BLI, dense["lora_a"]), dense["lora_b"])
    return made_BLO


def _matmul(x: jax.Array, kernel_IO: jax.Array, out: jnp.dtype | type | None = None) -> jax.Array:
    # Leading axes are flattened because, on a CPU, the gradient of a rank-3 matmul starts with a slow transpose.
    rows = x.reshape(-1, x.shape[-1])
    made = jnp.matmul(rows, kernel_IO.astype(x.dtype), preferred_element_type=out)
    return made.reshape(*x.shape[:-1], kernel_IO.shape[1])


def _biased(x_BLO: jax.Array, dense: Weights) -> jax.Array:
    return x_BLO + dense["bias"].astype(x_BLO.dtype)[None, None, :] if "bias" in dense else x_BLO


def _final_norm(params: types.Params, x_BLD: jax.Array, cfg: config.LMConfig) -> jax.Array:
    return _norm(weights_lib.whole(params, "final_norm", cfg=cfg)["final_norm"], x_BLD, cfg)


@functools.partial(_recomputed, static_argnums=2)
def _norm(weights: Weights, x_BLD: jax.Array, cfg: config.LMConfig) -> jax.Array:
    if cfg.norm == "rmsnorm":
        return _rms_norm(weights, x_BLD, cfg)
    x = x_BLD.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + cfg.norm_eps)
    x = x * weights["scale"][None, None, :] + weights["bias"][None, None, :]
    return x.astype(x_BLD.dtype)


def _rms_norm(weights: Weights, x: jax.Array, cfg: config.LMConfig) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + cfg.norm_eps)
    scale = weights["scale"].astype(jnp.float32)
    scale = scale + 1.0 if cfg.norm_plus_one else scale
    return (wide * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


@functools.partial(_recomputed, static_argnums=1)
def _activated(x_BLF: jax.Array, cfg: config.LMConfig) -> jax.Array:
    return _ACTIVATIONS[cfg.activation](x_BLF)


@functools.partial(_recomputed, static_argnums=2)
def _gated(gate_BLF: jax.Array, up_BLF: jax.Array, cfg: config.LMConfig) -> jax.Array:
    return _ACTIVATIONS[cfg.activation](gate_BLF) * up_BLF


def _rematerialised(step: Callable, cfg: config.LMConfig) -> Callable:
    policies = jax.checkpoint_policies
    if cfg.remat != "none":
        policy = policies.dots_with_no_batch_dims_saveable if cfg.remat == "dots" else None
    elif parallel.num_shards("embed") > 1:
        policy = policies.save_anything_except_these_names(parallel.GATHERED)
    else:
        return step
    return jax.checkpoint(step, policy=policy, prevent_cse=False)


def _check(
    tokens_BL: jax.Array,
    mask_BL: jax.Array | None,
    positions_BL: jax.Array | None,
    segments_BL: jax.Array | None,
    cache: kv_cache.KVCache | None,
    cfg: config.LMConfig,
) -> None:
    if tokens_BL.ndim != 2:
        raise ValueError(f"tokens_BL must have rank 2, got shape {tokens_BL.shape}")
    for name, array in (("mask_BL", mask_BL), ("positions_BL", positions_BL), ("segments_BL", segments_BL)):
        if array is not None and array.shape != tokens_BL.shape:
            raise ValueError(f"{name} has shape {array.shape}; it must have the shape of tokens_BL, {tokens_BL.shape}")
    if mask_BL is not None and mask_BL.dtype != jnp.bool_:
        raise ValueError(f"mask_BL must be bool, got {mask_BL.dtype}")
    if segments_BL is not None and cache is not None:
        raise ValueError("segments_BL cannot be combined with a cache: give each sequence its own row")
    width = tokens_BL.shape[1] if cache is None else cache.slots
    if width > cfg.max_length:
        raise ValueError(f"rows of {width} tokens are longer than cfg.max_length = {cfg.max_length}")
    if cache is not None and tokens_BL.shape[1] > cache.slots:
        raise ValueError(f"{tokens_BL.shape[1]} new tokens do not fit in a cache of {cache.slots} slots")
