"""What the records of a method amount to, with intervals."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

Z = statistics.NormalDist().inv_cdf(0.975)  # Of a two-sided 95 % interval.


def wilson(correct: int | float, n: int | float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion; within [0, 1], also at its ends.

    Source: E. B. Wilson, JASA 22 (1927), 209-212.
    """
    share = correct / n
    centre = share + Z**2 / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    # Rounding may leave the ends of [0, 1] by an ulp.
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def cluster_variance(
    values: Sequence[int], clusters: Sequence[Hashable], mean: float
) -> float | None:
    """Variance of the sum of `values` around `mean` each, problems of a cluster alike.

    Problems that differ in a name alone are right or wrong together: as independent
    ones they would make an interval too narrow. None for a single cluster.

    Source: Liang and Zeger, Biometrika 73 (1986), 13-22; for evaluations of language
    models, Miller, arXiv 2411.00640.
    """
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    if len(sums) < 2:
        return None
    # The correction for few clusters is 1 where each problem is its own.
    few = len(sums) / (len(sums) - 1) * (len(values) - 1) / len(values)
    return few * math.fsum(x**2 for x in sums.values())


def reach(problems: int, clusters: int) -> float:
    """How many standard errors a 95 % interval reaches to each side.

    More than `Z` where few clusters say how large these are: by as much as Student's t
    of so many clusters goes beyond that of so many problems.

    Source: Korn and Graubard, Survey Methodology 24 (1998), 193-201.
    """
    from scipy.special import stdtrit

    if clusters < 2:
        return Z
    return float(Z * stdtrit(clusters - 1, 0.975) / stdtrit(problems - 1, 0.975))


def proportion(
    values: Sequence[bool], clusters: Sequence[Hashable]
) -> tuple[float, float]:
    """Wilson's interval of the mean of `values`, which are worth fewer problems.

    n is divided by how much larger the variance is than that of n independent problems
    (where it is smaller, or cannot be told, by 1) and by what few clusters cost.
    """
    n, correct = len(values), sum(values)
    independent = correct * (n - correct) / n
    found = cluster_variance(values, clusters, correct / n)
    effect = max(found / independent, 1.0) if found and independent else 1.0
    effect *= (reach(n, len({*clusters})) / Z) ** 2
    return wilson(correct / effect, n / effect)


def paired(
    values: Sequence[int], clusters: Sequence[Hashable]
) -> tuple[float, tuple[float, float] | None]:
    """The mean of per-problem differences, and its 95 % interval.

    Both methods answer the same problems, so what makes a problem hard cancels out and
    the interval is narrower than one from two accuracies. It is made as if of two more
    problems, on which they differ by half a point each way: without a difference on any
    problem it is not empty. None for a single cluster.

    Source: Agresti and Min, Statistics in Medicine 24 (2005), 729-740.
    """
    n, total = len(values), sum(values)
    centre = total / (n + 2)
    found = cluster_variance(values, clusters, centre)
    if found is None:
        return total / n, None
    error = math.sqrt(found + 1 + 2 * centre**2) / (n + 2)
    half = reach(n, len({*clusters})) * error
    return total / n, (max(centre - half, -1.0), min(centre + half, 1.0))


def summarise(
    records: Sequence[Mapping[str, Any]],
    baseline: Sequence[Mapping[str, Any]] | None,
    clusters: Mapping[str, str],
) -> dict[str, Any]:
    """Figures of one method on one set of problems.

    Args:
        records: at least one.
        baseline: of the method to compare with, on the same problems in any order;
            None for no comparison.
        clusters: for each record's id what other problems share if they are nearly the
            same, `tasks.Instance.group`.

    Returns:
        JSON values; proportions and differences are in [-1, 1].
    """
    n = len(records)
    right = [record["correct"] for record in records]
    correct = sum(right)
    alike = [clusters[record["id"]] for record in records]
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
        "clusters": len({*alike}),
        "correct": correct,
        "accuracy": correct / n,
        "interval": list(proportion(right, alike)),
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
        [record["correct"] - reference[record["id"]] for record in records], alike
    )
    theirs = sum(record["useful_tokens"] for record in baseline)
    speed = theirs / math.fsum(record["seconds"] for record in baseline)
    return figures | {
        "difference": mean,
        "difference_interval": None if interval is None else list(interval),
        # A baseline that writes nothing has no speed to compare with.
        "speed_up": figures["tokens_per_second"] / speed if speed else None,
    }
