"""The optimisers of the recipe's stages. To change the optimiser of an experiment, edit these functions.

Transformations must have a learning rate of 1, as in ``optax.adamw(1.0, weight_decay=0.1)``, because the train step
multiplies their updates by the learning rate of the stage, such as --pretrain.learning-rate.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax
import optax.contrib
from launch.run_settings import Optimizer
from launch.settings import PPO

from rlhf_jax import types
from rlhf_jax.train.optim import optimisers


def supervised() -> optax.GradientTransformation:
    """Returns the optimiser of pretraining, SFT and reward models: Muon for the layers' kernels, Adam for the rest.

    Training from scratch takes half as many steps as with Adam alone.
    """
    return _muon(b1=0.9, b2=0.95, eps=1e-8)


def _muon(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    contracted_axes = {"q": ((1,), (2, 3)), "k": ((1,), (2, 3)), "v": ((1,), (2, 3)), "out": ((1, 2), (3,))}

    def dimensions(params: types.Params) -> Any:
        def of_leaf(path: Any, leaf: jax.Array) -> Any:
            names = [entry.key for entry in path]  # in RL, policy or critic comes first
            if "layers" not in names or names[-1] != "kernel":
                return None
            return optax.contrib.MuonDimensionNumbers(*contracted_axes.get(names[-2], ((1,), (2,))))

        return jax.tree_util.tree_map_with_path(of_leaf, params)

    return optax.contrib.muon(
        1.0,
        adam_b1=b1,
        adam_b2=b2,
        eps=eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dimensions,
    )


def chosen(settings: Optimizer) -> optax.GradientTransformation:
    """Returns the optimiser that the --optimizer flags select."""
    return _named(settings.optimizer, settings.b1, settings.b2, settings.epsilon, settings.weight_decay)


@functools.cache  # a new transformation, even an equal one, would make the step recompile
def _named(name: str, b1: float, b2: float, eps: float, weight_decay: float) -> optax.GradientTransformation:
    """Returns an optimiser with a learning rate of 1."""
    made = {
        "adamw": lambda: optax.adam(1.0, b1=b1, b2=b2, eps=eps),
        "muon": lambda: _muon(b1=b1, b2=b2, eps=eps),
        "adafactor": lambda: optax.adafactor(None, multiply_by_parameter_scale=False),
        "lion": lambda: optax.lion(1.0, b1=b1, b2=b2, weight_decay=0.0),
    }[name]()
    if weight_decay == 0:
        return made
    decay = optax.add_decayed_weights(weight_decay, mask=_decayed)
    return optax.chain(made, optax.scale(-1.0), decay, optax.scale(-1.0))


def _decayed(params: types.Params) -> Any:
    """Returns a mask of the parameters that weight decay shrinks: kernels, embeddings and adapters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias", "gain"), params)


def ppo(settings: PPO) -> optax.GradientTransformation:
    """Returns the optimiser of PPO and the other RL methods: Adam, or AdamW with weight decay."""
    return _adam(settings.adam_b2, settings.adam_eps, settings.adam_tf1, settings.weight_decay)


@functools.cache  # a new transformation, even an equal one, would make the step recompile
def _adam(b2: float, eps: float, tf1: bool, weight_decay: float) -> optax.GradientTransformation:
    adam = (optimisers.scale_by_adam_tf1 if tf1 else optax.scale_by_adam)(b1=0.9, b2=b2, eps=eps)
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    return optax.chain(adam, *decay, optax.scale(-1.0))
