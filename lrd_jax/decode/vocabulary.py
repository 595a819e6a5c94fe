"""Reductions over the vocabulary: whole, or a part of it on each device of `model`.

What crosses between devices is a few numbers of each row and each device's candidates
for it: at most 64, or `sample_top_k`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lrd_jax.base import MODEL


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """How the last axis of an array `[R, V]` lies.

    The methods take such arrays, as far as they are on this device, and answer for the
    whole vocabulary; all devices of a group get the same answer.

    Attributes:
        shards: devices that have a part each, in the order of ids; 1 if it is whole.
    """

    shards: int = 1

    def size(self, values: Array) -> int:
        """V of all parts together."""
        return self.shards * values.shape[-1]

    def start(self, values: Array) -> Any:
        """The id of the first column here."""
        if self.shards == 1:
            return 0
        return jax.lax.axis_index(MODEL) * values.shape[-1]

    def ids(self, values: Array) -> Int[Array, " V"]:
        """The ids of the columns here."""
        return jnp.arange(values.shape[-1], dtype=jnp.int32) + self.start(values)

    def sum(self, values: Array) -> Array:
        """`[R]`."""
        total = jnp.sum(values, axis=-1)
        return total if self.shards == 1 else jax.lax.psum(total, MODEL)

    def max(self, values: Array) -> Array:
        """`[R]`."""
        highest = jnp.max(values, axis=-1)
        return highest if self.shards == 1 else jax.lax.pmax(highest, MODEL)

    def all(self, holds: Bool[Array, "R V"]) -> Bool[Array, " R"]:
        """`[R]`."""
        here = jnp.all(holds, axis=-1)
        if self.shards == 1:
            return here
        return jax.lax.pmin(here.astype(jnp.int32), MODEL) > 0

    def first(self, marked: Bool[Array, "R V"]) -> Int[Array, " R"]:
        """The first marked token; the last of all where none is, as in a row of NaN.

        `argmax` finds it too, but XLA for CPU walks through that one number at a time.
        """
        ids, last = self.ids(marked), self.size(marked) - 1
        found = jnp.min(jnp.where(marked, ids[None, :], last), axis=-1)
        return found if self.shards == 1 else jax.lax.pmin(found, MODEL)

    def at(
        self, values: Float[Array, "R V"], ids: Int[Array, " R"]
    ) -> Float[Array, " R"]:
        """The value of one token a row."""
        if self.shards == 1:
            return jnp.take_along_axis(values, ids[:, None], axis=-1)[:, 0]
        column = ids - self.start(values)
        here = (column >= 0) & (column < values.shape[-1])
        column = jnp.clip(column, 0, values.shape[-1] - 1)
        found = jnp.take_along_axis(values, column[:, None], axis=-1)[:, 0]
        return jax.lax.psum(jnp.where(here, found, 0.0), MODEL)

    def best_of(self, values: Float[Array, "R n"], count: int) -> Float[Array, "R m"]:
        """The `count` highest, in falling order, of each device's own n highest."""
        if self.shards > 1:
            values = jax.lax.all_gather(values, MODEL, axis=1, tiled=True)
        elif values.shape[-1] == count:  # In falling order already.
            return values
        return jax.lax.top_k(values, count)[0]

    def own(self, values: Float[Array, "R V"]) -> Float[Array, "R v"]:
        """This device's part of rows that are given for the whole vocabulary."""
        width = values.shape[-1] // self.shards
        if self.shards == 1:
            return values
        start = jax.lax.axis_index(MODEL) * width
        return jax.lax.dynamic_slice_in_dim(values, start, width, axis=-1)

    def softmax(self, logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
        """Probabilities of the columns here."""
        masses = jnp.exp(logits - self.max(logits)[:, None])
        return masses / self.sum(masses)[:, None]


WHOLE = Vocabulary()
