"""Directories and files that appear complete or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

from lrd_jax.errors import UserError


@contextlib.contextmanager
def staged(
    path: pathlib.Path | str,
    *,
    overwrite: bool,
    replaceable: Callable[[pathlib.Path], bool],
    needed_bytes: int = 0,
) -> Iterator[pathlib.Path]:
    """Gives a directory beside `path` that becomes `path` if the body succeeds.

    If the body fails or is interrupted, nothing of it is left, and what was at `path`
    is as before: the old directory goes only after the new one is in its place. What
    somebody else has put there meanwhile stays, too.

    Args:
        path: the directory to make.
        overwrite: whether it may replace what is there.
        replaceable: whether a directory is one that may be replaced at all; an empty
            one always may.
        needed_bytes: free space to insist on before starting.

    Raises:
        UserError: `path` is taken, or the disk is full or cannot be written.
    """
    path = pathlib.Path(os.path.abspath(path))  # Has a name, which `.` has not.
    _check_free(path, overwrite, replaceable)
    with one_line_disk_errors(path), _parents(path):
        _check_space(path, needed_bytes)
        prefix = f".{path.name}-"
        folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
        new, old = folder / "new", folder / "old"
        try:
            new.mkdir()  # mkdtemp's is private; this one is as the umask has it.
            yield new
            _check_free(path, overwrite, replaceable)
            _swap(new, path, old)
        finally:
            if path.exists() or not old.exists():  # Never the only one there is.
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def one_line_disk_errors(path: pathlib.Path, *also: type[Exception]) -> Iterator[None]:
    """Turns errors of the file system, and the types in `also`, into `UserError`."""
    kinds: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be written: {reason}") from None


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one, never a part.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    with one_line_disk_errors(path):
        beside = path.with_name(path.name + ".part")
        try:
            with open(beside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


def check_new_file(path: str, flag: str) -> None:
    """Sees that a file can be put there, before hours are spent on what is in it.

    Raises:
        UserError: it is no name of a file, or its directory is none to write to.
    """
    folder, name = os.path.split(path)
    if name in ("", ".", "..") or os.path.isdir(path):
        raise UserError(f"{flag} {path!r}: must be the name of a file.")
    if not os.path.isdir(folder or "."):
        raise UserError(f"{flag} {path}: no such directory.")
    if not os.access(folder or ".", os.W_OK):
        raise UserError(f"{flag} {path}: its directory is not writable.")
    with (
        one_line_disk_errors(pathlib.Path(path)),
        contextlib.suppress(FileNotFoundError),
    ):
        os.stat(path)  # Raises for a name that is too long.


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the kind of error if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_free(
    path: pathlib.Path, overwrite: bool, replaceable: Callable[[pathlib.Path], bool]
) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{path} exists; give --overwrite to replace it.")
    ours = path.is_dir() and not path.is_symlink()
    if not ours or not (replaceable(path) or not any(path.iterdir())):
        raise UserError(f"{path} was not made by this program: not overwriting it.")


def _swap(new: pathlib.Path, path: pathlib.Path, old: pathlib.Path) -> None:
    """Puts `new` in the place of `path`, which becomes `old`; all or nothing of it."""
    try:
        if path.exists():
            path.rename(old)
        new.rename(path)
    except BaseException:  # An interrupt may come right behind the first of the two.
        if old.exists() and not path.exists():
            old.rename(path)
        raise


def _check_space(path: pathlib.Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        raise UserError(
            f"{path}: the disk has {free:,} bytes free, {needed_bytes:,} are needed."
        )


@contextlib.contextmanager
def _parents(path: pathlib.Path) -> Iterator[None]:
    """Makes the missing parents of `path`, and removes those again on failure."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
