"""`state.create` refuses optimisers without unit learning rate."""

import functools

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from launch.run_settings import Optimizer
from launch.settings import PPO
from recipe import optimiser_choice

from rlhf_jax.train import ppo, state
from rlhf_jax.train.optim import optimisers, probe

PARAMS = {
    "layers": {"q": {"kernel": jnp.ones((2, 4, 2, 2))}, "up": {"kernel": jnp.ones((2, 4, 8))}},
    "embed": jnp.ones((5, 4)),
    "norm": {"scale": jnp.zeros(4)},
    "gain": jnp.ones(()),
}
DESCENT = optax.scale(-1.0)


def by_name(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "a" if path[0].key == "layers" else "b", params)


PARTS = optax.partition({"a": optax.adam(1e-2), "b": optax.set_to_zero()}, by_name)
GOOD = {
    "adam": optax.adam(1.0),
    "adamw": optax.adamw(1.0, weight_decay=0.1),
    "large eps": optax.adam(1.0, eps=1e-3),
    "adam tf1": optax.chain(optimisers.scale_by_adam_tf1(eps=1e-3), DESCENT),
    "nadam": optax.nadam(1.0),
    "sgd": optax.sgd(1.0, momentum=0.9, nesterov=True),
    "plain": DESCENT,
    "lion": optax.lion(1.0),
    "muon": optax.contrib.muon(1.0),
    "adafactor": optax.adafactor(None, multiply_by_parameter_scale=False),
    "adafactor with parameter scale": optax.adafactor(1.0),
    "rmsprop": optax.rmsprop(1.0),
    "clipped": optax.chain(optax.clip_by_global_norm(1e-3), DESCENT),
    "clipped adam": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0)),
    "partition": optax.partition({"a": optax.adam(1.0), "b": optax.set_to_zero()}, by_name),
    "masked": optax.chain(DESCENT, optax.masked(optax.set_to_zero(), by_name(PARAMS) == "a")),
    "accumulated": optax.MultiSteps(optax.adam(1.0), 4),
    "supervised": optimiser_choice.supervised(),
    "ppo": optimiser_choice.ppo(PPO()),
    "ppo tf1": optimiser_choice.ppo(PPO(adam_tf1=True, weight_decay=0.1)),
} | {
    f"chosen {name} {decay}": optimiser_choice.chosen(Optimizer(optimizer=name, weight_decay=decay))
    for name in ("adamw", "muon", "adafactor", "lion")
    for decay in (0.0, 0.1)
}


@pytest.mark.parametrize("name", GOOD)
def test_unit_learning_rate_is_accepted(name):
    state.create(PARAMS, GOOD[name])
    state.create({"embed": jnp.ones((300, 200))}, GOOD[name]) if name != "masked" else None


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-2),
        optax.sgd(1e-2, momentum=0.9),
        optax.lion(1e-4),
        optax.contrib.muon(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4)),
        PARTS,
        optax.scale(-100.0),
    ],
)
def test_other_learning_rates_are_refused(tx):
    with pytest.raises(ValueError, match=r"must be about 1, because .* write, for example, optax.adamw\(1.0\)"):
        state.create(PARAMS, tx)
    assert int(state.create(PARAMS, tx, check_learning_rate=False).step) == 0
    with pytest.raises(ValueError, match="must be about 1"):
        ppo.create({}, PARAMS, tx) if tx is not PARTS else state.create(PARAMS, tx)
    ppo.create(PARAMS, None, tx, check_learning_rate=False)


@pytest.mark.parametrize("tx", [optax.scale_by_adam(), optax.identity(), optimisers.scale_by_adam_tf1()])
def test_ascent_is_refused(tx):
    with pytest.raises(ValueError, match=r"point along the gradient.* append optax.scale\(-1.0\)"):
        state.create(PARAMS, tx)


def test_check_works_in_traced_functions():
    create = functools.partial(state.create, tx=optax.adamw(1.0))
    for made in (jax.jit(create)(PARAMS), jax.eval_shape(create, PARAMS)):
        assert made.params["embed"].shape == (5, 4)
    wrong = functools.partial(state.create, tx=optax.adamw(1e-2))
    for function in (jax.jit(wrong), functools.partial(jax.eval_shape, wrong)):
        with pytest.raises(ValueError, match="must be about 1"):
            function(PARAMS)


@pytest.mark.parametrize("name", GOOD)
def test_update_in_numpy_equals_that_of_optax(name):
    leaves, structure = jax.tree.flatten(PARAMS)
    ranks = tuple(x.ndim for x in leaves)
    grads = jax.tree.map(lambda rank: jnp.zeros((2,) * rank).at[(0,) * rank].set(1.0), structure.unflatten(ranks))
    params = jax.tree.map(jnp.ones_like, grads)
    tx = GOOD[name]
    updates = jax.tree.leaves(jax.jit(lambda: tx.update(grads, tx.init(params), params)[0])())
    expected = max(abs(float(x[(0,) * x.ndim])) for x in updates)
    assert abs(probe.first_updates(tx, structure, ranks)[0]) == pytest.approx(expected, rel=1e-4)
