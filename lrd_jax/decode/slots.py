"""Continuous batching on the device: slots whose finished rows take new prompts."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, Key

from lrd_jax.base import DATA, MODEL, REPLICATED, Denoiser, KVCache, Params
from lrd_jax.config import MethodConfig
from lrd_jax.decode.cache import CacheState
from lrd_jax.decode.loop import make_plan, make_stepper
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
        groups: of equally many slots in turn, each of which decodes by itself; where
            there are several, `enough` is `[groups]`, one number for each.
        everywhere: how an array lies that all devices have whole; None for one device.
    """

    start: Callable[..., DecodeState]
    advance: Callable[..., tuple[DecodeState, DecodeResult]]
    groups: int = 1
    everywhere: Sharding | None = None


def make_slots(
    denoiser: Denoiser,
    cfg: MethodConfig,
    mesh: Mesh | None = None,
    param_specs: Any = REPLICATED,
) -> Slots:
    """Builds the slots of one model and method, for as many prompts as there will be.

    A row gets the result that `make_decode_fn` gives it, whichever slot it is in and
    whatever the other slots do.

    Args:
        denoiser: the model.
        cfg: as for `make_decode_fn`.
        mesh: devices to spread the slots over, a group for each coordinate of its axis
            `data`; None for one device.
        param_specs: how the parameters are split over its axis `model`.
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

    if mesh is not None:
        cached = make_plan(denoiser, cfg).cfg.cache != "none"
        return _spread(Slots(start, advance), mesh, param_specs, cached)
    return Slots(
        start=jax.jit(start), advance=jax.jit(advance, donate_argnames="state")
    )


def _spread(slots: Slots, mesh: Mesh, param_specs: Any, cached: bool) -> Slots:
    """The same slots, a group on each coordinate of `data`; each has its own loop."""
    groups, rows = mesh.shape[DATA], P(DATA)
    state_specs = _state_specs(cached)

    def start(params: Params, *inputs: Any) -> DecodeState:
        specs = (param_specs, *[rows] * len(inputs))
        # The check of varying axes refuses a loop that starts alike on all devices.
        over_data = jax.shard_map(
            slots.start,
            mesh=mesh,
            in_specs=specs,
            out_specs=state_specs,
            check_vma=False,
        )
        return over_data(params, *inputs)

    def group(
        params: Params, state: DecodeState, refill: Any, enough: Any, *inputs: Any
    ) -> tuple[DecodeState, DecodeResult]:
        return slots.advance(params, state, refill, enough[0], *inputs)

    def advance(
        params: Params, state: DecodeState, refill: Any, enough: Any, *inputs: Any
    ) -> tuple[DecodeState, DecodeResult]:
        over_data = jax.shard_map(
            group,
            mesh=mesh,
            in_specs=(param_specs, state_specs, *[rows] * (2 + len(inputs))),
            out_specs=(state_specs, rows),
            check_vma=False,
        )
        enough = jnp.broadcast_to(enough, groups)
        return over_data(params, state, refill, enough, *inputs)

    return Slots(
        start=jax.jit(start),
        advance=jax.jit(advance, donate_argnames="state"),
        groups=groups,
        everywhere=NamedSharding(mesh, REPLICATED),
    )


def _state_specs(cached: bool) -> DecodeState:
    """How a state lies on a mesh: rows over `data`, the same on all of `model`.

    But for a cache, of which each device keeps what its own heads read.
    """
    names = [field.name for field in dataclasses.fields(DecodeState)]
    fields: dict[str, Any] = dict.fromkeys(names, P(DATA))
    if cached:
        heads: Any = P(None, DATA, None, MODEL)
        names = [field.name for field in dataclasses.fields(CacheState)]
        rows: dict[str, Any] = dict.fromkeys(names, P(DATA))
        fields["cache"] = CacheState(**rows | {"slots": KVCache(heads, heads)})
    return DecodeState(**fields)


def _num_done(state: DecodeState) -> Int[Array, ""]:
    return jnp.sum(state.phase == Phase.DONE, dtype=jnp.int32)
