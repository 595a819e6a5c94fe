"""One forward of the model: in full, or over windows that read a cache for the rest."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lrd_jax.base import KVCache, Params
from lrd_jax.decode.cache import CacheState, is_stale, take_seats
from lrd_jax.decode.plan import Plan
from lrd_jax.decode.state import DecodeState, Phase, take_window, text_length

# Hidden rows of the active blocks, and the keys and values of all positions: given a
# cache, the model returns one.
Carry = tuple[Float[Array, "B W D"], KVCache | None]
ResultT = TypeVar("ResultT")


def forward(
    plan: Plan, params: Params, state: DecodeState, rows: Bool[Array, " B"]
) -> tuple[Float[Array, "B W D"], DecodeState, Bool[Array, " B"]]:
    """Runs the model for those of `rows` that it has room for in this turn.

    With `trim_tail` a row attends to what its own text may still need of the window,
    so that its numbers are the same in any company, up to rounding: the arrays are as
    long as the longest text needs. Positions left out keep the hidden rows they had.

    Returns:
        Hidden rows of each active block, the state with its cache as written, and
        `[B]` the rows that were run; other rows' hidden rows mean nothing.
    """
    if not plan.cfg.trim_tail:
        hidden, cache, ran = _forward(plan, params, state, rows)
        return hidden, dataclasses.replace(state, cache=cache), ran
    gen_length = state.tokens.shape[1]
    lengths = jnp.array(trimmed_lengths(gen_length))[_choice(plan, state)]
    seen = jnp.arange(gen_length)[None, :] < lengths[:, None]
    key_mask = state.key_mask.at[:, state.offset :].set(
        state.key_mask[:, state.offset :] & seen
    )
    trimmed = dataclasses.replace(state, key_mask=key_mask)
    hidden, cache, ran = _forward(plan, params, trimmed, rows)
    in_block = take_window(seen, state.block_start, state.block_length)
    hidden = jnp.where(in_block[..., None], hidden, state.belief.hidden)
    return hidden, dataclasses.replace(state, cache=cache), ran


def trimmed_lengths(gen_length: int) -> list[int]:
    """The lengths that a window can be cut to: quarters of it, rounded up."""
    return sorted({-(-gen_length * quarter // 4) for quarter in (1, 2, 3, 4)})


def _choice(plan: Plan, state: DecodeState) -> Int[Array, " B"]:
    """Which of the trimmed lengths each row's text needs."""
    lengths = jnp.array(trimmed_lengths(state.tokens.shape[1]))
    return jnp.searchsorted(lengths, text_length(state, plan.denoiser.eos_ids))


def _by_length(
    plan: Plan,
    state: DecodeState,
    rows: Bool[Array, " B"],
    run: Callable[[int], ResultT],
) -> ResultT:
    """Calls `run` with the length of window that the longest text of `rows` needs."""
    gen_length = state.tokens.shape[1]
    if not plan.cfg.trim_tail:
        return run(gen_length)
    return jax.lax.switch(
        jnp.max(jnp.where(rows, _choice(plan, state), 0)),
        [functools.partial(run, length) for length in trimmed_lengths(gen_length)],
    )


def _forward(
    plan: Plan, params: Params, state: DecodeState, rows: Bool[Array, " B"]
) -> tuple[Float[Array, "B W D"], CacheState | None, Bool[Array, " B"]]:
    """Without a cache all of `rows` are run.

    With one, rows that open a block or whose cache is too old take one of the lane's
    seats or wait, the others read their cache. Neither call is made when no row needs
    it.
    """
    if state.cache is None:
        return _whole(plan, params, state, rows), None, rows
    cache = state.cache
    needs = rows & ((state.phase == Phase.OPEN) | is_stale(plan.cfg, cache))
    lane = min(plan.cfg.cache_lane, rows.size)
    seats = take_seats(needs, cache.waited, lane)
    seated = jnp.zeros_like(rows).at[seats].set(True, mode="drop")
    windowed = rows & ~needs

    carry = state.belief.hidden, cache.slots
    carry = jax.lax.cond(
        jnp.any(windowed),
        lambda c: _windows(plan, params, state, windowed, c),
        lambda c: c,
        carry,
    )
    hidden, slots = jax.lax.cond(
        jnp.any(seated),
        lambda c: _seats(plan, params, state, seats, c),
        lambda c: c,
        carry,
    )
    cache = dataclasses.replace(
        cache,
        slots=slots,
        age=jnp.where(seated, 0, cache.age),
        waited=jnp.where(
            rows, jnp.where(needs & ~seated, cache.waited + 1, 0), cache.waited
        ),
        num_full=jnp.where(seated, cache.num_full + 1, cache.num_full),
    )
    return hidden, cache, windowed | seated


