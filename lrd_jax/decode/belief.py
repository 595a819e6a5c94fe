"""What a prediction says: entropy, KL, soft embeddings. Pure maths, by rows.

Everything here is float32 and works on R rows of the output head at once; rows never
mix, so a row's numbers do not depend on its neighbours.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lrd_jax.base import Denoiser, Params
from lrd_jax.decode.nucleus import mean_embeddings, nucleus

TILE_BYTES = 128 * 2**20  # Largest float32 `[2 R, V]` array of one tile.
# A tile this small stays in the caches of a CPU, but with fewer than 128 rows (256 for
# the head, with the old ones) matrix units would wait for the head's weights.
CACHED_BYTES, FULL_ROWS = 32 * 2**20, 128

TreeT = TypeVar("TreeT")


class Prediction(NamedTuple):
    """R predictive distributions, before any sampling temperature.

    Attributes:
        logits: `[R, V]`; -inf at the mask token where it may not be predicted.
        log_probs: `[R, V]`.
        probs: `[R, V]`.
        entropy: `[R]` nats.
        best: `[R]` the likeliest token, the first of equals.
        best_prob: `[R]` its probability.
    """

    logits: Float[Array, "R V"]
    log_probs: Float[Array, "R V"]
    probs: Float[Array, "R V"]
    entropy: Float[Array, " R"]
    best: Int[Array, " R"]
    best_prob: Float[Array, " R"]


# Chooses a token for each row and how eagerly to commit it (higher goes first).
PickFn = Callable[[Prediction, Any], tuple[Int[Array, " R"], Float[Array, " R"]]]


class Reading(NamedTuple):
    """What R rows of hidden state say, without anything of size V.

    Attributes:
        entropy: `[R]` nats.
        best: `[R]` the likeliest token.
        best_prob: `[R]` its probability.
        token: `[R]` the token to commit: `best`, or a sample.
        token_prob: `[R]` its probability.
        score: `[R]` how eagerly to commit it, higher first.
        kl: `[R]` KL(new || old), nats.
        expected: `[R, D]` mean embedding over the nucleus; 0 in rows that are not open.
        nucleus_size: `[R]` tokens in it; NaN where no embeddings are averaged.
        finite: `[R]` whether every logit is a number.
    """

    entropy: Float[Array, "..."]
    best: Int[Array, "..."]
    best_prob: Float[Array, "..."]
    token: Int[Array, "..."]
    token_prob: Float[Array, "..."]
    score: Float[Array, "..."]
    kl: Float[Array, "..."]
    expected: Float[Array, "... D"]
    nucleus_size: Float[Array, "..."]
    finite: Bool[Array, "..."]


def predict(logits: Float[Array, "R V"], excluded: int | None) -> Prediction:
    """Softmax and its summary; `excluded` is a token that gets probability 0."""
    if excluded is not None:
        barred = jnp.arange(logits.shape[-1]) == excluded
        logits = jnp.where(barred[None, :], -jnp.inf, logits)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - highest
    masses = jnp.exp(shifted)
    total = jnp.sum(masses, axis=-1, keepdims=True)
    probs, log_probs = masses / total, shifted - jnp.log(total)
    best = _first(logits == highest)
    return Prediction(
        logits=logits,
        log_probs=log_probs,
        probs=probs,
        entropy=jnp.maximum(-_sum_where_positive(probs, probs * log_probs), 0.0),
        best=best,
        best_prob=_at(probs, best),
    )


def _first(marked: Bool[Array, "R V"]) -> Int[Array, " R"]:
    """The first marked token; the last of all where none is, as in a row of NaN.

    `argmax` finds it too, but XLA for CPU walks through that one number at a time.
    """
    last = marked.shape[-1] - 1
    ids = jnp.arange(last + 1, dtype=jnp.int32)
    return jnp.min(jnp.where(marked, ids[None, :], last), axis=-1)


def _sum_where_positive(
    probs: Float[Array, "R V"], terms: Float[Array, "R V"]
) -> Float[Array, " R"]:
    # 0 log 0 counts as 0; the product itself is 0 * -inf = NaN.
    return jnp.sum(jnp.where(probs > 0, terms, 0.0), axis=-1)


def _at(values: Float[Array, "R V"], ids: Int[Array, " R"]) -> Float[Array, " R"]:
    return jnp.take_along_axis(values, ids[:, None], axis=-1)[:, 0]


def kl_divergence(new: Prediction, old: Prediction) -> Float[Array, " R"]:
    """KL(new || old) per row in nats (Eq. 6).

    Never below 0, where rounding would put it: `D < 0` must stay impossible, since a
    threshold of 0 means "never".
    """
    terms = new.probs * (new.log_probs - old.log_probs)
    return jnp.maximum(_sum_where_positive(new.probs, terms), 0.0)


def mix_weight(
    entropy: Float[Array, "..."], r_f: float, vocab_size: int
) -> Float[Array, "..."]:
    """alpha = r_f (1 - H / log V), Eq. 4: the surer, the more of the prediction."""
    return r_f * (1.0 - entropy / jnp.log(jnp.float32(vocab_size)))


def soft_embeddings(
    expected: Float[Array, "B W D"],
    entropy: Float[Array, "B W"],
    mask_row: Float[Array, " D"],
    r_f: float,
    vocab_size: int,
) -> Float[Array, "B W D"]:
    """(1 - alpha) e_M + alpha * expected (Eq. 3), in the dtype of `mask_row`."""
    mask = mask_row.astype(jnp.float32)[None, None, :]
    alpha = mix_weight(entropy, r_f, vocab_size)[..., None]
    return ((1.0 - alpha) * mask + alpha * expected).astype(mask_row.dtype)


def keep_likely(
    logits: Float[Array, "R V"], top_p: float, top_k: int | None
) -> Float[Array, "R V"]:
    """Sets the logits outside the nucleus, then outside the k likeliest, to -inf."""
    if top_p < 1:
        inside = nucleus(jax.nn.softmax(logits, axis=-1), top_p)
        logits = jnp.where(inside, logits, -jnp.inf)
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def draw(logits: Float[Array, "R V"], keys: Key[Array, " R"]) -> Int[Array, " R"]:
    """One sample of each row's softmax, by its own key."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def read_rows(
    denoiser: Denoiser,
    params: Params,
    hidden: Float[Array, "R D"],
    old_hidden: Float[Array, "R D"],
    keys: Key[Array, " R"],
    still_open: Bool[Array, " R"],
    *,
    pick: PickFn,
    top_p: float,
    predicts_mask: bool,
) -> Reading:
    """Reads the predictions of R rows and how they moved since the last forward.

    The old logits are recomputed from the old hidden rows: the head is read once for
    both, and nothing of size V outlives this call.

    Args:
        denoiser: the model.
        params: its weights.
        hidden: `[R, D]` rows of the newest forward.
        old_hidden: `[R, D]` the same positions one forward earlier.
        keys: `[R]` noise for sampling, one key a row.
        still_open: `[R]` rows that the next forward may read a soft embedding for.
        pick: the method's choice of token and score.
        top_p: nucleus mass for the mean embedding; 0 skips it.
        predicts_mask: whether the mask token keeps its probability.
    """
    excluded = None if predicts_mask else denoiser.mask_id
    logits = denoiser.logits(params, jnp.concatenate([hidden, old_hidden]))
    new_logits, old_logits = jnp.split(logits, 2)
    new, old = predict(new_logits, excluded), predict(old_logits, excluded)
    token, score = pick(new, keys)
    if top_p > 0:
        expected, size = mean_embeddings(denoiser, params, new.probs, still_open, top_p)
    else:
        expected = jnp.zeros(hidden.shape, jnp.float32)
        size = jnp.full(hidden.shape[:1], jnp.nan, jnp.float32)
    return Reading(
        entropy=new.entropy,
        best=new.best,
        best_prob=new.best_prob,
        token=token,
        token_prob=_at(new.probs, token),
        score=score,
        kl=kl_divergence(new, old),
        expected=expected,
        nucleus_size=size,
        finite=jnp.all(jnp.isfinite(new_logits), axis=-1),
    )


def map_tiles(fn: Callable[[Any], TreeT], rows: Any, tile: int) -> TreeT:
    """`fn` over `tile` rows at most, so that only one tile's temporaries exist.

    Args:
        fn: maps a pytree of `[tile, ...]` leaves to another, row by row.
        rows: pytree of `[R, ...]` leaves.
        tile: most rows at a time.

    Returns:
        Pytree of `[R, ...]` leaves.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    if count <= tile:
        return fn(rows)
    num_tiles = -(-count // tile)
    tile = -(-count // num_tiles)  # Evenly, so that little is computed twice.
    # The last tile repeats the last row rather than padding with made-up numbers.
    index = jnp.minimum(jnp.arange(num_tiles * tile), count - 1)
    index = index.reshape(num_tiles, tile)
    tiles = jax.lax.map(lambda i: fn(jax.tree.map(lambda x: x[i], rows)), index)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], tiles)


def tile_rows(vocab_size: int) -> int:
    """How many rows one tile holds, each with V float32 logits of two forwards."""
    row_bytes = 2 * 4 * vocab_size
    rows = max(FULL_ROWS, CACHED_BYTES // row_bytes)
    return max(1, min(rows, TILE_BYTES // row_bytes))
