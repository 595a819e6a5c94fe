"""The nucleus and its mean embedding, against their definitions in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import lrd

from lrd_jax.config import ModelConfig
from lrd_jax.decode import nucleus
from lrd_jax.model import backbone, families

R = 40
SMALL, LARGE = 24, 4096  # Vocabularies.
FEW = nucleus.few(LARGE)
nucleus_of = jax.jit(nucleus.nucleus, static_argnums=1)
top_tokens = jax.jit(nucleus.top_tokens, static_argnums=1)


def random_probs(seed, scale=3.0, vocab_size=SMALL, rows=R):
    """Float32 probabilities and the same numbers in float64."""
    logits = np.random.default_rng(seed).normal(scale=scale, size=(rows, vocab_size))
    p = jax.nn.softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    return p, np.asarray(p, np.float64)


def rows_of(kind, vocab_size=LARGE, rows=R):
    """Float32 probabilities of one shape, `[rows, vocab_size]`."""
    rng = np.random.default_rng(3)
    if kind == "flat":
        p = np.ones((rows, vocab_size))
    elif kind == "one-hot":
        p = np.eye(vocab_size)[rng.integers(0, vocab_size, rows)]
    elif kind == "tied":  # Many tokens share one of four values.
        p = rng.choice(
            [1.0, 2.0, 400.0, 4000.0], (rows, vocab_size), p=[0.4, 0.5, 0.09, 0.01]
        )
    elif kind == "nearly few":  # Exactly `few` tokens tied at the top, then a tail.
        p = np.full((rows, vocab_size), 1e-5)
        for row in p:
            row[rng.permutation(vocab_size)[:FEW]] = 1
    elif kind == "mixed":  # Rows of small nuclei and of large ones, next to each other.
        scale = np.where(np.arange(rows) % 3 == 0, 12.0, 1.5)[:, None]
        p = np.exp(scale * rng.normal(size=(rows, vocab_size)))
    else:
        p = np.exp(
            {"sharp": 12.0, "random": 3.0}[kind] * rng.normal(size=(rows, vocab_size))
        )
    p /= p.sum(axis=1, keepdims=True)
    # Denormal numbers count as 0 in XLA, but not in NumPy.
    return jnp.asarray(np.where(p < 1e-30, 0, p), jnp.float32)


KINDS = ["flat", "one-hot", "tied", "nearly few", "mixed", "sharp", "random"]


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_the_nucleus_is_the_definition_by_sorting(top_p, scale):
    p, exact = random_probs(4, scale)
    got = np.asarray(nucleus_of(p, top_p))
    clear = 0
    for row, probs in zip(got, exact, strict=True):
        want, slack = lrd.nucleus(probs, top_p)
        if slack > 1e-6:  # Else a float32 sum may fall on the other side.
            assert set(np.flatnonzero(row)) == want
            clear += 1
    assert clear > 0.9 * R


@pytest.mark.parametrize(
    ("probs", "top_p", "inside"),
    [
        ([0.25, 0.25, 0.25, 0.25], 0.3, [0, 1, 2, 3]),  # Flat: all are tied.
        ([0.5, 0.125, 0.125, 0.25], 0.8, [0, 1, 2, 3]),  # Both that cross are in.
        ([0.5, 0.125, 0.125, 0.25], 0.75, [0, 3]),  # Exactly enough.
        ([0.375, 0.25, 0.375, 0.0], 0.3, [0, 2]),  # A tie at the top.
        ([0.0, 1.0, 0.0, 0.0], 0.9, [1]),
        ([0.0, 1.0, 0.0, 0.0], 1e-9, [1]),
        ([0.5, 0.25, 0.25, 0.0], 1e-9, [0]),
        ([0.5, 0.25, 0.25, 0.0], 1.0, [0, 1, 2, 3]),
    ],
)
def test_all_tokens_tied_with_the_crossing_one_are_in(probs, top_p, inside):
    probs = jnp.array([probs], jnp.float32)
    assert np.flatnonzero(nucleus_of(probs, top_p)[0]).tolist() == inside
    values, _ = top_tokens(jnp.pad(probs, ((0, 0), (0, 1))), 5)
    threshold, known = nucleus.small_nucleus(values, top_p)
    assert known.all() == (top_p < 1)
    assert np.flatnonzero(probs[0] >= threshold).tolist() == inside


def test_a_nucleus_near_one_holds_its_mass():
    p, exact = random_probs(5)
    top_p = 1 - 1e-7
    mass = np.where(nucleus_of(p, top_p), exact, 0).sum(axis=1)
    assert (mass > top_p - 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab_size", "count"), [(4096, 64), (4099, 64), (4096, 1)])
def test_the_likeliest_tokens_are_those_of_a_full_sort(kind, vocab_size, count):
    p = rows_of(kind, vocab_size)
    values, ids = top_tokens(p, count)
    np.testing.assert_array_equal(values, -np.sort(-np.asarray(p))[:, :count])
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(p), ids, 1), values)
    assert all(len(set(row)) == count for row in ids.tolist())


def test_a_tie_with_a_token_that_was_left_out_is_not_settled():
    values = jnp.array([[0.4, 0.3, 0.1], [0.4, 0.3, 0.3], [0.4, 0.2, 0.1]], jnp.float32)
    threshold, known = nucleus.small_nucleus(values, 0.7)
    assert known.tolist() == [True, False, False]  # Settled; tied; mass not reached.
    assert threshold[0] == values[0, 1]


@functools.cache
def model(dtype):
    """A real Denoiser over random weights."""
    cfg = ModelConfig(
        family="llada",
        vocab_size=LARGE,
        d_model=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=8,
        rope_theta=1e4,
        norm_eps=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
        max_length=32,
        mask_id=2,
        eos_ids=(1,),
        pad_id=0,
    )
    params = backbone.init_params(cfg, jax.random.key(1), dtype)
    return families.make_denoiser(cfg), params


@functools.cache
def mean_fn(top_p, dtype):
    denoiser, params = model(dtype)
    return jax.jit(
        lambda *args: nucleus.mean_embeddings(denoiser, params, *args, top_p)
    )


def mean(p, wanted=True, *, top_p=0.9, dtype=jnp.float32):
    return mean_fn(top_p, dtype)(p, np.broadcast_to(wanted, len(p)))


def exact_mean(p, top_p, dtype):
    """Mean, its magnitude bound and size by sorting, float64; and how clear it is."""
    table = np.asarray(model(dtype)[1]["embed"], np.float64)
    p = np.asarray(p, np.float64)
    order = np.argsort(-p, axis=1, kind="stable")
    mass = np.cumsum(np.take_along_axis(p, order, 1), axis=1)
    crossing = np.minimum((mass < top_p).sum(axis=1), p.shape[1] - 1)
    threshold = np.take_along_axis(p, order, 1)[np.arange(len(p)), crossing]
    inside = p >= (threshold[:, None] if top_p < 1 else 0)
    kept = np.where(inside, p, 0)
    kept /= kept.sum(axis=1, keepdims=True)
    clear = (np.abs(mass - top_p) > 1e-6).all(axis=1) | (top_p == 1)
    return kept @ table, kept @ np.abs(table), (kept > 0).sum(axis=1), clear


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_mean_embeddings_are_those_of_float64(kind, dtype, top_p):
    p = rows_of(kind)
    got, size = mean(p, top_p=top_p, dtype=dtype)
    want, magnitude, count, clear = exact_mean(p, top_p, dtype)
    assert clear.sum() > 0.6 * R
    np.testing.assert_array_equal(size[clear], count[clear])
    # Only a dense product rounds the probabilities, see `families`.
    unit = np.where((dtype == jnp.bfloat16) & (count > FEW - 1), 2**-8, 0)
    bound = (unit[:, None] + 4e-6) * magnitude + 1e-7
    assert (np.abs(got - want) <= bound)[clear].all()


def test_the_kinds_of_rows_take_both_ways():
    """Else the tests above would not compare what they seem to."""
    sizes = {kind: np.asarray(mean(rows_of(kind))[1]) for kind in KINDS}
    assert (sizes["flat"] == LARGE).all()
    assert (sizes["nearly few"] == FEW).all()
    assert (sizes["sharp"] < FEW).all()
    assert (sizes["mixed"][::3] < FEW).all()
    assert (sizes["mixed"][1::3] > FEW).all()


@pytest.mark.parametrize("kind", ["flat", "one-hot", "tied", "mixed"])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_small_vocabulary_has_the_means_of_a_large_one(kind, top_p, monkeypatch):
    """The dense way alone, and both ways: the numbers are the same but for rounding."""
    denoiser, params = model(jnp.float32)
    p = rows_of(kind)
    wanted = jnp.arange(R) % 2 == 0
    want, sizes = mean(p, wanted, top_p=top_p)
    monkeypatch.setattr(nucleus, "SMALL_VOCAB", LARGE)
    jaxpr = jax.make_jaxpr(
        lambda *args: nucleus.mean_embeddings(denoiser, params, *args, top_p)
    )(p, wanted)
    assert "top_k" not in str(jaxpr)
    got, got_sizes = nucleus.mean_embeddings(denoiser, params, p, wanted, top_p)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got_sizes, sizes)


@pytest.mark.parametrize("rows", [1, 7, 64, 65, 200])
def test_a_mean_does_not_depend_on_the_other_rows(rows):
    """Bit for bit, at one shape: whatever the company, and which way it goes."""
    p = rows_of("mixed", rows=rows)
    got, size = mean(p)
    for kind in ("sharp", "flat"):
        for row in {0, rows // 2, rows - 1}:
            company = rows_of(kind, rows=rows).at[row].set(p[row])
            alone, its_size = mean(company)
            np.testing.assert_array_equal(alone[row], got[row])
            assert its_size[row] == size[row]


def test_rows_that_are_not_wanted_are_left_out():
    p = rows_of("mixed")
    wanted = np.arange(R) % 2 == 0
    all_rows, all_sizes = mean(p)
    got, size = mean(p, wanted)
    np.testing.assert_array_equal(got[wanted], all_rows[wanted])
    np.testing.assert_array_equal(size[wanted], all_sizes[wanted])
    assert (got[~wanted] == 0).all()
    assert np.isnan(size[~wanted]).all()


def test_only_rows_with_a_large_nucleus_meet_the_whole_table():
    """Counted as it runs: turns of `DENSE_ROWS` rows, and none where all are small."""
    denoiser, params = model(jnp.float32)
    turns = []

    def expect(params, probs, ids=None):
        if ids is None:
            jax.debug.callback(lambda: turns.append(len(probs)))
        return denoiser.expect(params, probs, ids)

    counted = dataclasses.replace(denoiser, expect=expect)
    rows = 3 * nucleus.DENSE_ROWS
    p = jnp.concatenate([rows_of("flat", rows=rows), rows_of("sharp", rows=rows)])
    for num_wanted, num_turns in [(rows, 3), (65, 2), (1, 1), (0, 0)]:
        wanted = (jnp.arange(2 * rows) < num_wanted) | (jnp.arange(2 * rows) >= rows)
        turns.clear()
        jax.block_until_ready(nucleus.mean_embeddings(counted, params, p, wanted, 0.9))
        jax.effects_barrier()
        assert turns == [nucleus.DENSE_ROWS] * num_turns
