"""The masked-diffusion loss of LLaDA's SFT, on a `Denoiser` and so for both families.

A row draws a masking probability t and each response token is masked with it. The
model predicts the masked ones from all the rest; a row's loss is

    sum over masked response tokens of CE / t / W,

W being the length of the response with its padding, and the batch's the mean of its
rows. In expectation it bounds the response's negative log-likelihood per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lrd_jax.base import Denoiser, Params
from lrd_jax.decode import belief
from lrd_jax.decode.nucleus import nucleus

# LLaDA's: keeps 1 / t below a thousand.
LEAST_PROB = 1e-3


class Batch(NamedTuple):
    """B prompts with their responses, all padded to the same two lengths.

    Attributes:
        prompt_ids: `[B, P]`, padded on the left.
        prompt_mask: `[B, P]` True at real tokens.
        response_ids: `[B, W]`, padded with the pad id, which is to be predicted too.
        group: `[B]` which entry of the log a row's loss belongs to.
    """

    prompt_ids: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    response_ids: Int[Array, "B W"]
    group: Int[Array, " B"]


class Noise(NamedTuple):
    """What is hidden from the model.

    Attributes:
        prob: `[B]` t, the masking probability of a row.
        masked: `[B, W]` True at masked response tokens.
    """

    prob: Float[Array, " B"]
    masked: Bool[Array, "B W"]


def draw_noise(key: Key[Array, ""], rows: int, window: int) -> Noise:
    """Draws t, uniform in [`LEAST_PROB`, 1] and spread evenly over the rows, and masks.

    One t falls into each of B equal parts of the range (a low-discrepancy draw), so
    that batches differ less than with independent ones.
    """
    shift_key, mask_key = jax.random.split(key)
    del key
    shift = jax.random.uniform(shift_key)
    even = (shift + jnp.arange(rows, dtype=jnp.float32) / rows) % 1.0
    prob = 1.0 - (1.0 - LEAST_PROB) * even
    masked = jax.random.uniform(mask_key, (rows, window)) < prob[:, None]
    return Noise(prob, masked)


def masked_embeds(
    denoiser: Denoiser,
    params: Params,
    batch: Batch,
    masked: Bool[Array, "B W"],
) -> Float[Array, "B T D"]:
    """What the model reads: prompt, then response with the mask token where masked."""
    hidden_ids = jnp.where(masked, denoiser.mask_id, batch.response_ids)
    ids = jnp.concatenate([batch.prompt_ids, hidden_ids], axis=1)
    return denoiser.embed(params, ids)


def response_logits(
    denoiser: Denoiser,
    params: Params,
    batch: Batch,
    embeds: Float[Array, "B T D"],
) -> Float[Array, "R V"]:
    """Predictions for the B W response positions, row after row."""
    rows, length = embeds.shape[:2]
    window = batch.response_ids.shape[1]
    open_mask = jnp.ones((rows, window), bool)
    key_mask = jnp.concatenate([batch.prompt_mask, open_mask], axis=1)
    first = jnp.argmax(key_mask, axis=1, keepdims=True)
    positions = jnp.maximum(jnp.arange(length)[None] - first, 0)
    hidden, _ = denoiser.hidden(params, embeds, positions, key_mask)
    flat = hidden[:, length - window :].reshape(rows * window, -1)
    return denoiser.logits(params, flat)


def row_losses(
    denoiser: Denoiser,
    logits: Float[Array, "R V"],
    batch: Batch,
    noise: Noise,
) -> Float[Array, " B"]:
    """Each row's loss, see the module's docstring.

    The mask token gets no probability, as in decoding.
    """
    rows, window = batch.response_ids.shape
    barred = jnp.arange(logits.shape[-1]) == denoiser.mask_id
    logits = jnp.where(barred[None], -jnp.inf, logits)
    target = batch.response_ids.reshape(-1, 1)
    right = jnp.take_along_axis(logits, target, axis=-1)[:, 0]
    surprise = jax.nn.logsumexp(logits, axis=-1) - right
    surprise = jnp.where(noise.masked, surprise.reshape(rows, window), 0.0)
    return jnp.sum(surprise, axis=1) / noise.prob / window


def soften(
    denoiser: Denoiser,
    params: Params,
    batch: Batch,
    masked: Bool[Array, "B W"],
    r_f: Float[Array, " B"],
    top_p: float,
) -> Float[Array, "B T D"]:
    """What LRD reads after a first forward: soft embeddings where tokens are masked.

    The first forward's beliefs are constants for the gradient; the embedding table
    that they mix is not.

    Args:
        denoiser: the model.
        params: its weights.
        batch: prompts and responses.
        masked: `[B, W]` where the response is masked.
        r_f: `[B]` largest weight of the predicted embeddings, per row.
        top_p: nucleus mass of the predicted embeddings.

    Returns:
        `[B, P + W, D]` embeddings of prompt and response.
    """
    rows, window = masked.shape
    hard = masked_embeds(denoiser, params, batch, masked)
    frozen = jax.lax.stop_gradient((params, hard))
    new = belief.predict(
        response_logits(denoiser, frozen[0], batch, frozen[1]), denoiser.mask_id
    )
    kept = jnp.where(nucleus(new.probs, top_p), new.probs, 0.0)
    kept = kept / jnp.sum(kept, axis=-1, keepdims=True)
    mask_row = denoiser.embed(params, jnp.array(denoiser.mask_id))
    fully_soft = belief.soft_embeddings(
        denoiser.expect(params, kept).reshape(rows, window, -1),
        new.entropy.reshape(rows, window),
        mask_row,
        1.0,
        denoiser.vocab_size,
    )
    # Soft embeddings are linear in r_f, which here differs from row to row.
    weight = r_f.astype(mask_row.dtype)[:, None, None]
    mask = mask_row[None, None]
    soft = mask + weight * (fully_soft - mask)
    start = hard.shape[1] - window
    response = jnp.where(masked[..., None], soft, hard[:, start:])
    return jnp.concatenate([hard[:, :start], response], axis=1)
