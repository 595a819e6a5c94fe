"""The maths of a prediction, against its definitions in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import lrd

from lrd_jax.config import ModelConfig
from lrd_jax.decode import belief
from lrd_jax.model import backbone, families

V, R = 24, 40
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def random_logits(seed, scale=3.0):
    return np.random.default_rng(seed).normal(scale=scale, size=(R, V))


def to_jax(x, dtype=jnp.float32):
    return jnp.asarray(x, dtype)


def random_probs(seed, scale=3.0):
    """Float32 probabilities and the same numbers in float64."""
    p = jax.nn.softmax(to_jax(random_logits(seed, scale)), axis=-1)
    return p, np.asarray(p, np.float64)


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_entropy_and_the_likeliest_token_are_those_of_float64(scale):
    logits = random_logits(0, scale)
    got = belief.predict(to_jax(logits), excluded=toy.MASK)
    p = [lrd.probabilities(row, toy.MASK) for row in logits]
    assert_close(got.entropy, [lrd.entropy(row) for row in p], atol=1e-5)
    assert_close(got.probs, p)
    np.testing.assert_array_equal(got.best, np.argmax(p, axis=1))
    assert_close(got.best_prob, np.max(p, axis=1))


def test_the_excluded_token_is_never_predicted():
    logits = random_logits(1)
    logits[:, toy.MASK] = 50.0
    got = belief.predict(to_jax(logits), excluded=toy.MASK)
    assert (got.probs[:, toy.MASK] == 0).all()
    assert (got.best != toy.MASK).all()
    assert_close(got.probs.sum(axis=1), 1)
    kept = belief.predict(to_jax(logits), excluded=None)
    assert (kept.best == toy.MASK).all()


def test_equal_logits_are_uniform_and_the_first_of_equals_is_best():
    got = belief.predict(jnp.zeros((2, V)), excluded=None)
    assert_close(got.entropy, np.log(V))
    assert (got.best == 0).all()


def test_certainty_has_no_entropy_and_makes_no_nan():
    logits = jnp.full((1, V), -1e4).at[0, 5].set(1e4)
    got = belief.predict(logits, excluded=toy.MASK)
    assert got.entropy[0] == 0
    assert got.best[0] == 5
    assert belief.kl_divergence(got, got)[0] == 0


def test_kl_is_that_of_float64():
    new, old = random_logits(2), random_logits(3)
    got = belief.kl_divergence(
        belief.predict(to_jax(new), toy.MASK), belief.predict(to_jax(old), toy.MASK)
    )
    pairs = zip(new, old, strict=True)
    want = [
        lrd.kl(lrd.probabilities(n, toy.MASK), lrd.probabilities(o, toy.MASK))
        for n, o in pairs
    ]
    assert_close(got, want)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    step=st.sampled_from([0.0, 1e-7, 1e-4, 1.0]),
)
def test_kl_is_never_negative(seed, scale, step):
    old = random_logits(seed, scale)
    new = old + step * random_logits(seed + 1)
    moved, still = (belief.predict(to_jax(x), toy.MASK) for x in (new, old))
    assert (belief.kl_divergence(moved, still) >= 0).all()


def soft(entropy, r_f, dtype=jnp.float32):
    rng = np.random.default_rng(6)
    expected, mask_row = rng.normal(size=(2, 3, 8)), rng.normal(size=8)
    entropy = np.broadcast_to(entropy, (2, 3))
    got = belief.soft_embeddings(
        to_jax(expected), to_jax(entropy), to_jax(mask_row, dtype), r_f, V
    )
    alpha = r_f * (1 - entropy / np.log(V))
    rounded = np.asarray(to_jax(mask_row, dtype), np.float64)
    want = (1 - alpha)[..., None] * rounded + alpha[..., None] * expected
    return got, want, to_jax(mask_row, dtype)


@pytest.mark.parametrize("r_f", [0.15, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_soft_embeddings_are_equations_3_and_4(r_f, dtype):
    entropy = np.random.default_rng(7).uniform(0, np.log(V), (2, 3))
    got, want, _ = soft(entropy, r_f, dtype)
    assert got.dtype == dtype
    assert_close(
        got.astype(jnp.float32), want, atol=1e-6 if dtype == "float32" else 2e-2
    )


def test_a_uniform_prediction_gives_back_the_mask_row():
    got, _, mask_row = soft(np.log(V), r_f=1.0)
    assert_close(got, np.broadcast_to(mask_row, got.shape))


def test_no_mixing_weight_gives_back_the_mask_row_exactly():
    for dtype in (jnp.float32, jnp.bfloat16):
        got, _, mask_row = soft(0.3, r_f=0.0, dtype=dtype)
        assert (got == mask_row[None, None, :]).all()


def test_a_certain_prediction_mixes_in_r_f_of_it():
    assert belief.mix_weight(jnp.float32(0.0), 0.2, V) == pytest.approx(0.2)
    sure, unsure = belief.mix_weight(jnp.array([0.1, 2.0]), 0.2, V)
    assert 0 < unsure < sure < 0.2


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, None, [0, 1, 2, 3]),
        (0.7, None, [0, 1]),
        (1.0, 3, [0, 1, 2]),
        (0.7, 3, [0, 1]),
        (0.6, 2, [0, 1]),  # Of two, the first alone would hold 0.6 of the mass.
        (0.7, 1, [0]),
        (0.95, 1, [0]),
        (1.0, 9, [0, 1, 2, 3]),
    ],
)
def test_sampling_keeps_the_nucleus_then_the_k_likeliest(top_p, top_k, kept):
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]], jnp.float32))
    got = belief.keep_likely(logits, top_p, top_k)
    assert np.flatnonzero(np.isfinite(got[0])).tolist() == kept
    assert_close(got[0, kept], logits[0, kept])


@pytest.mark.parametrize("count", range(1, 10))
def test_tiles_change_nothing_whatever_the_remainder(count):
    rows = {"x": jnp.arange(count, dtype=jnp.float32), "y": jnp.ones((count, 2))}

    def fn(tile):
        return {"z": tile["y"] * tile["x"][:, None], "i": tile["x"].astype(jnp.int32)}

    want = fn(rows)
    for tile in (1, 3, 4, 20):
        got = belief.map_tiles(fn, rows, tile)
        chex.assert_trees_all_equal(got, want)


def test_the_logits_of_a_tile_take_at_most_128_mebibytes():
    """Those of the newest forward and of the one before, in float32."""
    rows = belief.tile_rows(152064)
    assert 2 * 4 * 152064 * rows <= 128 * 2**20 < 2 * 4 * 152064 * (rows + 1)
    assert belief.tile_rows(10**9) == 1


def test_a_tile_has_rows_enough_for_the_head_before_it_outgrows_caches():
    assert belief.tile_rows(126464) == belief.tile_rows(65536) == 128
    assert belief.tile_rows(4096) == 512


def test_tiles_share_rows_evenly():
    sizes = []

    def fn(rows):
        sizes.append(len(rows))
        return rows

    belief.map_tiles(fn, jnp.arange(1024), 110)
    assert set(sizes) == {103}  # Ten tiles compute 1030 rows; of 110, it were 1100.


TINY = ModelConfig(
    family="llada",
    vocab_size=V,
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
    mask_id=toy.MASK,
    eos_ids=(toy.EOS,),
    pad_id=toy.PAD,
)


def tiny_model(dtype):
    """A real Denoiser of random weights, and some hidden rows, old and new."""
    rng = np.random.default_rng(8)
    params = jax.tree.map(
        lambda leaf: to_jax(rng.normal(size=leaf.shape), dtype),
        backbone.abstract_params(TINY),
    )
    hidden = to_jax(rng.normal(size=(2, R, 16)), dtype)
    return families.make_denoiser(TINY), params, hidden


def greedy(prediction, keys):
    del keys
    return prediction.best, -prediction.entropy


def read(dtype, *, top_p=0.8, tile=R, predicts_mask=False, still_open=True):
    denoiser, params, (new, old) = tiny_model(dtype)
    still_open = jnp.broadcast_to(jnp.asarray(still_open), R)
    rows = (new, old, jax.random.split(jax.random.key(0), R), still_open)
    return belief.map_tiles(
        lambda tile: belief.read_rows(
            denoiser,
            params,
            *tile,
            pick=greedy,
            top_p=top_p,
            predicts_mask=predicts_mask,
        ),
        rows,
        tile,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_reading_is_that_of_float64(dtype):
    got = read(dtype)
    _, params, hidden = tiny_model(dtype)
    head, table, (new, old) = (
        np.asarray(x, np.float64) for x in (params["head"], params["embed"], hidden)
    )
    for r in range(R):
        p = lrd.probabilities(new[r] @ head, toy.MASK)
        inside, slack = lrd.nucleus(p, 0.8)
        before = lrd.probabilities(old[r] @ head, toy.MASK)
        assert got.entropy[r] == pytest.approx(lrd.entropy(p), rel=1e-4, abs=1e-5)
        assert got.kl[r] == pytest.approx(lrd.kl(p, before), rel=1e-4)
        assert got.token[r] == got.best[r] == p.argmax()
        assert got.token_prob[r] == pytest.approx(p.max(), rel=1e-4)
        assert slack > 1e-5
        assert got.nucleus_size[r] == len(inside)
        kept = np.array([x if v in inside else 0 for v, x in enumerate(p)])
        kept /= kept.sum()
        # In bfloat16 the probabilities are rounded, see `families`.
        bound = 1e-5 if dtype == jnp.float32 else 2**-8 * (kept @ np.abs(table)) + 1e-5
        assert (np.abs(got.expected[r] - kept @ table) <= bound).all()
    assert got.finite.all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tile", [1, 7, 39])
def test_a_tiled_reading_is_the_untiled_one(dtype, tile):
    want, got = read(dtype), read(dtype, tile=tile)
    jax.tree.map(functools.partial(assert_close, rtol=1e-4, atol=1e-5), got, want)


def test_no_nucleus_mixes_nothing():
    got = read(jnp.float32, top_p=0.0)
    assert (got.expected == 0).all()
    assert np.isnan(got.nucleus_size).all()


def test_rows_that_are_not_open_are_read_but_not_averaged():
    still_open = np.arange(R) % 3 > 0
    got, want = read(jnp.float32, still_open=still_open), read(jnp.float32)
    assert (got.expected[~still_open] == 0).all()
    assert np.isnan(got.nucleus_size[~still_open]).all()
    np.testing.assert_array_equal(got.expected[still_open], want.expected[still_open])
    for name in ("kl", "entropy", "token", "score"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_the_mask_token_is_read_only_where_a_method_predicts_it():
    assert (read(jnp.float32).best != toy.MASK).all()
    assert (read(jnp.float32, predicts_mask=True).best == toy.MASK).any()


def test_a_row_of_nan_is_not_finite_and_its_neighbours_are():
    denoiser, params, (new, old) = tiny_model(jnp.float32)
    keys = jax.random.split(jax.random.key(0), R)
    got = belief.read_rows(
        denoiser,
        params,
        new.at[3].set(jnp.nan),
        old,
        keys,
        jnp.ones(R, bool),
        pick=greedy,
        top_p=0.8,
        predicts_mask=False,
    )
    assert np.flatnonzero(~np.asarray(got.finite)).tolist() == [3]
    others = np.arange(R) != 3
    assert_close(got.entropy[others], read(jnp.float32).entropy[others])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_mean_embeddings_err_within_the_stated_bound(dtype, scale):
    """2^-8 of sum(p |e|) in bfloat16, half its spacing; in float32 that of sums."""
    denoiser, params, _ = tiny_model(dtype)
    p, exact = random_probs(9, scale)
    table = np.asarray(params["embed"], np.float64)
    error = np.abs(denoiser.expect(params, p) - exact @ table)
    magnitude = exact @ np.abs(table)
    unit = 2**-8 if dtype == jnp.bfloat16 else 0.0
    assert (error <= (unit + 4e-6) * magnitude).all()
    assert denoiser.expect(params, p).dtype == jnp.float32
