"""Checkpoints on disk: written leaf by leaf, restored straight onto the devices.

A checkpoint is a directory:

    model.json      the config and a fingerprint, see `lrd_jax.model_file`
    params/         Orbax, the parameter tree of `lrd_jax.model.backbone`
    tokenizer.json, tokenizer_config.json       if the source had a tokenizer

Nothing here knows where the weights come from; `python -m convert` makes checkpoints
of published ones.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from lrd_jax import model_file
from lrd_jax.base import Params
from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.leaf_buffer import array_slabs, digest
from lrd_jax.model import backbone, int8
from lrd_jax.model_file import ModelFile
from lrd_jax.quantization import join
from lrd_jax.saving import (
    PARAMS_DIR,
    LeafPath,
    fingerprint,
    flat,
    nest,
    release,
)
from lrd_jax.saving import is_checkpoint as is_checkpoint
from lrd_jax.saving import save as save
from lrd_jax.saving import save_params as save_params
from lrd_jax.staging import first_line

# Bytes up to which the values are compared with what was written; SHA-256 takes a
# second or so for a GiB, and they pass through the host.
VERIFIED_BYTES = 2**30


def read_config(path: pathlib.Path | str) -> ModelConfig:
    """The model's config.

    Raises:
        UserError: no such directory, not a checkpoint, or a damaged one.
    """
    return model_file.read(path).config


def read_dtype(path: pathlib.Path | str) -> str:
    """The dtype that the weights are stored in.

    Raises:
        UserError: as for `read_config`.
    """
    return model_file.read(path).dtype


def read_quantization(path: pathlib.Path | str) -> str | None:
    """Which matrices are stored in int8, one of `quantization.KINDS`, or None.

    Raises:
        UserError: as for `read_config`.
    """
    return model_file.read(path).quantization


def read_fingerprint(path: pathlib.Path | str) -> str:
    """SHA-256 of the weights: names, shapes, dtype and values.

    Raises:
        UserError: as for `read_config`.
    """
    return model_file.read(path).weights_sha256


def restore(
    path: pathlib.Path | str,
    dtype: DTypeLike | None = None,
    shardings: Any = None,
    quantization: str | None = None,
) -> Params:
    """Reads the parameters onto their devices, each device's part only.

    The values of a checkpoint of up to `VERIFIED_BYTES` are compared with what was
    written, unless several processes share it; of a larger one only the sizes of files.

    Args:
        path: the checkpoint.
        dtype: what to cast to; None keeps the stored dtype.
        shardings: one sharding for all leaves, a pytree of them like the parameters
            (int8 or not: a matrix's is that of its int8), or None for the default
            device.
        quantization: which matrices to round to int8 beside those that are stored so,
            one of `quantization.KINDS`. One leaf at a time exists in both forms.

    Returns:
        The parameter tree, see `lrd_jax.model.backbone`.

    Raises:
        UserError: not a checkpoint, a damaged one, one whose shapes are not those of
            its config, or a dtype that the model does not compute in.
        ValueError: a sharding does not divide its leaf.
    """
    path = pathlib.Path(path)
    file = model_file.read(path)
    dtype = jnp.dtype(file.dtype if dtype is None else dtype)
    if dtype.name not in (*model_file.DTYPES, "float64"):
        raise UserError(
            f"`dtype` must be {' or '.join(model_file.DTYPES)}, got {dtype.name}; int8 "
            'is `quantize="int8"`.'
        )
    quantization = join(file.quantization, quantization)
    wanted = backbone.abstract_params(file.config, dtype, quantization)
    if shardings is None:
        shardings = jnp.zeros(()).sharding
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(
            lambda _, one=shardings: one, wanted, is_leaf=int8.is_qtensor
        )
    wanted = jax.tree_util.tree_map_with_path(
        functools.partial(_place, quantization),
        wanted,
        shardings,
        is_leaf=int8.is_qtensor,
    )
    # One at a time, as JAX keeps a second copy on the host until garbage is collected.
    stored = flat(_stored(file))
    read = _reader(path, file, stored)
    digests: dict[LeafPath, str] | None = None
    if sum(file.sizes.values()) <= VERIFIED_BYTES and jax.process_count() == 1:
        read = _digesting(read, stored, digests := {})
    leaves = []
    for name, leaf in flat(wanted, is_leaf=int8.is_qtensor).items():
        if int8.is_qtensor(leaf) and name in stored:
            axis = int8.out_axis(name, quantization)
            like = jax.ShapeDtypeStruct(
                leaf.shape, stored[name].dtype, sharding=leaf.int8.sharding
            )
            made = _quantise(read(name, like), axis, leaf)
        else:
            made = _read_parts(read, name, leaf)
        leaves.append(jax.block_until_ready(made))
        release(leaf.size * 4)
    if digests is not None:
        _check_values(path, file, digests, stored)
    treedef = jax.tree.structure(wanted, is_leaf=int8.is_qtensor)
    return jax.tree.unflatten(treedef, leaves)


def _stored(file: ModelFile) -> Params:
    return backbone.abstract_params(
        file.config, jnp.dtype(file.dtype), file.quantization
    )


def _read_parts(read: Callable[[LeafPath, Any], Any], name: LeafPath, like: Any) -> Any:
    """Reads an array, or both of a stored `QTensor`."""
    # Orbax reads in threads of its own, which do not know of `jax.enable_x64`.
    parts = [
        read((*name, *part), leaf).astype(leaf.dtype)
        for part, leaf in flat(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), parts)


def _quantise(weights: jax.Array, axis: int | None, like: int8.QTensor) -> int8.QTensor:
    """Rounds to int8 onto the devices of `like`; `weights` are then of no use."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    rounded = jax.jit(
        int8.quantise,
        static_argnames=("out_axis", "dtype"),
        out_shardings=shardings,
    )(weights, out_axis=axis, dtype=like.dtype)
    jax.block_until_ready(rounded)
    weights.delete()
    return rounded


