"""The report as Markdown that also reads well in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from lrd_jax.benchmark.axes import AXES
from lrd_jax.evaluation.table import markdown

PARTS = ("forward", "belief", "bookkeeping")


def tables(report: Mapping[str, Any]) -> str:
    """What was measured, one line of settings first.

    Args:
        report: as `lrd_jax.bench` writes it.
    """
    settings = report["settings"]
    lines = [
        f"{settings['model']} on {settings['platform']}, {settings['threads']} "
        f"thread(s), batches of {settings['batch_size']}, prompts of "
        f"{settings['prompt']}, windows of {settings['gen_length']}. Medians of "
        f"{settings['repeats']} rounds, in brackets the least and the largest."
    ]
    if "sweep" in report:
        return "\n".join([*lines, *_sweep(report["sweep"])]) + "\n"
    lines += _peaks(report)
    lines += ["", *_parts(report["methods"])]
    if settings["decode"]:
        loops = report.get("peer", {}).get("loops", {})
        lines += ["", *_decodes(report["methods"], loops)]
        lines += _agreement(loops)
    return "\n".join(lines) + "\n"


def shown(figures: Mapping[str, float] | None, digits: int = 2) -> str:
    """A median with its spread; nothing for None."""
    if figures is None:
        return ""
    median, low, high = (f"{figures[k]:.{digits}f}" for k in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "" if value is None else f"{scale * value:.{digits}f}"


def _peaks(report: Mapping[str, Any]) -> list[str]:
    peaks = report["peak_gflops"]
    told = ", ".join(f"{name} {shown(peak, 1)}" for name, peak in peaks.items())
    lines = [
        "",
        f"float32 matrix products, GFLOP/s: {told}.",
        f"Plain forward, head over the window: {shown(report['forward_ms'])} ms.",
    ]
    if peer := report.get("peer"):
        lines += [
            f"The peer's: {shown(peer['forward_ms'])} ms; ours over it "
            f"{shown(peer['forward_ratio'])}, at equal matrix products "
            f"{shown(peer['forward_ratio_at_equal_peak'])}; logits differ by "
            f"{peer['largest_logit_difference']:.1e} at most.",
        ]
    return lines


def _parts(methods: Mapping[str, Any]) -> list[str]:
    head = ["one turn", *(f"{part}, ms" for part in PARTS), "whole turn, ms"]
    head += ["shares, %", "beyond forward, %"]
    return markdown(
        head, [[name, *_part_cells(m["parts"])] for name, m in methods.items()]
    )


def _part_cells(parts: Mapping[str, Any]) -> list[str]:
    shares = " / ".join(f"{100 * parts['share'][part]:.0f}" for part in PARTS)
    per_cent = {k: 100 * v for k, v in parts["beyond_forward"].items()}
    return [
        *(shown(parts["ms"][part]) for part in PARTS),
        shown(parts["turn_ms"]),
        shares,
        shown(per_cent, 1),
    ]


def _decodes(methods: Mapping[str, Any], loops: Mapping[str, Any]) -> list[str]:
    head = ["whole decode", "ms/forward", "forwards", "tokens/forward", "tokens/s"]
    head += ["accuracy, %", "compile, s", "memory, MiB"]
    head += [f"speed-up over torch {loop}" for loop in loops]
    rows = [
        [name, *_decode_cells(figures, loops)]
        for name, figures in [
            *methods.items(),
            *((f"torch {loop}", figures) for loop, figures in loops.items()),
        ]
    ]
    return markdown(head, rows)


def _decode_cells(figures: Mapping[str, Any], loops: Mapping[str, Any]) -> list[str]:
    speed_ups = figures.get("speed_up", {})
    return [
        shown(figures["ms_per_forward"]),
        _number(figures["forwards_per_prompt"], 1),
        _number(figures["tokens_per_forward"], 2),
        shown(figures["tokens_per_second"], 1),
        _number(figures["accuracy"], 1, 100.0),
        _number(figures.get("compile_seconds"), 1),
        _number(figures["memory_growth_mib"], 1),
        *(shown(speed_ups.get(loop)) for loop in loops),
    ]


def _agreement(loops: Mapping[str, Any]) -> list[str]:
    lines = []
    for loop, figures in loops.items():
        rows = figures["rows_that_differ"]
        said = f"differ in {rows} row(s)" if rows else "are the same"
        lines += ["", f"Tokens of torch {loop} and of {figures['same_as']} {said}."]
    return lines


def _sweep(sweep: Mapping[str, Any]) -> list[str]:
    head = ["", *(f"{part}, ms" for part in PARTS), "beyond forward, %"]
    rows = []
    for axis, figures in sweep.items():
        for point in figures["points"]:
            per_cent = {k: 100 * v for k, v in point["beyond_forward"].items()}
            cells = [shown(point["ms"][part]) for part in PARTS]
            rows.append([f"{axis} {point['value']}", *cells, shown(per_cent, 1)])
    lines = ["", *markdown(head, rows), ""]
    for axis, figures in sweep.items():
        lines.append(f"{AXES[axis]}: {_growth(axis, figures['exponents'])}.")
    return lines


def _growth(axis: str, exponents: Mapping[str, float | None]) -> str:
    known: Sequence[str] = [
        f"{part} grows like {axis}^{power:.2f}"
        for part, power in exponents.items()
        if power is not None
    ]
    return ", ".join(known) or "no growth to tell"
