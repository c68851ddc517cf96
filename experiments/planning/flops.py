"""How many operations a program's products are, loops counted as often as they go round.

Read from the jaxpr, which is the same for all platforms and holds what rematerialisation computes again. Of a kernel,
what it says it costs; of the branches of a condition the dearest, or the one for the platform.
"""

from __future__ import annotations

import math
from typing import Any

import jax


def count(jaxpr: Any, *, platform: str, open_loops: int = 1) -> float:
    """Multiplications and additions in all products of a (closed) jaxpr.

    Args:
        jaxpr: As ``jax.make_jaxpr`` gives it.
        platform: ``tpu``, ``cpu`` or ``cuda``, which some of its branches are for.
        open_loops: How often a loop goes round that no number in the program ends.
    """

    def of(jaxpr: Any) -> float:
        return sum(one(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)

    def one(eqn: Any) -> float:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        if name == "scan":
            return params["length"] * of(params["jaxpr"])
        if name == "while":
            return open_loops * (of(params["body_jaxpr"]) + of(params["cond_jaxpr"]))
        if name == "cond":
            return branch(params)
        if name == "pallas_call":
            cost = params.get("cost_estimate")
            return float(cost.flops) if cost is not None else kernel(eqn)
        if name == "shard_map":
            return _copies(params) * of(params["jaxpr"])
        inner = [value for value in params.values() if _is_jaxpr(value)]
        return sum(of(value) for value in inner[:1])

    def branch(params: Any) -> float:
        platforms = params.get("branches_platforms")
        if platforms is not None:
            mine = [i for i, names in enumerate(platforms) if names is not None and platform in names]
            rest = [i for i, names in enumerate(platforms) if names is None]
            return of(params["branches"][(mine or rest)[0]])
        return max(of(jaxpr) for jaxpr in params["branches"])

    def kernel(eqn: Any) -> float:
        grid = eqn.params["grid_mapping"].grid
        return math.prod(n for n in grid if isinstance(n, int)) * of(eqn.params["jaxpr"])

    return of(jaxpr)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def _copies(params: Any) -> int:
    sizes = dict(params["mesh"].shape)
    return math.prod(sizes[name] for name in params["manual_axes"])


def traced(fn: Any, *args: Any) -> Any:
    """The jaxpr of ``fn`` on shapes."""
    return jax.make_jaxpr(fn)(*args)
