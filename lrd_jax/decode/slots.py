"""Continuous batching on the device: slots whose finished rows take new prompts."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from lrd_jax.base import Denoiser, Params
from lrd_jax.config import MethodConfig
from lrd_jax.decode.loop import make_stepper
from lrd_jax.decode.state import DecodeResult, DecodeState, Phase, select_rows


class Slots(NamedTuple):
    """A decode that never has to end, B slots wide; both functions are jitted.

    Attributes:
        start: `(params, prompt_ids, prompt_mask, keys, open_mask=None)` -> a state of
            these shapes whose slots are all idle.
        advance: `(params, state, refill, enough, prompt_ids, prompt_mask, keys,
            open_mask=None)` -> (state, result): puts the prompts of the slots `refill`
            `[B]` in place of what they held, then decodes until `enough` slots are done
            or idle, or all are. The buffers of `state` are used up. In the result,
            `stop_reason` is RUNNING where a slot's row is not done.
    """

    start: Callable[..., DecodeState]
    advance: Callable[..., tuple[DecodeState, DecodeResult]]


def make_slots(denoiser: Denoiser, cfg: MethodConfig) -> Slots:
    """Builds the slots of one model and method, for as many prompts as there will be.

    A row gets the result that `make_decode_fn` gives it, whichever slot it is in and
    whatever the other slots do.

    Args:
        denoiser: the model.
        cfg: as for `make_decode_fn`.
    """
    stepper = make_stepper(denoiser, cfg)

    def start(
        params: Params,
        prompt_ids: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        keys: Key[Array, " B"],
        open_mask: Bool[Array, "B P"] | None = None,
    ) -> DecodeState:
        state = stepper.init(params, prompt_ids, prompt_mask, keys, open_mask)
        return dataclasses.replace(state, phase=jnp.full_like(state.phase, Phase.DONE))

    def advance(
        params: Params,
        state: DecodeState,
        refill: Bool[Array, " B"],
        enough: Int[Array, ""],
        prompt_ids: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        keys: Key[Array, " B"],
        open_mask: Bool[Array, "B P"] | None = None,
    ) -> tuple[DecodeState, DecodeResult]:
        fresh = stepper.init(params, prompt_ids, prompt_mask, keys, open_mask)
        state = select_rows(refill, fresh, state)
        state = jax.lax.while_loop(
            lambda s: stepper.active(s) & (_num_done(s) < enough),
            lambda s: stepper.step(params, s),
            state,
        )
        return state, stepper.finish(state)

    return Slots(
        start=jax.jit(start), advance=jax.jit(advance, donate_argnames="state")
    )


def _num_done(state: DecodeState) -> Int[Array, ""]:
    return jnp.sum(state.phase == Phase.DONE, dtype=jnp.int32)
