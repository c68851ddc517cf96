"""Attention over whole rows by a kernel of the platform, which never holds the scores of all keys.

On a TPU that is splash attention, from Pallas; on a GPU cuDNN's. Both compute what `attention.attend` writes out, in
another order. Which one it is is decided where a program is lowered, so that it is right for a described topology too.
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
"""Rows of a splash block come in multiples of it."""
_BLOCKS = (512, 256, 128)


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
    """`attention.attend` of whole rows, ``seen_BLL`` being what `attention.causal` makes of mask and segments.

    With ``cfg.attention`` "auto", 16-bit heads go through the kernel of the platform where it can do the mask, and
    through the products that are written out everywhere else. What padding gets is finite and may differ.
    """

    # Its scores are made again for the backward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def written_out(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return attention.attend(queries, keys, values, seen_BLL, cfg=cfg)

    heads = (queries_BHLC, keys_BGLC, values_BGLC)
    if cfg.attention != "auto" or queries_BHLC.dtype.itemsize != 2:
        return written_out(*heads)
    kernels: dict[str, Any] = {}
    if _splash_can(cfg, queries_BHLC):
        ids_BL = segment_ids(mask_BL, segments_BL)
        kernels["tpu"] = functools.partial(_splash_on_mesh, ids_BL, cfg=cfg)
    if _cudnn_can(cfg):
        kernels["cuda"] = lambda *heads: attention.attend_by("cudnn", *heads, seen_BLS=seen_BLL, cfg=cfg)
    return lax.platform_dependent(*heads, **kernels, default=written_out) if kernels else written_out(*heads)


def segment_ids(mask_BL: jax.Array, segments_BL: jax.Array | None) -> jax.Array:
    """Mask and segments as one: 0 at padding, which sees nothing but padding, and a number of its own for the rest."""
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
    """Causal attention within segments on one TPU, forward and backward; ``interpret`` runs it anywhere, slowly.

    L is a multiple of 128.
    """
    # Not everybody who imports this library has a use for Pallas, which takes a while to import.
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
    """Every device attends with its own rows and heads: a kernel is nothing that a compiler can take apart."""
    mesh = parallel.active_mesh()
    if mesh is None:
        return splash(*heads, ids_BL=ids_BL, cfg=cfg)
    names = [("batch", "heads", None, None), *[("batch", "kv_heads", None, None)] * 2, ("batch", None)]
    specs = tuple(parallel.spec(axes, mesh, shape=x.shape) for axes, x in zip(names, (*heads, ids_BL), strict=True))

    def attend(*mine: Any) -> jax.Array:
        queries, keys, values, ids = mine
        return splash(queries, keys, values, ids, cfg=cfg)

    return jax.shard_map(attend, in_specs=specs, out_specs=specs[0], check_vma=False)(*heads, ids_BL)


def _splash_can(cfg: config.LMConfig, queries_BHLC: jax.Array) -> bool:
    L, C = queries_BHLC.shape[2:]
    # The window counts real tokens, and a kernel's counts columns: they differ where padding stands between tokens.
    windowed = cfg.windowed and cfg.sliding_window < L
    # Each device's query heads need their own key heads beside them.
    apart = parallel.num_shards("heads")
    together = cfg.n_heads % apart != 0 or cfg.n_kv_heads % apart == 0
    return L % _LANES == 0 and C % 64 == 0 and not windowed and together and parallel.num_shards("length") == 1


def _cudnn_can(cfg: config.LMConfig) -> bool:
    """Whether there is a GPU to compile for; without one its kernel cannot even be traced."""
    fits = cfg.d_head % 8 == 0 and cfg.d_head <= 128 and cfg.attn_softcap == 0
    return fits and jax.default_backend() == "gpu" and "cuda" in jax.extend.backend.get_backend().platform_version
