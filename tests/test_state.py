"""The state's own operations: windows, keys, the first state, the result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import RICH

from lrd_jax.decode.state import (
    Phase,
    StopReason,
    init_state,
    put_at,
    put_window,
    row_keys,
    select_rows,
    take_window,
)

VALUES = np.arange(24, dtype=np.float32).reshape(2, 6, 2)
START = jnp.array([1, 3], jnp.int32)


def test_a_window_is_taken_at_each_rows_own_start():
    got = take_window(jnp.asarray(VALUES), START, 3)
    np.testing.assert_array_equal(got, [VALUES[0, 1:4], VALUES[1, 3:6]])


def test_a_window_put_back_changes_only_its_positions():
    new = -np.ones((2, 3, 2), np.float32)
    want = VALUES.copy()
    want[0, 1:4] = want[1, 3:6] = -1
    got = put_window(jnp.asarray(VALUES), START, jnp.asarray(new))
    np.testing.assert_array_equal(got, want)


def test_a_window_put_takes_the_dtype_of_what_it_goes_into():
    got = put_window(jnp.zeros((2, 6), jnp.int32), START, jnp.ones((2, 2), bool))
    assert got.dtype == jnp.int32
    assert got.sum() == 4


def test_one_entry_a_row_is_put():
    got = put_at(jnp.zeros((2, 4)), START, jnp.array([5.0, 6.0]))
    np.testing.assert_array_equal(got, [[0, 5, 0, 0], [0, 0, 0, 6]])


def test_rows_are_selected_in_leaves_of_any_rank():
    old = {"a": jnp.zeros(2), "b": jnp.zeros((2, 3, 4))}
    new = jax.tree.map(jnp.ones_like, old)
    got = select_rows(jnp.array([True, False]), new, old)
    assert got["a"].tolist() == [1, 0]
    assert got["b"].sum(axis=(1, 2)).tolist() == [12, 0]


def key_data(keys):
    return np.asarray(jax.random.key_data(keys))


@pytest.mark.parametrize("raw", [False, True])
def test_one_key_is_folded_by_row_and_one_per_row_is_taken_as_it_is(raw):
    key = jax.random.key(4)
    given = jax.random.key_data(key) if raw else key
    want = [key_data(jax.random.fold_in(key, r)) for r in range(3)]
    np.testing.assert_array_equal(key_data(row_keys(given, 3)), want)
    own = jax.random.split(key, 3)
    given = jax.random.key_data(own) if raw else own
    np.testing.assert_array_equal(key_data(row_keys(given, 3)), key_data(own))


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1)])
def test_another_number_of_keys_is_refused(shape):
    keys = jax.random.split(jax.random.key(0), shape)
    with pytest.raises(ValueError, match=r"one per row \(3\), got shape"):
        row_keys(keys, 3)


@pytest.mark.parametrize("key", [3, np.float32([1, 2]), np.uint32(3)])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match=r"must be a key, as of `jax.random.key"):
        row_keys(key, 3)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint32])
def test_the_mask_is_the_mask_whatever_holds_the_prompt(kind):
    """A mask id of 399 would be 143 in eight bits."""
    vocabulary = np.ones((400, 2), np.float32)
    denoiser = dataclasses.replace(
        toy.DENOISER, mask_id=399, embed=lambda params, ids: params[ids]
    )
    ids, mask = jnp.array([[3, 4]], kind), jnp.ones((1, 2), bool)
    sizes = dict(gen_length=2, block_length=2, budget=4)
    key = jax.random.key(0)
    state = init_state(denoiser, jnp.asarray(vocabulary), ids, mask, key, None, **sizes)
    np.testing.assert_array_equal(state.tokens, [[399, 399]])
    assert state.tokens.dtype == jnp.int32


def first_state(open_mask=None):
    ids, mask = toy.left_pad(toy.prompts(0))
    if open_mask is not None:
        open_mask = jnp.asarray(open_mask)
    return init_state(
        toy.DENOISER,
        toy.params(0),
        ids,
        mask,
        jax.random.key(0),
        open_mask,
        gen_length=8,
        block_length=4,
        budget=11,
    )


def test_positions_count_from_the_first_real_token():
    state = first_state()
    assert state.offset == 6
    assert state.positions[0].tolist() == list(range(14))
    assert state.positions[1].tolist() == [0, 0, 0, *range(11)]
    assert state.key_mask[1].tolist() == [False] * 3 + [True] * 11


def test_the_window_starts_as_plain_masks_behind_the_prompt():
    state, table = first_state(), toy.params(0)["embed"]
    ids, _ = toy.left_pad(toy.prompts(0))
    assert (state.embeds[:, 6:] == table[toy.MASK][None, None, :]).all()
    np.testing.assert_array_equal(state.embeds[:, :6], table[ids])
    assert (state.tokens == toy.MASK).all()
    assert state.fillable.all()
    assert not state.committed.any()
    assert (state.phase == Phase.OPEN).all()
    assert state.num_blocks == 2
    assert state.record.kl.shape == (4, 11)
    assert np.isnan(state.record.kl).all()


def test_infilling_opens_real_positions_only_and_drops_their_tokens():
    open_mask = np.zeros((4, 6), bool)
    open_mask[0, 2] = open_mask[1, 1] = open_mask[1, 4] = True  # [1, 1] is padding.
    state = first_state(open_mask)
    ids, _ = toy.left_pad(toy.prompts(0))
    assert state.offset == 0
    assert [np.flatnonzero(r).tolist() for r in state.fillable] == [[2], [4], [], []]
    np.testing.assert_array_equal(state.tokens, ids.at[0, 2].set(23).at[1, 4].set(23))
    table = toy.params(0)["embed"]
    np.testing.assert_array_equal(state.embeds, table[state.tokens])
    assert state.phase.tolist() == [Phase.OPEN, Phase.OPEN, Phase.DONE, Phase.DONE]
    assert state.stop_reason[2] == StopReason.COMMITTED


@pytest.mark.parametrize(
    ("tokens", "useful"),
    [
        ([9, 9, 9, 9, 9, 9, 9, 9], 8),
        ([9, 9, toy.EOS, 9, 9, toy.PAD, toy.PAD, toy.PAD], 2),
        ([9, toy.TURN, 9, toy.EOS, 9, 9, 9, 9], 1),
        ([toy.EOS, 9, 9, 9, 9, 9, 9, 9], 0),
        ([9, toy.PAD, 9, 9, 9, 9, 9, 9], 8),  # A pad that was predicted ends nothing.
        ([9, toy.MASK, 9, 9, toy.MASK, 9, 9, 9], 6),  # Never reached, so not counted.
    ],
)
def test_useful_tokens_are_those_committed_before_the_first_eos(tokens, useful):
    row = jnp.array(tokens, jnp.int32)
    state = toy.first_state(RICH)
    state = dataclasses.replace(
        state,
        tokens=jnp.tile(row[None, :], (4, 1)),
        committed=jnp.tile((row != toy.MASK)[None, :], (4, 1)),
    )
    result = toy.stepper(RICH).finish(state)
    assert result.useful_tokens.tolist() == [useful] * 4
