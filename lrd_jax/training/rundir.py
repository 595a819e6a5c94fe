"""The directory of a run, which may be killed at any moment and started again.

settings.json      what made it; a run with others is refused
tokenizer/         the model's tokenizer, if it has one
checkpoints/N/     weights, their average and the optimiser's state after N steps
log.jsonl          one line for every few steps
export/            the result, as a checkpoint for `lrd_jax.load`
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lrd_jax.errors import UserError
from lrd_jax.staging import first_line, one_line_disk_errors, write_atomically

KEPT = 2  # Checkpoints: the older one is there should the newest be damaged.


class RunDir:
    """Names and reads the files of a run.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path).absolute()

    @property
    def settings(self) -> pathlib.Path:
        return self.path / "settings.json"

    @property
    def log(self) -> pathlib.Path:
        return self.path / "log.jsonl"

    @property
    def tokenizer(self) -> pathlib.Path:
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> pathlib.Path:
        return self.path / "export"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the directory, which it makes, for one run.

        Raises:
            UserError: another run holds it, or it cannot be written.
        """
        with one_line_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            # The kernel frees the lock of a process that dies.
            handle = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UserError(f"{self.path}: another run is writing it now.") from None
        finally:
            os.close(handle)

    def keep_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings, unless they are there.

        Raises:
            UserError: as for `check_settings`, or they cannot be written.
        """
        self.check_settings(settings)
        if not self.settings.exists():
            write_atomically(self.settings, json.dumps(settings, indent=1) + "\n")

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Compares the settings with those that are there; changes nothing.

        Raises:
            UserError: made by other settings, or by something else.
        """
        if not self.settings.exists():
            self._check_empty()
            return
        wanted = json.loads(json.dumps(settings))
        try:
            there = json.loads(self.settings.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = None
        if not isinstance(there, dict):
            raise UserError(
                f"{self.settings}: not the settings of a run; choose another `--out`."
            )
        differ = [
            f"{name} was {there.get(name)!r}, now {wanted.get(name)!r}"
            for name in sorted({*there, *wanted})
            if there.get(name) != wanted.get(name)
        ]
        if differ:
            raise UserError(
                f"{self.path} was made with other settings: {'; '.join(differ)}. Give "
                "those again, or choose another `--out`."
            )

    def _check_empty(self) -> None:
        """Raises a `UserError` if something else than a run is there."""
        if not self.path.is_dir():
            return  # Nothing is there, or what `locked` cannot make a directory of.
        others = [p.name for p in self.path.iterdir() if p.name != ".lock"]
        if others:
            raise UserError(
                f"{self.path} holds {sorted(others)[0]} but no settings.json: not the "
                "directory of a run; choose another `--out`."
            )

    def saved_steps(self) -> list[int]:
        """Numbers of the checkpoints that are complete, the oldest first."""
        if not self.checkpoints.is_dir():
            return []
        names = [path.name for path in self.checkpoints.iterdir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, state: Any, seconds: float) -> None:
        """Writes a checkpoint, which appears complete or not at all.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        from orbax.checkpoint import v1 as ocp  # 0.2 s

        # By number: the structure of an optimiser's state is nothing to store.
        leaves = {f"{i:04}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        leaves["seconds"] = np.float64(seconds)
        with one_line_disk_errors(self.checkpoints, ValueError):
            self.checkpoints.mkdir(exist_ok=True)
            ocp.save(self.checkpoints / str(step), leaves, overwrite=True)
            for old in self.saved_steps()[:-KEPT]:
                shutil.rmtree(self.checkpoints / str(old))

    def restore(self, step: int, like: Any) -> tuple[Any, float]:
        """Reads a checkpoint.

        Args:
            step: its number.
            like: a state of the same structure, shapes and dtypes.

        Returns:
            The state, and the seconds that training had taken.

        Raises:
            UserError: damaged, or of other shapes.
        """
        from orbax.checkpoint import v1 as ocp

        leaves, structure = jax.tree.flatten(like)
        wanted: dict[str, Any] = {f"{i:04}": leaf for i, leaf in enumerate(leaves)}
        wanted["seconds"] = np.float64(0)
        path = self.checkpoints / str(step)
        try:
            stored = ocp.load(path, wanted)
        except Exception as error:  # Orbax raises bare ones.
            raise UserError(
                f"{path}: cannot be read: {first_line(error)}; remove it to go on from "
                "an older one."
            ) from error
        seconds = float(stored.pop("seconds"))
        return jax.tree.unflatten(
            structure, [stored[name] for name in sorted(stored)]
        ), seconds

    def remove_unfinished(self) -> None:
        """Removes what a save that was killed has left."""
        if self.checkpoints.is_dir():
            for path in self.checkpoints.iterdir():
                if not path.name.isdecimal():
                    shutil.rmtree(path, ignore_errors=True)

    def cut_log(self, step: int) -> None:
        """Drops the lines after a step, and one that is cut short."""
        kept = [line for line in read_log(self.log) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.log, text)

    def append_log(self, line: Mapping[str, Any]) -> None:
        """Adds a line; when it returns, it is on the disk."""
        with one_line_disk_errors(self.log), open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_log(path: pathlib.Path) -> Sequence[dict[str, Any]]:
    """The lines of a log; none if there is no file.

    Raises:
        UserError: a line, other than a last one that is cut short, is no line of a log.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    read = []
    for number, line in enumerate(lines, start=1):
        try:
            read.append(json.loads(line))
            read[-1]["step"], read[-1]["loss"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number}: not a line of a log.") from None
    return read
