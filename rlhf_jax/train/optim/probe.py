"""Computes an optimiser's first update on small arrays in NumPy, because JAX would compile every operation."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
import optax
from jax.extend import core

SMALL_GRADIENT = 1e-4


@functools.lru_cache(maxsize=64)
def first_updates(tx: optax.GradientTransformation, structure: Any, ranks: tuple[int, ...]) -> tuple[float, float]:
    """Returns the largest update, with a sign, for gradients of 1 and of `SMALL_GRADIENT`, negative if it descends.

    The gradient is not 0 only in the first element of each array. The parameters are 1.

    Args:
        tx: The transformation.
        structure: The structure of the parameters.
        ranks: Number of axes of each parameter.
    """
    params = structure.unflatten(np.ones((2,) * rank, np.float32) for rank in ranks)

    def update(grads: Any) -> Any:
        return jax.tree.leaves(tx.update(grads, tx.init(params), params)[0])

    def measure(size: float) -> float:
        grads = [np.zeros((2,) * rank, np.float32) for rank in ranks]
        for grad in grads:
            grad[(0,) * grad.ndim] = size
        with np.errstate(all="ignore"), jax.ensure_compile_time_eval():
            updates = _evaluate(traced.jaxpr, traced.consts, grads)
        firsts = [float(np.asarray(x)[(0,) * np.ndim(x)]) for x in updates]
        return math.copysign(max(map(abs, firsts), default=0.0), sum(firsts))

    traced = jax.make_jaxpr(update)(params)
    return measure(1.0), measure(SMALL_GRADIENT)


_SIMPLE = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "sign": np.sign,
    "max": np.maximum,
    "min": np.minimum,
    "sqrt": np.sqrt,
    "square": np.square,
    "pow": np.power,
    "abs": np.abs,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "is_finite": np.isfinite,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "copy": lambda x: x,
    "stop_gradient": lambda x: x,
    "exp": np.exp,
    "log": np.log,
}
_WITH_PARAMETERS = {
    "integer_pow": lambda p, x: np.asarray(x) ** p["y"],
    "convert_element_type": lambda p, x: np.asarray(x, p["new_dtype"]),
    "reshape": lambda p, x: np.reshape(x, p["new_sizes"]),
    "slice": lambda p, x: x[tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or [1] * x.ndim))],
    "dot_general": lambda p, a, b: _dot(p, a, b),
    "squeeze": lambda p, x: np.squeeze(x, p["dimensions"]),
    "transpose": lambda p, x: np.transpose(x, p["permutation"]),
    "reduce_sum": lambda p, x: np.sum(x, p["axes"]),
    "reduce_max": lambda p, x: np.max(x, p["axes"]),
    "select_n": lambda p, which, *cases: np.choose(np.asarray(which, int), cases),
}


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    """Evaluates a jaxpr in NumPy, and in JAX for the rarer operations."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        inputs = [read(each) for each in equation.invars]
        if name in ("jit", "pjit"):
            outputs = _evaluate(parameters["jaxpr"].jaxpr, parameters["jaxpr"].consts, inputs)
        elif name == "scan" and parameters["num_consts"] + len(equation.outvars) == len(inputs):  # a loop
            outputs, body, n = inputs[parameters["num_consts"] :], parameters["jaxpr"], parameters["num_consts"]
            for _ in range(parameters["length"]):
                outputs = _evaluate(body.jaxpr, body.consts, [*inputs[:n], *outputs])
        elif name in _SIMPLE:
            outputs = [_SIMPLE[name](*inputs)]
        elif name == "div" and np.issubdtype(np.result_type(inputs[0]), np.floating):
            outputs = [np.divide(*inputs)]
        elif name == "broadcast_in_dim" and len(inputs) == 1:
            outputs = [_broadcast(inputs[0], parameters["shape"], parameters["broadcast_dimensions"])]
        elif name in _WITH_PARAMETERS:
            outputs = [_WITH_PARAMETERS[name](parameters, *inputs)]
        else:
            variables = list(dict.fromkeys(each for each in equation.invars if not isinstance(each, core.Literal)))
            single = jaxpr.replace(constvars=[], invars=variables, outvars=equation.outvars, eqns=[equation])
            outputs = core.jaxpr_as_fun(core.ClosedJaxpr(single, []))(*map(read, variables))
        for variable, output in zip(equation.outvars, outputs, strict=True):
            values[variable] = np.asarray(output, variable.aval.dtype)
    return [read(each) for each in jaxpr.outvars]


def _dot(parameters: Any, a: Any, b: Any) -> np.ndarray:
    (contracted_a, contracted_b), (batch_a, batch_b) = parameters["dimension_numbers"]
    letters_a, letters_b = list(range(np.ndim(a))), list(range(np.ndim(a), np.ndim(a) + np.ndim(b)))
    for i, j in zip((*contracted_a, *batch_a), (*contracted_b, *batch_b), strict=True):
        letters_b[j] = letters_a[i]
    out = [letters_a[i] for i in batch_a]
    out += [each for i, each in enumerate(letters_a) if i not in (*contracted_a, *batch_a)]
    out += [each for j, each in enumerate(letters_b) if j not in (*contracted_b, *batch_b)]
    return np.einsum(a, letters_a, b, letters_b, out)


def _broadcast(x: Any, shape: Any, axes: Any) -> np.ndarray:
    expanded = [1] * len(shape)
    for axis, size in zip(axes, np.shape(x), strict=True):
        expanded[axis] = size
    return np.broadcast_to(np.reshape(x, expanded), shape)
