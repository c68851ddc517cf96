import dataclasses
import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import generation, lm

SMALL: dict[str, Any] = dict(vocab_size=23, n_layers=2, d_model=16, n_heads=4, d_mlp=24, max_length=32)
CONFIGS = {
    "rope": lm.LMConfig(**SMALL, n_kv_heads=2),
    "learned": lm.LMConfig(**SMALL, norm="layernorm", positions="learned", gated_mlp=False, tie_embeddings=True),
    "window": lm.LMConfig(**SMALL, sliding_window=3, local_layers=(True, False)),
}
N, P, T = 45, 5, 9
SAMPLING = generation.Sampling(temperature=1.3, max_new_tokens=T, stop_ids=(3, 11, 7), pad_id=5)
FIELDS = ("tokens_BL", "mask_BL", "response_mask_BT", "logprobs_BT", "lengths_B", "finish_B")


@functools.cache
def model(cfg):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), lm.abstract(cfg, head=True))


def arguments(n=N, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (n, P), 1, 23)
    mask = jnp.arange(P)[None, :] >= jnp.arange(n)[:, None] % P
    return jax.random.split(jax.random.key(seed + 1), n), tokens, mask


@functools.partial(jax.jit, static_argnames=("cfg", "slots", "refill", "values"))
def continuous(params, rng, tokens, mask, *, cfg, sampling, slots, refill=None, values=False, limits=None):
    return generation.continuous.generate(
        params,
        rng,
        tokens,
        mask,
        cfg=cfg,
        sampling=sampling,
        slots=slots,
        refill=refill,
        values=values,
        limits_N=limits,
    )


@functools.partial(jax.jit, static_argnames=("cfg", "values"))
def static(params, rng, tokens, mask, *, cfg, sampling, values=False):
    return generation.generate(params, rng, tokens, mask, cfg=cfg, sampling=sampling, values=values)


def assert_same(got, want):
    for name in ("tokens_BL", "mask_BL", "response_mask_BT", "lengths_B", "finish_B"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    np.testing.assert_allclose(got.logprobs_BT, want.logprobs_BT, atol=1e-5)
    if want.values_BT is not None:
        np.testing.assert_allclose(got.values_BT, want.values_BT, atol=1e-5)


@pytest.mark.parametrize(
    "slots, refill",
    [(8, None), (1, 1), (100, 7), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((8, 3), (4, 4)))],
)
@pytest.mark.parametrize("name", ["rope"])
def test_continuous_batching_matches_a_static_batch(name, slots, refill):
    cfg = CONFIGS[name]
    kept = dict(cfg=cfg, sampling=SAMPLING, values=True)
    want = static(model(cfg), *arguments(), **kept)
    assert 1 < want.lengths_B.mean() < T and 0 < want.finish_B.mean() < 1
    assert_same(continuous(model(cfg), *arguments(), slots=slots, refill=refill, **kept), want)


@pytest.mark.parametrize("name", ["learned", "window"])
def test_other_architectures_match_a_static_batch(name):
    cfg = CONFIGS[name]
    want = static(model(cfg), *arguments(), cfg=cfg, sampling=SAMPLING)
    assert_same(continuous(model(cfg), *arguments(), cfg=cfg, sampling=SAMPLING, slots=8), want)


@settings(max_examples=8)
@given(stops=st.sets(st.integers(0, 22), max_size=12), temperature=st.floats(0.4, 2.0), longest=st.integers(1, T))
def test_any_stop_ids_and_limits_match_a_static_batch(stops, temperature, longest):
    cfg = CONFIGS["rope"]
    limits = jnp.minimum(jnp.arange(N) % 7 + 1, longest)
    sampling = dataclasses.replace(SAMPLING, temperature=temperature, stop_ids=(), max_new_tokens=T)
    # Stop ids are emulated by length limits, which hypothesis can vary without recompiling.
    free = static(model(cfg), *arguments(), cfg=cfg, sampling=sampling)
    ends = np.isin(np.asarray(free.tokens_BL[:, P:]), list(stops))
    natural = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, T)
    limits = jnp.minimum(limits, jnp.asarray(natural))
    got = continuous(model(cfg), *arguments(), cfg=cfg, sampling=sampling, slots=8, limits=limits)
    np.testing.assert_array_equal(got.lengths_B, limits)
    mask = np.asarray(got.response_mask_BT)
    np.testing.assert_array_equal(np.asarray(got.tokens_BL[:, P:])[mask], np.asarray(free.tokens_BL[:, P:])[mask])
    np.testing.assert_allclose(np.asarray(got.logprobs_BT)[mask], np.asarray(free.logprobs_BT)[mask], atol=1e-5)


