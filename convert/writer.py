"""Writes safetensors shards and their index, one shard in memory at a time."""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SHARD_BYTES = 2 * 10**9  # Of memory, too: a shard is written from a dict of it.
INDEX_FILE = "model.safetensors.index.json"
_MADE_BY = "lrd_jax"  # In the index: what this program wrote it may replace.

Look = tuple[str, tuple[int, ...]]  # Name and shape of a tensor.


def plan_shards(
    tensors: Iterable[Look], itemsize: int, limit: int = SHARD_BYTES
) -> list[list[Look]]:
    """Cuts the sequence of tensors into shards of at most `limit` bytes.

    A tensor larger than that is a shard of its own.
    """
    shards: list[list[Look]] = []
    room = 0
    for name, shape in tensors:
        size = math.prod(shape) * itemsize
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append((name, shape))
        room -= size
    return shards


def write_shards(
    folder: pathlib.Path,
    shards: Sequence[Sequence[Look]],
    tensors: Iterator[np.ndarray],
    dtype: np.dtype,
) -> None:
    """Writes all shards and the index.

    Args:
        folder: where to.
        shards: the plan.
        tensors: the tensors in the order of the plan.
        dtype: of the tensors.

    Raises:
        ValueError: a tensor is not as planned.
    """
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {}
        for name, shape in shard:
            tensor = next(tensors)
            if (tensor.shape, tensor.dtype) != (shape, dtype):
                raise ValueError(f"{name} is {tensor.shape} of {tensor.dtype}.")
            # The package writes the memory as it lies there, transposed or not.
            content[name] = np.ascontiguousarray(tensor)
            weight_map[name] = file_name
        # Transformers refuses a file that does not say which framework it is for.
        save_file(content, folder / file_name, metadata={"format": "pt"})
    if next(tensors, None) is not None:
        raise ValueError("there are more tensors than planned.")
    elements = sum(math.prod(shape) for shard in shards for _, shape in shard)
    metadata = {"made_by": _MADE_BY, "total_size": elements * dtype.itemsize}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, index)


def is_export(path: pathlib.Path) -> bool:
    """Whether this program made the directory; a downloaded one is never replaced."""
    try:
        index = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))
        return bool(index["metadata"]["made_by"] == _MADE_BY)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def write_json(file: pathlib.Path, content: Any) -> None:
    """Writes JSON the way published checkpoints have it."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
