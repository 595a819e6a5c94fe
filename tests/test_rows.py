"""Rows are independent, and so is each row's randomness."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import lrd
from reference.compare import assert_same_trees
from toy import LIKES_EOS, RICH, SAMPLED
from train_toy import quick_compile as quick_compile

from lrd_jax.config import BaselineConfig
from lrd_jax.decode.loop import make_decode_fn
from lrd_jax.decode.state import StopReason


@st.composite
def batches(draw):
    """Four prompts of 1 to 6 tokens, special ids among them."""
    token = st.integers(0, toy.V - 1)
    return [draw(st.lists(token, min_size=1, max_size=6)) for _ in range(4)]


many = settings(max_examples=20, deadline=None, derandomize=True, database=None)
row_keys = jax.random.split(jax.random.key(3), 4)


def decode_with(keys, rows, cfg=SAMPLED, width=6):
    ids, mask = toy.left_pad(rows, width)
    return toy.run(cfg, toy.params(2, **LIKES_EOS), ids, mask, keys)


@many
@given(rows=batches())
def test_a_row_decodes_alone_as_in_a_batch(rows):
    together = decode_with(row_keys, rows)
    for r, row in enumerate(rows):
        alone = decode_with(row_keys[r : r + 1], [row])
        for field in ("tokens", "num_forwards", "commit_step", "stop_reason"):
            np.testing.assert_array_equal(
                getattr(together, field)[r], getattr(alone, field)[0]
            )


@many
@given(rows=batches())
def test_left_padding_changes_nothing(rows):
    narrow, wide = decode_with(row_keys, rows), decode_with(row_keys, rows, width=9)
    for field in ("tokens", "num_forwards", "commit_step", "stop_reason"):
        np.testing.assert_array_equal(getattr(narrow, field), getattr(wide, field))
    np.testing.assert_allclose(narrow.kl, wide.kl, atol=1e-5)


@many
@given(rows=batches(), order=st.permutations(range(4)))
def test_permuting_rows_permutes_results(rows, order):
    straight = decode_with(row_keys, rows)
    shuffled = decode_with(row_keys[np.array(order)], [rows[r] for r in order])
    np.testing.assert_array_equal(shuffled.tokens, straight.tokens[np.array(order)])
    np.testing.assert_array_equal(
        shuffled.num_forwards, straight.num_forwards[np.array(order)]
    )


def test_a_second_call_does_not_retrace():
    traces = []

    def counted(*args, **kwargs):
        traces.append("traced")
        return toy.DENOISER.hidden(*args, **kwargs)

    run = make_decode_fn(dataclasses.replace(toy.DENOISER, hidden=counted), RICH)
    ids, mask = toy.left_pad(toy.prompts(0))
    run(toy.params(0), ids, mask, jax.random.key(0))
    after_first = len(traces)
    run(toy.params(1), ids + 1, ~mask | mask, jax.random.key(1))
    assert len(traces) == after_first > 0


def test_vmap_over_keys_and_an_outer_jit_change_nothing():
    run, params = toy.decode_fn(SAMPLED), toy.params(2)
    ids, mask = toy.left_pad(toy.prompts(2))
    keys = jax.random.split(jax.random.key(5), 3)
    mapped = jax.vmap(run, in_axes=(None, None, None, 0))(params, ids, mask, keys)
    nested = jax.jit(lambda *args: run(*args).tokens)
    for k, key in enumerate(keys):
        want = run(params, ids, mask, key)
        np.testing.assert_array_equal(mapped.tokens[k], want.tokens)
        np.testing.assert_array_equal(mapped.num_forwards[k], want.num_forwards)
        np.testing.assert_array_equal(nested(params, ids, mask, key), want.tokens)
    assert len({mapped.tokens[k].tobytes() for k in range(3)}) > 1


def test_pmap_over_one_device_changes_nothing():
    run, params = toy.decode_fn(SAMPLED), toy.params(2)
    ids, mask = toy.left_pad(toy.prompts(2))
    key = jax.random.key(5)
    mapped = jax.pmap(run, in_axes=(None, 0, 0, 0))(
        params, ids[None], mask[None], key[None]
    )
    np.testing.assert_array_equal(mapped.tokens[0], run(params, ids, mask, key).tokens)


def test_one_key_is_one_key_per_row_folded_by_row():
    rows, key = toy.prompts(2), jax.random.key(9)
    folded = jnp.stack([jax.random.fold_in(key, r) for r in range(4)])
    want = decode_with(key, rows)
    for same in (folded, jax.random.PRNGKey(9), jax.random.key_data(folded)):
        got = decode_with(same, rows)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.commit_step, want.commit_step)
    assert (decode_with(jax.random.key(10), rows).tokens != want.tokens).any()


def expected_frequencies(p, temperature, top_p, top_k):
    """What a token is drawn from, in float64."""
    p = p ** (1 / temperature)
    p /= p.sum()
    inside, _ = lrd.nucleus(p, top_p)
    allowed = sorted(inside, key=lambda v: -p[v])[:top_k]
    kept = np.zeros_like(p)
    kept[allowed] = p[allowed]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(0.7, 1.0, None), (1.6, 1.0, None), (1.6, 0.6, None), (1.6, 1.0, 3)],
)
def test_sampled_tokens_follow_the_tempered_distribution(temperature, top_p, top_k):
    cfg = BaselineConfig(
        gen_length=2,
        temperature=temperature,
        sample_top_p=top_p,
        sample_top_k=top_k,
        stop_at_eos=False,
    )
    draws, prompt = 3000, toy.prompts(3)[0]
    result = toy.decode(cfg, [prompt] * draws, 3)
    model = toy.NumpyModel(toy.weights(3))
    position = lrd.decode(
        model, prompt, gen_length=2, max_refine_steps=0
    ).commit_step.index(0)
    assert (result.commit_step[:, position] == 0).all(), "the order is not tempered"
    embeds = model.table[[*prompt, toy.MASK, toy.MASK]]
    logits = model.logits(embeds)[len(prompt) + position]
    p = lrd.probabilities(logits, toy.MASK)
    want = draws * expected_frequencies(p, temperature, top_p, top_k)
    seen = np.bincount(result.tokens[:, position], minlength=toy.V)
    assert (seen[want == 0] == 0).all()
    likely = want > 5
    chi_square = ((seen - want)[likely] ** 2 / want[likely]).sum()
    freedom = likely.sum() - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
    np.testing.assert_allclose(
        result.commit_prob[:, position], p[result.tokens[:, position]], rtol=1e-3
    )


@pytest.fixture(scope="module")
def healthy():
    """Rows, their decode, and row 1's first token that is in no other row."""
    for seed in range(20):
        rows = toy.prompts(seed)
        result = toy.decode(RICH, rows)
        elsewhere = {*np.delete(result.tokens, 1, 0).flat, *itertools.chain(*rows)}
        its_own = [t for t in result.tokens[1, :4] if t not in elsewhere]
        if its_own:
            return rows, result, int(its_own[0])
    raise AssertionError("no seed gives row 1 a token of its own")


