"""LLaDA and Dream as Denoisers: where a prediction is read, which head is used."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lrd_jax.base import MODEL, Denoiser, KVCache, Params
from lrd_jax.config import ModelConfig
from lrd_jax.model import backbone, layers
from lrd_jax.model.int8 import Weights, rows_of, unpack
from lrd_jax.model.published import from_published as from_published
from lrd_jax.model.published import to_published as to_published


def make_denoiser(cfg: ModelConfig, *, unroll: bool = False) -> Denoiser:
    """The model of `cfg` as pure functions over its parameters.

    Args:
        cfg: the model.
        unroll: see `backbone.run_blocks`; for training small models.
    """
    lead = 1 if cfg.family == "dream" else 0
    return Denoiser(
        embed=functools.partial(_embed, cfg.vocab_size),
        hidden=functools.partial(_hidden, cfg, lead, unroll),
        logits=functools.partial(_logits, cfg.tie_embeddings),
        expect=functools.partial(_expect, cfg.vocab_size),
        init_cache=functools.partial(backbone.init_cache, cfg),
        mask_id=cfg.mask_id,
        eos_ids=cfg.eos_ids,
        pad_id=cfg.pad_id,
        vocab_size=cfg.vocab_size,
        lead=lead,
        max_length=cfg.max_length,
    )


def _embed(
    vocab_size: int, params: Params, ids: Int[Array, "..."]
) -> Float[Array, "... D"]:
    table = params["embed"]
    if len(table) == vocab_size:
        return rows_of(table, ids)
    column = ids - jax.lax.axis_index(MODEL) * len(table)
    here = (column >= 0) & (column < len(table))
    rows = rows_of(table, jnp.clip(column, 0, len(table) - 1))
    return jax.lax.psum(jnp.where(here[..., None], rows, 0), MODEL)


def _hidden(
    cfg: ModelConfig,
    lead: int,
    unroll: bool,
    params: Params,
    embeds: Float[Array, "B n D"],
    positions: Int[Array, "B n"],
    key_mask: Bool[Array, "B T"],
    cache: KVCache | None = None,
    start: Int[Array, " B"] | None = None,
    write: Bool[Array, "B n"] | None = None,
) -> tuple[Float[Array, "B m D"], KVCache | None]:
    slot = None if start is None else start - lead
    hidden, cache = backbone.run_blocks(
        cfg, params, embeds, positions, key_mask, cache, slot, write, unroll=unroll
    )
    if not lead:
        return hidden, cache
    # Dream predicts i at i - 1; a row's first real token has only itself to read.
    if start is None:
        before = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
    else:
        before, hidden, positions = hidden[:, :-1], hidden[:, 1:], positions[:, 1:]
    return jnp.where(positions[..., None] == 0, hidden, before), cache


def _logits(
    tied: bool, params: Params, hidden: Float[Array, "R D"]
) -> Float[Array, "R V"]:
    head = params["embed"] if tied else params["head"]
    spec = "rd,vd->rv" if tied else "rd,dv->rv"
    factor, scale = unpack(head)
    logits = jnp.einsum(
        spec,
        hidden.astype(head.dtype),
        factor,
        precision=layers.precision_for(head.dtype),
        preferred_element_type=layers.at_least_float32(head.dtype),
    )
    if scale is not None:
        logits = logits * scale[None]
    return logits.astype(jnp.float32)


def _expect(
    vocab_size: int,
    params: Params,
    probs: Float[Array, "R n"],
    ids: Int[Array, "R n"] | None = None,
) -> Float[Array, "R D"]:
    table = params["embed"]
    mean = _mean_of_all(table, probs) if ids is None else _mean_of(table, probs, ids)
    return mean if len(table) == vocab_size else jax.lax.psum(mean, MODEL)


def _mean_of_all(table: Weights, probs: Float[Array, "R V"]) -> Float[Array, "R D"]:
    factor, scale = unpack(table)
    if scale is not None:  # Of the axis that is summed: it goes on the other factor.
        probs = probs * scale[None].astype(probs.dtype)
    # Probabilities rounded to bfloat16 move the mean by at most 2^-8 of sum(p |e|), as
    # rounding to the model's own dtype does elsewhere.
    return jnp.einsum(
        "rv,vd->rd",
        probs.astype(table.dtype),
        factor,
        precision=layers.precision_for(table.dtype),
        preferred_element_type=layers.at_least_float32(table.dtype),
    ).astype(jnp.float32)


def _mean_of(
    table: Weights, probs: Float[Array, "R n"], ids: Int[Array, "R n"]
) -> Float[Array, "R D"]:
    # Products and sum, not a matrix product: XLA then needs no float32 copy of the
    # embeddings, and float32 is not rounded on the way.
    return jnp.sum(probs[..., None] * rows_of(table, ids).astype(jnp.float32), axis=1)
