"""The decode loop: act on the newest belief, run one forward, measure; repeat.

A turn acts first, so a row that its last commit finishes takes no further forward, and
the switch from phase 1 to phase 2 takes none of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lrd_jax.base import Denoiser, Params, check_arrays
from lrd_jax.config import DecodeConfig, DreamConfig, LladaConfig, MethodConfig
from lrd_jax.decode import belief
from lrd_jax.decode.commit import commit_step, lrd_plan
from lrd_jax.decode.forward import forward
from lrd_jax.decode.measure import measure
from lrd_jax.decode.plan import Plan
from lrd_jax.decode.refine import refine_step
from lrd_jax.decode.samplers import dream_plan, llada_plan
from lrd_jax.decode.state import (
    DecodeResult,
    DecodeState,
    Phase,
    WindowBelief,
    finish,
    init_state,
    select_rows,
)


class Stepper(NamedTuple):
    """The loop's bodies one by one, each jitted; nothing is donated.

    Attributes:
        init: `(params, prompt_ids, prompt_mask, key, open_mask=None)` -> DecodeState.
        refine: `(params, state)` -> the state after one forward of the rows in phase 1
            or at the start of a block; other rows are untouched.
        commit: `(params, state)` -> the state after a commit and one forward of the
            rows in phase 2; other rows are untouched.
        step: `(params, state)` -> the state after one turn of every row; repeated until
            `active(state)` is False it replays `decode_fn`.
        active: `(state)` -> whether any row still decodes.
        finish: `(state)` -> DecodeResult.
    """

    init: Callable[..., DecodeState]
    refine: Callable[[Params, DecodeState], DecodeState]
    commit: Callable[[Params, DecodeState], DecodeState]
    step: Callable[[Params, DecodeState], DecodeState]
    active: Callable[[DecodeState], Bool[Array, ""]]
    finish: Callable[[DecodeState], DecodeResult]


def make_plan(denoiser: Denoiser, cfg: MethodConfig) -> Plan:
    """Resolves a method's settings for one model."""
    if isinstance(cfg, LladaConfig):
        return llada_plan(denoiser, cfg)
    if isinstance(cfg, DreamConfig):
        return dream_plan(denoiser, cfg)
    return lrd_plan(denoiser, cfg)


def make_decode_fn(
    denoiser: Denoiser, cfg: MethodConfig
) -> Callable[..., DecodeResult]:
    """Builds the jitted decoder of one model and method.

    Args:
        denoiser: the model, see `lrd_jax.load(...).denoiser`.
        cfg: `DecodeConfig` for LRD, or another method's config.

    Returns:
        `decode_fn(params, prompt_ids, prompt_mask, key, open_mask=None)`, pure and
        compiled once per shape of its arguments:

        - `prompt_ids` `[B, P]` ids, left-padded;
        - `prompt_mask` `[B, P]` True at real tokens;
        - `key` one random key (row r folds in r), or one per row;
        - `open_mask` `[B, P]` for infilling: True at the positions to generate. The
          prompt is then the whole text, decoded as one block, and `gen_length` and
          `block_length` are not used.

        The answer is a `DecodeResult`.

    Raises:
        ValueError: when traced, for arguments of a wrong shape or dtype, an empty
            prompt, a prompt + window beyond the model's context, or infilling with
            `stop_at_eos`, with a cache or with another method than LRD.
    """
    plan = make_plan(denoiser, cfg)

    @jax.jit
    def decode_fn(
        params: Params,
        prompt_ids: Array,
        prompt_mask: Array,
        key: Array,
        open_mask: Array | None = None,
    ) -> DecodeResult:
        state = _init(plan, cfg, params, prompt_ids, prompt_mask, key, open_mask)
        state = jax.lax.while_loop(
            active, lambda s: turn(plan, params, s, _alive(s)), state
        )
        return finish(state, denoiser)

    return decode_fn


def make_stepper(denoiser: Denoiser, cfg: MethodConfig) -> Stepper:
    """Builds the bodies of the loop, for research loops, live views and tests.

    Args:
        denoiser: the model.
        cfg: as for `make_decode_fn`.
    """
    plan = make_plan(denoiser, cfg)

    def init(
        params: Params,
        prompt_ids: Array,
        prompt_mask: Array,
        key: Array,
        open_mask: Array | None = None,
    ) -> DecodeState:
        return _init(plan, cfg, params, prompt_ids, prompt_mask, key, open_mask)

    def refine(params: Params, state: DecodeState) -> DecodeState:
        return turn(plan, params, state, state.phase <= Phase.REFINE)

    def commit(params: Params, state: DecodeState) -> DecodeState:
        return turn(plan, params, state, state.phase == Phase.COMMIT)

    def step(params: Params, state: DecodeState) -> DecodeState:
        return turn(plan, params, state, _alive(state))

    return Stepper(
        init=jax.jit(init),
        refine=jax.jit(refine),
        commit=jax.jit(commit),
        step=jax.jit(step),
        active=jax.jit(active),
        finish=jax.jit(functools.partial(finish, denoiser=denoiser)),
    )


def active(state: DecodeState) -> Bool[Array, ""]:
    """Whether any row still decodes."""
    return jnp.any(_alive(state))


def _alive(state: DecodeState) -> Bool[Array, " B"]:
    return state.phase != Phase.DONE


