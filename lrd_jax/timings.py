"""Where the time of a command goes, from the start of its process on."""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator


class Timings:
    """Seconds of the phases of a command; made when its `main` begins.

    Attributes:
        seconds: of each phase, in the order in which they came; None if unknown.
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.seconds: dict[str, float | None] = {"launch": since_launch()}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of what is done inside to the phase `name`."""
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[name] = (self.seconds.get(name) or 0.0) + spent

    def line(self) -> str:
        """One line for the terminal; the total also has what is in no phase."""
        total = time.perf_counter() - self._begin + (self.seconds["launch"] or 0.0)
        told: dict[str, float | None] = {**self.seconds, "total": total}
        parts = [
            f"{name} {'unknown' if seconds is None else f'{seconds:.2f} s'}"
            for name, seconds in told.items()
        ]
        return "timings: " + " | ".join(parts)


def since_launch() -> float | None:
    """Seconds since this process was started; None where the system does not say."""
    try:
        # Behind the name, in parentheses that it may itself contain, comes field 3;
        # the start is field 22, in ticks since the machine was switched on.
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):  # Not Linux.
        return None
