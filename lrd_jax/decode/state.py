"""The decode state: one pytree of fixed shapes whose rows move independently."""

import enum
import typing
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from lrd_jax.base import Denoiser, KVCache, Params
from lrd_jax.base import row_keys as row_keys
from lrd_jax.decode.cache import CacheState, empty_cache


class Phase(enum.IntEnum):
    """What a row's next forward is; the first three are recorded per forward."""

    OPEN = 0  # The first forward of a block, on plain masks.
    REFINE = 1  # Phase 1: soft embeddings, nothing committed.
    COMMIT = 2  # Phase 2: after a commit.
    DONE = 3  # The row is frozen.


class StopReason(enum.IntEnum):
    """Why a block or a row ended."""

    RUNNING = 0  # It did not: still decoding, or never begun.
    COMMITTED = 1  # No position was left open.
    KL = 2  # Predictions settled; open positions took their likeliest token.
    EOS = 3  # The text ended; open positions behind it were padded.
    STEP_LIMIT = 4  # The forwards were spent.
    NONFINITE = 5  # The model predicted NaN or infinity; nothing more was committed.


NEVER = -1  # In `commit_step` and `phase`: no forward.


@typing.no_type_check  # Else the test-time shape checker also stops `jax.eval_shape`.
@flax.struct.dataclass
class WindowBelief:
    """The newest prediction for the active block, as far as acting needs it.

    Attributes:
        hidden: `[B, W, D]` its hidden rows, from which KL recomputes the logits.
        expected: `[B, W, D]` mean embedding over the nucleus, float32.
        entropy: `[B, W]` nats.
        best: `[B, W]` likeliest token.
        best_prob: `[B, W]` its probability.
        token: `[B, W]` the token a commit takes: `best`, or a sample.
        token_prob: `[B, W]` its probability.
        score: `[B, W]` commit order, higher first.
        kl: `[B, W]` KL to the prediction before; NaN after a block's first forward.
    """

    hidden: Float[Array, "B W D"]
    expected: Float[Array, "B W D"]
    entropy: Float[Array, "B W"]
    best: Int[Array, "B W"]
    best_prob: Float[Array, "B W"]
    token: Int[Array, "B W"]
    token_prob: Float[Array, "B W"]
    score: Float[Array, "B W"]
    kl: Float[Array, "B W"]


@typing.no_type_check
@flax.struct.dataclass
class Record:
    """What is only reported, never acted upon.

    Attributes:
        kl: `[B, S]` D of each forward, nats; NaN where there is none.
        phase: `[B, S]` the `Phase` each forward was; NEVER where it was not run.
        nucleus_size: `[B, S]` mean over the open positions; NaN where not computed.
        refine_steps: `[B, N]` refinement forwards of each block.
        block_stop: `[B, N]` `StopReason` of each block.
        commit_step: `[B, G]` the forward whose prediction was committed, or NEVER.
        commit_prob: `[B, G]` the committed token's probability then; NaN if NEVER.
        commit_entropy: `[B, G]` the position's entropy then, nats; NaN if NEVER.
    """

    kl: Float[Array, "B S"]
    phase: Int[Array, "B S"]
    nucleus_size: Float[Array, "B S"]
    refine_steps: Int[Array, "B N"]
    block_stop: Int[Array, "B N"]
    commit_step: Int[Array, "B G"]
    commit_prob: Float[Array, "B G"]
    commit_entropy: Float[Array, "B G"]


