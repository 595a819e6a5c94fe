"""Decodes with a KV cache: exact where that is possible, and who pays for what."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from reference.compare import assert_same_trees, row_of
from test_backbone import DREAM, params_of
from toy import LIKES_EOS, RICH, SAMPLED
from train_toy import quick_compile as quick_compile

from lrd_jax.decode.cache import take_seats
from lrd_jax.decode.loop import make_decode_fn, make_stepper
from lrd_jax.decode.slots import make_slots
from lrd_jax.decode.state import Phase, StopReason, select_rows
from lrd_jax.model import families

MODES = ("prefix", "dual")
LONG = dataclasses.replace(RICH, gen_length=12)  # Three blocks: one has two neighbours.
KEYS = jax.random.split(jax.random.key(3), 4)


def cached(mode, cfg=LONG, **changes):
    return dataclasses.replace(cfg, cache=mode, **changes)


def assert_same_results(got, want):
    """What a row decodes to, up to rounding; not what it cost."""
    for field in ("tokens", "num_forwards", "commit_step", "stop_reason", "phase"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
    np.testing.assert_allclose(got.kl, want.kl, rtol=2e-5, atol=1e-5)


DREAM_1 = dataclasses.replace(DREAM, num_layers=1)
ONE_LAYER = {
    "toy": (toy.DENOISER, toy.first_layer(toy.params(1))),
    "dream": (families.make_denoiser(DREAM_1), params_of(DREAM_1)),
}


@functools.cache
def one_layer(name, mode):
    denoiser, params = ONE_LAYER[name]
    cfg = cached(mode, max_refine_steps=2)
    ids, mask = toy.left_pad(toy.prompts(1))
    return toy.run(cfg, params, ids, mask, KEYS, denoiser=denoiser)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ONE_LAYER)
def test_a_model_of_one_layer_decodes_as_without_a_cache(name, mode):
    got, want = one_layer(name, mode), one_layer(name, "none")
    assert_same_results(got, want)
    assert (got.num_full_forwards == 3).all()
    assert (want.num_full_forwards == want.num_forwards).all()
    assert (got.num_forwards > 6).all()


def test_a_deeper_model_reads_what_is_stale():
    """Else the test above would show nothing."""
    want = toy.decode(LONG, 1, 1)
    kls = [toy.decode(cached(mode), 1, 1).kl for mode in MODES]
    for kl, other in itertools.combinations([want.kl, *kls], 2):
        assert not np.allclose(kl, other, atol=1e-3, equal_nan=True)


def test_a_refresh_at_every_forward_decodes_as_without_a_cache():
    got = toy.decode(cached("dual", cache_refresh_steps=1), 1, 1)
    assert_same_results(got, toy.decode(LONG, 1, 1))
    np.testing.assert_array_equal(got.num_full_forwards, got.num_forwards)


@pytest.mark.parametrize(("mode", "lane"), [("prefix", 2), ("dual", 1)])
def test_neither_neighbours_nor_padding_change_a_row(mode, lane):
    cfg = cached(mode, SAMPLED, stop_at_eos=True, cache_lane=lane)
    params, rows = toy.params(2, **LIKES_EOS), toy.prompts(2)
    together, padded = (
        toy.run(cfg, params, *toy.left_pad(rows, width), KEYS) for width in (6, 9)
    )
    assert_same_results(padded, together)
    for r in range(4):
        alone = toy.run(cfg, params, *toy.left_pad([rows[r]], 6), KEYS[r : r + 1])
        assert_same_results(row_of(alone, 0), row_of(together, r))
        assert alone.num_full_forwards[0] == together.num_full_forwards[r]


@dataclasses.dataclass
class Watched:
    """A decode turn by turn: the states and the calls of the model before each."""

    stepper: object
    params: dict
    states: list
    calls: list


def counting(calls):
    def hidden(params, embeds, *args, **kwargs):
        shape = embeds.shape[:2]
        jax.debug.callback(lambda: calls.append(shape))
        return toy.DENOISER.hidden(params, embeds, *args, **kwargs)

    return dataclasses.replace(toy.DENOISER, hidden=hidden)


def quick(fn, *args):
    return fn.lower(*args).compile(compiler_options=toy.QUICK)


def watch(cfg):
    calls, params = [], toy.params(1)
    stepper = make_stepper(counting(calls), cfg)
    states, history = [stepper.init(params, *toy.left_pad(toy.prompts(1)), KEYS)], []
    step = quick(stepper.step, params, states[0])
    while stepper.active(states[-1]):
        states.append(step(params, states[-1]))
        jax.effects_barrier()
        history.append(tuple(calls))
        calls.clear()
    return Watched(stepper, params, states, history)


@functools.cache
def watched(mode):
    """Every row is refreshed in the middle of a block, too."""
    return watch(cached(mode, cache_refresh_steps=3))


@pytest.mark.parametrize("mode", MODES)
def test_the_model_runs_only_for_rows_that_need_it(mode):
    run = watched(mode)
    length = {"prefix": 12, "dual": 4}[mode]
    kinds = set()
    for (old, new), calls in zip(
        itertools.pairwise(run.states), run.calls, strict=True
    ):
        full = new.cache.num_full > old.cache.num_full
        windowed = (new.step > old.step) & ~full
        assert np.sum(full) <= 1
        want = [(4, length)] * bool(windowed.any()) + [(1, 18)] * bool(full.any())
        assert list(calls) == want
        kinds.add(tuple(want))
    assert len(kinds) == 4  # Each alone, both, and none in the last turn.


@pytest.mark.parametrize("mode", MODES)
def test_a_full_forward_reads_nothing_stale_and_a_window_forward_does(mode):
    run = watched(mode)
    stale = []
    for old, new in itertools.pairwise(run.states):
        fresh, _ = toy.DENOISER.hidden(
            run.params, new.embeds, new.positions, new.key_mask
        )
        for r in np.flatnonzero(new.step > old.step):
            start = int(new.offset + new.block_start[r])
            want = fresh[r, start : start + new.block_length]
            error = np.abs(new.belief.hidden[r] - want).max()
            if new.cache.num_full[r] > old.cache.num_full[r]:
                assert error < 1e-4
            else:
                stale.append(error)
    assert np.median(stale) > 1e-3


def without_cache(state):
    return dataclasses.replace(state, cache=None)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_waits_stands_still(mode):
    waits = in_block = 0
    for old, new in itertools.pairwise(watched(mode).states):
        for r in np.flatnonzero((old.cache.waited > 0) & (new.cache.waited > 0)):
            rows = [row_of(without_cache(state), r) for state in (old, new)]
            assert_same_trees(*rows)
            waits += 1
            in_block += bool(old.phase[r] != Phase.OPEN)
    assert min(waits, in_block) > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_writes_the_slots_of_its_rows_and_windows_only(mode):
    for old, new in itertools.pairwise(watched(mode).states):
        moved = (new.cache.slots.keys != old.cache.slots.keys).any(axis=(0, 3, 4))
        assert not moved[new.step == old.step].any()
        full = new.cache.num_full > old.cache.num_full
        for r in np.flatnonzero(~full):
            first = new.offset + new.block_start[r]
            last = first + 4 if mode == "dual" else moved.shape[1]
            assert set(np.flatnonzero(moved[r])) <= set(range(first, last))


def test_refine_and_commit_in_turn_replay_a_decode_with_a_cache():
    run = watched("dual")
    state = run.states[0]
    bodies = [
        quick(body, run.params, state)
        for body in (run.stepper.refine, run.stepper.commit)
    ]
    for _ in range(len(run.states)):
        for body in bodies:
            state = body(run.params, state)
    assert not run.stepper.active(state)
    want = run.stepper.finish(run.states[-1])
    got = run.stepper.finish(state)
    assert_same_results(got, want)
    np.testing.assert_array_equal(got.num_full_forwards, want.num_full_forwards)


def test_a_wider_lane_takes_fewer_turns_to_the_same_results():
    narrow, wide = (watch(cached("dual", cache_lane=lane)) for lane in (1, 9))
    results = [run.stepper.finish(run.states[-1]) for run in (narrow, wide)]
    assert_same_results(*results)
    turns = [len(run.calls) for run in (narrow, wide)]
    assert turns[1] == results[1].num_forwards.max() + 1  # The last one only commits.
    assert turns[0] > turns[1]


def test_who_has_waited_longest_gets_the_seat():
    needs = jnp.array([True, True, False, True])
    waited = jnp.array([0, 2, 9, 2], jnp.int32)
    assert take_seats(needs, waited, 2).tolist() == [1, 3]
    assert take_seats(needs, waited, 4).tolist() == [1, 3, 0, 4]


def test_rows_that_come_and_go_do_not_keep_one_from_its_seat():
    """With each row a block long, a new one wants a full forward at once."""
    slots = make_slots(toy.DENOISER, cached("dual", threshold=0.0))
    inputs = (*toy.left_pad(toy.prompts(1)), KEYS)
    params = toy.params(1)
    state = slots.start(params, *inputs)
    refill, ended = jnp.ones(4, bool), 0
    for _ in range(12):
        state, result = slots.advance(params, state, refill, jnp.int32(1), *inputs)
        done = result.stop_reason != StopReason.RUNNING
        ended += int(done[3])
        refill = done & (jnp.arange(4) < 3)
    assert ended > 0


def test_the_drift_bound_is_on_the_sum_of_d_since_the_last_full_forward():
    run = watch(cached("dual", cache_refresh_kl=0.5))
    refreshed = 0
    for r in range(4):
        drift = 0.0
        rows = [row_of(without_cache(s), r) for s in run.states]
        for old, new, after, before in zip(
            rows, rows[1:], run.states[1:], run.states, strict=False
        ):
            if new.step == old.step:
                continue
            full = bool(after.cache.num_full[r] > before.cache.num_full[r])
            opens = new.record.phase[old.step] == Phase.OPEN
            assert full == (opens or drift > 0.5)
            refreshed += full and not opens
            drift = 0.0 if full else drift + float(new.last_kl)
    assert refreshed > 0


def test_without_a_cache_nothing_of_it_is_carried():
    assert toy.first_state(LONG).cache is None


def test_selecting_rows_leaves_slots_as_they_are():
    state = watched("dual").states[3]
    fresh = watched("dual").states[0]
    rows = jnp.array([True, False, False, True])
    got = select_rows(rows, fresh, state)
    assert got.step.tolist() == [0, *state.step[1:3].tolist(), 0]
    assert_same_trees(got.cache.slots, state.cache.slots)


def test_the_cache_has_the_dtype_of_the_weights():
    denoiser, params = families.make_denoiser(DREAM), params_of(DREAM, "bfloat16")
    arguments = (params, *toy.left_pad(toy.prompts(0)), KEYS)
    cfg = cached("dual")
    state = jax.eval_shape(make_stepper(denoiser, cfg).init, *arguments)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(state.cache.slots)}
    assert dtypes == {"bfloat16"}
    assert state.cache.slots.keys.shape == (2, 4, 18, 2, 8)
    result = jax.eval_shape(make_decode_fn(denoiser, cfg), *arguments)
    assert result.num_full_forwards.shape == (4,)


def test_a_second_call_does_not_retrace():
    traces = []

    def counted(*args, **kwargs):
        traces.append("traced")
        return toy.DENOISER.hidden(*args, **kwargs)

    denoiser = dataclasses.replace(toy.DENOISER, hidden=counted)
    run = make_decode_fn(denoiser, cached("dual"))
    ids, mask = toy.left_pad(toy.prompts(0))
    run(toy.params(0), ids, mask, KEYS)
    after_first = len(traces)
    run(toy.params(1), ids + 1, mask, KEYS[::-1])
    assert len(traces) == after_first > 0


def test_vmap_and_pmap_change_nothing():
    cfg = cached("dual", SAMPLED)
    run, arguments = toy.decode_fn(cfg), (toy.params(2), *toy.left_pad(toy.prompts(2)))
    want = toy.run(cfg, *arguments, KEYS)
    axes = (None, None, None, 0)
    for mapped in (jax.jit(jax.vmap(run, axes)), jax.pmap(run, in_axes=axes)):
        got = quick(mapped, *arguments, KEYS[None])(*arguments, KEYS[None])
        assert_same_results(row_of(got, 0), want)


def test_a_row_that_is_never_finite_harms_no_other():
    rows = toy.prompts(0)
    poison = next(t for t in rows[1] if t not in itertools.chain(*rows[:1], *rows[2:]))
    cfg = cached("dual", gen_length=4)
    sick = toy.decode(cfg, rows, denoiser=toy.poisoned(poison))
    assert sick.stop_reason[1] == StopReason.NONFINITE
    assert sick.num_full_forwards[1] == sick.num_forwards[1] == 1
    others = jax.tree.map(lambda x: np.delete(x, 1, 0), (sick, toy.decode(cfg, rows)))
    assert_same_trees(*others)


@pytest.mark.parametrize("mode", ["none", "dual"])
def test_blocks_behind_a_committed_eos_are_not_begun(mode):
    spared = 0
    for seed in range(4):
        result = toy.decode(cached(mode, stop_at_eos=True), seed, seed, **LIKES_EOS)
        for r in np.flatnonzero(result.stop_reason == StopReason.EOS):
            ends = np.isin(result.tokens[r], (toy.EOS, toy.TURN)) & result.committed[r]
            begun = ends.argmax() // 4 + 1
            assert (result.block_stop[r, :begun] != StopReason.RUNNING).all()
            assert (result.block_stop[r, begun:] == StopReason.RUNNING).all()
            if mode == "dual":
                assert result.num_full_forwards[r] == begun
            spared += 3 - begun
    assert spared > 0


def test_infilling_refuses_a_cache():
    ids, mask = toy.left_pad(toy.prompts(0))
    with pytest.raises(ValueError, match="needs `cache='none'`, got 'dual'"):
        toy.decode_fn(cached("dual"))(toy.params(0), ids, mask, KEYS, mask)
