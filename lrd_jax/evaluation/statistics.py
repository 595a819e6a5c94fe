"""What the records of a method amount to, with intervals; plain Python."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Z = statistics.NormalDist().inv_cdf(0.975)  # Of a two-sided 95 % interval.


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion; within [0, 1], also at its ends.

    Source: E. B. Wilson, JASA 22 (1927), 209-212.
    """
    share = correct / n
    centre = share + Z**2 / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    # Rounding may leave the ends of [0, 1] by an ulp.
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def paired(values: Sequence[int]) -> tuple[float, tuple[float, float] | None]:
    """The mean of per-problem differences, and its normal 95 % interval.

    Both methods answer the same problems, so what makes a problem hard cancels out and
    the interval is narrower than one from two accuracies. None for a single problem.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    half = Z * statistics.stdev(values) / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


def summarise(
    records: Sequence[Mapping[str, Any]],
    baseline: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Figures of one method on one set of problems.

    Args:
        records: at least one.
        baseline: of the method to compare with, on the same problems in any order;
            None for no comparison.

    Returns:
        JSON values; proportions and differences are in [-1, 1].
    """
    n = len(records)
    correct = sum(record["correct"] for record in records)
    forwards, full_forwards, tokens, refine_steps = (
        sum(record[name] for record in records)
        for name in (
            "num_forwards",
            "num_full_forwards",
            "useful_tokens",
            "refine_steps",
        )
    )
    seconds = math.fsum(record["seconds"] for record in records)
    figures: dict[str, Any] = {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": list(wilson(correct, n)),
        "forwards": forwards,
        "full_forwards": full_forwards,
        "refine_steps": refine_steps,
        "useful_tokens": tokens,
        "seconds": seconds,
        "forwards_per_problem": forwards / n,
        "tokens_per_forward": tokens / forwards,
        "tokens_per_second": tokens / seconds,
        "stop_reasons": dict(Counter(record["stop_reason"] for record in records)),
    }
    if baseline is None:
        return figures
    reference = {record["id"]: record["correct"] for record in baseline}
    mean, interval = paired(
        [record["correct"] - reference[record["id"]] for record in records]
    )
    theirs = sum(record["useful_tokens"] for record in baseline)
    speed = theirs / math.fsum(record["seconds"] for record in baseline)
    return figures | {
        "difference": mean,
        "difference_interval": None if interval is None else list(interval),
        # A baseline that writes nothing has no speed to compare with.
        "speed_up": figures["tokens_per_second"] / speed if speed else None,
    }
