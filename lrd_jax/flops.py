"""Floating-point operations of a function, counted on its jaxpr.

XLA's own cost analysis counts the body of a loop once. Here a scan counts as often as
it runs. What depends on data is counted by rule: a cond as its most expensive branch, a
while loop as one turn.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Multiply, too, but nothing here uses them: better refused than counted as nothing.
_UNKNOWN = ("conv_general_dilated", "pallas_call", "ragged_dot_general")


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Counts the multiplications and additions of all matrix products in `fn(*args)`.

    Args:
        fn: what to count; traced, not run.
        *args: its arguments, or `jax.ShapeDtypeStruct`s in their place.

    Returns:
        FLOPs: 2 for each product that is summed. Elementwise work is not counted, and
        inside a shard_map all devices are counted together.

    Raises:
        ValueError: a primitive that multiplies matrices and is not known here.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name in _UNKNOWN:
        raise ValueError(f"counting FLOPs: `{name}` is not known; add its formula.")
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    parts = [_count(inner) for inner in inner_jaxprs(params)]
    if name == "cond":
        return max(parts)
    if name == "scan":
        return params["length"] * sum(parts)
    if name == "shard_map":
        mesh = params["mesh"]
        return sum(parts) * math.prod(
            mesh.shape[a] for a in params["newly_manual_axes"]
        )
    return sum(parts)  # A while is one turn: its condition and its body.


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Those of branches, bodies and called functions, whatever the primitive."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part
