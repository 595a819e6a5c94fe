"""Weights in int8: whole numbers and one scale for each output channel.

    weights ~= int8 * scale,  |weights - int8 * scale| <= scale / 2

Symmetric, so without a zero point, and of the weights only: what they are multiplied
with keeps its dtype. The scale is the same for all that one output sums, so it goes on
the product, `x @ (q * s) = (x @ q) * s`, and the weights never exist in another size.
"""

import functools
import typing
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8

from lrd_jax.base import Params
from lrd_jax.quantization import KINDS

LARGEST = 127  # Not -128, which has no opposite.

# Which of a matrix's two axes is its output. An embedding table has tokens for that: so
# it is for the head that it may be, and a lookup then needs one scale a row.
_OUT_AXES = {"q": -2, "k": -2, "v": -2, "out": -1, "gate": -1, "up": -1, "down": -1}
_HEAD_AXIS, _EMBED_AXIS = -1, -2


@typing.no_type_check  # Else the test-time shape checker also stops `jax.eval_shape`.
@flax.struct.dataclass
class QTensor:
    """Matrices in int8, maybe stacked; in a parameter tree instead of one array.

    Attributes:
        int8: `[..., in, out]` or `[..., out, in]`, in [-127, 127].
        scale: `[..., out]`, in the dtype that the weights stand for.
    """

    int8: Int8[Array, "..."]
    scale: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.int8.shape

    @property
    def size(self) -> int:
        return self.int8.size

    @property
    def dtype(self) -> np.dtype:
        """Of the weights that these stand for."""
        return self.scale.dtype

    def __len__(self) -> int:
        return len(self.int8)

    def __getitem__(self, index: object) -> "QTensor":
        """`[...]`, the only index that a parameter is read with."""
        assert index is ..., index
        return self


Weights = Array | QTensor


def is_qtensor(leaf: object) -> bool:
    return isinstance(leaf, QTensor)


def unpack(weights: Weights) -> tuple[Array, Array | None]:
    """What to multiply with, and the float32 scale of the product, if there is one.

    int8 is exact in bfloat16, too.
    """
    if not isinstance(weights, QTensor):
        return weights, None
    wide = np.promote_types(weights.dtype, np.float32)
    return weights.int8.astype(weights.dtype), weights.scale.astype(wide)


def rows_of(table: Weights, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of an embedding table, in the dtype that it stands for."""
    if not isinstance(table, QTensor):
        return table[ids]
    wide = np.promote_types(table.dtype, np.float32)
    scale = table.scale[ids][..., None].astype(wide)
    return (table.int8[ids].astype(wide) * scale).astype(table.dtype)


@functools.partial(jax.jit, static_argnames=("out_axis", "dtype"))
def quantise(
    weights: Float[Array, "..."], out_axis: int, dtype: DTypeLike | None = None
) -> QTensor:
    """Rounds matrices to int8.

    Args:
        weights: `[..., in, out]` or `[..., out, in]`.
        out_axis: of the output channels, -1 or -2.
        dtype: of the scale; None for that of the weights.
    """
    dtype = jnp.dtype(dtype or weights.dtype)
    wide = weights.astype(np.promote_types(weights.dtype, np.float32))
    largest = jnp.max(jnp.abs(wide), axis=_in_axis(out_axis))
    # A channel of zeros has a scale, too.
    least = float(jnp.finfo(dtype).tiny)
    scale = jnp.maximum(largest / LARGEST, least).astype(dtype)
    # By the scale as it is kept: its own rounding then costs nothing.
    counts = wide / jnp.expand_dims(scale.astype(wide.dtype), _in_axis(out_axis))
    rounded = jnp.clip(jnp.round(counts), -LARGEST, LARGEST)
    return QTensor(int8=rounded.astype(jnp.int8), scale=scale)


def _in_axis(out_axis: int) -> int:
    return -1 if out_axis == -2 else -2


def out_axis(path: tuple[str, ...], kind: str | None) -> int | None:
    """The output axis of the leaf at `path` if `kind` has it in int8, else None."""
    if kind is None:
        return None
    if path == ("head",):
        return _HEAD_AXIS
    if path == ("embed",):
        return _EMBED_AXIS if kind == KINDS[1] else None
    return _OUT_AXES.get(path[-1]) if path[0] == "blocks" else None


def quantise_params(params: Params, kind: str | None) -> Params:
    """The parameter tree with a `QTensor` for each matrix that `kind` names."""

    def one(path: tuple[jax.tree_util.DictKey, ...], leaf: Weights) -> Weights:
        axis = out_axis(tuple(str(key.key) for key in path), kind)
        return leaf if axis is None or is_qtensor(leaf) else quantise(leaf, axis)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_qtensor)


def quantise_specs(specs: Params, kind: str | None) -> Params:
    """How the parts of each `QTensor` are split, from how its matrix is."""

    # A tree of specs has the shape of the tree of arrays, which types cannot say.
    def one(path: tuple[jax.tree_util.DictKey, ...], spec: Any) -> P | QTensor:
        names = tuple(str(key.key) for key in path)
        axis = out_axis(names, kind)
        if axis is None:
            return spec
        ndim = 3 if names[0] == "blocks" else 2
        scale: Any = _scale_spec(spec, ndim, axis)
        return QTensor(int8=spec, scale=scale)

    return jax.tree_util.tree_map_with_path(
        one, specs, is_leaf=lambda leaf: isinstance(leaf, P)
    )


def shard_like(sharding: Sharding, ndim: int, out_axis: int) -> QTensor:
    """The shardings of a `QTensor` whose int8 has `sharding`: the scale follows it."""
    int8: Any = sharding
    scale: Any = sharding
    if isinstance(sharding, NamedSharding):
        spec = _scale_spec(sharding.spec, ndim, out_axis)
        scale = NamedSharding(sharding.mesh, spec)
    return QTensor(int8=int8, scale=scale)


def _scale_spec(spec: P, ndim: int, out_axis: int) -> P:
    parts = [*spec, *[None] * (ndim - len(spec))]
    del parts[_in_axis(out_axis)]
    return P(*parts)