@typing.no_type_check
@flax.struct.dataclass
class DecodeState:
    """One decode in flight. Structure, shapes and dtypes never change.

    The window of G positions is the end of the T = P + G positions; for infilling it
    is the whole text, G = T. A row that is DONE never changes again.

    Attributes:
        key_mask: `[B, T]` True at real tokens and in the window. Fixed.
        positions: `[B, T]` rotary positions, 0 at a row's first real token. Fixed.
        fillable: `[B, G]` True where a token is to be generated. Fixed, but that
            `trim_tail` takes away what lies behind an end of text.
        keys: `[B]` random key of each row. Fixed.
        embeds: `[B, T, D]` what the model reads: tokens, plain or soft masks.
        tokens: `[B, G]` the final id where `committed`, else the mask id; behind the
            end of a text the pad id.
        committed: `[B, G]` True where `tokens` is final; it stays True.
        belief: the newest prediction for the active block.
        phase: `[B]` `Phase`: what to do next.
        block: `[B]` index of the active block.
        step: `[B]` forwards so far.
        block_step: `[B]` forwards so far in the active block.
        refine_run: `[B]` refinement forwards since the block began or last committed.
        last_kl: `[B]` D of the newest forward, NaN where it has none.
        calm: `[B]` forwards in a row with D below tau_decode.
        stable: `[B, W]` forwards in a row with KL below klass_kl, for each position.
        fill: `[B]` `StopReason` that makes the next commit take every open position;
            RUNNING for an ordinary commit.
        stop_reason: `[B]` `StopReason` of the row.
        record: what is only reported.
        cache: kept keys and values; None where every forward computes all of them.
    """

    key_mask: Bool[Array, "B T"]
    positions: Int[Array, "B T"]
    fillable: Bool[Array, "B G"]
    keys: Key[Array, " B"]
    embeds: Float[Array, "B T D"]
    tokens: Int[Array, "B G"]
    committed: Bool[Array, "B G"]
    belief: WindowBelief
    phase: Int[Array, " B"]
    block: Int[Array, " B"]
    step: Int[Array, " B"]
    block_step: Int[Array, " B"]
    refine_run: Int[Array, " B"]
    last_kl: Float[Array, " B"]
    calm: Int[Array, " B"]
    stable: Int[Array, "B W"]
    fill: Int[Array, " B"]
    stop_reason: Int[Array, " B"]
    record: Record
    cache: CacheState | None

    @property
    def offset(self) -> int:
        """Where the window starts: prompt positions ahead of it."""
        return self.embeds.shape[1] - self.tokens.shape[1]

    @property
    def block_length(self) -> int:
        return self.stable.shape[1]

    @property
    def num_blocks(self) -> int:
        return self.tokens.shape[1] // self.block_length

    @property
    def block_start(self) -> Int[Array, " B"]:
        """First position of the active block within the window."""
        return self.block * self.block_length

    @property
    def block_open(self) -> Bool[Array, "B W"]:
        """True at the active block's positions that are still to be committed."""
        return take_window(
            self.fillable & ~self.committed, self.block_start, self.block_length
        )


@typing.no_type_check
@flax.struct.dataclass
class DecodeResult:
    """A finished decode; see `Record` and `DecodeState` for the shared fields.

    Attributes:
        tokens: `[B, G]` final ids; the pad id behind an early end, the mask id at
            positions never reached (step limit, non-finite).
        committed: `[B, G]` True where the model chose the token.
        num_forwards: `[B]` forward passes the row took.
        num_full_forwards: `[B]` those of them that read no cache. The others computed a
            window and read one for the rest.
        useful_tokens: `[B]` committed tokens before the first end-of-text id.
        stop_reason: `[B]` `StopReason`.
    """

    tokens: Int[Array, "B G"]
    committed: Bool[Array, "B G"]
    num_forwards: Int[Array, " B"]
    num_full_forwards: Int[Array, " B"]
    useful_tokens: Int[Array, " B"]
    stop_reason: Int[Array, " B"]
    block_stop: Int[Array, "B N"]
    refine_steps: Int[Array, "B N"]
    kl: Float[Array, "B S"]
    phase: Int[Array, "B S"]
    nucleus_size: Float[Array, "B S"]
    commit_step: Int[Array, "B G"]
    commit_prob: Float[Array, "B G"]
    commit_entropy: Float[Array, "B G"]


