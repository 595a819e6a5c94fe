"""Phase 1, latent refinement: soften every open position, predict, see what moved."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lrd_jax.base import Params
from lrd_jax.decode import belief
from lrd_jax.decode.plan import Plan
from lrd_jax.decode.state import DecodeState, Phase, put_window, take_window


def refine_step(
    plan: Plan, params: Params, state: DecodeState, rows: Bool[Array, " B"]
) -> DecodeState:
    """Gives the open positions of `rows` their soft embeddings; commits nothing."""
    return soften(plan, params, state, rows, plan.refine_weight)


def soften(
    plan: Plan,
    params: Params,
    state: DecodeState,
    rows: Bool[Array, " B"],
    r_f: float,
) -> DecodeState:
    """Open positions of the active block read a mixture of prediction and mask.

    Args:
        plan: the decode method.
        params: the model's weights.
        state: its belief is the newest prediction.
        rows: `[B]` rows to change.
        r_f: weight of the prediction, Eq. 4; 0 puts the plain mask back.
    """
    if plan.mixing_top_p == 0:  # Nothing is ever mixed: the masks are plain already.
        return state
    mask_row = plan.denoiser.embed(params, jnp.int32(plan.denoiser.mask_id))
    soft = belief.soft_embeddings(
        state.belief.expected,
        state.belief.entropy,
        mask_row,
        r_f,
        plan.denoiser.vocab_size,
    )
    start = state.offset + state.block_start
    old = take_window(state.embeds, start, state.block_length)
    change = rows[:, None] & state.block_open
    new = jnp.where(change[..., None], soft, old)
    return dataclasses.replace(state, embeds=put_window(state.embeds, start, new))


def reduce_kl(
    kl: Float[Array, "B W"],
    in_block: Bool[Array, "B W"],
    still_open: Bool[Array, "B W"],
    reduction: str,
) -> Float[Array, " B"]:
    """D: how far the block's predictions moved, in nats.

    Args:
        kl: `[B, W]` divergence at each position.
        in_block: `[B, W]` positions that are generated.
        still_open: `[B, W]` those of them that are not committed yet.
        reduction: `mean` (Eq. 6), `sum`, `max` or `mean_open`.
    """
    counted = still_open if reduction == "mean_open" else in_block
    kept = jnp.where(counted, kl, 0.0)
    if reduction == "sum":
        return jnp.sum(kept, axis=1)
    if reduction == "max":
        return jnp.max(kept, axis=1)
    return jnp.sum(kept, axis=1) / jnp.maximum(
        jnp.sum(counted, axis=1, dtype=kept.dtype), 1
    )


def settled(
    plan: Plan, state: DecodeState, kl: Float[Array, " B"]
) -> Bool[Array, " B"]:
    """Whether phase 1 is over, after a refinement forward that gave D = `kl`.

    `state.refine_run` counts that forward already, `state.last_kl` is D before it.
    """
    cfg = plan.cfg
    if cfg.refine_per_commit > 0:
        return state.refine_run >= cfg.refine_per_commit
    moved = jnp.abs(kl - state.last_kl) if cfg.kl_criterion == "delta" else kl
    # A block's first D has no predecessor: NaN, and no comparison with it holds.
    return (moved < cfg.tau_refine) | (state.refine_run >= cfg.max_refine_steps)


def after_commit(plan: Plan) -> Phase:
    """What follows the forward after a commit."""
    return Phase.REFINE if plan.cfg.refine_per_commit != 0 else Phase.COMMIT
