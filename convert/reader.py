"""Reads published weights a few rows at a time, and lists all that is wrong with them.

Safetensors by index or as a single file. `pytorch_model*.bin` is a pickle: it is read
only by torch's own restricted unpickler, and only where torch is installed.
"""

import abc
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from lrd_jax.errors import UserError
from lrd_jax.staging import first_line

BLOCK_BYTES = 2**26  # Read at a time.
# The floating types that published weights come in, by the name errors give them.
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
Index = list[tuple[str, pathlib.Path]]  # Tensor -> shard; a list, as names may repeat.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A published tensor: where it is and what it looks like.

    Attributes:
        shard: the file that holds it.
        shape: its shape.
        dtype: as safetensors names it: `BF16`, `F32`, `I8`, ...
    """

    shard: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


class _Format(abc.ABC):
    """How the tensors of one kind of file are read."""

    @abc.abstractmethod
    def tensors(self, shard: pathlib.Path) -> Iterator[tuple[str, Tensor]]:
        """Names and looks of all tensors of a shard."""

    @abc.abstractmethod
    def rows(self, shard: pathlib.Path, name: str, start: int, stop: int) -> np.ndarray:
        """Some rows of a tensor, in memory of their own."""


class _Safetensors(_Format):
    def tensors(self, shard: pathlib.Path) -> Iterator[tuple[str, Tensor]]:
        with safetensors.safe_open(shard, framework="numpy") as file:
            for name in file.keys():
                view = file.get_slice(name)
                yield name, Tensor(shard, tuple(view.get_shape()), view.get_dtype())

    def rows(self, shard: pathlib.Path, name: str, start: int, stop: int) -> np.ndarray:
        # Opened anew each time: pages of the mapped file count as memory in use until
        # it is closed.
        with safetensors.safe_open(shard, framework="numpy") as file:
            return file.get_slice(name)[start:stop]


class _Pickled(_Format):
    """Torch's own format. Keeps one shard open: opening it reads its whole index."""

    def __init__(self, src: pathlib.Path) -> None:
        if importlib.util.find_spec("torch") is None:
            raise UserError(
                f"{src} has its weights in pytorch_model.bin form, which takes torch "
                "to read: install torch, or get the safetensors files."
            )
        self._torch = importlib.import_module("torch")
        self._shard: pathlib.Path | None = None
        self._state: dict[str, Any] = {}

    def _open(self, shard: pathlib.Path) -> dict[str, Any]:
        if shard != self._shard:
            self._state = self._torch.load(
                shard, map_location="cpu", weights_only=True, mmap=True
            )
            self._shard = shard
        return self._state

    def tensors(self, shard: pathlib.Path) -> Iterator[tuple[str, Tensor]]:
        names = {
            self._torch.bfloat16: "BF16",
            self._torch.float16: "F16",
            self._torch.float32: "F32",
        }
        for name, value in self._open(shard).items():
            dtype = names.get(value.dtype, str(value.dtype))
            yield name, Tensor(shard, tuple(value.shape), dtype)

    def rows(self, shard: pathlib.Path, name: str, start: int, stop: int) -> np.ndarray:
        block = self._open(shard)[name][start:stop].contiguous()
        if block.dtype == self._torch.bfloat16:
            bits = block.view(self._torch.int16).numpy()
            return bits.view(ml_dtypes.bfloat16).copy()
        return block.numpy().copy()


class Source:
    """The weights of a published checkpoint.

    Args:
        src: directory with the weights.

    Attributes:
        tensors: name -> tensor, over all shards.
        problems: what is wrong so far, one phrase each: tensors in two shards, or
            where the index does not say; shards that are absent.

    Raises:
        UserError: no weights, an index that cannot be used, a damaged shard.
    """

    def __init__(self, src: pathlib.Path) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.problems: list[str] = []
        index, shards = _find_weights(src)
        pickled = shards[0].suffix == ".bin"
        self._format: _Format = _Pickled(src) if pickled else _Safetensors()
        for shard in shards:
            if shard.is_file():
                self._add(shard)
            else:
                self.problems.append(f"shard {shard.name} of the index is absent")
        if index is not None:
            self._compare(index, {shard for shard in shards if shard.is_file()})

    def _add(self, shard: pathlib.Path) -> None:
        with _named_damage(shard):
            for name, tensor in self._format.tensors(shard):
                if name in self.tensors:
                    first = self.tensors[name].shard.name
                    self.problems.append(f"{name} is in both {first} and {shard.name}")
                self.tensors.setdefault(name, tensor)

    def _compare(self, index: Index, present: set[pathlib.Path]) -> None:
        """Notes where the index and the shards disagree."""
        where: dict[str, pathlib.Path] = {}
        for name, shard in index:
            if where.setdefault(name, shard) != shard:
                self.problems.append(
                    f"{name} is in both {where[name].name} and {shard.name} "
                    "by the index"
                )
        for name, shard in where.items():
            held = self.tensors.get(name)
            if shard in present and (held is None or held.shard != shard):
                self.problems.append(f"{name} is not in {shard.name} as the index says")
        for name, tensor in self.tensors.items():
            if name not in where:
                self.problems.append(f"{name} of {tensor.shard.name} is not indexed")

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Reads a tensor in blocks of rows.

        Yields:
            The number of the block's first row, and the rows.
        """
        tensor = self.tensors[name]
        row_bytes = math.prod(tensor.shape[1:]) * DTYPES[tensor.dtype].itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, tensor.shape[0], step):
            stop = min(start + step, tensor.shape[0])
            with _named_damage(tensor.shard):
                block = self._format.rows(tensor.shard, name, start, stop)
            yield start, block


@contextlib.contextmanager
def _named_damage(shard: pathlib.Path) -> Iterator[None]:
    """Turns a failure to read a shard into a `UserError` that names the shard."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:  # The system's own.
            raise UserError(f"{shard}: cannot be read: {error.strerror}.") from None
        reason = first_line(error)
        raise UserError(f"{shard}: truncated or corrupt: {reason}") from None


def _find_weights(src: pathlib.Path) -> tuple[Index | None, list[pathlib.Path]]:
    """The index, if there is one, and the shards; safetensors first."""
    for single, index in zip(_SINGLES, _INDEXES, strict=True):
        if (src / single).is_file():
            return None, [src / single]
        if (src / index).is_file():
            pairs = _read_index(src / index)
            return pairs, sorted({shard for _, shard in pairs})
    raise UserError(
        f"{src} has no weights: expected {_SINGLES[0]}, or {_INDEXES[0]} and the "
        "shards it names."
    )


def _read_index(file: pathlib.Path) -> Index:
    def keep_repeated(pairs: list[tuple[str, Any]]) -> Any:
        return pairs

    try:
        content = json.loads(
            file.read_text(encoding="utf-8"), object_pairs_hook=keep_repeated
        )
        weight_map = dict(content)["weight_map"]
        index = [(str(name), str(shard)) for name, shard in weight_map]
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{file}: damaged: no map of tensors to files.") from None
    if not index:
        raise UserError(f"{file}: damaged: its weight_map is empty.")
    suffix = ".bin" if file.name.endswith(".bin.index.json") else ".safetensors"
    for _, shard in index:
        # Never follow a downloaded index out of its own directory.
        if pathlib.PurePath(shard).name != shard or not shard.endswith(suffix):
            raise UserError(f"{file}: unsafe or unknown kind of shard: {shard!r}.")
    return [(name, file.parent / shard) for name, shard in index]
