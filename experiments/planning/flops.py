"""Counts the FLOPs of a program's matrix products. The body of a loop is counted once per iteration.

The program is given as a jaxpr, which is the same for all platforms and includes rematerialised computations. For a
Pallas kernel, its cost estimate is used; without an estimate, its body is counted once per grid step. For a conditional
on the platform, only the platform's branch is counted; for any other conditional, the most expensive branch.
"""

from __future__ import annotations

import math
from typing import Any


def count(jaxpr: Any, *, platform: str, open_loops: int = 1) -> float:
    """Returns the number of multiplications and additions in the matrix products of a jaxpr.

    Args:
        jaxpr: A closed jaxpr, such as the result of ``jax.make_jaxpr``.
        platform: ``tpu``, ``cpu`` or ``cuda``, which selects platform-dependent branches.
        open_loops: Assumed number of iterations of a ``while`` loop, which a jaxpr does not specify.
    """

    def flops(jaxpr: Any) -> float:
        return sum(equation_flops(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)

    def equation_flops(eqn: Any) -> float:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        if name == "scan":
            return params["length"] * flops(params["jaxpr"])
        if name == "while":
            return open_loops * (flops(params["body_jaxpr"]) + flops(params["cond_jaxpr"]))
        if name == "cond":
            return branch_flops(params)
        if name == "pallas_call":
            cost = params.get("cost_estimate")
            return float(cost.flops) if cost is not None else kernel_flops(params)
        if name == "shard_map":
            sizes = dict(params["mesh"].shape)
            return math.prod(sizes[axis] for axis in params["manual_axes"]) * flops(params["jaxpr"])
        inner = [value for value in params.values() if _is_jaxpr(value)]
        return sum(flops(value) for value in inner[:1])

    def branch_flops(params: Any) -> float:
        platforms = params.get("branches_platforms")
        if platforms is None:
            return max(flops(jaxpr) for jaxpr in params["branches"])
        own = [i for i, names in enumerate(platforms) if names is not None and platform in names]
        default = [i for i, names in enumerate(platforms) if names is None]
        return flops(params["branches"][(own or default)[0]])

    def kernel_flops(params: Any) -> float:
        return math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int)) * flops(params["jaxpr"])

    return flops(jaxpr)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
