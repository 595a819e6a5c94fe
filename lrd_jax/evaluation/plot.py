"""Figures of a report: accuracy against cost, or both against a swept setting."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lrd_jax.figure import pyplot, save

# One more than matplotlib has colours, so that their pairs repeat late.
_MARKERS = "os^vDP*X<>h"


def plot(report: Mapping[str, Any], path: str) -> None:
    """Draws the report: its sweep if it has one, else a point for each method.

    Args:
        report: as `lrd_jax.evaluate` writes it.
        path: of the image, checked by `figure.check_path`.

    Raises:
        UserError: no matplotlib, or the file cannot be written.
    """
    if report["settings"]["sweep"] is None:
        save(_cost(report["methods"]), path)
    else:
        save(_sweep(report), path)


def _cost(methods: Mapping[str, Any]) -> Any:
    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    for i, (name, method) in enumerate(methods.items()):
        y, x = _heights(method["all"])
        marker = _MARKERS[i % len(_MARKERS)]
        errors = _errors([method["all"]])
        axes.errorbar(x, y, errors, fmt=marker, capsize=3, alpha=0.8, label=name)
    figure.legend(loc="outside right upper")
    axes.set(xlabel="forwards per problem", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    return figure


def _sweep(report: Mapping[str, Any]) -> Any:
    setting = report["settings"]["sweep"]
    figure, (top, bottom) = pyplot().subplots(
        2, sharex=True, figsize=(8, 7), layout="constrained"
    )
    lines: dict[str, list[Any]] = {}
    for name, method in report["methods"].items():
        if method["swept"]:
            lines.setdefault(method["entry"], []).append(method)
        else:
            for axes, y in zip((top, bottom), _heights(method["all"]), strict=True):
                axes.axhline(y, color="grey", linestyle="--", label=name)
    for entry, line in lines.items():
        places = positions([method["value"] for method in line])
        figures = [method["all"] for method in line]
        shares, forwards = zip(*map(_heights, figures), strict=True)
        top.errorbar(places, shares, _errors(figures), fmt="o-", capsize=3, label=entry)
        bottom.plot(places, forwards, "o-", label=entry)
    top.set(ylabel="accuracy (%)")
    bottom.set(xlabel=setting, ylabel="forwards per problem", ylim=(0, None))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _heights(figures: Mapping[str, Any]) -> tuple[float, float]:
    return 100 * figures["accuracy"], figures["forwards_per_problem"]


def _errors(figures: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Distances down and up to the ends of the interval, as matplotlib wants them."""
    down = [100 * (f["accuracy"] - f["interval"][0]) for f in figures]
    up = [100 * (f["interval"][1] - f["accuracy"]) for f in figures]
    # Rounding may put an end of the interval an ulp on the wrong side.
    return [[max(x, 0.0) for x in down], [max(x, 0.0) for x in up]]


def positions(values: Sequence[Any]) -> list[Any]:
    """Where the values stand on the axis: at themselves, or as words if one cannot."""
    numbers = all(
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        for value in values
    )
    return list(values) if numbers else [str(value) for value in values]
