"""Where the time of one turn of the decode goes: forward, belief, bookkeeping.

The forward is the transformer over all positions it needs and the head over the active
window. The belief is what reading the window costs beyond that one head product: the
previous rows' logits, softmax, entropy, KL and the mean embeddings. Bookkeeping is the
rest: commits, soft embeddings, records, stops. Each is a program of its own here, made
of the functions that the decode loop is made of.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lrd_jax.base import Denoiser, Params
from lrd_jax.batches import Batch
from lrd_jax.benchmark.clock import Seconds, combine, spread
from lrd_jax.config import MethodConfig
from lrd_jax.decode import loop
from lrd_jax.decode.forward import forward
from lrd_jax.decode.state import DecodeState, Phase

Run = Callable[[], Any]


def compiled(fn: Callable[..., Any], *args: Any) -> Run:
    """`fn(*args)` as a run that is compiled now and returns when it is done."""
    program = jax.jit(fn).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def part_runs(
    denoiser: Denoiser, params: Params, cfg: MethodConfig, batch: Batch
) -> dict[str, Run]:
    """The programs of one turn, on the state two turns into the decode of `batch`.

    Or fewer, where by then all is committed: that turn would run no forward.
    """
    plan = loop.make_plan(denoiser, cfg)

    # Which rows decode is computed inside: a constant would be folded away.
    def whole(params: Params, state: DecodeState) -> tuple[Any, Any]:
        hidden, _, _ = forward(plan, params, state, _alive(state))
        return hidden, _head(denoiser, params, hidden)

    def head(params: Params, hidden: Any) -> Any:
        return _head(denoiser, params, hidden)

    def read(params: Params, state: DecodeState, hidden: Any) -> Any:
        return loop.read_window(plan, params, state, hidden, _alive(state))

    def bookkeeping(params: Params, state: DecodeState, hidden: Any, said: Any) -> Any:
        state = loop.act(plan, params, state, _alive(state))
        return loop.note(plan, state, hidden, said, _alive(state))

    def turn(params: Params, state: DecodeState) -> DecodeState:
        return loop.turn(plan, params, state, _alive(state))

    state = loop.make_stepper(denoiser, cfg).init(
        params, batch.ids, batch.mask, jax.random.key(0)
    )
    turn_run = jax.jit(turn).lower(params, state).compile()
    ahead = turn_run(params, state)
    for _ in range(2):
        beyond = turn_run(params, ahead)
        if not _alive(beyond).any():
            break
        state, ahead = ahead, beyond
    whole_run = compiled(whole, params, state)
    hidden, _ = whole_run()
    read_run = compiled(read, params, state, hidden)
    return {
        "forward": whole_run,
        "head": compiled(head, params, hidden),
        "read": read_run,
        "bookkeeping": compiled(bookkeeping, params, state, hidden, read_run()),
        "turn": lambda: jax.block_until_ready(turn_run(params, state)),
    }


def _alive(state: DecodeState) -> Any:
    return state.phase != Phase.DONE


def _head(denoiser: Denoiser, params: Params, hidden: Any) -> Any:
    return denoiser.logits(params, hidden.reshape(-1, hidden.shape[-1]))


def plain_forward(denoiser: Denoiser, params: Params, batch: Batch, window: int) -> Run:
    """One forward without a decode: transformer over all, head over `window` ends."""
    ids, mask = full_text(batch, window, denoiser.mask_id)

    def run(params: Params, ids: Any, mask: Any) -> Any:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        embeds = denoiser.embed(params, ids)
        hidden, _ = denoiser.hidden(params, embeds, positions, mask)
        logits = _head(denoiser, params, hidden[:, -window:])
        return logits.reshape(len(ids), window, -1)

    return compiled(run, params, ids, mask)


def full_text(batch: Batch, gen_length: int, mask_id: int) -> tuple[Any, Any]:
    """`[B, P + G]` ids of prompt and window, and which of them are real."""
    window = jnp.full((len(batch.ids), gen_length), mask_id, batch.ids.dtype)
    ids = jnp.concatenate([jnp.asarray(batch.ids), window], axis=1)
    mask = jnp.concatenate([jnp.asarray(batch.mask), jnp.ones_like(window, bool)], 1)
    return ids, mask


def summarise_parts(seconds: Seconds) -> dict[str, Any]:
    """Milliseconds of the parts, their shares of all, and what goes beyond the forward.

    Args:
        seconds: of the runs of `part_runs`, by round.
    """
    forward, notes = seconds["forward"], seconds["bookkeeping"]
    beliefs = combine(lambda read, head: read - head, seconds["read"], seconds["head"])
    parts = {"forward": forward, "belief": beliefs, "bookkeeping": notes}
    whole = combine(lambda *values: sum(values), *parts.values())
    beyond = combine(lambda f, b, k: (b + k) / f, *parts.values())
    return {
        "ms": {name: spread(values, 1e3) for name, values in parts.items()},
        "turn_ms": spread(seconds["turn"], 1e3),
        "share": {
            name: spread(combine(lambda x, y: x / y, values, whole))["median"]
            for name, values in parts.items()
        },
        "beyond_forward": spread(beyond),
    }
