"""The output file of a run that may be killed at any moment and started again.

Beside OUTPUT lie OUTPUT.meta.json, the settings that made it, written before the first
result and kept; and OUTPUT.lock while a run is under way. Results are appended in input
order, so what is done is always a first part of the input.
"""

import fcntl
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lrd_jax.errors import UserError
from lrd_jax.staging import write_atomically


class RunFile:
    """An output file, locked while it is open (a context manager).

    Opening it changes nothing but the lock, so a refused run leaves no trace.

    Attributes:
        num_done: results that the file already holds.
        nonfinite: ids among them that ended as `nonfinite`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        ids: Sequence[int | str],
        *,
        lock: bool = True,
    ) -> None:
        """Names the file.

        Args:
            path: of the file.
            settings: that make its results.
            ids: of all results it is to hold, in order.
            lock: whether it is to be written; if not, it may only be read.
        """
        self.path = pathlib.Path(path)
        self.num_done = 0
        self.nonfinite: list[int | str] = []
        self._settings = dict(settings)
        self._ids = list(ids)
        self._locks = lock
        self._keep = 0  # Bytes of whole lines; what follows is half-written.
        self._lock: int | None = None
        self._file: Any = None

    @property
    def meta_path(self) -> pathlib.Path:
        return self.path.with_name(self.path.name + ".meta.json")

    @property
    def lock_path(self) -> pathlib.Path:
        return self.path.with_name(self.path.name + ".lock")

    def __enter__(self) -> "RunFile":
        """Locks the file and reads how far an earlier run came.

        Raises:
            UserError: not writable, another run is writing it, or it was made by
                other settings or by something else.
        """
        try:
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"{self.path}: cannot be written: not a regular file.")
            if self._locks:
                self._lock = _take_lock(self.lock_path)
            if self.path.exists():
                self._check_settings()
                self._read_done()
        except BlockingIOError:
            raise UserError(f"{self.path}: another run is writing it now.") from None
        except OSError as error:
            self._release()
            raise self._unwritable(error) from None
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.close()
        self._release()

    def start(self) -> None:
        """Writes the settings and cuts off a half-written last line; only once."""
        if self._file is not None:
            return
        try:
            if not self.path.exists():
                write_atomically(self.meta_path, _meta_text(self._settings))
            self._file = open(self.path, "ab")
            self._file.truncate(self._keep)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._unwritable(error) from None

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds results; when it returns they are on the disk."""
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        try:
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def lines(self) -> Iterator[bytes]:
        """The results that the file held when it was opened."""
        if self.num_done:
            with open(self.path, "rb") as file:
                yield from itertools.islice(file, self.num_done)

    def extend(self, lines: Iterable[bytes]) -> None:
        """Adds the lines of results that another run has made, and counts them.

        Raises:
            UserError: as for `append`, or one is not the result that comes next.
        """
        try:
            for line in lines:
                self._count(line)
                self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written: {error.strerror}.")

    def _check_settings(self) -> None:
        try:
            there = json.loads(self.meta_path.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{self.path} exists, but no {self.meta_path.name} says what made it: "
                "move it away, or choose another `--output`."
            ) from None
        except (OSError, ValueError):
            there = None
        if not isinstance(there, dict):
            raise UserError(
                f"{self.meta_path}: not the settings of a run; move it and "
                f"{self.path.name} away, or choose another `--output`."
            )
        wanted = json.loads(_meta_text(self._settings))
        differ = [
            f"{name} was {there.get(name)!r}, now {wanted.get(name)!r}"
            for name in sorted({*there, *wanted})
            if there.get(name) != wanted.get(name)
            or (name in there) != (name in wanted)
        ]
        if differ:
            raise UserError(
                f"{self.path} was made with other settings: {'; '.join(differ)}. Give "
                "those again, or choose another `--output`."
            )

    def _read_done(self) -> None:
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # The writer was killed within this line.
                self._count(line)

    def _count(self, line: bytes) -> None:
        record = self._read_record(line)
        if record.get("stop_reason") == "nonfinite":
            self.nonfinite.append(record["id"])
        self.num_done += 1
        self._keep += len(line)

    def _read_record(self, line: bytes) -> dict[str, Any]:
        number = self.num_done + 1
        try:
            record = json.loads(line)
            name = record["id"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{self.path}, line {number}: not a result; was it changed by hand?"
            ) from None
        expected = self._ids[number - 1] if number <= len(self._ids) else None
        if name != expected or type(name) is not type(expected):
            raise UserError(
                f"{self.path}, line {number}: has id {name!r} where {expected!r} was "
                "expected; was it changed by hand?"
            )
        return record

    def _release(self) -> None:
        if self._lock is not None:
            self.lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def _take_lock(path: pathlib.Path) -> int:
    """Locks the file `path` and returns its descriptor.

    The kernel frees the lock of a process that dies, so a file that is left over blocks
    nobody. A file may be removed by its owner between our opening and our locking it:
    then the lock is on a file that nobody else will find, and we try again.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made or locked.
    """
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _meta_text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, allow_nan=False) + "\n"


def _sync_folder(folder: pathlib.Path) -> None:
    """Makes the names of new files in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
