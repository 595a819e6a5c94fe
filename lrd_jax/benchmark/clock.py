"""Seconds of things that are compared, and the memory that they take."""

import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Seconds = dict[str, list[float]]  # Of each thing, by round.


def interleave(runs: Mapping[str, Callable[[], Any]], repeats: int) -> Seconds:
    """Times the runs in turn, round after round, so that all see the same machine.

    Args:
        runs: by name; a run returns when its work is done, not only begun.
        repeats: rounds that count; one before them does not.
    """
    seconds: Seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, least and largest of the rounds, times `scale`."""
    return {
        "median": scale * statistics.median(values),
        "low": scale * min(values),
        "high": scale * max(values),
    }


def combine(fn: Callable[..., float], *rounds: Sequence[float]) -> list[float]:
    """`fn` of figures of the same round, for each round."""
    return [fn(*values) for values in zip(*rounds, strict=True)]


def memory_growth(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """Runs, and says by how many bytes the process grew at the most meanwhile.

    What was freed before, and the process kept, is not seen. None for bytes where the
    system cannot tell (it is not Linux).
    """
    before = _restart_peak()
    answer = run()
    after = _status("VmHWM")
    if before is None or after is None:
        return answer, None
    return answer, max(after - before, 0)


def _restart_peak() -> int | None:
    """Makes the present size of the process its peak, and returns it."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int | None:
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None
