"""Phase 2: which positions a commit takes, what it writes, when a block ends."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import config

from lrd_jax.decode.belief import predict
from lrd_jax.decode.commit import (
    best_open,
    choose,
    commit_step,
    count_stable,
    kl_stop,
    lrd_plan,
    margin,
    pick,
    within_entropy_bound,
)
from lrd_jax.decode.state import NEVER, Phase, StopReason

G, W, OFFSET = 8, 4, 6
PARAMS = toy.params(0)
OPEN = jnp.array([[True] * 4, [True, False, True, True]] * 2)


def floats(rows):
    return jnp.array(rows, jnp.float32)


def taken(chosen):
    return [np.flatnonzero(row).tolist() for row in chosen]


def test_the_best_open_positions_go_first_and_ties_to_the_left():
    score = floats([[1, 3, 3, 2], [1, 9, 1, 1], [-1, -2, -1, -3], [0, 0, 0, 5]])
    counts = jnp.array([1, 2, 3, 0])
    assert taken(best_open(score, OPEN, counts)) == [[1], [0, 2], [0, 1, 2], []]
    assert taken(best_open(score, OPEN, jnp.full(4, 9)))[1] == [0, 2, 3]


@pytest.mark.parametrize(
    ("bound", "want"),
    [
        (0.0, [[1], [0], [1], [0]]),
        # Row 0: 0.1, 0.2, 0.3 before the largest, 0.9; row 1 has three open.
        (0.11, [[1, 3], [0], [1, 2, 3], [0]]),
        (0.35, [[0, 1, 3], [0], [1, 2, 3], [0]]),
        (0.65, [[0, 1, 2, 3], [0, 2], [0, 1, 2, 3], [0, 2]]),
        (9.0, [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3], [0, 2, 3]]),
    ],
)
def test_the_entropy_bound_holds_in_each_row_by_itself(bound, want):
    """The largest entropy of a set is free; neighbours in the batch do not count."""
    entropy = floats([[0.3, 0.1, 0.9, 0.2], [0.5, 0.0, 0.6, 0.7]] * 2)
    entropy = entropy.at[2].set(floats([2.0, 0.05, 0.3, 0.05]))
    got = within_entropy_bound(entropy, OPEN, bound)
    assert taken(got) == want
    for row in range(4):
        alone = within_entropy_bound(entropy[row : row + 1], OPEN[row : row + 1], bound)
        assert taken(alone) == want[row : row + 1]


def test_what_is_small_beside_the_largest_counts_against_an_entropy_bound():
    entropy = floats([[1e-8, 4.0, 0.0, 0.0]])
    still_open = jnp.array([[True, True, False, False]])
    assert taken(within_entropy_bound(entropy, still_open, 0.0)) == [[0]]
    assert taken(within_entropy_bound(entropy, still_open, 1e-8)) == [[0, 1]]


def test_the_margin_is_the_lead_over_the_next_token():
    probs = floats([[0.1, 0.6, 0.3], [0.4, 0.4, 0.2], [1, 0, 0]])
    got = margin(probs, jnp.array([1, 0, 0]))
    np.testing.assert_allclose(got, [0.3, 0.0, 1.0], atol=1e-7)


@pytest.mark.parametrize(
    ("order", "best"), [("entropy", 0), ("confidence", 1), ("margin", 2)]
)
def test_each_commit_order_has_its_own_favourite(order, best):
    probs = floats(
        [
            [0.51, 0.485, 0.001, 0.004],  # Least entropy.
            [0.60, 0.34, 0.03, 0.03],  # Likeliest token.
            [0.58, 0.14, 0.14, 0.14],  # Clearest lead.
        ]
    )
    keys = jax.random.split(jax.random.key(0), 3)
    _, score = pick(config(commit_order=order), predict(jnp.log(probs), None), keys)
    assert score.argmax() == best


def state_of(cfg, committed=(), tokens=None, **belief):
    """Four equal rows in block 0; `belief` gives `[W]` fields of the newest belief."""
    state = toy.first_state(cfg)

    def repeat(values):
        return jnp.tile(jnp.asarray(values)[None, :], (4, 1))

    fields = {
        name: repeat(jnp.asarray(value, getattr(state.belief, name).dtype))
        for name, value in belief.items()
    }
    state = dataclasses.replace(
        state,
        belief=dataclasses.replace(state.belief, **fields),
        phase=jnp.full(4, Phase.COMMIT, jnp.int32),
        step=jnp.full(4, 3, jnp.int32),
        committed=state.committed.at[:, jnp.array(committed, int)].set(True),
    )
    if tokens is not None:
        state = dataclasses.replace(state, tokens=repeat(jnp.array(tokens, jnp.int32)))
    return state


SCORES = dict(
    score=[0.0, 3.0, 2.0, 1.0],
    best_prob=[0.9, 0.5, 0.7, 0.6],
    entropy=[0.1, 1.0, 0.3, 0.4],
)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [1]),
        (dict(tokens_per_step=3), [1, 2, 3]),
        (dict(threshold=0.7), [0, 1, 2]),  # At the threshold is in.
        (dict(threshold=0.95), [1]),  # Always at least the best.
        (dict(entropy_bound=0.4), [0, 1, 2, 3]),
        (dict(entropy_bound=0.3), [0, 1, 2]),
        (dict(klass_conf=0.6), [0, 1]),
        (dict(klass_conf=0.6, klass_steps=1), [0, 1, 2]),
        (dict(klass_conf=0.6, klass_steps=3), [1]),
        (dict(klass_conf=0.95, klass_steps=1), [1]),
    ],
)
def test_multi_commit_rules_add_to_the_best(options, want):
    cfg = config(block_length=W, **options)
    state = state_of(cfg, **SCORES)
    stable = jnp.tile(jnp.array([[2, 2, 1, 0]], jnp.int32), (4, 1))
    state = dataclasses.replace(state, stable=stable)
    assert taken(choose(cfg, state, state.block_open)) == [want] * 4


def test_positions_are_stable_while_their_kl_stays_small():
    cfg = config(block_length=W, klass_conf=0.9, klass_kl=0.05)
    state = dataclasses.replace(state_of(cfg), stable=jnp.full((4, W), 3, jnp.int32))
    kl = floats([[0.04, 0.05, 1.0, np.nan]] * 4)
    assert count_stable(cfg, state, kl)[0].tolist() == [4, 0, 0, 0]
    default = config(block_length=W, klass_conf=0.9)
    kl = floats([[0.009, 0.011, 0.01, 0.0]] * 4)
    assert count_stable(default, state, kl)[0].tolist() == [4, 0, 0, 4]


@pytest.mark.parametrize(
    ("calm", "stop_entropy", "want"),
    [(1, np.inf, False), (2, np.inf, True), (2, 0.3, True), (2, 0.29, False)],
)
def test_the_kl_stop_needs_patience_and_sure_open_positions(calm, stop_entropy, want):
    cfg = config(block_length=W, kl_patience=2, stop_entropy=stop_entropy)
    state = state_of(cfg, committed=[1, 3], **SCORES)  # 0.3 is the worst open one.
    got = kl_stop(lrd_plan(toy.DENOISER, cfg), state, jnp.full(4, calm, jnp.int32))
    assert got.tolist() == [want] * 4


BELIEF = SCORES | dict(
    token=[10, 11, 12, 13],
    token_prob=[0.1, 0.2, 0.3, 0.4],
    best=[14, 15, 16, 17],
)


@functools.cache
def commit_fn(cfg):
    plan = lrd_plan(toy.DENOISER, cfg)
    return jax.jit(lambda state, rows: commit_step(plan, PARAMS, state, rows))


def commit(cfg, state, rows=(True,) * 4):
    new = commit_fn(cfg)(state, jnp.array(rows))
    return jax.device_get(dataclasses.replace(new, keys=None))


def test_a_commit_writes_token_embedding_and_record_of_its_rows_only():
    cfg = config(block_length=W)
    old = state_of(cfg, committed=[2], **BELIEF)
    new = commit(cfg, old, rows=(True, False, True, False))
    assert new.tokens[0].tolist() == [toy.MASK, 11, *[toy.MASK] * 6]
    assert np.flatnonzero(new.committed[0]).tolist() == [1, 2]
    np.testing.assert_array_equal(new.embeds[0, OFFSET + 1], PARAMS["embed"][11])
    assert new.record.commit_step[0].tolist() == [NEVER, 2, *[NEVER] * 6]
    assert new.record.commit_prob[0, 1] == np.float32(0.2)
    assert new.record.commit_entropy[0, 1] == 1.0
    assert new.phase[0] == Phase.COMMIT
    for leaf, before in zip(
        jax.tree.leaves(new),
        jax.tree.leaves(dataclasses.replace(old, keys=None)),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf[[1, 3]], before[np.array([1, 3])])


def test_what_stays_open_reads_soft_embeddings_by_the_weight_of_phase_2():
    cfg = config(block_length=W, r_f=0.1, r_f_decode=0.5)
    state = state_of(cfg, **BELIEF)
    expected = jnp.ones_like(state.belief.expected)
    state = dataclasses.replace(
        state, belief=dataclasses.replace(state.belief, expected=expected)
    )
    new = commit(cfg, state)
    alpha = 0.5 * (1 - 0.1 / np.log(toy.V))
    mask_row = np.asarray(PARAMS["embed"][toy.MASK])
    np.testing.assert_allclose(
        new.embeds[0, OFFSET], (1 - alpha) * mask_row + alpha, rtol=1e-5
    )


@pytest.mark.parametrize("why", [StopReason.KL, StopReason.STEP_LIMIT])
def test_a_stop_takes_the_likeliest_token_everywhere(why):
    """Not the sampled one, and not only the best positions."""
    cfg = config(block_length=W)
    state = state_of(cfg, committed=[2], **BELIEF)
    state = dataclasses.replace(state, fill=jnp.full(4, why, jnp.int32))
    new = commit(cfg, state)
    assert new.tokens[0, :W].tolist() == [14, 15, toy.MASK, 17]
    assert new.committed[0, :W].all()
    assert not new.committed[0, W:].any()
    assert new.record.block_stop[0].tolist() == [why, StopReason.RUNNING]


def test_a_full_block_opens_the_next_and_the_last_ends_the_row():
    cfg = config(block_length=W)
    state = state_of(cfg, committed=[0, 2, 3], **BELIEF)
    new = commit(cfg, state)
    assert new.phase[0] == Phase.OPEN
    assert new.block[0] == 1
    assert new.block_step[0] == 0
    assert new.stop_reason[0] == StopReason.RUNNING
    state = state_of(cfg, committed=[0, 1, 2, 3, 4, 6, 7], **BELIEF)
    state = dataclasses.replace(state, block=jnp.ones(4, jnp.int32))
    new = commit(cfg, state)
    assert new.phase[0] == Phase.DONE
    assert new.block[0] == 1
    assert new.stop_reason[0] == new.record.block_stop[0, 1] == StopReason.COMMITTED


X = toy.MASK


@pytest.mark.parametrize(
    ("tokens", "want"),
    [
        # Position 1 is committed now, with token 11.
        ([9, X, toy.EOS, X, X, X, X, X], [9, 11, toy.EOS, *[toy.PAD] * 5]),
        ([9, X, toy.TURN, X, X, X, X, X], [9, 11, toy.TURN, *[toy.PAD] * 5]),
        ([X, X, toy.EOS, X, X, X, X, X], None),  # Something before it is open.
        ([9, X, 12, X, X, X, X, X], None),  # No eos.
        ([9, X, X, toy.EOS, X, X, X, X], None),
        # What is committed behind it stays, another eos too.
        ([toy.EOS, X, 12, X, X, X, X, X], [toy.EOS, 11, 12, *[toy.PAD] * 5]),
        ([toy.EOS, X, toy.EOS, X, 9, X, X, X], [1, 11, 1, 0, 9, 0, 0, 0]),
        # A literal pad is no end.
        ([toy.PAD, X, X, X, X, X, X, X], None),
    ],
)
def test_a_text_ends_once_all_before_its_first_eos_is_committed(tokens, want):
    cfg = config(block_length=W, stop_at_eos=True)
    done = [i for i, token in enumerate(tokens) if token != X]
    new = commit(cfg, state_of(cfg, committed=done, tokens=tokens, **BELIEF))
    if want is None:
        assert new.phase[0] == Phase.COMMIT
        assert not (new.tokens[0][[i for i in range(1, 8) if i not in done]] == 0).any()
    else:
        assert new.tokens[0].tolist() == want
        assert new.phase[0] == Phase.DONE
        assert new.stop_reason[0] == new.record.block_stop[0, 0] == StopReason.EOS
        assert np.flatnonzero(new.committed[0]).tolist() == sorted([*done, 1])


def test_running_on_ignores_the_eos():
    cfg = config(block_length=W)
    tokens = [toy.EOS, X, X, X, X, X, X, X]
    new = commit(cfg, state_of(cfg, committed=[0], tokens=tokens, **BELIEF))
    assert new.phase[0] == Phase.COMMIT
    assert (new.tokens[0, 2:] == toy.MASK).all()
