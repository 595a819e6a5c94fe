"""Writes checkpoints, one leaf in memory at a time; `lrd_jax.checkpoint` reads them."""

import concurrent.futures
import contextlib
import contextvars
import ctypes
import gc
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lrd_jax import model_file
from lrd_jax.base import Params
from lrd_jax.config import ModelConfig
from lrd_jax.leaf_buffer import LeafBuffer, Piece, array_slabs, digest
from lrd_jax.model import backbone
from lrd_jax.model.int8 import out_axis, quantise
from lrd_jax.model_file import ModelFile
from lrd_jax.staging import first_line, staged

PARAMS_DIR = "params"

_COLLECTED_BYTES = 2**24

LeafPath = tuple[str, ...]
Leaf = np.ndarray | jax.Array | Callable[[], Iterable[Piece]]


def save_params(
    path: pathlib.Path | str, cfg: ModelConfig, params: Params, overwrite: bool = False
) -> None:
    """Makes the checkpoint `path` of parameters at hand, in their own dtype.

    Raises:
        UserError: as for `staged` and `save`.
    """
    leaves = flat(params)
    dtype = next(iter(leaves.values())).dtype
    with staged(path, overwrite=overwrite, replaceable=is_checkpoint) as folder:
        save(folder, cfg, leaves.items(), dtype)


def save(
    path: pathlib.Path,
    cfg: ModelConfig,
    leaves: Iterable[tuple[LeafPath, Leaf]],
    dtype: DTypeLike,
    quantization: str | None = None,
) -> None:
    """Writes `params/` and `model.json` into an existing directory.

    One leaf is in memory at a time: it is made, written and freed before the next.

    Args:
        path: an existing directory made by `staged`, which names its disk errors.
        cfg: the model's config.
        leaves: every leaf of the parameter tree once, in any order: an array, or a
            function that yields the leaf in pieces, each with the position of its
            first element, so that the whole never exists in another layout.
        dtype: of the stored weights; what is given in another is cast.
        quantization: which matrices to store in int8, one of `quantization.KINDS`.

    Raises:
        OSError: the disk is full or cannot be written.
        ValueError: a leaf is unknown, missing, incomplete or of another shape.
    """
    from orbax.checkpoint import v1 as ocp  # 0.2 s

    path, dtype = path.absolute(), jnp.dtype(dtype)
    if dtype.name not in model_file.DTYPES:
        raise ValueError(
            f"cannot store {dtype.name}, only {' or '.join(model_file.DTYPES)}."
        )
    wanted = flat(backbone.abstract_params(cfg, dtype, quantization))
    whole = flat(backbone.abstract_params(cfg, dtype))
    context = ocp.Context()
    # Compression would triple the memory; whole chunks are written without a copy.
    context.array.saving.use_compression = False
    context.array.saving.enable_write_sharding_file = False
    digests: dict[LeafPath, str] = {}
    written: set[LeafPath] = set()
    with context:
        for name, leaf in leaves:
            if name not in whole or name in written:
                raise ValueError(f"unexpected leaf {name}.")
            written.add(name)
            axis = out_axis(name, quantization)
            given = isinstance(leaf, jax.Array) and axis is None  # Not ours to free.
            parts = _parts(name, leaf, whole[name], axis)
            del leaf
            while parts:
                part, array, digests[part] = parts.pop()
                with _disk_errors():
                    _to_its_end(ocp.partial.save, path / PARAMS_DIR, nest(part, array))
                if not given:
                    array.delete()
                num_bytes = array.nbytes
                del array
                release(num_bytes)
        if missing := sorted(wanted.keys() - digests.keys()):
            raise ValueError(f"missing leaves: {missing}")
        with _disk_errors():
            _to_its_end(ocp.partial.finalize, path / PARAMS_DIR)
            # It names this machine's directories; only object stores need it.
            (path / PARAMS_DIR / "commit_success.txt").unlink(missing_ok=True)
            sha256 = fingerprint(digests, wanted)
            sizes = {
                str(file.relative_to(path)): file.stat().st_size
                for file in sorted((path / PARAMS_DIR).rglob("*"))
                if file.is_file()
            }
            file = ModelFile(cfg, dtype.name, sha256, sizes, quantization)
            model_file.write(path, file)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turns TensorStore's errors, which are all `ValueError`, into `OSError`."""
    try:
        yield
    except ValueError as error:
        raise OSError(first_line(error)) from None


