"""Phase 2, predictive feedback: commit tokens, feed back soft embeddings (Eq. 7)."""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lrd_jax.base import Denoiser, Params
from lrd_jax.config import DecodeConfig
from lrd_jax.decode import belief
from lrd_jax.decode.plan import Plan
from lrd_jax.decode.refine import soften
from lrd_jax.decode.state import (
    DecodeState,
    Phase,
    StopReason,
    is_eos,
    put_at,
    put_window,
    take_window,
    text_length,
)
from lrd_jax.decode.vocabulary import WHOLE, Vocabulary

KLASS_KL = 0.01  # The published defaults of KLASS.
KLASS_STEPS = 2


def lrd_plan(denoiser: Denoiser, cfg: DecodeConfig) -> Plan:
    """LRD, its ablations and the paper's baseline."""
    return Plan(
        denoiser=denoiser,
        cfg=cfg,
        pick=functools.partial(pick, cfg),
        choose=functools.partial(choose, cfg),
    )


def pick(
    cfg: DecodeConfig, prediction: belief.Prediction, keys: Array
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """A token for every position, and the order in which to commit them.

    The order goes by the untempered prediction, whatever the sampling temperature.
    """
    if cfg.commit_order == "entropy":
        score = -prediction.entropy
    elif cfg.commit_order == "confidence":
        score = prediction.best_prob
    else:
        score = margin(prediction.probs, prediction.best, prediction.vocab)
    if cfg.temperature == 0:
        return prediction.best, score
    tempered = belief.keep_likely(
        prediction.logits / cfg.temperature,
        cfg.sample_top_p,
        cfg.sample_top_k,
        prediction.vocab,
    )
    return belief.draw(tempered, keys, prediction.vocab), score


def margin(
    probs: Float[Array, "R V"], best: Int[Array, " R"], vocab: Vocabulary = WHOLE
) -> Float[Array, " R"]:
    """p1 - p2, the lead of the likeliest token over the next."""
    is_best = vocab.ids(probs)[None, :] == best[:, None]
    return vocab.max(probs) - vocab.max(jnp.where(is_best, 0.0, probs))


def ranks(
    score: Float[Array, "B W"], still_open: Bool[Array, "B W"]
) -> Int[Array, "B W"]:
    """Place of every open position by score, 0 for the highest, ties to the left."""
    order = jnp.argsort(jnp.where(still_open, -score, jnp.inf), axis=1, stable=True)
    return jnp.argsort(order, axis=1)


def best_open(
    score: Float[Array, "B W"], still_open: Bool[Array, "B W"], count: Int[Array, " B"]
) -> Bool[Array, "B W"]:
    """The `count[b]` open positions of the highest score."""
    return still_open & (ranks(score, still_open) < count[:, None])


def choose(
    cfg: DecodeConfig, state: DecodeState, still_open: Bool[Array, "B W"]
) -> Bool[Array, "B W"]:
    """The best `tokens_per_step` positions and those a multi-commit rule lets in."""
    newest = state.belief
    count = jnp.full(still_open.shape[0], cfg.tokens_per_step)
    chosen = best_open(newest.score, still_open, count)
    if cfg.threshold is not None:
        chosen |= still_open & (newest.best_prob >= cfg.threshold)
    if cfg.entropy_bound is not None:
        chosen |= within_entropy_bound(newest.entropy, still_open, cfg.entropy_bound)
    if cfg.klass_conf is not None:
        stable = state.stable >= (cfg.klass_steps or KLASS_STEPS)
        chosen |= still_open & stable & (newest.best_prob >= cfg.klass_conf)
    return chosen


def within_entropy_bound(
    entropy: Float[Array, "B W"], still_open: Bool[Array, "B W"], bound: float
) -> Bool[Array, "B W"]:
    """The largest U of lowest entropies with sum(U) - max(U) <= bound.

    Source: EB-sampler, arXiv 2505.24857.
    """
    rank = ranks(-entropy, still_open)
    ascending = jnp.sort(jnp.where(still_open, entropy, jnp.inf), axis=1)
    # The sum without the last, which is the largest; not by taking it off again, which
    # would lose what is small beside it.
    before = jnp.pad(jnp.cumsum(ascending, axis=1)[:, :-1], ((0, 0), (1, 0)))
    size = jnp.sum(before <= bound, axis=1)
    return still_open & (rank < size[:, None])


def count_stable(
    cfg: DecodeConfig, state: DecodeState, kl: Float[Array, "B W"]
) -> Int[Array, "B W"]:
    """Forwards in a row whose KL stayed small at each position; NaN starts anew."""
    limit = KLASS_KL if cfg.klass_kl is None else cfg.klass_kl
    return jnp.where(kl < limit, state.stable + 1, 0)


def kl_stop(
    plan: Plan, state: DecodeState, calm: Int[Array, " B"]
) -> Bool[Array, " B"]:
    """Whether predictions have settled on tokens they are sure of.

    A small D only says that nothing moved; the entropy gate says it is decided too.
    """
    entropy = jnp.where(state.block_open, state.belief.entropy, -jnp.inf)
    sure = jnp.max(entropy, axis=1) <= plan.cfg.stop_entropy
    return (calm >= plan.cfg.kl_patience) & sure


def commit_step(
    plan: Plan, params: Params, state: DecodeState, rows: Bool[Array, " B"]
) -> DecodeState:
    """Commits tokens in `rows`, embeds them, softens the rest, closes what is done.

    Args:
        plan: the decode method.
        params: the model's weights.
        state: its belief is the newest prediction, `fill` the kind of commit.
        rows: `[B]` rows to change.
    """
    still_open = rows[:, None] & state.block_open
    filling = (state.fill != StopReason.RUNNING)[:, None]
    token = jnp.where(filling, state.belief.best, state.belief.token)
    prob = jnp.where(filling, state.belief.best_prob, state.belief.token_prob)
    chosen = jnp.where(filling, still_open, plan.choose(state, still_open))
    if plan.predicts_mask:
        chosen &= token != plan.denoiser.mask_id
    committed = _write_tokens(plan, params, state, chosen, token, prob)
    committed = soften(plan, params, committed, rows, plan.decode_weight)
    return _close(plan, params, committed, rows)


def _write_tokens(
    plan: Plan,
    params: Params,
    state: DecodeState,
    chosen: Bool[Array, "B W"],
    token: Int[Array, "B W"],
    prob: Float[Array, "B W"],
) -> DecodeState:
    start, length = state.block_start, state.block_length

    def written(values: Array, new: Array, start: Array = start) -> Array:
        old = take_window(values, start, length)
        keep = chosen.reshape(chosen.shape + (1,) * (old.ndim - 2))
        return put_window(values, start, jnp.where(keep, new, old))

    record = state.record
    used = jnp.broadcast_to(state.step[:, None] - 1, chosen.shape)
    return dataclasses.replace(
        state,
        tokens=written(state.tokens, token),
        committed=written(state.committed, chosen),
        embeds=written(
            state.embeds, plan.denoiser.embed(params, token), state.offset + start
        ),
        record=dataclasses.replace(
            record,
            commit_step=written(record.commit_step, used),
            commit_prob=written(record.commit_prob, prob),
            commit_entropy=written(record.commit_entropy, state.belief.entropy),
        ),
    )


def _close(
    plan: Plan, params: Params, state: DecodeState, rows: Bool[Array, " B"]
) -> DecodeState:
    """Ends the block, or the row, where a commit left nothing more to do."""
    if plan.cfg.trim_tail:
        state = _trim_tail(plan, params, state, rows)
    full = ~jnp.any(state.block_open, axis=1)
    spent = jnp.zeros_like(full)
    if plan.block_steps is not None:
        spent = state.block_step >= plan.block_steps
    limited = jnp.zeros_like(full)
    if plan.cfg.max_steps is not None:
        limited = state.step >= plan.cfg.max_steps
    text_ended = jnp.zeros_like(full)
    if plan.cfg.stop_at_eos:
        state, text_ended = _pad_behind_eos(plan, state, rows)

    block_ends = rows & (full | spent | text_ended)
    reason = jnp.where(
        state.fill != StopReason.RUNNING,
        state.fill,
        jnp.where(
            full,
            StopReason.COMMITTED,
            jnp.where(text_ended, StopReason.EOS, StopReason.STEP_LIMIT),
        ),
    ).astype(jnp.int32)
    last = state.block == state.num_blocks - 1
    row_ends = block_ends & (last | text_ended | limited)
    old_reason = take_window(state.record.block_stop, state.block, 1)[:, 0]
    block_stop = put_at(
        state.record.block_stop, state.block, jnp.where(block_ends, reason, old_reason)
    )
    next_phase = jnp.where(row_ends, Phase.DONE, Phase.OPEN)
    # An earlier block may have spent its steps and left positions open.
    left_open = jnp.any(state.fillable & ~state.committed, axis=1)
    row_reason = jnp.where(left_open, StopReason.STEP_LIMIT, reason)
    row_reason = jnp.where(text_ended, StopReason.EOS, row_reason)
    return dataclasses.replace(
        state,
        phase=jnp.where(block_ends, next_phase, state.phase).astype(jnp.int32),
        block=jnp.where(block_ends & ~row_ends, state.block + 1, state.block),
        block_step=jnp.where(block_ends, 0, state.block_step),
        stop_reason=jnp.where(row_ends, row_reason, state.stop_reason).astype(
            jnp.int32
        ),
        record=dataclasses.replace(state.record, block_stop=block_stop),
    )


def _pad_behind_eos(
    plan: Plan, state: DecodeState, rows: Bool[Array, " B"]
) -> tuple[DecodeState, Bool[Array, " B"]]:
    """Pads the open positions behind the first eos id once nothing before it is open.

    Returns:
        The state, and `[B]` True where that ended a text with positions still open.
    """
    eos = state.committed & is_eos(state.tokens, plan.denoiser.eos_ids)
    reached = jnp.cumprod(state.committed, axis=1, dtype=jnp.int32) > 0
    behind = jnp.cumsum(eos & reached, axis=1) > 0
    padded = rows[:, None] & behind & ~state.committed
    tokens = jnp.where(padded, plan.denoiser.pad_id, state.tokens)
    return dataclasses.replace(state, tokens=tokens), jnp.any(padded, axis=1)


def _trim_tail(
    plan: Plan, params: Params, state: DecodeState, rows: Bool[Array, " B"]
) -> DecodeState:
    """Closes the open positions behind the first committed eos id, with the pad id."""
    needed = text_length(state, plan.denoiser.eos_ids)[:, None]
    behind = jnp.arange(state.tokens.shape[1])[None, :] >= needed
    closed = rows[:, None] & behind & state.fillable & ~state.committed
    pad_row = plan.denoiser.embed(params, jnp.int32(plan.denoiser.pad_id))
    window = state.embeds[:, state.offset :]
    window = jnp.where(closed[..., None], pad_row[None, None], window)
    return dataclasses.replace(
        state,
        tokens=jnp.where(closed, plan.denoiser.pad_id, state.tokens),
        fillable=state.fillable & ~closed,
        embeds=state.embeds.at[:, state.offset :].set(window),
    )
