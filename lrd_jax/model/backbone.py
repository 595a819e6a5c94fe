"""One bidirectional transformer block, scanned over layers; KV cache in and out.

Parameters are a plain dict, the layers of `blocks` stacked on a leading axis L:

    embed [V, D]   head [D, V] (absent when tied)   norm.scale [D]
    blocks.attn_norm.scale, blocks.mlp_norm.scale [L, D]
    blocks.attn.q [L, A H, D]   .k, .v [L, K H, D]   .out [L, A H, D]
    blocks.attn.q_bias [L, A H]   .k_bias, .v_bias [L, K H] where the family has them
    blocks.mlp.gate, .up [L, D, F]   .down [L, F, D], F the inner width of the MLP

A matrix may be an `int8.QTensor` of that shape instead of an array.

Inside a `jax.shard_map` they may be one device's part of V, of the heads A and K (or of
A alone) and of F, see `lrd_jax.sharding`: shapes smaller than the config's say so, and
what the parts give is then summed over the axis `model`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lrd_jax.base import KVCache, Params
from lrd_jax.config import ModelConfig
from lrd_jax.model import int8, layers


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.attn_norm = layers.RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = layers.Attention(cfg, rngs=rngs)
        self.mlp_norm = layers.RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = layers.GatedMLP(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B n D"],
        angles: Any,
        key_mask: Any,
        slots: Any,
        start: Any,
        write: Any,
    ) -> tuple[Float[Array, "B n D"], Any]:
        normed = self.attn_norm(x)
        mixed, slots = self.attn(normed, angles, key_mask, slots, start, write)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), slots


def _new_block(cfg: ModelConfig, key: jax.Array) -> Block:
    return Block(cfg, rngs=nnx.Rngs(key))


def init_params(
    cfg: ModelConfig, key: jax.Array, dtype: DTypeLike = jnp.float32
) -> Params:
    """Random weights: normal with variance 1 / fan-in, norms at one, biases at zero."""
    embed_key, head_key, block_key = jax.random.split(key, 3)

    def block(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(_new_block(cfg, key), nnx.Param))

    params = {
        "embed": jax.random.normal(embed_key, (cfg.vocab_size, cfg.d_model)),
        "blocks": jax.vmap(block)(jax.random.split(block_key, cfg.num_layers)),
        "norm": {"scale": jnp.ones(cfg.d_model)},
    }
    if not cfg.tie_embeddings:
        shape = (cfg.d_model, cfg.vocab_size)
        params["head"] = jax.random.normal(head_key, shape) * cfg.d_model**-0.5
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def abstract_params(
    cfg: ModelConfig, dtype: DTypeLike = jnp.float32, quantization: str | None = None
) -> Params:
    """Shapes and dtypes of the parameters, without making them.

    Args:
        cfg: the model.
        dtype: of the weights, those that int8 stands for included.
        quantization: which matrices are in int8, one of `quantization.KINDS`.
    """

    def init(key: jax.Array) -> Params:
        return int8.quantise_params(init_params(cfg, key, dtype), quantization)

    return jax.eval_shape(init, jax.random.key(0))


def init_cache(
    cfg: ModelConfig, params: Params, batch: int, length: int, dtype: DTypeLike
) -> KVCache:
    """An empty cache of `length` slots a row, for the heads whose weights are here."""
    num_heads = params["blocks"]["attn"]["k"].shape[1] // cfg.head_dim
    shape = (cfg.num_layers, batch, length, num_heads, cfg.head_dim)
    return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))


def run_blocks(
    cfg: ModelConfig,
    params: Params,
    embeds: Float[Array, "B n D"],
    positions: Int[Array, "B n"],
    key_mask: Bool[Array, "B T"],
    cache: KVCache | None = None,
    start: Int[Array, " B"] | None = None,
    write: Bool[Array, "B n"] | None = None,
    *,
    unroll: bool = False,
) -> tuple[Float[Array, "B n D"], KVCache | None]:
    """Runs all layers and the last norm over n rows.

    Args:
        cfg: the model's shape.
        params: see the module docstring.
        embeds: `[B, n, D]` what the first layer reads.
        positions: `[B, n]` rotary positions of these rows.
        key_mask: `[B, T]` True where a position may be attended to.
        cache: keys and values of all T positions; the n rows are written into it and
            attention reads all of it. None attends among the n = T rows.
        start: `[B]` slot of the first row; None for 0, with all rows written.
        write: `[B, n]` True at the rows that are written to the cache; None for all.
        unroll: writes the layers out one by one instead of as a loop: longer to
            compile, and the gradient need not stack what it keeps of each layer.

    Returns:
        `[B, n, D]` in the dtype of `embeds`, and the cache as written.
    """
    block_def, _ = nnx.split(nnx.eval_shape(lambda: _new_block(cfg, jax.random.key(0))))
    wide = layers.at_least_float32(embeds.dtype)
    angles = layers.rotary_angles(positions, cfg.head_dim, cfg.rope_theta, wide)

    def layer(carry: Any, inputs: Any) -> Any:
        # The cache is carried and not scanned over, which would make a second one.
        x, cache = carry
        index, block_params = inputs
        block = nnx.merge(block_def, block_params)
        slots = None
        if cache is not None:
            slots = tuple(
                jax.lax.dynamic_index_in_dim(part, index, keepdims=False)
                for part in (cache.keys, cache.values)
            )
        x, slots = block(x, angles, key_mask, slots, start, write)
        if cache is not None:
            put = jax.lax.dynamic_update_index_in_dim
            keys, values = slots
            cache = KVCache(
                keys=put(cache.keys, keys, index, 0),
                values=put(cache.values, values, index, 0),
            )
        return (x, cache), None

    indices = jnp.arange(cfg.num_layers)
    (x, cache), _ = jax.lax.scan(
        layer, (embeds, cache), (indices, params["blocks"]), unroll=unroll
    )
    norm_def, _ = nnx.split(
        nnx.eval_shape(lambda: layers.RMSNorm(cfg.d_model, cfg.norm_eps))
    )
    return nnx.merge(norm_def, params["norm"])(x), cache
