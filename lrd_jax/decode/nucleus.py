"""The nucleus, the likeliest tokens that hold `top_p` of the mass, and its mean.

Most nuclei are small, and are then found among the `few` likeliest tokens. Only rows
with a larger one pay for passes over the vocabulary and for a dense product with the
embedding table. Which way a row goes depends on that row alone, so its numbers are the
same in any company. Where the vocabulary is small, all go the dense way.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lrd_jax.base import Denoiser, Params
from lrd_jax.decode.vocabulary import WHOLE, Vocabulary

DENSE_ROWS = 64  # Rows of one dense product: fewer would waste reads of the table.
SMALL_VOCAB = 2048  # Up to here sorting out a few costs what the dense way does.
_COLUMNS = 16  # Tokens that stand together in the first round of `top_tokens`.


def few(vocab_size: int) -> int:
    """How many of the likeliest tokens are looked at first.

    Sorting out and gathering more of them would cost a row more than a fifth of the
    dense product, or, where V is large, more than a usual nucleus needs.
    """
    return min(64, vocab_size // 64)


def top_tokens(
    probs: Float[Array, "R V"], count: int
) -> tuple[Float[Array, "R n"], Int[Array, "R n"]]:
    """The `count` likeliest tokens of each row, in falling order: values and ids.

    In two rounds: the best columns of `_COLUMNS` tokens by their maximum hold them all,
    and sorting is then among those only.
    """
    rows, vocab_size = probs.shape
    if vocab_size % _COLUMNS or vocab_size // _COLUMNS < 2 * count:
        values, ids = jax.lax.top_k(probs, count)
        return values, ids
    width = vocab_size // _COLUMNS
    # Token v stands in column v % width, so that a column is spread over the rows of a
    # [16, width] array: its last axis stays long, which vector units need.
    table = probs.reshape(rows, _COLUMNS, width)
    _, column = jax.lax.top_k(jnp.max(table, axis=1), count)
    among = jnp.take_along_axis(table, column[:, None, :], axis=2).reshape(rows, -1)
    values, place = jax.lax.top_k(among, count)
    column = jnp.take_along_axis(column, place % count, axis=1)
    return values, place // count * width + column


def small_nucleus(
    values: Float[Array, "R n"], top_p: float
) -> tuple[Float[Array, " R"], Bool[Array, " R"]]:
    """The nucleus' threshold where the likeliest tokens settle it.

    Args:
        values: probabilities of the n likeliest tokens of more, in falling order.
        top_p: mass.

    Returns:
        `[R]` threshold, and `[R]` True where it is right: the mass is reached, and the
        last token is below it, so none of those left out can be tied with it.
    """
    if top_p >= 1:
        return jnp.zeros(len(values)), jnp.zeros(len(values), bool)
    crossing = jnp.sum(jnp.cumsum(values, axis=-1) < top_p, axis=-1)
    last = values.shape[-1] - 1
    at = jnp.minimum(crossing, last)
    threshold = jnp.take_along_axis(values, at[:, None], axis=-1)[:, 0]
    return threshold, (crossing <= last) & (values[:, -1] < threshold)


def search_threshold(
    probs: Float[Array, "R V"], top_p: float, vocab: Vocabulary = WHOLE
) -> Float[Array, " R"]:
    """The largest value whose tokens `p >= value` hold at least `top_p` of the mass.

    Exact without sorting V: non-negative floats are ordered like their bit patterns,
    so 30 halvings of [0, 2) end at the very probability that crosses `top_p`, and all
    tokens tied with it are in.

    Args:
        probs: `[R, V]` float32, each row summing to one.
        top_p: mass, in (0, 1].
        vocab: how the axis V lies.

    Returns:
        `[R]`; 0, which lets all tokens in, where `top_p` is 1 or rounding keeps the sum
        below it.
    """
    if top_p >= 1:
        return jnp.zeros(len(probs))

    def value(bits: Int[Array, " R"]) -> Float[Array, " R"]:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(_: Any, bounds: Any) -> Any:
        low, high = bounds
        middle = low + (high - low) // 2
        inside = probs >= value(middle)[:, None]
        enough = vocab.sum(jnp.where(inside, probs, 0.0)) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(len(probs), jnp.int32)
    above_one = jax.lax.bitcast_convert_type(jnp.float32(2.0), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, jnp.full_like(low, above_one)))
    return value(low)


def nucleus(
    probs: Float[Array, "R V"], top_p: float, vocab: Vocabulary = WHOLE
) -> Bool[Array, "R V"]:
    """N_i: which tokens make up `top_p` of the mass (SPEC of Eq. 3)."""
    return probs >= search_threshold(probs, top_p, vocab)[:, None]


def mean_embeddings(
    denoiser: Denoiser,
    params: Params,
    probs: Float[Array, "R V"],
    wanted: Bool[Array, " R"],
    top_p: float,
    vocab: Vocabulary = WHOLE,
) -> tuple[Float[Array, "R D"], Float[Array, " R"]]:
    """Mean embedding over the nucleus, and how many tokens of positive mass are in it.

    Args:
        denoiser: the model.
        params: its weights.
        probs: `[R, V]` float32, each row summing to one.
        wanted: `[R]` rows to average for; the others get 0 and a size of NaN.
        top_p: mass, in (0, 1].
        vocab: how the axis V lies.

    Returns:
        `[R, D]` float32 and `[R]`.
    """
    vocab_size = vocab.size(probs)
    if vocab_size <= SMALL_VOCAB:
        return _only(wanted, *_dense_mean(denoiser, params, probs, top_p, vocab))
    count = few(vocab_size)
    values, column = top_tokens(probs, min(count, probs.shape[1]))
    threshold, known = small_nucleus(vocab.best_of(values, count), top_p)
    # A device's own likeliest hold all that it has of a nucleus of `count` tokens.
    kept, size = _keep(values, threshold, vocab)
    expected = denoiser.expect(params, kept, column)
    expected, size = _only(wanted & known, expected, size)
    large = wanted & ~known
    return _add_large(denoiser, params, probs, large, top_p, vocab, expected, size)


def _only(
    rows: Bool[Array, " R"], expected: Float[Array, "R D"], size: Float[Array, " R"]
) -> tuple[Float[Array, "R D"], Float[Array, " R"]]:
    """Leaves 0 and a size of NaN in the other rows."""
    return jnp.where(rows[:, None], expected, 0.0), jnp.where(rows, size, jnp.nan)


def _keep(
    values: Float[Array, "R n"], threshold: Float[Array, " R"], vocab: Vocabulary
) -> tuple[Float[Array, "R n"], Float[Array, " R"]]:
    """Probabilities renormalised over the nucleus, and how many of them are above 0."""
    inside = values >= threshold[:, None]
    kept = jnp.where(inside, values, 0.0)
    size = vocab.sum(kept > 0).astype(jnp.float32)
    return kept / vocab.sum(kept)[:, None], size


def _dense_mean(
    denoiser: Denoiser,
    params: Params,
    probs: Float[Array, "R V"],
    top_p: float,
    vocab: Vocabulary,
) -> tuple[Float[Array, "R D"], Float[Array, " R"]]:
    """Mean embedding and size of the nucleus by passes over all of V."""
    kept, size = _keep(probs, search_threshold(probs, top_p, vocab), vocab)
    return denoiser.expect(params, kept), size


def _add_large(
    denoiser: Denoiser,
    params: Params,
    probs: Float[Array, "R V"],
    large: Bool[Array, " R"],
    top_p: float,
    vocab: Vocabulary,
    expected: Float[Array, "R D"],
    size: Float[Array, " R"],
) -> tuple[Float[Array, "R D"], Float[Array, " R"]]:
    """Fills in the rows of `large`, a few at a time: as many turns as they need."""
    rows = len(probs)
    turns = -(-rows // DENSE_ROWS)
    share = -(-rows // turns)
    order = jnp.argsort(~large, stable=True)  # The large ones first.
    count = jnp.sum(large)

    def fill(turn: Any, filled: Any) -> Any:
        expected, size = filled
        place = turn * share + jnp.arange(share)
        row = order[jnp.minimum(place, rows - 1)]
        mean, found = _dense_mean(denoiser, params, probs[row], top_p, vocab)
        to = jnp.where(place < count, row, rows)  # `rows` is nowhere: dropped.
        return (
            expected.at[to].set(mean, mode="drop"),
            size.at[to].set(found, mode="drop"),
        )

    return jax.lax.fori_loop(0, (count + share - 1) // share, fill, (expected, size))
