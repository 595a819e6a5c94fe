"""One leaf of a checkpoint on the host, in as many blocks as it has chunks on disk."""

import hashlib
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

# A leaf larger than this is stored as a grid of chunks, so that a mesh reads only its
# own parts: at most this many along each of two axes, given that many CPU devices.
_CHUNKED_BYTES = 2**26
_CHUNKS_PER_AXIS = 8
GRID_DEVICES = _CHUNKS_PER_AXIS**2
_SLAB_BYTES = 2**26
_ALIGNMENT = 64  # XLA on CPU borrows such memory; any other it copies.

Piece = tuple[tuple[int, ...], np.ndarray]  # Where its first element goes, and values.


class LeafBuffer:
    """An array to be filled piece by piece, then handed to JAX without a copy.

    Orbax writes each shard of an array as one chunk and copies nothing; an array on one
    device that it must cut into chunks itself, it copies as a whole. So each block is
    memory of its own, and becomes the shard of one (simulated) CPU device.

    Args:
        shape: of the leaf.
        dtype: of the leaf; pieces of another are cast.
        chunked_axes: the two axes that meshes split.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, chunked_axes: tuple[int, int]
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.sharding = _storage_grid(shape, dtype, chunked_axes)
        indices = self.sharding.addressable_devices_indices_map(shape)
        self._blocks = [
            (
                device,
                [range(*part.indices(n)) for part, n in zip(index, shape, strict=True)],
                aligned_empty(self.sharding.shard_shape(shape), dtype),
            )
            for device, index in indices.items()
            if index is not None
        ]
        self._written = 0

    def write(self, start: tuple[int, ...], values: np.ndarray) -> None:
        """Copies `values` to where `start` is its first element."""
        for _, block, memory in self._blocks:
            inside, outside = [], []
            for at, n, part in zip(start, values.shape, block, strict=True):
                low, high = max(at, part.start), min(at + n, part.stop)
                inside.append(slice(low - part.start, max(low, high) - part.start))
                outside.append(slice(low - at, max(low, high) - at))
            target, source = memory[tuple(inside)], values[tuple(outside)]
            if source.dtype == self.dtype:
                # NumPy copies the bits of a plain integer many times faster.
                bits = np.dtype(f"u{self.dtype.itemsize}")
                target, source = target.view(bits), source.view(bits)
            target[...] = source
        self._written += values.size

    def check_complete(self) -> None:
        """Raises `ValueError` unless as many elements were written as there are."""
        if self._written != math.prod(self.shape):
            raise ValueError(f"wrote {self._written} elements of {self.shape}.")

    def to_jax(self) -> jax.Array:
        """The leaf as an array that shares the memory of this buffer."""
        shards = [jax.device_put(m, d, may_alias=True) for d, _, m in self._blocks]
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, shards
        )

    def slabs(self) -> Iterator[np.ndarray]:
        """The leaf in row-major order, some rows of its first axis at a time."""
        for rows in _slab_rows(self.shape, self.dtype):
            slab = np.empty((len(rows), *self.shape[1:]), self.dtype)
            for _, block, memory in self._blocks:
                low = max(rows.start, block[0].start)
                high = min(rows.stop, block[0].stop)
                if low < high:
                    place = tuple(slice(p.start, p.stop) for p in block[1:])
                    here = slice(low - rows.start, high - rows.start)
                    there = slice(low - block[0].start, high - block[0].start)
                    slab[(here, *place)] = memory[there]
            yield slab


def digest(slabs: Iterator[np.ndarray]) -> str:
    """SHA-256 of the values in row-major order."""
    sha256 = hashlib.sha256()
    for slab in slabs:
        sha256.update(np.ascontiguousarray(slab).view(np.uint8).reshape(-1).data)
    return sha256.hexdigest()


def array_slabs(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array as `LeafBuffer.slabs` would give it."""
    for rows in _slab_rows(array.shape, array.dtype):
        yield array[rows.start : rows.stop]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Like `np.empty`, at an address that XLA on CPU borrows instead of copying."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT
    return memory[offset : offset + size].view(dtype).reshape(shape)


def _slab_rows(shape: tuple[int, ...], dtype: np.dtype) -> Iterator[range]:
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    step = max(1, _SLAB_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], step):
        yield range(start, min(start + step, shape[0]))


def _storage_grid(
    shape: tuple[int, ...], dtype: np.dtype, axes: tuple[int, int]
) -> Sharding:
    """How the leaf is cut into chunks: a grid over CPU devices, or one whole."""
    # These devices stand for chunks of a file, not for a mesh to compute on.
    devices = jax.local_devices(backend="cpu")
    if math.prod(shape) * dtype.itemsize < _CHUNKED_BYTES:
        return jax.sharding.SingleDeviceSharding(devices[0])
    first = _largest_split(shape[axes[0]], len(devices))
    second = _largest_split(shape[axes[1]], len(devices) // first)
    grid = np.array(devices[: first * second]).reshape(first, second)
    names: list[str | None] = [None] * len(shape)
    names[axes[0]], names[axes[1]] = "first", "second"
    return NamedSharding(Mesh(grid, ("first", "second")), PartitionSpec(*names))


def _largest_split(size: int, limit: int) -> int:
    """The largest power of two, up to `limit`, that divides `size`."""
    parts = 1
    while parts * 2 <= min(limit, _CHUNKS_PER_AXIS) and size % (parts * 2) == 0:
        parts *= 2
    return parts