def read_leaves(
    path: pathlib.Path | str, order: Iterable[LeafPath]
) -> Iterator[np.ndarray]:
    """Reads all leaves to the host, one after the other, in their stored dtype.

    Raises:
        UserError: as for `restore`; after the last leaf also if the values are not
            those that were written.
    """
    path = pathlib.Path(path)
    file = model_file.read(path)
    wanted = flat(_stored(file))
    read = _reader(path, file, wanted)
    digests: dict[LeafPath, str] = {}
    for name in order:
        leaf = _read_digested(read, name, wanted[name], digests)
        yield leaf
        del leaf
    _check_values(path, file, digests, wanted)


def _read_digested(
    read: Callable[[LeafPath, Any], Any],
    name: LeafPath,
    stored: jax.ShapeDtypeStruct,
    digests: dict[LeafPath, str],
) -> np.ndarray:
    """A leaf on the host, in its stored dtype; its digest goes into `digests`."""
    # For a NumPy array, Orbax reads to NumPy; this one takes no memory.
    like = np.broadcast_to(np.zeros((), stored.dtype), stored.shape)
    leaf = np.asarray(read(name, like))
    digests[name] = digest(array_slabs(leaf))
    return leaf


def _digesting(
    read: Callable[[LeafPath, Any], Any],
    stored: dict[LeafPath, Any],
    digests: dict[LeafPath, str],
) -> Callable[[LeafPath, Any], Any]:
    """What reads like `read`, but through the host, and keeps the digests of leaves."""

    def read_and_digest(name: LeafPath, like: Any) -> Any:
        leaf = _read_digested(read, name, stored[name], digests)
        return jax.device_put(leaf.astype(like.dtype, copy=False), like.sharding)

    return read_and_digest


def _check_values(
    path: pathlib.Path,
    file: ModelFile,
    digests: dict[LeafPath, str],
    stored: dict[LeafPath, Any],
) -> None:
    """Raises a `UserError` unless the digests are those of what was written."""
    if fingerprint(digests, stored) != file.weights_sha256:
        raise UserError(f"{path}: damaged: its weights are not what was written.")


def _reader(
    path: pathlib.Path, file: ModelFile, wanted: dict[LeafPath, Any]
) -> Callable[[LeafPath, Any], Any]:
    """Checks files and shapes; gives what reads a leaf like the one it is given."""
    from orbax.checkpoint import v1 as ocp  # 0.2 s

    folder = (path / PARAMS_DIR).absolute()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # Each process reads what its devices need, and waits for no other.
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}

    def read(name: LeafPath, like: Any) -> Any:
        with context, _one_line_read_errors(path):
            return jax.tree.leaves(ocp.load(folder, nest(name, like)))[0]

    _check_sizes(path, file.sizes)
    with _one_line_read_errors(path):
        stored = flat(ocp.metadata(folder).metadata)
    _check_shapes(path, wanted, stored)
    return read


def _check_sizes(path: pathlib.Path, sizes: dict[str, int]) -> None:
    """Raises a `UserError` that lists all files that are absent or cut short."""
    bad = [
        name
        for name, size in sizes.items()
        if not (path / name).is_file() or (path / name).stat().st_size != size
    ]
    if bad:
        raise UserError(f"{path}: absent or truncated: {', '.join(bad)}.")


def _check_shapes(
    path: pathlib.Path, wanted: dict[LeafPath, Any], stored: dict[LeafPath, Any]
) -> None:
    """Raises a `UserError` that lists all leaves that do not fit."""
    bad = [
        f"{'.'.join(name)} is {list(stored[name].shape)}, expected {list(leaf.shape)}"
        if name in stored
        else f"{'.'.join(name)} is missing"
        for name, leaf in wanted.items()
        if name not in stored or tuple(stored[name].shape) != tuple(leaf.shape)
    ]
    bad += [f"{'.'.join(name)} is unknown" for name in stored if name not in wanted]
    if bad:
        raise UserError(f"{path} does not fit {model_file.NAME}: {'; '.join(bad)}.")


@contextlib.contextmanager
def _one_line_read_errors(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax raises bare ones.
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


def _place(quantization: str | None, path: Any, leaf: Any, sharding: Any) -> Any:
    """The leaf, or both of a `QTensor`, with the sharding that is given for it."""
    if int8.is_qtensor(leaf) and isinstance(sharding, Sharding):
        axis = int8.out_axis(tuple(key.key for key in path), quantization)
        assert axis is not None
        sharding = int8.shard_like(sharding, leaf.int8.ndim, axis)
    return jax.tree.map(_with_sharding, leaf, sharding)


def _with_sharding(
    leaf: jax.ShapeDtypeStruct, sharding: Sharding
) -> jax.ShapeDtypeStruct:
    sharding.shard_shape(leaf.shape)  # Raises unless it divides the leaf.
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