def _whole(
    plan: Plan, params: Params, state: DecodeState, rows: Bool[Array, " B"]
) -> Float[Array, "B W D"]:
    """The prompt and what of the window `rows` need; zeros stand for the others."""

    def run(embeds: Float[Array, "B T D"], length: int) -> Float[Array, "B W D"]:
        end = state.offset + length
        hidden, _ = plan.denoiser.hidden(
            params,
            embeds[:, :end],
            state.positions[:, :end],
            state.key_mask[:, :end],
        )
        start = state.offset + state.block_start
        return take_window(_padded(hidden, embeds), start, state.block_length)

    hidden = _by_length(plan, state, rows, functools.partial(run, state.embeds))
    if plan.guidance == 0:
        return hidden
    mask_row = plan.denoiser.embed(params, jnp.int32(plan.denoiser.mask_id))
    blinded = state.embeds.at[:, : state.offset].set(mask_row[None, None, :])
    blind = _by_length(plan, state, rows, functools.partial(run, blinded))
    # The head is linear, so guiding hidden rows guides logits: z_u + (s+1)(z_c - z_u).
    wide, blind = hidden.astype(jnp.float32), blind.astype(jnp.float32)
    guided = blind + (plan.guidance + 1.0) * (wide - blind)
    return guided.astype(hidden.dtype)


def _padded(
    hidden: Float[Array, "B L D"], embeds: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Zeros behind the hidden rows, so that no window reaches beyond them."""
    missing = embeds.shape[1] - hidden.shape[1]
    return jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))


def _windows(
    plan: Plan,
    params: Params,
    state: DecodeState,
    rows: Bool[Array, " B"],
    carry: Carry,
) -> Carry:
    """The positions that are not cached, of all rows; `rows` keep what was computed.

    With a prefix cache these are the active block and all behind it. Rows may be at
    different blocks, but an array has one length: each row passes the window from its
    beginning, and the blocks that it has done already are computed for nothing.
    """
    lead = plan.denoiser.lead
    prefix = plan.cfg.cache == "prefix"
    first = jnp.zeros_like(state.block_start) if prefix else state.block_start
    start = state.offset + first

    def run(length: int) -> Carry:
        column = first[:, None] + jnp.arange(-lead, length)[None, :]
        hidden, slots = plan.denoiser.hidden(
            params,
            take_window(state.embeds, start - lead, lead + length),
            take_window(state.positions, start - lead, lead + length),
            state.key_mask,
            carry[1],
            start,
            rows[:, None] & (column >= state.block_start[:, None] - lead),
        )
        hidden = _padded(hidden, state.embeds)
        return take_window(hidden, state.block_start - first, state.block_length), slots

    return _by_length(plan, state, rows, run) if prefix else run(state.block_length)


def _seats(
    plan: Plan,
    params: Params,
    state: DecodeState,
    seats: Int[Array, " R"],
    carry: Carry,
) -> Carry:
    """All positions of the rows on the lane's seats; fills their caches."""

    def of_seats(values: Array) -> Array:
        return values.at[seats].get(mode="clip")  # An empty seat runs any row.

    hidden, slots = carry
    embeds = of_seats(state.embeds)
    empty = plan.denoiser.init_cache(params, *embeds.shape[:2], embeds.dtype)
    whole, filled = plan.denoiser.hidden(
        params, embeds, of_seats(state.positions), of_seats(state.key_mask), empty
    )
    start = state.offset + of_seats(state.block_start)
    block = take_window(whole, start, state.block_length)
    slots = jax.tree.map(
        lambda old, new: old.at[:, seats].set(new, mode="drop"), slots, filled
    )
    return hidden.at[seats].set(block, mode="drop"), slots
