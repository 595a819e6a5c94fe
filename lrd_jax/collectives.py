"""What crosses between devices in one turn, counted on the jaxpr."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr

from lrd_jax.flops import inner_jaxprs

# Reductions: each device sends its part twice. What is gathered it sends once.
_REDUCES = ("psum", "psum_invariant", "pmax", "pmin")
_GATHERS = ("all_gather", "all_gather_invariant")
# Cross, too, but nothing here uses them: better refused than counted as nothing.
_UNKNOWN = ("all_to_all", "ppermute", "reduce_scatter", "psum_scatter")


class Collectives(NamedTuple):
    """How many there are, and the bytes that all of them give on one device.

    Attributes:
        number: of all-reduces and all-gathers.
        reduced: bytes of the results of reductions.
        gathered: bytes of the results of gathers.
    """

    number: int = 0
    reduced: int = 0
    gathered: int = 0

    def times(self, n: int) -> "Collectives":
        return Collectives(*(n * value for value in self))

    def seconds(self, devices: int, link: float) -> float:
        """On a ring of `devices` that each send `link` bytes/s, without latency."""
        part = (devices - 1) / devices
        return (2 * self.reduced + self.gathered) * part / link


def _total(parts: Any) -> Collectives:
    return Collectives(*map(sum, zip(Collectives(), *parts, strict=True)))


def count_collectives(fn: Callable[..., Any], *args: Any) -> Collectives:
    """Counts those of `fn(*args)`, loops and branches as `flops.count_flops` does.

    Raises:
        ValueError: a collective that is not known here.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> Collectives:
    return _total(map(_count_equation, jaxpr.eqns))


def _count_equation(equation: Any) -> Collectives:
    name, params = equation.primitive.name, equation.params
    if name in _UNKNOWN:
        raise ValueError(f"counting collectives: `{name}` is not known.")
    avals = [var.aval for var in equation.outvars]
    if name in _REDUCES + _GATHERS:
        size = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)
        reduced = name in _REDUCES
        return Collectives(len(avals), size * reduced, size * (not reduced))
    parts = [_count(inner) for inner in inner_jaxprs(params)]
    if name == "cond":
        return max(parts, key=lambda part: part.reduced + part.gathered)
    return _total(parts).times(params["length"] if name == "scan" else 1)