def _to_its_end(function: Callable[..., None], *args: Any) -> None:
    """Calls Orbax so that Ctrl-C waits for it.

    Its threads would go on writing, into a directory that is being removed.
    """
    in_context = contextvars.copy_context().run
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(in_context, function, *args).result()


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether `path` is a directory that `save` made."""
    return (path / model_file.NAME).is_file() and (path / PARAMS_DIR).is_dir()


def _parts(
    name: LeafPath, leaf: Leaf, wanted: jax.ShapeDtypeStruct, axis: int | None
) -> list[tuple[LeafPath, jax.Array, str]]:
    """What is stored for a leaf, with the digests: itself, or int8 and scale."""
    if axis is None:
        return [(name, *_materialise(name, leaf, wanted))]
    array, _ = _materialise(name, leaf, wanted)
    parts = flat(jax.block_until_ready(quantise(array, axis)))
    if not isinstance(leaf, jax.Array):
        array.delete()
    return [
        ((*name, *part), made, digest(array_slabs(np.asarray(made))))
        for part, made in parts.items()
    ]


def _materialise(
    name: LeafPath, leaf: Leaf, wanted: jax.ShapeDtypeStruct
) -> tuple[jax.Array, str]:
    """The leaf as an array of the wanted dtype, and the digest of its values."""
    if isinstance(leaf, jax.Array):
        _check_shape(name, leaf.shape, wanted.shape)
        array = leaf.astype(wanted.dtype)
        return array, digest(array_slabs(np.asarray(array)))
    buffer = LeafBuffer(wanted.shape, wanted.dtype, _chunked_axes(name))
    if isinstance(leaf, np.ndarray):
        _check_shape(name, leaf.shape, wanted.shape)
        buffer.write((0,) * leaf.ndim, leaf)
    else:
        for start, values in leaf():
            buffer.write(start, values)
    buffer.check_complete()
    return buffer.to_jax(), digest(buffer.slabs())


def _check_shape(
    name: LeafPath, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    if shape != wanted:
        raise ValueError(f"leaf {name} is {shape}, expected {wanted}.")


def _chunked_axes(name: LeafPath) -> tuple[int, int]:
    """The two axes of a leaf that meshes split: width, and heads, MLP or vocabulary."""
    return (1, 2) if name[0] == "blocks" else (0, 1)


def fingerprint(digests: dict[LeafPath, str], wanted: dict[LeafPath, Any]) -> str:
    """One SHA-256 of names, shapes, dtypes and values, whatever the order of leaves."""
    lines = [
        f"{'.'.join(name)} {list(wanted[name].shape)} {wanted[name].dtype} {sha256}"
        for name, sha256 in sorted(digests.items())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def release(num_bytes: int) -> None:
    """Frees the host memory of a large leaf, which JAX lets go of only then."""
    if num_bytes >= _COLLECTED_BYTES:
        gc.collect()
        # glibc keeps smaller blocks for the thread that freed them.
        with contextlib.suppress(AttributeError, OSError, TypeError):  # Not glibc.
            ctypes.CDLL(None).malloc_trim(0)


def flat(tree: Params, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """The leaves of a parameter tree by their paths: dict of `LeafPath` to leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {tuple(_name(key) for key in path): leaf for path, leaf in leaves}


def _name(key: Any) -> str:
    """Of a key of a dict, or of a field of a `QTensor`."""
    return str(key.name if isinstance(key, jax.tree_util.GetAttrKey) else key.key)


def nest(name: LeafPath, leaf: Any) -> Params:
    """A parameter tree of one leaf."""
    for key in reversed(name):
        leaf = {key: leaf}
    return leaf
