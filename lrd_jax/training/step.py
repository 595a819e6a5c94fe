"""One update: loss, gradient, optimiser, running average, sums for the log."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from lrd_jax.base import Denoiser, Params
from lrd_jax.training import loss
from lrd_jax.training.loss import Batch
from lrd_jax.training.settings import TrainConfig

# The average follows the weights closely at first: with decay d, step n counts as
# min(d, (1 + n) / (10 + n)).
AVERAGE_LAG = 10


class TrainState(NamedTuple):
    """All that a step changes; what is saved.

    Attributes:
        step: updates made.
        params: the weights.
        average: their running average.
        opt_state: the optimiser's.
        loss_sums: `[groups]` rows' losses since the last line of the log.
        row_counts: `[groups]` rows since then.
    """

    step: Int[Array, ""]
    params: Params
    average: Params
    opt_state: optax.OptState
    loss_sums: Float[Array, " groups"]
    row_counts: Float[Array, " groups"]


StepFn = Callable[[TrainState, Batch], TrainState]


def init_state(
    params: Params, optimiser: optax.GradientTransformation, num_groups: int
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.array(0, jnp.int32),
        params=params,
        # An array of its own: a step gives both away.
        average=jax.tree.map(jnp.copy, params),
        opt_state=optimiser.init(params),
        loss_sums=jnp.zeros(num_groups, jnp.float32),
        row_counts=jnp.zeros(num_groups, jnp.float32),
    )


def batch_loss(
    denoiser: Denoiser,
    cfg: TrainConfig,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    *,
    soft: bool,
) -> tuple[Float[Array, ""], Float[Array, " B"]]:
    """The mean of the rows' losses, and these.

    Args:
        denoiser: the model.
        cfg: gives the range of r_f and the nucleus of soft inputs.
        params: the weights.
        batch: prompts and responses.
        key: decides masks, and r_f.
        soft: whether masked inputs are soft embeddings.
    """
    noise_key, r_f_key = jax.random.split(key)
    del key
    rows, window = batch.response_ids.shape
    noise = loss.draw_noise(noise_key, rows, window)
    if soft:
        low, high = cfg.soft_r_f
        r_f = jax.random.uniform(r_f_key, (rows,), minval=low, maxval=high)
        embeds = loss.soften(denoiser, params, batch, noise.masked, r_f, cfg.soft_top_p)
    else:
        embeds = loss.masked_embeds(denoiser, params, batch, noise.masked)
    logits = loss.response_logits(denoiser, params, batch, embeds)
    losses = loss.row_losses(denoiser, logits, batch, noise)
    return jnp.mean(losses), losses


def make_step_fn(
    denoiser: Denoiser,
    cfg: TrainConfig,
    optimiser: optax.GradientTransformation,
    *,
    soft: bool,
) -> StepFn:
    """A jitted step, which takes its state for itself (donates it)."""
    grad_fn = jax.grad(
        functools.partial(batch_loss, denoiser, cfg, soft=soft), has_aux=True
    )

    def step_fn(state: TrainState, batch: Batch) -> TrainState:
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        grads, losses = grad_fn(state.params, batch, key)
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = (state.step + 1).astype(jnp.float32)
        decay = jnp.minimum(cfg.average_decay, (1 + step) / (AVERAGE_LAG + step))
        return TrainState(
            step=state.step + 1,
            params=params,
            average=jax.tree.map(
                lambda old, new: new + decay * (old - new), state.average, params
            ),
            opt_state=opt_state,
            loss_sums=state.loss_sums.at[batch.group].add(losses),
            row_counts=state.row_counts.at[batch.group].add(1.0),
        )

    return jax.jit(step_fn, donate_argnums=0)
