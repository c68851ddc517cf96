"""Training a part of a model: what a pattern names is trained, all else is frozen and has no optimiser state.

A path is the keys with slashes between, such as ``layers/q/kernel`` or ``head/kernel_D``::

    trained, frozen = partition.split(params, r"^head/")        # the scalar head alone
    step = reward_model.make_train_step(score, join=partition.join)
    state, logs = step(state.create(trained, tx), frozen, hyper, batch, rng)
    whole = partition.join(frozen, state.params)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.lm import params as lm_params

Pattern = str | Callable[[str], bool]


def split(params: Mapping[str, Any], trains: Pattern) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(trained, frozen)``: two nested dicts with every leaf in one of them, nothing copied.

    Args:
        params: A nested dict of arrays.
        trains: A regular expression that is searched for in each path, or a predicate of the path.

    Raises:
        ValueError: for an expression that is none, or one that names no parameter.
    """
    if isinstance(trains, str):
        try:
            wanted: Callable[[str], Any] = re.compile(trains).search
        except re.error as error:
            raise ValueError(f"{trains!r} is not a regular expression: {error}") from None
    else:
        wanted = trains
    flat = lm_params.flatten(params)
    mine = {path for path in flat if wanted(path)}
    if not mine:
        raise ValueError(f"{trains!r} names none of the parameters, which are {', '.join(flat)}")
    trained, frozen = ({path: x for path, x in flat.items() if (path in mine) == side} for side in (True, False))
    return lm_params.nest(trained), lm_params.nest(frozen)


def join(frozen: Mapping[str, Any] | None, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`split`: the ``join`` of a train step."""
    return lm_params.nest(lm_params.flatten(frozen or {}) | lm_params.flatten(trained))
