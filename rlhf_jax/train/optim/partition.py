"""Partial training: parameters whose path matches a pattern are trained; the others are frozen.

Frozen parameters have no optimiser state. A path consists of the keys joined by slashes, such as ``layers/q/kernel`` or
``head/kernel_D``::

    trained, frozen = partition.split(params, r"^head/")        # only the scalar head
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
    """Splits parameters into ``(trained, frozen)``, two nested dicts that share the leaves of ``params``.

    Args:
        params: A nested dict of arrays.
        trains: A regular expression that may match anywhere in a path, or a function that returns True for the paths to
            train.

    Returns:
        ``(trained, frozen)``; each leaf is in exactly one of them.

    Raises:
        ValueError: If the expression is invalid or matches no parameter.

    Example:
        >>> from rlhf_jax.train.optim import partition
        >>> trained, frozen = partition.split({"embed": {"tokens": 1}, "head": {"kernel": 2, "bias": 3}}, "^head/")
        >>> trained
        {'head': {'kernel': 2, 'bias': 3}}
        >>> partition.join(frozen, trained)
        {'embed': {'tokens': 1}, 'head': {'kernel': 2, 'bias': 3}}
    """
    if isinstance(trains, str):
        try:
            matches: Callable[[str], Any] = re.compile(trains).search
        except re.error as error:
            raise ValueError(f"{trains!r} is not a regular expression: {error}") from None
    else:
        matches = trains
    flat = lm_params.flatten(params)
    paths = {path for path in flat if matches(path)}
    if not paths:
        raise ValueError(f"{trains!r} matches none of the parameters, which are {', '.join(flat)}")
    trained, frozen = ({path: x for path, x in flat.items() if (path in paths) == chosen} for chosen in (True, False))
    return lm_params.nest(trained), lm_params.nest(frozen)


def join(frozen: Mapping[str, Any] | None, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the two dicts that :func:`split` returned; pass this function to ``make_train_step`` as ``join``."""
    return lm_params.nest(lm_params.flatten(frozen or {}) | lm_params.flatten(trained))
