"""Continuous batching: which row goes where, and that it changes no result."""

import dataclasses
import functools
import time
import types

import jax
import numpy as np
import pytest
import toy
from toy import LIKES_EOS, QUICK, SAMPLED
from toy_run import toy_config, toy_result

from lrd_jax import scheduler
from lrd_jax.batches import Row
from lrd_jax.decode.slots import Slots, make_slots
from lrd_jax.decode.state import StopReason
from lrd_jax.errors import UserError
from lrd_jax.scheduler import AHEAD, ROUND, Scheduler, pad_lengths

GEN = 8
CONFIG = toy_config(
    vocab_size=toy.V,
    mask_id=toy.MASK,
    eos_ids=(toy.EOS, toy.TURN),
    pad_id=toy.PAD,
    max_length=64,
)
CFG = dataclasses.replace(SAMPLED, stop_at_eos=True)
EXACT = ("tokens", "committed", "num_forwards", "commit_step", "stop_reason", "phase")
KEY = jax.random.key(5)


@functools.cache
def quick_slots(cfg=CFG, denoiser=toy.DENOISER):
    """Compiled fast rather than well, and once for all tests with a number of slots."""
    kept = {}

    def quick(name, fn):
        def lower(*args):
            key = (name, *(str(jax.typeof(x)) for x in jax.tree.leaves(args)))

            def compile():
                if key not in kept:
                    kept[key] = fn.lower(*args).compile(compiler_options=QUICK)
                return kept[key]

            return types.SimpleNamespace(compile=compile)

        return types.SimpleNamespace(lower=lower)

    slots = make_slots(denoiser, cfg)
    return Slots(quick("start", slots.start), quick("advance", slots.advance))


def rows_of(prompts, **fields):
    return [Row(id=f"r{i}", line=i, ids=ids, **fields) for i, ids in enumerate(prompts)]


def make(slots, num_slots, *, gen_length=GEN, params=None, config=CONFIG, seed=5):
    params = toy.params(2, **LIKES_EOS) if params is None else params
    return Scheduler(
        slots, params, seed, num_slots=num_slots, config=config, gen_length=gen_length
    )


def alone(rows, cfg=CFG, denoiser=toy.DENOISER, seed=2, **liked):
    """Each row's result from `decode_fn`, by itself and without padding."""
    results = []
    for row in rows:
        ids, mask = toy.left_pad([row.ids], 32)
        key = jax.random.fold_in(KEY, row.line)[None]
        extra = ()
        if row.open is not None:
            extra = (toy.left_pad([list(map(int, row.open))], 32)[0].astype(bool),)
        params = toy.params(seed, **liked)
        results.append(toy.run(cfg, params, ids, mask, key, *extra, denoiser=denoiser))
    return results


def assert_same(pairs, rows, want):
    pairs = list(pairs)
    assert [row for row, _ in pairs] == list(rows)
    for (_, got), expected in zip(pairs, want, strict=True):
        for field in EXACT:
            np.testing.assert_array_equal(
                getattr(got, field), getattr(expected, field), err_msg=field
            )
        np.testing.assert_allclose(got.kl, expected.kl, atol=1e-5)


ROWS = rows_of([prompt for seed in range(3) for prompt in toy.prompts(seed)])


@pytest.fixture(scope="module")
def want():
    results = alone(ROWS, **LIKES_EOS)
    taken = [int(result.num_forwards[0]) for result in results]
    assert max(taken) >= 2 * min(taken), "rows should end at different times"
    return results


@pytest.mark.parametrize("num_slots", [1, 2, 5, 12])
def test_a_row_gets_what_it_gets_alone(want, num_slots):
    """Sampled, with EOS stops: each row keeps its own noise, whatever its slot."""
    stream = make(quick_slots(), num_slots).stream(ROWS)
    assert_same(stream, ROWS, want)


