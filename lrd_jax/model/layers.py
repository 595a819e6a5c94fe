"""The parts of a transformer block: RMSNorm, rotary embedding, attention, gated MLP."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lrd_jax.base import MODEL
from lrd_jax.config import ModelConfig
from lrd_jax.model.int8 import QTensor, unpack


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """The dtype that norms, rotations and reductions run in."""
    return np.promote_types(dtype, np.float32)  # jnp's refuses under strict promotion.


def precision_for(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Full-precision products for float32 weights, which TPUs would else round."""
    return None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


def project(
    x: Float[Array, "B n in_"],
    kernel: Float[Array, "_ _"] | QTensor,
    transposed: bool = False,
) -> Float[Array, "B n out"]:
    """`x @ kernel`, or `x @ kernel.T`, in the dtype of the weights.

    Batch and length are made one axis first, for the sake of the gradient: with two
    axes, XLA for CPU does not make one matrix product of it.
    """
    flat = x.reshape(-1, x.shape[-1])
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    factor, scale = unpack(kernel)
    out = jax.lax.dot_general(
        flat,
        factor,
        axes,
        precision_for(kernel.dtype),
        # Rounded once, after the scale.
        preferred_element_type=None if scale is None else scale.dtype,
    )
    if scale is not None:
        out = (out * scale[None]).astype(x.dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def sum_parts(
    out: Float[Array, "B n D"], kernel: Float[Array, "F D"] | QTensor, whole: int
) -> Float[Array, "B n D"]:
    """Adds up what each device's rows of a last matrix give, unless it has all.

    Args:
        out: the product with `kernel`.
        kernel: the matrix, or this device's rows of it.
        whole: how many rows all of it has.
    """
    return out if len(kernel) == whole else jax.lax.psum(out, MODEL)


def _initial(
    rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int
) -> nnx.Param[Float[Array, "..."]]:
    return nnx.Param(jax.random.normal(rngs.params(), shape) / jnp.sqrt(fan_in))


class RMSNorm(nnx.Module):
    """Root-mean-square norm with the cast order of the published PyTorch code.

    The row is normalised in float32, cast back, and only then scaled.
    """

    def __init__(self, width: int, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(at_least_float32(x.dtype))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        return normed.astype(x.dtype) * self.scale[...][None, None, :]


def rotary_angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float, dtype: DTypeLike
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Cosines and sines of the rotary embedding, h = head_dim / 2."""
    exponent = jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim
    angles = positions[..., None].astype(dtype) * (theta**-exponent)[None, None, :]
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(
    x: Float[Array, "B T A H"],
    cos: Float[Array, "B T 1 h"],
    sin: Float[Array, "B T 1 h"],
) -> Float[Array, "B T A H"]:
    """Rotates pairs (i, i + H/2) of the channels, in float32 or better."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def write_slots(
    slots: Float[Array, "B T K H"],
    rows: Float[Array, "B n K H"],
    start: Int[Array, " B"] | None,
    write: Bool[Array, "B n"] | None = None,
) -> Float[Array, "B T K H"]:
    """Writes each batch row's `rows` into its slots from `start[b]` on.

    Where `write` is False the slots stay as they are; None writes all rows. None for
    `start` writes all rows, too, from 0 on.
    """
    rows = rows.astype(slots.dtype)
    if start is None:
        return jax.lax.dynamic_update_slice(slots, rows, (0, 0, 0, 0))

    def put(slot: Array, new: Array, at: Array, write: Array | None) -> Array:
        if write is not None:
            old = jax.lax.dynamic_slice(slot, (at, 0, 0), new.shape)
            new = jnp.where(write[:, None, None], new, old)
        return jax.lax.dynamic_update_slice(slot, new, (at, 0, 0))

    return jax.vmap(put)(slots, rows, start, write)


class Attention(nnx.Module):
    """Bidirectional grouped-query attention over the keys that `key_mask` allows."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        width, self.head_dim = cfg.d_model, cfg.head_dim
        self.num_heads, self.num_kv_heads = cfg.num_heads, cfg.num_kv_heads
        q_width = cfg.num_heads * cfg.head_dim
        kv_width = cfg.num_kv_heads * cfg.head_dim
        # [out, in] for these three, heads side by side: any other layout is one that
        # XLA for TPU first copies into this, all layers at once (1 GB each at 8B).
        self.q = _initial(rngs, (q_width, width), width)
        self.k = _initial(rngs, (kv_width, width), width)
        self.v = _initial(rngs, (kv_width, width), width)
        self.out = _initial(rngs, (q_width, width), q_width)
        self.has_bias = cfg.qkv_bias
        if cfg.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros(q_width))
            self.k_bias = nnx.Param(jnp.zeros(kv_width))
            self.v_bias = nnx.Param(jnp.zeros(kv_width))

    def __call__(
        self,
        x: Float[Array, "B n D"],
        angles: tuple[Float[Array, "B n 1 h"], Float[Array, "B n 1 h"]],
        key_mask: Bool[Array, "B T"],
        slots: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]] | None,
        start: Int[Array, " B"] | None,
        write: Bool[Array, "B n"] | None = None,
    ) -> tuple[
        Float[Array, "B n D"],
        tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]] | None,
    ]:
        """Attends from the n rows of `x` to themselves, or to `slots` once written."""
        q = project(x, self.q[...], transposed=True)
        k = project(x, self.k[...], transposed=True)
        v = project(x, self.v[...], transposed=True)
        if self.has_bias:
            q = q + self.q_bias[...][None, None]
            k = k + self.k_bias[...][None, None]
            v = v + self.v_bias[...][None, None]
        q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in (q, k, v))
        q, k = rotate(q, *angles), rotate(k, *angles)
        if slots is not None:
            keys, values = slots
            keys = write_slots(keys, k, start, write)
            values = write_slots(values, v, start, write)
            slots = keys, values
            k, v = keys.astype(q.dtype), values.astype(q.dtype)
        k, v = self._of_queries(k, q.shape[2]), self._of_queries(v, q.shape[2])
        precision = precision_for(q.dtype)
        with (
            # It mixes dtypes inside, which strict promotion forbids for bfloat16.
            jax.numpy_dtype_promotion("standard"),
            # It takes no precision of its own.
            jax.default_matmul_precision(precision and precision.name.lower()),
        ):
            mixed = jax.nn.dot_product_attention(
                q, k, v, mask=key_mask[:, None, None, :]
            )
        flat, out = mixed.reshape(*x.shape[:2], -1), self.out[...]
        whole = self.num_heads * self.head_dim
        return sum_parts(project(flat, out), out, whole), slots

    def _of_queries(
        self, heads: Float[Array, "B T K H"], num_queries: int
    ) -> Float[Array, "B T _ H"]:
        """The key or value heads that go with this device's query heads."""
        if num_queries == self.num_heads or heads.shape[2] < self.num_kv_heads:
            return heads  # Both are whole, or both are split alike.
        first = jax.lax.axis_index(MODEL) * num_queries
        query = first + jnp.arange(num_queries)
        return heads[:, :, query // (self.num_heads // self.num_kv_heads)]


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.width = cfg.mlp_dim
        self.gate = _initial(rngs, (cfg.d_model, cfg.mlp_dim), cfg.d_model)
        self.up = _initial(rngs, (cfg.d_model, cfg.mlp_dim), cfg.d_model)
        self.down = _initial(rngs, (cfg.mlp_dim, cfg.d_model), cfg.mlp_dim)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = project(x, self.gate[...])
        up = project(x, self.up[...])
        down = self.down[...]
        return sum_parts(project(jax.nn.silu(gate) * up, down), down, self.width)