def test_neighbours_do_not_change_a_single_bit():
    cfg = CONFIGS["rope"]
    rng, tokens, mask = arguments()
    run = functools.partial(continuous, model(cfg), cfg=cfg, sampling=SAMPLING, slots=8)
    alone = run(rng, tokens, mask)
    # In another order, the same prompts have other slots, neighbours and starting times.
    order = np.random.default_rng(0).permutation(N)
    shuffled = run(rng[order], tokens[order], mask[order])
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(shuffled, name), np.asarray(getattr(alone, name))[order], err_msg=name)
    # Half of the prompts have other keys and therefore other responses.
    others = jnp.where((jnp.arange(N) % 2 == 0)[:, None], jax.random.key_data(rng), jax.random.key_data(rng)[::-1])
    changed = run(jax.random.wrap_key_data(others), tokens, mask)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(changed, name)[::2], getattr(alone, name)[::2], err_msg=name)
    assert not np.array_equal(changed.tokens_BL, alone.tokens_BL)


def test_a_shuffled_static_batch_has_the_same_rows():
    cfg = CONFIGS["rope"]
    rng, tokens, mask = arguments()
    order = np.random.default_rng(1).permutation(N)
    want = static(model(cfg), rng, tokens, mask, cfg=cfg, sampling=SAMPLING)
    got = static(model(cfg), rng[order], tokens[order], mask[order], cfg=cfg, sampling=SAMPLING)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(got, name), np.asarray(getattr(want, name))[order], err_msg=name)


def test_single_tokens_and_immediate_stops():
    cfg = CONFIGS["rope"]
    short = dataclasses.replace(SAMPLING, max_new_tokens=1)
    want = static(model(cfg), *arguments(), cfg=cfg, sampling=short)
    assert_same(continuous(model(cfg), *arguments(), cfg=cfg, sampling=short, slots=8), want)
    everything = dataclasses.replace(SAMPLING, stop_ids=tuple(range(23)))
    got = continuous(model(cfg), *arguments(), cfg=cfg, sampling=everything, slots=8)
    assert np.all(got.lengths_B == 1) and np.all(got.finish_B == 1)


def test_vmap_over_seeds_matches_a_loop():
    cfg = CONFIGS["rope"]
    params = jax.tree.map(lambda x: jnp.stack([x, 0.8 * x]), model(cfg))
    rng, tokens, mask = arguments()
    rngs = jnp.stack([rng, rng[::-1]])

    def one(params, rng):
        return generation.continuous.generate(
            params, rng, tokens, mask, cfg=cfg, sampling=SAMPLING, slots=8, axis_name="seeds"
        )

    mapped = jax.jit(jax.vmap(one, axis_name="seeds"))(params, rngs)
    for i in range(2):
        member = jax.tree.map(lambda x, i=i: x[i], (params, rngs))
        alone = continuous(*member, tokens, mask, cfg=cfg, sampling=SAMPLING, slots=8)
        assert_same(jax.tree.map(lambda x, i=i: x[i], mapped), alone)


def test_invalid_arguments_are_refused():
    for wrong in (dict(slots=0), dict(slots=4, refill=0), dict(slots=4, refill=-1)):
        name, number = list(wrong.items())[-1]
        with pytest.raises(ValueError, match=f"^{name} is {number}; it must be at least 1"):
            continuous(model(CONFIGS["rope"]), *arguments(), cfg=CONFIGS["rope"], sampling=SAMPLING, **wrong)


MESH = """
import dataclasses, functools, re, sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
import test_continuous as t
from rlhf_jax import generation, lm
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
rules = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
cfg = lm.LMConfig(**t.SMALL | dict(vocab_size=24, n_kv_heads=2, max_length=2048))
place = lambda axes: NamedSharding(mesh, P(*(rules.get(a) for a in axes)))
params = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), t.model(cfg))
sharded = jax.tree.map(lambda x, a: jax.device_put(x, place(a)), params, lm.logical_axes(cfg, head=True))
rng, tokens, mask = t.arguments(32)
rows = NamedSharding(mesh, P("data"))
spread = [jax.device_put(x, rows) for x in (rng, tokens, mask)]
options = dict(cfg=cfg, sampling=t.SAMPLING)
runs = {
    "static": functools.partial(generation.generate, **options),
    "continuous": functools.partial(generation.continuous.generate, slots=8, **options),
}
for name, run in runs.items():
    want, got = jax.jit(run)(params, rng, tokens, mask), jax.jit(run)(sharded, *spread)
    t.assert_same(got, want)
    # The shapes of the cache on a device; its length identifies it.
    long = functools.partial(run, sampling=dataclasses.replace(t.SAMPLING, max_new_tokens=2000))
    text = jax.jit(long).lower(sharded, *spread).compile().as_text()
    print(name, *sorted(set(re.findall(r"f32\\[(\\d+,\\d+),2004,4\\]", text))))
"""


@pytest.mark.slow  # test_parallel.py also samples on a mesh
def test_a_mesh_samples_the_same_tokens_with_a_sharded_cache():
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", MESH, os.path.dirname(__file__)],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shapes = {line.split()[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    # Static rows are sharded over both axes. Slots accept prompts of any device, so only their heads are sharded.
    assert shapes == {"static": {"16,1"}, "continuous": {"8,1"}}