def test_a_run_is_taken_up_at_any_row(want):
    assert_same(make(quick_slots(), 2).stream(ROWS, 7), ROWS[7:], want[7:])
    assert list(make(quick_slots(), 2).stream(ROWS, len(ROWS))) == []


@pytest.mark.parametrize("ahead", [True, False])
def test_what_a_caller_does_counts_only_if_the_device_goes_on_meanwhile(want, ahead):
    one = make(quick_slots(), 2)
    taken = []
    for row, result in one.stream(ROWS, ahead=ahead):
        time.sleep(0.2)
        taken.append((row, result))
    assert_same(taken, ROWS, want)
    assert (one.run_seconds > 0.1 * len(ROWS)) == ahead


def test_the_seed_makes_the_noise(want):
    stream = make(quick_slots(), 2, seed=6).stream(ROWS)
    tokens = [result.tokens for _, result in stream]
    assert any((a != b.tokens).any() for a, b in zip(tokens, want, strict=True))


def test_nothing_is_compiled_twice():
    traces = []

    def counted(*args, **kwargs):
        traces.append("traced")
        return toy.DENOISER.hidden(*args, **kwargs)

    denoiser = dataclasses.replace(toy.DENOISER, hidden=counted)
    one = make(quick_slots(toy.RICH, denoiser), 2)
    stream = one.stream(ROWS)
    next(stream)
    after_first, seconds = len(traces), one.compile_seconds
    assert len(list(stream)) == len(ROWS) - 1
    list(one.stream(ROWS))
    assert len(traces) == after_first > 0
    assert one.compile_seconds == seconds > 0
    assert one.run_seconds > 0


def test_infilling():
    cfg = toy.config(threshold=0.7)
    opened = [[True] * n + [False] * 2 for n in (1, 4, 2)]
    prompts = [toy.prompts(0)[0][: len(which)] for which in opened]
    rows = [
        Row(id=i, line=i, ids=(prompts[i] * 2)[: len(which)], open=which)
        for i, which in enumerate(opened)
    ]
    # A text without anything to fill is done before it has begun.
    rows.append(Row(id=3, line=3, ids=[4, 5], open=[False, False]))
    slots = quick_slots(cfg)
    stream = make(slots, 2, gen_length=None).stream(rows)
    assert_same(stream, rows, alone(rows, cfg, **LIKES_EOS))


def test_a_nonfinite_row_harms_no_other():
    rows = rows_of([[5, 6], [9, 9, 9], [7], [8, 4], [6]])
    cfg, denoiser = toy.RICH, toy.poisoned(9)
    want = alone(rows, cfg, denoiser, **LIKES_EOS)
    assert want[1].stop_reason == StopReason.NONFINITE
    assert_same(make(quick_slots(cfg, denoiser), 2).stream(rows), rows, want)


def test_results_do_not_hold_the_batch():
    _, result = next(make(quick_slots(), 5).stream(ROWS))
    assert result.tokens.shape == (1, GEN)
    assert all(leaf.base is None for leaf in jax.tree.leaves(result))


class FakeDevice:
    """Slots without a model: the first id of a prompt is how long its row takes."""

    def __init__(self, num_slots):
        self.left = {}
        self.num_slots = num_slots
        self.log = []  # (P, live slots, turns) of each round.

    def slots(self):
        def jitted(fn):
            compiled = types.SimpleNamespace(compile=lambda: fn)
            return types.SimpleNamespace(lower=lambda *args: compiled)

        return Slots(jitted(self.start), jitted(self.advance))

    def start(self, params, ids, mask, keys):
        return np.zeros(self.num_slots, int)

    def advance(self, params, left, refill, enough, ids, mask, keys):
        first = ids[np.arange(self.num_slots), mask.argmax(1)]
        left = np.where(refill, first, left)
        live, turns = int((left > 0).sum()), 0
        while (left == 0).sum() < min(enough, self.num_slots):
            left, turns = np.maximum(left - 1, 0), turns + 1
        self.log.append((ids.shape[1], live, turns))
        result = toy_result(ids, mask, np.zeros((len(ids), 2), np.uint32), mask)
        done = np.where(left == 0, StopReason.KL, StopReason.RUNNING)
        return left, result.replace(stop_reason=done)

    def turns(self):
        return sum(turns for _, _, turns in self.log)


