"""The report as Markdown that also reads well in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any


def tables(report: Mapping[str, Any]) -> str:
    """All tasks together, then accuracy and difference for each task.

    Args:
        report: as `lrd_jax.evaluate` writes it.
    """
    settings, methods = report["settings"], report["methods"]
    first = next(iter(methods.values()))
    lines = [
        f"All tasks together: {first['all']['n']} problems of split "
        f"{settings['split']}, windows of {settings['gen_length']}, batches of "
        f"{settings['batch_size']}. Brackets hold 95 % intervals. Tokens are those "
        "before the end of the text. Problems that differ in names alone, or share a "
        "grid, count as what they are worth together."
    ]
    head = ["method", "accuracy, %", "forwards", "tokens/forward", "tokens/s"]
    if report["baseline"] is not None:
        head += ["difference", "speed-up"]
        lines[0] += (
            f" The difference is in points of accuracy, to {report['baseline']} on the "
            "same problems."
        )
        if _lacks_a_twin(report):
            lines[0] += (
                f" {report['baseline']} goes on behind the end of the text, where "
                "others stop: the same with `stop_at_eos` would say what that alone "
                "saves."
            )
    rows = [
        [name, *_overall(method["all"], name == report["baseline"])][: len(head)]
        for name, method in methods.items()
    ]
    by_task = [
        [name, *(accuracy(figures) for figures in method["tasks"].values())]
        for name, method in methods.items()
    ]
    names = [f"{name} ({figures['n']})" for name, figures in first["tasks"].items()]
    lines += ["", *markdown(head, rows)]
    lines += ["", "Accuracy of each task, %; in parentheses the number of problems."]
    lines += ["", *markdown(["method", *names], by_task)]
    others = [
        [name, *(_difference(figures) for figures in method["tasks"].values())]
        for name, method in methods.items()
        if report["baseline"] not in (None, name)
    ]
    if others and len(names) > 1:
        lines += ["", f"Difference to {report['baseline']} for each task, points."]
        lines += ["", *markdown(["method", *first["tasks"]], others)]
    return "\n".join(lines) + "\n"


def _lacks_a_twin(report: Mapping[str, Any]) -> bool:
    """Whether others stop with the text and the baseline, in no entry, does."""
    stops = "decode.stop_at_eos"
    methods = report["methods"]
    fixed = methods[report["baseline"]]
    if fixed["settings"][stops]:
        return False
    twin = (fixed["method"], fixed["settings"] | {stops: True})
    others = [(m["method"], m["settings"]) for m in methods.values()]
    return twin not in others and any(s[stops] for _, s in others)


def accuracy(figures: Mapping[str, Any]) -> str:
    """In per cent, with its interval."""
    low, high = figures["interval"]
    return f"{100 * figures['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _overall(figures: Mapping[str, Any], is_baseline: bool) -> list[str]:
    cells = [
        accuracy(figures),
        f"{figures['forwards_per_problem']:.1f}",
        f"{figures['tokens_per_forward']:.2f}",
        f"{figures['tokens_per_second']:.0f}",
    ]
    if is_baseline or "difference" not in figures:
        return [*cells, "", ""]
    speed_up = figures["speed_up"]
    return [
        *cells,
        _difference(figures),
        "" if speed_up is None else f"{speed_up:.2f}",
    ]


def _difference(figures: Mapping[str, Any]) -> str:
    mean, interval = figures["difference"], figures["difference_interval"]
    if interval is None:
        return f"{100 * mean:+.1f}"
    low, high = interval
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines, its columns aligned: the first to the left, others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    widths = [max(width, 3) for width in widths]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *others]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(head), line(rule), *map(line, rows)]
