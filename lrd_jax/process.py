"""How a command starts and ends: what it keeps, its exit code and its last words."""

import contextlib
import io
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from lrd_jax.errors import UserError

MAX_NAMED = 20


def say(line: str) -> None:
    """Tells the user something that is no result."""
    print(line, file=sys.stderr)


def exit_code(run: Callable[[], int], on_interrupt: Callable[[], str]) -> int:
    """Runs a command; what stops it becomes one line and an exit code.

    Args:
        run: the command; returns its exit code.
        on_interrupt: what to say after Ctrl-C.
    """
    _replace_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter that the terminal cannot show must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _flushed(run)
    except UserError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say(f"interrupted; {on_interrupt()}.")
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except OSError as error:  # Of a file that nobody has looked at before, or stdout.
        _try_to_flush()
        # What is open already has no name here.
        say(f"error: {error.filename or 'the output'}: {error.strerror or error}")
        return 2


def use_compilation_cache() -> None:
    """Keeps what JAX compiles for the next run; call it before JAX is imported.

    In a folder of the user's, unless JAX's own variable names another.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(home) / "lrd_jax" / "compiled")
    )


@contextlib.contextmanager
def memory_errors(hint: str) -> Iterator[None]:
    """Turns a device's lack of memory, or this machine's, into a `UserError`.

    Args:
        hint: for what it has too little, and what to give instead.
    """
    import jax

    try:
        yield
    except MemoryError:  # Of the host, which reads the weights for the device.
        raise UserError(f"this machine has too little memory {hint}.") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device has too little memory {hint}.") from None


def _replace_closed() -> None:
    """Gives a stream that the caller has closed (`>&-`) a place for what is said.

    Python has None for it, and its number would go to the next file that is opened.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def _flushed(run: Callable[[], int]) -> int:
    """The exit code of a command all of whose output has been taken."""
    try:
        code = run()
    except SystemExit as stop:  # tyro's, after its own message or `--help`.
        code = stop.code if isinstance(stop.code, int) else 2
    sys.stdout.flush()
    return code


def _try_to_flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()


def _drop_stdout() -> None:
    """Else Python tries to flush what is left at exit, and complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def nonfinite_code(ids: Sequence[int | str]) -> int:
    """1 if there are rows that met non-finite logits, which it names; 0 otherwise."""
    if not ids:
        return 0
    names = ", ".join(map(str, ids[:MAX_NAMED]))
    more = len(ids) - MAX_NAMED
    say(
        "the model gave NaN or infinite logits for id "
        + names
        + (f" and {more} more" if more > 0 else "")
        + "; those rows end with stop_reason nonfinite."
    )
    return 1


def leave(code: int) -> NoReturn:
    """Ends the process; after an interrupt without waiting for the device.

    An orderly exit waits for the batch under way, which may take minutes.
    """
    if code == 130:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
