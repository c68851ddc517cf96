"""Attention with platform-specific kernels, compared with the einsum implementation."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import parallel
from rlhf_jax.lm import attention, config, kernels

CFG = config.LMConfig(vocab_size=8, n_layers=1, d_model=256, n_heads=4, n_kv_heads=2, d_head=64, dtype="bfloat16")
ROWS, LENGTH = 2, 256


def _heads():
    keys = jax.random.split(jax.random.key(0), 4)
    queries = jax.random.normal(keys[0], (ROWS, CFG.n_heads, LENGTH, CFG.d_head))
    others = [jax.random.normal(key, (ROWS, CFG.n_kv_heads, LENGTH, CFG.d_head)) for key in keys[1:3]]
    weights = jax.random.normal(keys[3], queries.shape)
    return (queries, *others), weights


def _masks():
    """Returns masks with padding at both ends and in the middle, and three segments of a packed row."""
    columns = np.arange(LENGTH)
    mask_BL = np.stack([columns >= 37, (columns < 240) & (columns % 50 != 3)])
    segments_BL = np.stack([np.ones(LENGTH, int), 1 + (columns > 70) + (columns > 199)]) * mask_BL
    return jnp.asarray(mask_BL), jnp.asarray(segments_BL)


@pytest.mark.parametrize(("packed", "softcap"), [(False, 0.0), (True, 20.0)])
def test_splash_equals_einsum_attention(packed, softcap):
    cfg = config.LMConfig(**{**_fields(CFG), "attn_softcap": softcap, "attn_scale": 0.2})
    heads, weights = _heads()
    mask_BL, segments_BL = _masks()
    segments_BL = segments_BL if packed else None
    real = mask_BL[:, None, :, None]

    def loss(attend, *heads):
        mixed = attend(*heads)
        return jnp.sum(jnp.where(real, mixed * weights, 0.0)), mixed

    seen_BLL = attention.causal(mask_BL, segments_BL)
    ids_BL = kernels.segment_ids(mask_BL, segments_BL)
    forms = (
        functools.partial(attention.attend, seen_BLS=seen_BLL, cfg=cfg),
        lambda *heads: kernels.splash(*heads, ids_BL=ids_BL, cfg=cfg, interpret=True),
    )
    found = [
        jax.value_and_grad(functools.partial(loss, form), argnums=(0, 1, 2), has_aux=True)(*heads) for form in forms
    ]
    ((_, expected), expected_grads), ((_, mixed), grads) = found
    np.testing.assert_allclose(jnp.where(real, mixed, 0), jnp.where(real, expected, 0), atol=2e-5)
    for made, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(made, wanted, atol=2e-4)
    assert np.isfinite(mixed).all()


def _fields(cfg):
    return {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}


@pytest.mark.parametrize(
    ("generation", "width", "length", "supported"),
    [
        (9, 256, 64, True),  # Hopper
        (10, 256, 64, True),
        (9, 264, 64, False),
        (8, 128, 64, True),  # Ampere
        (8, 256, 64, False),
        (7, 64, 64, False),
        (9, 64, 63, False),  # the backward pass needs an even number of columns
        (0, 64, 64, False),
    ],
)
def test_cudnn_is_used_where_it_supports_the_backward_pass(monkeypatch, generation, width, length, supported):
    monkeypatch.setattr(kernels, "_cuda_generation", lambda: generation)
    cfg = dataclasses.replace(CFG, d_head=width)
    assert kernels._cudnn_supports(cfg, jnp.zeros((1, 4, length, width), jnp.bfloat16)) is supported
    capped = dataclasses.replace(cfg, attn_softcap=50.0)
    assert not kernels._cudnn_supports(capped, jnp.zeros((1, 4, length, width), jnp.bfloat16))


needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed: pip install '.[tpu]'"
)


@needs_tpu_compiler
def test_tpu_programs_use_splash_and_cpu_programs_do_not():
    from jax.experimental import topologies
    from planning import chips

    chips.prepare()
    shape = jax.ShapeDtypeStruct((4, 4, LENGTH, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((4, LENGTH), jnp.bool_)

    def loss(heads, mask_BL):
        seen_BLL = attention.causal(mask_BL)
        mixed = kernels.attend_rows(*heads, seen_BLL=seen_BLL, mask_BL=mask_BL, segments_BL=None, cfg=CFG)
        return mixed.astype(jnp.float32).sum()

    def text(devices):
        mesh = parallel.make_mesh(data=1, fsdp=2, tensor=2, devices=devices)
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.grad(loss), in_shardings=whole).lower((shape, shape, shape), mask)
        return lowered.compile().as_text() or ""

    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    made = text(devices)
    assert "tpu_custom_call" in made and "bf16[2,2,256,64]" in made  # each device has a part of the rows and heads
    assert "custom-call" not in jax.jit(jax.grad(loss)).lower((shape, shape, shape), mask).as_text()


@pytest.mark.slow
@needs_tpu_compiler
def test_memory_of_long_rows_is_not_quadratic_on_a_tpu():
    """Compiles for a TPU mesh without hardware; the einsum implementation stores all scores of a row."""
    from planning import chips, plan_settings, planner

    chips.prepare()
    plan = plan_settings.Plan(
        model="gpt2", topology="v5e:2x2", mesh=plan_settings.MeshSizes(fsdp=2, tensor=2), length=8192, batch=2
    )
    cfg = config.LMConfig(
        vocab_size=256, n_layers=2, d_model=512, n_heads=4, max_length=8192, dtype="bfloat16", remat="full"
    )
    needed = {}
    for kind in ("auto", "einsum"):
        found = planner.measure(plan, cfg=config.LMConfig(**{**_fields(cfg), "attention": kind}))
        needed[kind] = found.temporaries or 0
    assert needed["auto"] < 2**29 < needed["einsum"]
