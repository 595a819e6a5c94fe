"""Kept keys and values of a decode: how old they are, and whose turn a refresh is."""

import dataclasses
import typing

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lrd_jax.base import Denoiser, KVCache, Params
from lrd_jax.config import DecodeConfig


@typing.no_type_check  # Else the test-time shape checker also stops `jax.eval_shape`.
@flax.struct.dataclass
class CacheState:
    """Keys and values of all positions, and what says when a row needs new ones.

    A full forward computes all of a row's slots; a window forward reads them, whatever
    their age, and writes those of its window only. A block begins with a full forward,
    so what an earlier text of the row left behind is never read.

    Attributes:
        slots: the keys and values; their axis B is the second.
        age: `[B]` forwards since the last full one, which counts as the first.
        drift: `[B]` sum of their D, without that of the full one, nats.
        waited: `[B]` turns that a row, which has acted, has waited for its full
            forward; 0 where it does not wait.
        num_full: `[B]` full forwards so far.
    """

    slots: KVCache
    age: Int[Array, " B"]
    drift: Float[Array, " B"]
    waited: Int[Array, " B"]
    num_full: Int[Array, " B"]


def empty_cache(
    denoiser: Denoiser, params: Params, embeds: Float[Array, "B T D"]
) -> CacheState:
    """The cache of rows that have not had a forward yet, in the dtype of `embeds`."""
    batch, length, _ = embeds.shape
    zero = jnp.zeros(batch, jnp.int32)
    return CacheState(
        slots=denoiser.init_cache(params, batch, length, embeds.dtype),
        age=zero,
        drift=jnp.zeros(batch, jnp.float32),
        waited=zero,
        num_full=zero,
    )


def is_stale(cfg: DecodeConfig, cache: CacheState) -> Bool[Array, " B"]:
    """Whether a row has to be refreshed though its block goes on."""
    stale = jnp.zeros(cache.age.shape, bool)
    if cfg.cache_refresh_steps is not None:
        stale |= cache.age >= cfg.cache_refresh_steps
    if cfg.cache_refresh_kl is not None:
        stale |= cache.drift > cfg.cache_refresh_kl
    return stale


def take_seats(
    needs: Bool[Array, " B"], waited: Int[Array, " B"], lane: int
) -> Int[Array, " R"]:
    """The rows that get a full forward in this turn, at most `lane` of them.

    Those that have waited longest go first, ties by index: nobody waits for ever, also
    where finished rows make room for new ones.

    Returns:
        `[R]` their indices; B, which is no row's, at seats that stay empty.
    """
    order = jnp.argsort(jnp.where(needs, -waited, 1), stable=True)[:lane]
    return jnp.where(needs[order], order, needs.size)


def count_forward(
    cache: CacheState | None, kl: Float[Array, " B"]
) -> CacheState | None:
    """Ages a cache by a forward that gave D = `kl`; age 0 says that it was full."""
    if cache is None:
        return None
    moved = jnp.where(jnp.isnan(kl), 0.0, kl)  # A block's first forward has no D.
    drift = jnp.where(cache.age == 0, 0.0, cache.drift + moved)
    return dataclasses.replace(cache, age=cache.age + 1, drift=drift)
