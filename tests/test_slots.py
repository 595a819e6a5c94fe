"""Slots on the device: refilled or not, rows end as `decode_fn` ends them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import LIKES_EOS, QUICK, RICH, SAMPLED
from train_toy import quick_compile as quick_compile

from lrd_jax.decode.slots import make_slots
from lrd_jax.decode.state import Phase, StopReason

KEYS = jax.random.split(jax.random.key(3), 4)
EXACT = ("tokens", "committed", "num_forwards", "commit_step", "stop_reason", "phase")


class Quick:
    """A jitted function, compiled fast rather than well, once for all tests."""

    def __init__(self, fn):
        self.fn, self.compiled = fn, None

    def __call__(self, *args):
        if self.compiled is None:
            self.compiled = self.fn.lower(*args).compile(compiler_options=QUICK)
        return self.compiled(*args)


@pytest.fixture(scope="module")
def slots():
    start, advance, *_ = make_slots(toy.DENOISER, SAMPLED)
    return Quick(start), Quick(advance)


@pytest.fixture
def problem():
    ids, mask = toy.left_pad(toy.prompts(2))
    return toy.params(2, **LIKES_EOS), (ids, mask, KEYS)


def slots_of(*which):
    return np.isin(np.arange(4), which)


def test_slots_start_idle(slots, problem):
    start, _ = slots
    params, inputs = problem
    state = start(params, *inputs)
    assert (state.phase == Phase.DONE).all()
    assert (state.stop_reason == StopReason.RUNNING).all()


def test_rows_end_as_in_one_batch(slots, problem):
    start, advance = slots
    params, inputs = problem
    want = toy.run(SAMPLED, params, *inputs)
    state = start(params, *inputs)
    _, result = advance(params, state, slots_of(0, 1, 2, 3), np.int32(4), *inputs)
    for field in EXACT:
        np.testing.assert_array_equal(getattr(result, field), getattr(want, field))


@pytest.mark.parametrize("enough", [1, 2, 3, 9])
def test_it_stops_as_soon_as_enough_slots_are_done(slots, problem, enough):
    start, advance = slots
    params, inputs = problem
    want = toy.run(SAMPLED, params, *inputs)
    assert len({*want.num_forwards.tolist()}) > 2
    state = start(params, *inputs)
    _, result = advance(params, state, slots_of(0, 1, 2, 3), np.int32(enough), *inputs)
    # A row that its last commit finishes is done at the others' next forward.
    last = np.sort(want.num_forwards)[min(enough, 4) - 1] + 1
    done = result.stop_reason != StopReason.RUNNING
    np.testing.assert_array_equal(done, want.num_forwards < last)
    np.testing.assert_array_equal(
        result.num_forwards, np.minimum(want.num_forwards, last)
    )


def test_a_refilled_slot_changes_and_no_other(slots, problem):
    start, advance = slots
    params, inputs = problem
    want = toy.run(SAMPLED, params, *inputs)
    all_four, one = slots_of(0, 1, 2, 3), slots_of(2)
    state, _ = advance(params, start(params, *inputs), all_four, np.int32(1), *inputs)
    # Slot 2 gets the prompt and the key of row 0; what stands elsewhere is ignored.
    moved = [jnp.roll(array, 2, axis=0) for array in inputs]
    state, result = advance(params, state, one, np.int32(4), *moved)
    for field in EXACT:
        got, expected = getattr(result, field), np.array(getattr(want, field))
        expected[2] = expected[0]
        np.testing.assert_array_equal(got, expected)


def test_idle_slots_are_left_alone(slots, problem):
    """An idle slot takes no forward and is never reported as done."""
    start, advance = slots
    params, inputs = problem
    _, result = advance(
        params, start(params, *inputs), slots_of(1), np.int32(4), *inputs
    )
    np.testing.assert_array_equal(result.num_forwards > 0, slots_of(1))
    done = result.stop_reason != StopReason.RUNNING
    np.testing.assert_array_equal(done, slots_of(1))


def test_the_state_is_used_up(problem):
    params, inputs = problem
    advance = make_slots(toy.DENOISER, RICH).advance
    start = make_slots(toy.DENOISER, RICH).start
    state = jax.eval_shape(start, params, *inputs)
    text = advance.lower(params, state, slots_of(1), np.int32(1), *inputs).as_text()
    assert "tf.aliasing_output" in text


def test_a_refill_does_not_retrace(problem):
    params, inputs = problem
    traces = []

    def counted(*args, **kwargs):
        traces.append("traced")
        return toy.DENOISER.hidden(*args, **kwargs)

    denoiser = dataclasses.replace(toy.DENOISER, hidden=counted)
    start, advance, *_ = make_slots(denoiser, RICH)
    state, _ = advance(
        params, start(params, *inputs), slots_of(0, 1), np.int32(3), *inputs
    )
    after_first = len(traces)
    advance(params, state, slots_of(0, 3), np.int32(4), *inputs)
    assert len(traces) == after_first > 0


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_a_refilled_slot_does_not_read_what_the_row_before_it_cached(mode, problem):
    params, inputs = problem
    cfg = dataclasses.replace(SAMPLED, cache=mode)
    want = toy.run(cfg, params, *inputs)
    start, advance = map(Quick, make_slots(toy.DENOISER, cfg)[:2])
    all_four, one = slots_of(0, 1, 2, 3), slots_of(2)
    state, _ = advance(params, start(params, *inputs), all_four, np.int32(1), *inputs)
    moved = [jnp.roll(array, 2, axis=0) for array in inputs]
    _, result = advance(params, state, one, np.int32(4), *moved)
    for field in (*EXACT, "num_full_forwards"):
        got, expected = getattr(result, field), np.array(getattr(want, field))
        expected[2] = expected[0]
        np.testing.assert_array_equal(got, expected)