def assert_others_unharmed(sick, healthy):
    """Bit for bit, since the other rows are in the same batch of the same shape."""
    others = jax.tree.map(lambda x: np.delete(x, 1, 0), (sick, healthy))
    assert_same_trees(*others)
    assert sick.stop_reason[1] == sick.block_stop[1, 0] == StopReason.NONFINITE
    assert (sick.tokens[1][~sick.committed[1]] == toy.MASK).all()


def test_a_row_that_is_never_finite_is_reported_and_harms_no_other(healthy):
    rows, want, poison = healthy
    poisoned_rows = [rows[0], [poison, *rows[1][1:]], *rows[2:]]
    sick = toy.decode(RICH, poisoned_rows, denoiser=toy.poisoned(poison))
    assert_others_unharmed(sick, want)
    assert sick.num_forwards[1] == 1
    assert not sick.committed[1].any()


def test_a_row_that_turns_nonfinite_keeps_what_it_committed(healthy):
    rows, want, poison = healthy
    sick = toy.decode(RICH, rows, denoiser=toy.poisoned(poison))
    assert_others_unharmed(sick, want)
    steps = want.commit_step[1]
    fatal = steps[want.tokens[1] == poison].min()
    assert sick.num_forwards[1] == fatal + 2
    np.testing.assert_array_equal(sick.committed[1], steps <= fatal)
    np.testing.assert_array_equal(
        sick.tokens[1][steps <= fatal], want.tokens[1][steps <= fatal]
    )
