"""Intervals against published and hand-computed values; figures of known records."""

import pytest

from lrd_jax.evaluation.statistics import paired, summarise, wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_has_the_published_values(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_stays_a_proportion_and_is_symmetric():
    for n in (1, 7, 1000):
        low, high = wilson(n, n)
        assert high == pytest.approx(1)
        assert high <= 1
        assert wilson(0, n) == pytest.approx((0, 1 - low))
        assert wilson(0, n)[0] >= 0


def test_paired_by_hand():
    # Mean 1/4; squared deviations 9/16 + 3 * 1/16 over 3 give variance 1/4.
    mean, interval = paired([1, 0, 0, 0])
    assert mean == 0.25
    assert interval == pytest.approx((0.25 - 1.96 * 0.25, 0.25 + 1.96 * 0.25), abs=1e-4)


def test_paired_without_a_spread():
    assert paired([0, 0, 0]) == (0, (0, 0))
    assert paired([1]) == (1, None)


def record(name, correct, forwards=4, tokens=2, seconds=0.5, stop="kl", refined=1):
    return {
        "id": name,
        "correct": correct,
        "num_forwards": forwards,
        "num_full_forwards": forwards // 4,
        "useful_tokens": tokens,
        "seconds": seconds,
        "stop_reason": stop,
        "refine_steps": refined,
    }


def test_figures_of_a_method():
    figures = summarise(
        [record("a", True), record("b", False, 8, 4, 1.5, "eos", 3)], None
    )
    assert figures == {
        "n": 2,
        "correct": 1,
        "accuracy": 0.5,
        "interval": list(wilson(1, 2)),
        "forwards": 12,
        "full_forwards": 3,
        "refine_steps": 4,
        "useful_tokens": 6,
        "seconds": 2.0,
        "forwards_per_problem": 6.0,
        "tokens_per_forward": 0.5,
        "tokens_per_second": 3.0,
        "stop_reasons": {"kl": 1, "eos": 1},
    }


def test_the_comparison_goes_by_id():
    baseline = [record("b", True), record("a", False), record("c", True)]
    ours = [record(name, name != "c", seconds=0.25) for name in "abc"]
    figures = summarise(ours, baseline)
    # a won, b equal, c lost.
    assert figures["difference"] == 0
    assert figures["difference_interval"] == pytest.approx([-1.1316, 1.1316], abs=1e-4)
    assert figures["speed_up"] == 2


def test_a_baseline_without_tokens_has_no_speed():
    figures = summarise([record("a", True)], [record("a", True, tokens=0)])
    assert figures["speed_up"] is None
    assert figures["difference_interval"] is None
