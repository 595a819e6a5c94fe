"""Random choices that come out the same on every version of Python.

Python promises this for `Random.random` alone: `choice`, `sample` and the rest have
changed their use of it before and may again.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def between(rng: random.Random, low: int, high: int) -> int:
    """A whole number, `low` and `high` included."""
    return low + int(rng.random() * (high - low + 1))


def chance(rng: random.Random, probability: float) -> bool:
    """True with that probability."""
    return rng.random() < probability


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items."""
    return items[int(rng.random() * len(items))]


def sample(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """`count` of the items at different places, in random order."""
    pool = list(items)
    for i in range(count):
        j = between(rng, i, len(pool) - 1)
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:count]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """All items in random order."""
    return sample(rng, items, len(items))
