"""Intervals against published and hand-computed values; figures of known records."""

import pytest

from lrd_jax.evaluation.statistics import paired, proportion, reach, summarise, wilson


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


def test_a_proportion_of_independent_problems_has_wilsons_interval():
    values = [True] * 7 + [False] * 2
    assert proportion(values, range(9)) == pytest.approx(wilson(7, 9))


def test_a_proportion_of_whole_clusters_is_worth_their_number():
    """Ten problems in each of 40, right together: as wide as for 40 problems."""
    values = [i < 300 for i in range(400)]
    low, high = proportion(values, [i // 10 for i in range(400)])
    # But for the corrections for few clusters: 40 / 39 * 399 / 400, and Student's t of
    # 39 and of 399 degrees of freedom.
    effect = 10 * 40 / 39 * 399 / 400 * (2.022691 / 1.965927) ** 2
    assert (low, high) == pytest.approx(wilson(300 / effect, 400 / effect))
    assert high - low > 3 * (wilson(300, 400)[1] - wilson(300, 400)[0]) * 0.95


def test_clusters_that_are_more_even_than_chance_do_not_make_an_interval_narrower():
    values, clusters = [True, False] * 50, [i // 2 for i in range(100)]
    few = (2.009575 / 1.984217) ** 2  # Student's t of 49 and of 99.
    want = wilson(50 / few, 100 / few)
    assert proportion(values, clusters) == pytest.approx(want, abs=1e-6)
    assert proportion([True] * 5, [0] * 5) == wilson(5, 5)


def test_few_clusters_reach_as_far_as_students_t():
    # t(0.975) of 28 and of 999 degrees of freedom, as tabulated.
    assert reach(1000, 29) == pytest.approx(1.959964 * 2.048407 / 1.962341, rel=1e-5)
    assert [reach(7, 7), reach(3, 1)] == pytest.approx([1.959964] * 2, abs=1e-6)
    values = [1, 0, 0, -1] * 9
    low, high = paired(values, [i // 4 for i in range(36)])[1]
    apart = paired(values, range(36))[1]
    # The clusters' sums are all 0: nothing but the two problems that are added.
    assert high - low < apart[1] - apart[0]
    assert high == pytest.approx(reach(36, 9) / 38)


def test_paired_by_hand():
    # Agresti and Min: half a problem more in each cell of the table, so that b = 8.5,
    # c = 3.5 and n = 22, d = 5 / 22, and its variance (b + c - (b - c)^2 / n) / n^2.
    mean, (low, high) = paired([1] * 8 + [-1] * 3 + [0] * 9, range(20))
    half = 1.959964 * (12 - 25 / 22) ** 0.5 / 22
    assert mean == 0.25
    assert (low, high) == pytest.approx((5 / 22 - half, 5 / 22 + half), abs=1e-6)


def test_paired_goes_by_clusters():
    values = [1, 1, 1, 0, 0, 0, 0, 0, 0] * 4
    together = paired(values, [i // 3 for i in range(36)])
    apart = paired(values, range(36))
    spread_out = paired(values, [i % 12 for i in range(36)])  # One of the 1 in each.
    assert together[0] == apart[0] == spread_out[0]
    width = [high - low for _, (low, high) in (spread_out, apart, together)]
    assert width == sorted(width)
    assert width[2] > 1.3 * width[1]


def test_paired_without_a_spread_is_not_sure():
    mean, (low, high) = paired([0] * 98, range(98))
    assert mean == 0
    assert high == -low == pytest.approx(0.0196, abs=1e-5)
    assert paired([1], [0]) == (1, None)
    assert paired([1, 1], [0, 0]) == (1, None)


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


NAMES = {name: name for name in "abc"}


def test_figures_of_a_method():
    figures = summarise(
        [record("a", True), record("b", False, 8, 4, 1.5, "eos", 3)], None, NAMES
    )
    assert figures == {
        "n": 2,
        "clusters": 2,
        "correct": 1,
        "accuracy": 0.5,
        "interval": pytest.approx(wilson(1, 2)),
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
    figures = summarise(ours, baseline, NAMES)
    # a won, b equal, c lost.
    assert figures["difference"] == 0
    # b + c = 3 of n = 5, with the two that are added.
    assert figures["difference_interval"] == pytest.approx([-0.679, 0.679], abs=1e-3)
    assert figures["speed_up"] == 2


def test_a_baseline_without_tokens_has_no_speed():
    figures = summarise([record("a", True)], [record("a", True, tokens=0)], NAMES)
    assert figures["speed_up"] is None
    assert figures["difference_interval"] is None