def simulate(durations, num_slots, widths=None):
    """Rows that take these numbers of turns; gives the device and the order."""
    widths = widths or [1] * len(durations)
    device = FakeDevice(num_slots)
    rows = rows_of([[n] * w for n, w in zip(durations, widths, strict=True)])
    config = toy_config(vocab_size=1000, mask_id=999, max_length=512)
    run = make(device.slots(), num_slots, params=(), config=config)
    seen = [row.id for row, _ in run.stream(rows)]
    assert seen == [row.id for row in rows]
    return device


def static_turns(durations, num_slots):
    return sum(
        max(durations[i : i + num_slots]) for i in range(0, len(durations), num_slots)
    )


def test_no_slot_waits_for_the_slowest_row():
    durations = np.random.default_rng(0).permutation([40] * 20 + [4] * 180).tolist()
    device = simulate(durations, 8)
    least = sum(durations) / 8
    assert device.turns() < 1.15 * least + 40
    assert device.turns() < 0.5 * static_turns(durations, 8)


def test_one_slot_in_eight_has_to_be_done_before_the_host_looks():
    rounds = {n: len(simulate([*range(1, 65)], n).log) for n in (ROUND, 4 * ROUND)}
    assert rounds[ROUND] > 50
    assert rounds[4 * ROUND] < 20


def test_a_slow_row_holds_back_a_limited_number(monkeypatch):
    """What a killed run loses: results that wait for an older row."""
    held = []
    release = scheduler.Pool.release

    def spy(pool, result):
        done = release(pool, result)
        held.extend(done)
        return done

    monkeypatch.setattr(scheduler.Pool, "release", spy)
    simulate([900] + [1] * 400, 4)
    assert held.index(0) == AHEAD * 4 - 1


def test_prompts_of_different_length_have_pools_of_their_own():
    widths = np.random.default_rng(1).permutation([20] * 60 + [100] * 60).tolist()
    device = simulate([5, 9, 2, 14] * 30, 4, widths)
    turns = {32: 0, 128: 0}
    for length, _, spent in device.log:
        turns[length] += spent
    # Hardly a turn more than its rows need by themselves, at either length.
    least = sum([5, 9, 2, 14] * 30) / 4
    assert device.turns() < 1.2 * least + 28
    assert turns[128] < 0.7 * device.turns()


def test_a_rare_long_prompt_takes_short_ones_along_and_leaves_them_then():
    widths = [100] + [20] * 99
    device = simulate([20] + [5] * 99, 4, widths)
    lengths = [length for length, _, _ in device.log]
    assert max(live for length, live, _ in device.log if length == 128) == 4
    assert lengths == sorted(lengths, reverse=True)
    assert lengths.count(128) < 20 < lengths.count(32)


def test_pad_lengths_are_few():
    config = toy_config(max_length=512)
    # 96 + 200 positions are not much cheaper than 128 + 200, but 48 + 200 are.
    assert pad_lengths([90, 5, 120, 40], config, 200) == [128, 48, 128, 48]
    assert pad_lengths([90, 5, 120, 40], config, None) == [96, 32, 128, 48]
    assert pad_lengths([300, 5], config, 200) == [312, 32]


def test_a_device_that_is_too_small():
    def no_room(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    failing = types.SimpleNamespace(lower=no_room)
    run = make(Slots(failing, failing), 2)
    with pytest.raises(UserError, match="2 rows of 32 prompt tokens: give a smaller"):
        next(run.stream(ROWS))