def turn(
    plan: Plan, params: Params, state: DecodeState, rows: Bool[Array, " B"]
) -> DecodeState:
    """Acts on the newest belief of `rows`, runs their next forward, measures it."""
    state = act(plan, params, state, rows)
    rows = rows & _alive(state)
    return jax.lax.cond(
        jnp.any(rows), lambda s: predict(plan, params, s, rows), lambda s: s, state
    )


def act(
    plan: Plan, params: Params, state: DecodeState, rows: Bool[Array, " B"]
) -> DecodeState:
    """Refines or commits, as is each row's turn.

    A row that waits for a full forward has acted already, in the turn it came to wait.
    """
    acting = rows if state.cache is None else rows & (state.cache.waited == 0)
    state = refine_step(plan, params, state, acting & (state.phase == Phase.REFINE))
    return commit_step(plan, params, state, acting & (state.phase == Phase.COMMIT))


def predict(
    plan: Plan, params: Params, state: DecodeState, rows: Bool[Array, " B"]
) -> DecodeState:
    """One forward of the model, and what it says about `rows`."""
    hidden, state, rows = forward(plan, params, state, rows)
    reading = read_window(plan, params, state, hidden, rows)
    return note(plan, state, hidden, reading, rows)


def note(
    plan: Plan,
    state: DecodeState,
    hidden: Float[Array, "B W D"],
    reading: belief.Reading,
    rows: Bool[Array, " B"],
) -> DecodeState:
    """Makes what a forward said the newest belief of `rows`, and measures it."""
    first = (state.phase == Phase.OPEN)[:, None]
    newest = WindowBelief(
        hidden=hidden,
        expected=reading.expected,
        entropy=reading.entropy,
        best=reading.best,
        best_prob=reading.best_prob,
        token=reading.token,
        token_prob=reading.token_prob,
        score=reading.score,
        kl=jnp.where(first, jnp.nan, reading.kl),
    )
    finite = jnp.all(reading.finite, axis=1)
    # Rows that may not act on this forward keep the belief they had.
    newest = select_rows(rows & finite, newest, state.belief)
    state = dataclasses.replace(state, belief=newest)
    return measure(plan, state, rows, finite, reading.nucleus_size)


def read_window(
    plan: Plan,
    params: Params,
    state: DecodeState,
    hidden: Float[Array, "B W D"],
    rows: Bool[Array, " B"],
) -> belief.Reading:
    """What the hidden rows of the active blocks say; means over open ones of `rows`."""
    still_open = rows[:, None] & state.block_open
    batch, length, width = hidden.shape
    column = state.block_start[:, None] + jnp.arange(length)[None, :]
    if state.offset == 0:  # Infilling: the window has the padding in it.
        column = state.positions
    step_keys = jax.vmap(jax.random.fold_in)(state.keys, state.step)
    # Noise belongs to a row, a step and a position, wherever they are in a batch.
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(step_keys, column)
    inputs = (
        hidden.reshape(-1, width),
        state.belief.hidden.reshape(-1, width),
        keys.reshape(-1),
        still_open.reshape(-1),
    )
    reading = belief.map_tiles(
        lambda tile: belief.read_rows(
            plan.denoiser,
            params,
            *tile,
            pick=plan.pick,
            top_p=plan.mixing_top_p,
            predicts_mask=plan.predicts_mask,
        ),
        inputs,
        belief.tile_rows(plan.denoiser.vocab_size),
    )
    return jax.tree.map(lambda x: x.reshape(batch, length, *x.shape[1:]), reading)


def _init(
    plan: Plan,
    cfg: MethodConfig,
    params: Params,
    prompt_ids: Array,
    prompt_mask: Array,
    key: Array,
    open_mask: Array | None,
) -> DecodeState:
    check_arguments(plan.denoiser, cfg, prompt_ids, prompt_mask, open_mask)
    gen_length = prompt_ids.shape[1] if open_mask is not None else cfg.gen_length
    block_length = gen_length
    if open_mask is None and plan.cfg.block_length is not None:
        block_length = plan.cfg.block_length
    return init_state(
        plan.denoiser,
        params,
        prompt_ids,
        prompt_mask,
        key,
        open_mask,
        gen_length=gen_length,
        block_length=block_length,
        budget=plan.budget(gen_length // block_length, gen_length),
        cached=plan.cfg.cache != "none",
    )


def check_arguments(
    denoiser: Denoiser,
    cfg: MethodConfig,
    prompt_ids: Any,
    prompt_mask: Any,
    open_mask: Any,
) -> None:
    """Raises `ValueError` for arguments that `decode_fn` cannot take; works traced."""
    check_arrays(prompt_ids, prompt_mask, open_mask)
    length = prompt_ids.shape[1]
    if open_mask is None:
        length += cfg.gen_length
    else:
        if not isinstance(cfg, DecodeConfig):
            raise ValueError(
                f"infilling (`open_mask`) is for the methods lrd and baseline, got "
                f"{cfg.method}."
            )
        if cfg.stop_at_eos:
            raise ValueError(
                "infilling (`open_mask`) needs `stop_at_eos=False`: an end-of-text id "
                "in the middle does not end a text that goes on behind it."
            )
        if cfg.cache != "none":
            raise ValueError(
                f"infilling (`open_mask`) needs `cache='none'`, got {cfg.cache!r}: the "
                "whole text is one block, and nothing is outside of it to be cached."
            )
    if length > denoiser.max_length:
        raise ValueError(
            f"prompt + window is {length} positions, padding included, more than the "
            f"model's context of {denoiser.max_length}; use a shorter prompt or "
            "`gen_length`."
        )