def take_window(values: Array, start: Int[Array, " B"], length: int) -> Array:
    """`values[b, start[b] : start[b] + length]` of `[B, X, ...]`."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, length))(
        values, start
    )


def put_window(values: Array, start: Int[Array, " B"], rows: Array) -> Array:
    """Writes `rows` `[B, W, ...]` into `[B, X, ...]` from `start[b]` on."""
    return jax.vmap(
        lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0)
    )(values, rows.astype(values.dtype), start)


def put_at(values: Array, column: Int[Array, " B"], new: Array) -> Array:
    """Writes one entry a row: `values[b, column[b]] = new[b]`."""
    return put_window(values, column, new[:, None])


def select_rows(rows: Bool[Array, " B"], new: Any, old: Any) -> Any:
    """Leaf by leaf, `new` where `rows` and `old` elsewhere.

    Cached keys and values stay those of `old`: only a forward writes them, and it
    writes those of the rows that it is for.
    """

    def select(new: Any, old: Any) -> Any:
        if isinstance(old, KVCache):
            return old
        pick = rows.reshape(rows.shape + (1,) * (new.ndim - 1))
        return jnp.where(pick, new, old)

    return jax.tree.map(select, new, old, is_leaf=lambda x: isinstance(x, KVCache))


def init_state(
    denoiser: Denoiser,
    params: Params,
    prompt_ids: Integer[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    key: Array,
    open_mask: Bool[Array, "B P"] | None,
    *,
    gen_length: int,
    block_length: int,
    budget: int,
    cached: bool = False,
) -> DecodeState:
    """All buffers of a decode, before its first forward.

    With `cached` a KV cache is among them, in the dtype of the embeddings.
    With `open_mask` the prompt itself is the window, one block long, and the positions
    marked in it are generated; `gen_length` and `block_length` are then not used.
    """
    batch, prompt_length = prompt_ids.shape
    prompt_ids = prompt_ids.astype(jnp.int32)  # A narrow type may not hold the mask id.
    if open_mask is None:
        fillable = jnp.ones((batch, gen_length), bool)
        tail = jnp.full((batch, gen_length), denoiser.mask_id, jnp.int32)
        ids = jnp.concatenate([prompt_ids, tail], axis=1)
        key_mask = jnp.concatenate([prompt_mask, fillable], axis=1)
    else:
        gen_length = block_length = prompt_length
        fillable = open_mask & prompt_mask
        ids = jnp.where(fillable, denoiser.mask_id, prompt_ids)
        key_mask = prompt_mask
    num_real = jnp.cumsum(key_mask, axis=1, dtype=jnp.int32)
    embeds = denoiser.embed(params, ids)
    has_work = jnp.any(fillable, axis=1)
    zero = jnp.zeros(batch, jnp.int32)
    return DecodeState(
        key_mask=key_mask,
        positions=jnp.maximum(num_real - 1, 0),
        fillable=fillable,
        keys=row_keys(key, batch),
        embeds=embeds,
        tokens=ids[:, ids.shape[1] - gen_length :],
        committed=~fillable,
        belief=_blank_belief(batch, block_length, embeds.shape[-1], embeds.dtype),
        phase=jnp.where(has_work, Phase.OPEN, Phase.DONE).astype(jnp.int32),
        block=zero,
        step=zero,
        block_step=zero,
        refine_run=zero,
        last_kl=jnp.full(batch, jnp.nan, jnp.float32),
        calm=zero,
        stable=jnp.zeros((batch, block_length), jnp.int32),
        fill=zero,
        stop_reason=jnp.where(
            has_work, StopReason.RUNNING, StopReason.COMMITTED
        ).astype(jnp.int32),
        record=_blank_record(batch, budget, gen_length // block_length, gen_length),
        cache=empty_cache(denoiser, params, embeds) if cached else None,
    )


def _blank_belief(
    batch: int, block_length: int, width: int, dtype: Any
) -> WindowBelief:
    shape = (batch, block_length)
    number, token = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
    return WindowBelief(
        hidden=jnp.zeros((*shape, width), dtype),
        expected=jnp.zeros((*shape, width), jnp.float32),
        entropy=number,
        best=token,
        best_prob=number,
        token=token,
        token_prob=number,
        score=number,
        kl=number,
    )


def _blank_record(batch: int, budget: int, num_blocks: int, gen_length: int) -> Record:
    unwritten = jnp.full((batch, budget), jnp.nan, jnp.float32)
    return Record(
        kl=unwritten,
        phase=jnp.full((batch, budget), NEVER, jnp.int32),
        nucleus_size=unwritten,
        refine_steps=jnp.zeros((batch, num_blocks), jnp.int32),
        block_stop=jnp.full((batch, num_blocks), StopReason.RUNNING, jnp.int32),
        commit_step=jnp.full((batch, gen_length), NEVER, jnp.int32),
        commit_prob=jnp.full((batch, gen_length), jnp.nan, jnp.float32),
        commit_entropy=jnp.full((batch, gen_length), jnp.nan, jnp.float32),
    )


def is_eos(tokens: Int[Array, "B G"], eos_ids: Sequence[int]) -> Bool[Array, "B G"]:
    return jnp.isin(tokens, jnp.asarray(eos_ids, tokens.dtype))


def text_length(state: DecodeState, eos_ids: Sequence[int]) -> Int[Array, " B"]:
    """Positions up to the first committed eos id, itself included; G without one."""
    ends = state.committed & is_eos(state.tokens, eos_ids)
    first = jnp.argmax(ends, axis=1).astype(jnp.int32) + 1
    return jnp.where(jnp.any(ends, axis=1), first, state.tokens.shape[1])


def finish(state: DecodeState, denoiser: Denoiser) -> DecodeResult:
    """The result of a decode, also of one that is still in flight."""
    chosen = state.committed & state.fillable
    counted = chosen
    if state.offset:  # An infilled text does not end at an eos id in its middle.
        ended = jnp.cumsum(is_eos(state.tokens, denoiser.eos_ids), axis=1) > 0
        counted = chosen & ~ended
    return DecodeResult(
        tokens=state.tokens,
        committed=chosen,
        num_forwards=state.step,
        num_full_forwards=state.step if state.cache is None else state.cache.num_full,
        useful_tokens=jnp.sum(counted, axis=1, dtype=jnp.int32),
        stop_reason=state.stop_reason,
        block_stop=state.record.block_stop,
        refine_steps=state.record.refine_steps,
        kl=state.record.kl,
        phase=state.record.phase,
        nucleus_size=state.record.nucleus_size,
        commit_step=state.record.commit_step,
        commit_prob=state.record.commit_prob,
        commit_entropy=state.record.commit_entropy,
    )
