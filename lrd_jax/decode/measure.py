"""After a forward: record it, and decide what each row does next."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lrd_jax.decode.cache import count_forward
from lrd_jax.decode.commit import count_stable, kl_stop
from lrd_jax.decode.plan import Plan
from lrd_jax.decode.refine import after_commit, reduce_kl, settled
from lrd_jax.decode.state import (
    DecodeState,
    Phase,
    StopReason,
    put_at,
    select_rows,
    take_window,
)


def measure(
    plan: Plan,
    state: DecodeState,
    rows: Bool[Array, " B"],
    finite: Bool[Array, " B"],
    nucleus_size: Float[Array, "B W"],
) -> DecodeState:
    """Records the forward and decides what each of `rows` does next."""
    kind = state.phase
    in_block = take_window(state.fillable, state.block_start, state.block_length)
    still_open = state.block_open
    kl = reduce_kl(state.belief.kl, in_block, still_open, plan.cfg.kl_reduction)
    kl = jnp.where((kind == Phase.OPEN) | ~finite, jnp.nan, kl)
    size = jnp.sum(jnp.where(still_open, nucleus_size, 0.0), axis=1)
    size = size / jnp.maximum(jnp.sum(still_open, axis=1, dtype=size.dtype), 1)

    refined = kind == Phase.REFINE
    record = dataclasses.replace(
        state.record,
        kl=put_at(state.record.kl, state.step, kl),
        phase=put_at(state.record.phase, state.step, kind),
        nucleus_size=put_at(state.record.nucleus_size, state.step, size),
        refine_steps=_count(state.record.refine_steps, state.block, refined),
    )
    counted = dataclasses.replace(
        state,
        record=record,
        step=state.step + 1,
        block_step=state.block_step + 1,
        refine_run=jnp.where(refined, state.refine_run + 1, 0),
        calm=_calm(plan, state, kind, kl),
        cache=count_forward(state.cache, kl),
    )
    counted = _decide(plan, counted, kind, kl, finite)
    if plan.cfg.klass_conf is not None:
        stable = count_stable(plan.cfg, state, state.belief.kl)
        counted = dataclasses.replace(counted, stable=stable)
    return select_rows(rows, dataclasses.replace(counted, last_kl=kl), state)


def _count(counts: Any, column: Any, event: Any) -> Any:
    """Adds one to `counts[b, column[b]]` where `event[b]`."""
    old = take_window(counts, column, 1)[:, 0]
    return put_at(counts, column, jnp.where(event, old + 1, old))


def _calm(plan: Plan, state: DecodeState, kind: Any, kl: Any) -> Any:
    """Forwards after a commit, in a row, with D below tau_decode."""
    counted = jnp.where(kl < plan.cfg.tau_decode, state.calm + 1, 0)
    after = jnp.where(kind == Phase.COMMIT, counted, state.calm)
    return jnp.where(kind == Phase.OPEN, 0, after)


def _decide(
    plan: Plan, state: DecodeState, kind: Any, kl: Any, finite: Any
) -> DecodeState:
    after_open = Phase.REFINE if plan.refines else Phase.COMMIT
    phase = jnp.where(kind == Phase.OPEN, after_open, after_commit(plan))
    leaves = jnp.where(settled(plan, state, kl), Phase.COMMIT, Phase.REFINE)
    phase = jnp.where(kind == Phase.REFINE, leaves, phase)

    stops = (kind == Phase.COMMIT) & kl_stop(plan, state, state.calm)
    fill = jnp.where(stops, StopReason.KL, StopReason.RUNNING)
    if plan.cfg.max_steps is not None:
        limit = (fill == StopReason.RUNNING) & (state.step >= plan.cfg.max_steps)
        fill = jnp.where(limit, StopReason.STEP_LIMIT, fill)
    phase = jnp.where(fill != StopReason.RUNNING, Phase.COMMIT, phase)

    block_stop = jnp.where(
        finite,
        take_window(state.record.block_stop, state.block, 1)[:, 0],
        StopReason.NONFINITE,
    )
    return dataclasses.replace(
        state,
        phase=jnp.where(finite, phase, Phase.DONE).astype(jnp.int32),
        fill=fill.astype(jnp.int32),
        stop_reason=jnp.where(finite, state.stop_reason, StopReason.NONFINITE).astype(
            jnp.int32
        ),
        record=dataclasses.replace(
            state.record,
            block_stop=put_at(state.record.block_stop, state.block, block_stop),
        ),
    )
