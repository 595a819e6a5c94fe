"""What a prediction says: entropy, KL, soft embeddings. Pure maths, by rows.

Everything here is float32 and works on R rows of the output head at once; rows never
mix, so a row's numbers do not depend on its neighbours. Where the vocabulary is split
over devices, `[R, V]` arrays are this device's part, and the rest is for all of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lrd_jax.base import Denoiser, Params
from lrd_jax.decode.nucleus import mean_embeddings, nucleus
from lrd_jax.decode.vocabulary import WHOLE, Vocabulary

TILE_BYTES = 128 * 2**20  # Largest float32 `[2 R, V]` array of one tile.
# A tile this small stays in the caches of a CPU with all that is computed from it, but
# with fewer than 128 rows (256 for the head, with the old ones) matrix units would wait
# for the head's weights.
CACHED_BYTES, FULL_ROWS = 16 * 2**20, 128

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
        vocab: how the axis V lies.
    """

    logits: Float[Array, "R V"]
    log_probs: Float[Array, "R V"]
    probs: Float[Array, "R V"]
    entropy: Float[Array, " R"]
    best: Int[Array, " R"]
    best_prob: Float[Array, " R"]
    vocab: Vocabulary = WHOLE


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


def predict(
    logits: Float[Array, "R V"], excluded: int | None, vocab: Vocabulary = WHOLE
) -> Prediction:
    """Softmax and its summary; `excluded` is a token that gets probability 0."""
    if excluded is not None:
        barred = vocab.ids(logits) == excluded
        logits = jnp.where(barred[None, :], -jnp.inf, logits)
    highest = vocab.max(logits)[:, None]
    shifted = logits - highest
    masses = jnp.exp(shifted)
    total = vocab.sum(masses)[:, None]
    probs, log_probs = masses / total, shifted - jnp.log(total)
    best = vocab.first(logits == highest)
    # 0 log 0 counts as 0; the product itself is 0 * -inf = NaN.
    terms = jnp.where(probs > 0, probs * log_probs, 0.0)
    return Prediction(
        logits=logits,
        log_probs=log_probs,
        probs=probs,
        entropy=jnp.maximum(-vocab.sum(terms), 0.0),
        best=best,
        best_prob=vocab.at(probs, best),
        vocab=vocab,
    )


def kl_divergence(new: Prediction, old: Prediction) -> Float[Array, " R"]:
    """KL(new || old) per row in nats (Eq. 6).

    Never below 0, where rounding would put it: `D < 0` must stay impossible, since a
    threshold of 0 means "never".
    """
    terms = new.probs * (new.log_probs - old.log_probs)
    terms = jnp.where(new.probs > 0, terms, 0.0)
    return jnp.maximum(new.vocab.sum(terms), 0.0)


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
    logits: Float[Array, "R V"],
    top_p: float,
    top_k: int | None,
    vocab: Vocabulary = WHOLE,
) -> Float[Array, "R V"]:
    """Sets the logits outside the nucleus, then outside the k likeliest, to -inf."""
    if top_p < 1:
        inside = nucleus(vocab.softmax(logits), top_p, vocab)
        logits = jnp.where(inside, logits, -jnp.inf)
    if top_k is not None and top_k < vocab.size(logits):
        here = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0]
        least = vocab.best_of(here, top_k)[:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def draw(
    logits: Float[Array, "R V"], keys: Key[Array, " R"], vocab: Vocabulary = WHOLE
) -> Int[Array, " R"]:
    """One sample of each row's softmax, by its own key: argmax(logits + Gumbel).

    The noise is that of `jax.random.categorical`, however the vocabulary is split.
    """
    shape = (vocab.size(logits),)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32))(keys)
    score = logits + vocab.own(noise)
    return vocab.first(score == vocab.max(score)[:, None])


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
    vocab = Vocabulary(shards=denoiser.vocab_size // logits.shape[-1])
    new_logits, old_logits = jnp.split(logits, 2)
    new = predict(new_logits, excluded, vocab)
    old = predict(old_logits, excluded, vocab)
    token, score = pick(new, keys)
    if top_p > 0:
        expected, size = mean_embeddings(
            denoiser, params, new.probs, still_open, top_p, vocab
        )
    else:
        expected = jnp.zeros(hidden.shape, jnp.float32)
        size = jnp.full(hidden.shape[:1], jnp.nan, jnp.float32)
    return Reading(
        entropy=new.entropy,
        best=new.best,
        best_prob=new.best_prob,
        token=token,
        token_prob=vocab.at(new.probs, token),
        score=score,
        kl=kl_divergence(new, old),
        expected=expected,
        nucleus_size=size,
        finite=vocab.all(jnp.isfinite(new_logits)),
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
