"""`trim_tail`: what lies behind an end of text is neither decoded nor computed.

That rows decode as plain loops do is in `test_loop.py`.
"""

import dataclasses

import jax
import numpy as np
import pytest
import toy
from test_cache import assert_same_results
from toy import SOFT, config

from lrd_jax.decode.forward import trimmed_lengths
from lrd_jax.decode.loop import make_decode_fn
from lrd_jax.errors import UserError

SEED, LIKED = 2, {"eos": 4.0, "turn": 3.0}  # Texts of four lengths.
TRIMMED = config(
    stop_at_eos=True, trim_tail=True, threshold=0.6, tau_decode=0.2, **SOFT
)


def test_the_lengths_are_quarters_rounded_up():
    assert trimmed_lengths(64) == [16, 32, 48, 64]
    assert trimmed_lengths(10) == [3, 5, 8, 10]
    assert trimmed_lengths(3) == [1, 2, 3]
    assert trimmed_lengths(1) == [1]


@pytest.mark.parametrize(
    ("beside", "lengths"),
    [
        ({}, {6 + 2, 6 + 4, 6 + 6, 6 + 8}),
        (dict(cache="prefix"), {6 + 8, 2, 4, 6, 8}),
        (dict(cache="dual", block_length=4), {6 + 8, 4}),
    ],
)
def test_the_model_is_run_over_the_lengths_only(beside, lengths):
    seen = set()

    def hidden(params, embeds, positions, key_mask, *cache):
        assert positions.shape == embeds.shape[:2]
        # Keys are those of a cache, if there is one: of all positions.
        num_keys = 6 + 8 if cache else embeds.shape[1]
        assert key_mask.shape == (embeds.shape[0], num_keys)
        seen.add(embeds.shape[1])
        return toy.DENOISER.hidden(params, embeds, positions, key_mask, *cache)

    denoiser = dataclasses.replace(toy.DENOISER, hidden=hidden)
    ids, mask = toy.left_pad(toy.prompts(SEED))
    assert ids.shape[1] == 6
    decode_fn = make_decode_fn(denoiser, dataclasses.replace(TRIMMED, **beside))
    jax.eval_shape(decode_fn, toy.params(SEED), ids, mask, jax.random.key(0))
    assert seen == lengths


def test_nothing_behind_the_end_is_chosen_later():
    result = toy.decode(TRIMMED, SEED, SEED, **LIKED)
    is_end = np.isin(result.tokens, toy.DENOISER.eos_ids) & result.committed
    assert is_end.any(axis=1).all()
    for row, ends in enumerate(is_end):
        end = np.flatnonzero(ends)[0]
        behind = slice(end + 1, None)
        # What was committed there was so before the end, or with it.
        assert (result.commit_step[row, behind] <= result.commit_step[row, end]).all()
        rest = result.tokens[row, behind][~result.committed[row, behind]]
        assert (rest == toy.PAD).all()
        assert result.committed[row, : end + 1].all()


@pytest.mark.parametrize(
    ("cache", "block_length"), [("prefix", None), ("prefix", 4), ("dual", 4)]
)
def test_where_a_cache_is_exact_it_changes_nothing(cache, block_length):
    """With one layer, and with a full forward at every step."""
    plain = dataclasses.replace(TRIMMED, block_length=block_length)
    cached = dataclasses.replace(plain, cache=cache, cache_lane=2)
    rows, key = toy.left_pad(toy.prompts(SEED)), jax.random.key(0)
    deep = toy.params(SEED, **LIKED)
    flat = toy.first_layer(deep)
    want = toy.run(plain, flat, *rows, key)
    got = toy.run(cached, flat, *rows, key)
    assert_same_results(got, want)
    assert (got.num_full_forwards < got.num_forwards).any()

    fresh = dataclasses.replace(cached, cache_refresh_steps=1)
    got = toy.run(fresh, deep, *rows, key)
    assert_same_results(got, toy.run(plain, deep, *rows, key))


@pytest.mark.parametrize(
    ("cache", "block_length"), [("none", None), ("none", 4), ("prefix", None)]
)
def test_a_row_is_the_same_in_any_company(cache, block_length):
    cfg = dataclasses.replace(TRIMMED, block_length=block_length, cache=cache)
    rows = toy.prompts(SEED)
    whole = toy.decode(cfg, rows, SEED, **LIKED)
    lengths = {int(n) for n in whole.useful_tokens}
    assert len(lengths) > 1, "all rows are cut alike"
    for r, row in enumerate(rows):
        alone = toy.decode(cfg, [row], SEED, **LIKED)
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[r])
        np.testing.assert_array_equal(alone.commit_step[0], whole.commit_step[r])
        steps = int(alone.num_forwards[0])
        np.testing.assert_allclose(
            alone.kl[0, :steps], whole.kl[r, :steps], rtol=1e-4, atol=1e-6
        )


def test_a_text_that_goes_on_behind_its_end_has_no_tail():
    with pytest.raises(UserError, match="`stop_at_eos` must be true with `trim_tail`"):
        config(stop_at_eos=False, trim_tail=True)
