"""Converts a published checkpoint to ours, and ours back to the published layout."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from convert import keymap
from convert.keymap import Entry
from convert.reader import DTYPES, Source
from convert.variant import Variant
from convert.writer import is_export, plan_shards, write_json, write_shards
from lrd_jax import checkpoint
from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.leaf_buffer import Piece
from lrd_jax.model import backbone, families
from lrd_jax.staging import staged
from lrd_jax.tokenizer import read_json_object

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        family: of the model.
        tensors: published tensors read or written.
        parameters: their elements.
        bytes: of the weights as written.
        dtype: as written.
        seconds: taken.
    """

    family: str
    tensors: int
    parameters: int
    bytes: int
    dtype: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.family}: {self.tensors} tensors, {self.parameters:,} parameters, "
            f"{self.bytes:,} bytes of {self.dtype}, {self.seconds:.1f} s"
        )


def from_hf(
    src: pathlib.Path,
    dst: pathlib.Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    variant: Variant | None = None,
    quantization: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Makes our checkpoint `dst` of the published one in `src`.

    Memory: one stacked leaf, and some rows of a published tensor.

    Args:
        src: directory with config.json and weights.
        dst: directory to make.
        dtype: of the weights; None for bfloat16 if all of the source are, else float32.
        variant: whether it is a base or an instruct model; None to tell by `src`.
        quantization: what to write in int8, one of `lrd_jax.quantization.KINDS`.
        overwrite: whether `dst` may replace an earlier checkpoint.

    Returns:
        What was done.

    Raises:
        UserError: all that is wrong with `src`, or with `dst`; nothing is written.
    """
    begin = time.monotonic()
    cfg = read_published_config(src)
    table = keymap.entries(cfg)
    source = Source(src)
    check_source(source, cfg, table)
    stored = jnp.dtype(dtype or _source_dtype(source, table))
    size = _num_bytes(cfg, stored, quantization)
    with staged(
        dst,
        overwrite=overwrite,
        replaceable=checkpoint.is_checkpoint,
        needed_bytes=size,
    ) as folder:
        cfg = _complete_config(src, folder, cfg, variant)
        leaves = (
            (entry.rule.path, _reading(source, entry)) for entry in _progress(table)
        )
        checkpoint.save(folder, cfg, leaves, stored, quantization)
    return _report(cfg, table, stored, size, quantization, begin)


def _num_bytes(cfg: ModelConfig, dtype: np.dtype, quantization: str | None) -> int:
    params = backbone.abstract_params(cfg, dtype, quantization)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def _report(
    cfg: ModelConfig,
    table: Sequence[Entry],
    dtype: np.dtype,
    size: int,
    quantization: str | None,
    begin: float,
) -> Report:
    parameters = sum(math.prod(entry.shape) for entry in table)
    return Report(
        family=cfg.family,
        tensors=sum(len(entry.names) for entry in table),
        parameters=parameters,
        bytes=size,
        dtype=" and ".join(filter(None, (dtype.name, quantization))),
        seconds=time.monotonic() - begin,
    )


def read_published_config(src: pathlib.Path) -> ModelConfig:
    """Reads `config.json` of a published checkpoint.

    Raises:
        UserError: there is none, it is malformed, or not supported.
    """
    file = src / "config.json"
    if not src.exists():
        raise UserError(f"no such directory: {src}")
    if not file.is_file():
        raise UserError(f"{src} is not a Hugging Face checkpoint: no config.json.")
    published = read_json_object(file)
    try:
        return families.from_published(published)
    except UserError as error:
        raise UserError(f"{src}: {error}") from None


def check_source(source: Source, cfg: ModelConfig, table: Sequence[Entry]) -> None:
    """Compares the published tensors with the table.

    A head that is published although it is tied is dropped if it equals the embedding.

    Raises:
        UserError: everything that is missing, unexpected, doubled, misshaped or of an
            unsupported dtype, in one message.
    """
    expected = {name: entry for entry in table for name in entry.names}
    tied = keymap.tied_head(cfg)
    problems = list(source.problems)
    missing = expected.keys() - source.tensors.keys()
    problems += [f"{name} is missing" for name in missing]
    for name, tensor in source.tensors.items():
        if name == tied or keymap.IGNORED.fullmatch(name):
            continue
        if name not in expected:
            problems.append(f"{name} is unexpected")
            continue
        shape = expected[name].published_shape
        if tensor.shape != shape:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            problems.append(f"{name} has dtype {tensor.dtype}, supported: {known}")
    if not problems and tied in source.tensors and not _head_is_tied(source, cfg, tied):
        problems.append(
            f"{tied} differs from {keymap.embed_name(cfg)}, though the config ties them"
        )
    if problems:
        raise UserError("; ".join(sorted(problems)) + ".")


def _head_is_tied(source: Source, cfg: ModelConfig, head: str) -> bool:
    embed = keymap.embed_name(cfg)
    if source.tensors[head].shape != source.tensors[embed].shape:
        return False
    if source.tensors[head].dtype != source.tensors[embed].dtype:
        return False
    pairs = zip(source.blocks(head), source.blocks(embed), strict=True)
    return all(np.array_equal(a, b) for (_, a), (_, b) in pairs)


def _source_dtype(source: Source, table: Sequence[Entry]) -> str:
    """bfloat16 if all weights are; float32, which holds every other kind too."""
    kinds = {source.tensors[name].dtype for entry in table for name in entry.names}
    return "bfloat16" if kinds == {"BF16"} else "float32"


def _complete_config(
    src: pathlib.Path, folder: pathlib.Path, cfg: ModelConfig, variant: Variant | None
) -> ModelConfig:
    """Writes the tokenizer; returns the config with what only the tokenizer says."""
    # Here, as it imports transformers (2 s).
    from convert.tokenizer import normalise_tokenizer

    return normalise_tokenizer(src, folder, cfg, variant=variant)


def _reading(source: Source, entry: Entry) -> Callable[[], Iterator[Piece]]:
    """The function that reads a leaf in pieces, as `checkpoint.save` wants it."""

    def pieces() -> Iterator[Piece]:
        for layer, name in enumerate(entry.names):
            for first, rows in source.blocks(name):
                start, values = entry.rule.to_ours(rows, first)
                if entry.layers is not None:
                    start, values = (layer, *start), values[None]
                yield start, values

    return pieces


def to_hf(
    src: pathlib.Path,
    dst: pathlib.Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    overwrite: bool = False,
) -> Report:
    """Makes the published layout `dst` of our checkpoint `src`; undoes `from_hf`.

    Args:
        src: our checkpoint.
        dst: directory to make.
        dtype: of the weights; None for that of the source.
        overwrite: whether `dst` may replace an earlier export.

    Returns:
        What was done.

    Raises:
        UserError: `src` is not a checkpoint or is damaged, or `dst` cannot be made.
    """
    begin = time.monotonic()
    cfg = checkpoint.read_config(src)
    if checkpoint.read_quantization(src) is not None:
        raise UserError(
            f"{src}: its weights are in int8, which the published layout has not; "
            "keep the published checkpoint that it was made of."
        )
    stored = jnp.dtype(dtype or checkpoint.read_dtype(src))
    table = keymap.entries(cfg)
    looks = [(name, entry.published_shape) for entry in table for name in entry.names]
    size = _num_bytes(cfg, stored, None)
    with staged(
        dst,
        overwrite=overwrite,
        replaceable=is_export,
        needed_bytes=size,
    ) as folder:
        # Here, as it imports transformers (2 s).
        from convert.tokenizer import write_hf_tokenizer

        published = families.to_published(cfg) | {"torch_dtype": stored.name}
        write_json(folder / "config.json", published)
        # Dream's published code does not load without it.
        ids = [f"{name}_token_id" for name in ("bos", "eos", "pad")]
        generation = {name: published[name] for name in ids if name in published}
        generation["_from_model_config"] = True
        write_json(folder / "generation_config.json", generation)
        write_hf_tokenizer(src, folder, cfg)
        shards = plan_shards(looks, stored.itemsize)
        write_shards(folder, shards, _published_tensors(src, table, stored), stored)
    return _report(cfg, table, stored, size, None, begin)


def _published_tensors(
    src: pathlib.Path, table: Sequence[Entry], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Every tensor in the order of the table, reading each leaf once."""
    leaves = checkpoint.read_leaves(src, [entry.rule.path for entry in table])
    for entry in _progress(table):
        leaf = next(leaves)
        for ours in [leaf] if entry.layers is None else leaf:
            yield entry.rule.to_published(ours).astype(dtype, copy=False)
        del leaf, ours  # Before the next is read.
    next(leaves, None)  # Checks that the values were sound.


def _progress(items: Iterable[T]) -> Iterable[T]:
    """A progress bar on stderr, on a terminal only."""
    return tqdm.tqdm(items, unit="leaf", disable=None)
