"""Runs programs that a model wrote, away from this process, and says how they did.

Each program runs in a process of its own: forked from a small runner that has only the
standard library, with an empty environment, an empty folder to work in, no input, its
output thrown away, limits on time, memory, file size, open files and processes, and
killed with all its group at the end. An audit hook refuses sockets, new processes and
threads, native code, and files other than its own folder's and (to read) the standard
library's. On Linux the runner also leaves the network (for a namespace of its own) if
the system lets it, and programs started by root run as `nobody` if that user can read
the library.

It protects against what a model writes by accident or by imitation: endless loops, use
of all the memory, recursion, `exit()`, deleting files, asking for input, downloads. A
result is believed only if it is right: values are compared here, where the program
cannot reach, so it cannot claim to have passed. (`tests` could be claimed: they run
inside the program's process, where the secret word for "passed" is in memory.)

It does NOT protect against someone who sets out to break it. Python's audit hook is no
wall: a bug of the interpreter gets around it, and some calls raise no event (a program
can see by `os.stat` whether a file exists). For hostile programs use a virtual machine
as well. Where there is no `fork` (Windows), nothing is run at all.
"""

import contextlib
import dataclasses
import enum
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from lrd_jax.errors import UserError
from lrd_jax.settings import check

_RUNNER = pathlib.Path(__file__).with_name("sandbox_runner.py")
_PER_RUNNER = 64  # Programs; bounds the loss if a runner hangs.
_GRACE = 10.0  # Seconds for a runner to start, beyond the time of its programs.


class Verdict(enum.Enum):
    """How a program did."""

    PASSED = "passed"
    FAILED = "failed"  # It ran, and a value or an assertion was wrong.
    ERROR = "error"  # It raised, was no Python, or ended without a result.
    TIMEOUT = "timeout"
    MEMORY = "memory"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A verdict and, unless it passed, the reason in a few words."""

    verdict: Verdict
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that must give the expected value.

    The values are those of JSON: None, bool, int, float, str, and lists and dicts of
    them. Types count: True is not 1, and 1 is not 1.0.
    """

    function: str
    args: Sequence[Any]
    expected: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A program and its checks: calls, or a test program run after it in its namespace.

    With `tests`, it passes if they end without an exception.
    """

    source: str
    calls: Sequence[Call] = ()
    tests: str | None = None

    def __post_init__(self) -> None:
        if bool(self.calls) == (self.tests is not None):
            raise ValueError("a program needs either calls or tests.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: time, both on the clock and of the processor.
        memory_mb: address space, with the 30 MB that Python itself takes.
        file_mb: size of a file.
    """

    seconds: float = 3.0
    memory_mb: int = 512
    file_mb: int = 1

    def __post_init__(self) -> None:
        check(self.seconds > 0, "seconds", self.seconds, "positive")
        check(self.memory_mb >= 64, "memory_mb", self.memory_mb, "at least 64")
        check(self.file_mb >= 0, "file_mb", self.file_mb, "0 or more")


def run(programs: Sequence[Program], limits: Limits | None = None) -> list[Outcome]:
    """Runs the programs one after the other; none can affect another's outcome.

    Raises:
        UserError: this system has no `fork`, or the runner cannot be started.
    """
    if not hasattr(os, "fork"):
        raise UserError("running programs safely needs Linux or macOS.")
    outcomes: list[Outcome] = []
    while len(outcomes) < len(programs):
        batch = programs[len(outcomes) : len(outcomes) + _PER_RUNNER]
        replies, late = _run_batch(batch, limits or Limits())
        outcomes += [_judge(p, r) for p, r in zip(batch, replies, strict=False)]
        if len(replies) < len(batch):
            # The runner is gone or hangs: put it down to the program it was at.
            verdict = Verdict.TIMEOUT if late else Verdict.ERROR
            outcomes.append(Outcome(verdict, "the runner did not come back"))
    return outcomes


def _run_batch(
    programs: Sequence[Program], limits: Limits
) -> tuple[list[dict[str, Any]], bool]:
    """The runner's replies, as many as came, and whether its time ran out."""
    with tempfile.TemporaryDirectory(prefix="lrd-sandbox-") as folder:
        request = {
            "folder": os.path.realpath(folder),
            "limits": dataclasses.asdict(limits),
            # Without the expected values.
            "programs": [
                {
                    "source": program.source,
                    "tests": program.tests,
                    "calls": [
                        [call.function, list(call.args)] for call in program.calls
                    ],
                }
                for program in programs
            ],
        }
        process = subprocess.Popen(
            # Isolated: no site-packages, no PYTHON* variables, no .pyc files.
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        patience = _GRACE + len(programs) * (limits.seconds + 1)
        late = False
        with process:
            try:
                output, errors = process.communicate(
                    json.dumps(request).encode(), timeout=patience
                )
            except subprocess.TimeoutExpired as expired:
                output, errors, late = expired.output or b"", b"", True
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        ready, *lines = output.split(b"\n")
        if not ready and not late:
            message = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"the sandbox cannot be started: {message}")
        # What follows the last \n is nothing, or half a reply.
        return [json.loads(line) for line in lines[:-1]], late


def _judge(program: Program, reply: dict[str, Any]) -> Outcome:
    detail = reply["detail"]
    if reply["verdict"] != "returned":
        return Outcome(Verdict(reply["verdict"]), detail)
    if program.tests is not None:
        return Outcome(Verdict.PASSED)
    try:
        values = json.loads(reply["values"])
    except (ValueError, RecursionError):
        return Outcome(Verdict.FAILED, "the values cannot be read")
    if not isinstance(values, list) or len(values) != len(program.calls):
        return Outcome(Verdict.ERROR, "not as many values as calls")
    for call, value in zip(program.calls, values, strict=True):
        if not _same(value, call.expected):
            shown = f"{call.function}({', '.join(map(repr, call.args))})"
            return Outcome(Verdict.FAILED, f"{shown} gave {value!r}"[:200])
    return Outcome(Verdict.PASSED)


def _same(value: Any, expected: Any) -> bool:
    """Equal in value and type, all the way down."""
    if type(value) is not type(expected):
        return False
    if isinstance(value, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(
            _same(value[key], expected[key]) for key in value
        )
    return bool(value == expected)
