"""Each part of a block against the same thing written out in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lrd_jax.config import ModelConfig
from lrd_jax.model import layers

CFG = ModelConfig(
    family="dream",
    vocab_size=32,
    d_model=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    rope_theta=1e4,
    norm_eps=1e-6,
    qkv_bias=True,
    tie_embeddings=False,
    max_length=64,
    mask_id=3,
    eos_ids=(1,),
    pad_id=1,
)
BF16 = jnp.bfloat16
close = np.testing.assert_allclose


def normal(seed, shape, dtype=jnp.float32):
    # Cast by NumPy, which compiles nothing.
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def randomised(make, dtype=jnp.float32):
    """The module with random values for all weights, biases and scales."""
    graph, state = nnx.split(nnx.eval_shape(make))
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    filled = [normal(100 + i, leaf.shape, dtype) for i, leaf in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, filled))


def attention(cfg=CFG, dtype=jnp.float32):
    return randomised(lambda: layers.Attention(cfg, rngs=nnx.Rngs(0)), dtype)


def gated_mlp(dtype=jnp.float32):
    return randomised(lambda: layers.GatedMLP(CFG, rngs=nnx.Rngs(0)), dtype)


def angles(positions, cfg=CFG):
    return layers.rotary_angles(positions, cfg.head_dim, cfg.rope_theta, jnp.float32)


def attend(attn, x, positions=None, key_mask=None):
    rows = x.shape[:2]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(rows[1])[None], rows)
    key_mask = jnp.ones(rows, bool) if key_mask is None else key_mask
    graph, state = nnx.split(attn)
    return attend_jitted(graph, nnx.to_pure_dict(state), x, positions, key_mask)


@functools.partial(jax.jit, static_argnums=0)
def attend_jitted(graph, state, x, positions, key_mask):
    return nnx.merge(graph, state)(x, angles(positions), key_mask, None, None)[0]


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", [jnp.float32, BF16])
def test_rms_norm_normalises_in_float32_then_casts_then_scales(dtype):
    norm = randomised(lambda: layers.RMSNorm(16, 1e-5), dtype)
    x = 30 * normal(1, (2, 3, 16), dtype)
    wide = np.asarray(x, np.float32)
    normed = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    # The product of two bfloat16 numbers is exact in float32, then rounded once.
    rounded = np.asarray(normed.astype(dtype), np.float32)
    want = (rounded * np.asarray(norm.scale[...], np.float32)).astype(dtype)
    got = norm(x)
    assert got.dtype == dtype
    if dtype == BF16:
        # Scaling before the cast would round elsewhere in many of the 96 numbers.
        late = (normed * np.asarray(norm.scale[...], np.float32)).astype(dtype)
        assert np.mean(np.asarray(late) != np.asarray(want)) > 0.1
        np.testing.assert_array_equal(got, want)
    else:
        close(got, want, rtol=1e-6)


def test_rms_norm_of_nothing_is_nothing():
    assert (layers.RMSNorm(16, 1e-5)(jnp.zeros((1, 1, 16))) == 0).all()


def test_rotary_rotates_pairs_half_a_head_apart():
    x = np.asarray(normal(2, (1, 5, 2, 8)))
    positions = np.array([[0, 3, 1, 7, 40]])
    rotated = layers.rotate(jnp.asarray(x), *angles(jnp.asarray(positions)))
    got = np.asarray(rotated)
    for t, position in enumerate(positions[0]):
        for i in range(4):
            turn = np.exp(1j * position * 1e4 ** (-2 * i / 8))
            pair = (x[0, t, :, i] + 1j * x[0, t, :, i + 4]) * turn
            close(got[0, t, :, i], pair.real, atol=1e-5)
            close(got[0, t, :, i + 4], pair.imag, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, BF16])
def test_rotary_leaves_position_zero_alone(dtype):
    x = normal(3, (2, 1, 3, 8), dtype)
    zero = angles(jnp.zeros((2, 1), jnp.int32))
    np.testing.assert_array_equal(layers.rotate(x, *zero), x)


@pytest.mark.parametrize("shift", [1, 17])
def test_rotary_products_depend_on_the_distance_only(shift):
    q, k = normal(4, (1, 1, 1, 8)), normal(5, (1, 1, 1, 8))

    def product(i, j):
        at = [angles(jnp.array([[n]])) for n in (i, j)]
        return jnp.sum(layers.rotate(q, *at[0]) * layers.rotate(k, *at[1]))

    close(product(9, 4), product(9 + shift, 4 + shift), atol=1e-5)
    assert abs(product(9, 4) - product(9 + shift, 4)) > 1e-2


def test_rotary_base_matters():
    at = jnp.array([[5]])
    slow, fast = (layers.rotary_angles(at, 8, b, jnp.float32)[0] for b in (1e6, 1e4))
    assert jnp.abs(slow - fast).max() > 1e-3


def test_attention_written_out():
    attn, x = attention(), np.asarray(normal(6, (2, 5, 16)))
    key_mask = np.array([[True] * 5, [False, True, True, True, False]])
    positions = np.maximum(np.cumsum(key_mask, axis=1) - 1, 0)
    w = {n: np.asarray(getattr(attn, n)[...]) for n in ("q", "k", "v", "out")}
    b = {n: np.asarray(getattr(attn, f"{n}_bias")[...]) for n in ("q", "k", "v")}
    # Weights of q, k, v are [out, in]; heads lie side by side.
    q, k, v = ((x @ w[n].T + b[n]).reshape(2, 5, -1, 8) for n in ("q", "k", "v"))
    turn = angles(jnp.asarray(positions))
    q, k = (np.asarray(layers.rotate(jnp.asarray(a), *turn)) for a in (q, k))
    want = np.zeros((2, 5, 16))
    for row in range(2):
        seen = np.flatnonzero(key_mask[row])
        for head in range(4):
            keys, values = k[row, seen, head // 2], v[row, seen, head // 2]
            weights = softmax(q[row, :, head] @ keys.T / np.sqrt(8))
            want[row] += weights @ values @ w["out"][8 * head : 8 * head + 8]
    got = attend(attn, jnp.asarray(x), jnp.asarray(positions), jnp.asarray(key_mask))
    close(got, want, rtol=2e-4, atol=2e-4)


def test_grouped_queries_equal_repeated_keys_and_values():
    grouped = attention()
    full_cfg = dataclasses.replace(CFG, num_kv_heads=4)
    graph, state = nnx.split(attention(full_cfg))
    state = nnx.to_pure_dict(state)
    for name in ("k", "v", "k_bias", "v_bias"):
        # Query heads 0, 1 share the first key head; 2, 3 the second.
        heads = jnp.split(getattr(grouped, name)[...], 2)
        state[name] = jnp.concatenate([heads[0], heads[0], heads[1], heads[1]])
    for name in ("q", "q_bias", "out"):
        state[name] = getattr(grouped, name)[...]
    x = normal(7, (2, 6, 16))
    close(attend(nnx.merge(graph, state), x), attend(grouped, x), atol=1e-4)


def test_masked_keys_are_ignored_and_others_are_not():
    attn, x = attention(), normal(8, (1, 6, 16))
    key_mask = jnp.array([[True, True, False, True, True, True]])
    before = attend(attn, x, key_mask=key_mask)
    other = np.asarray(attend(attn, x.at[:, 2].set(50.0), key_mask=key_mask))
    kept = np.array([0, 1, 3, 4, 5])
    np.testing.assert_array_equal(other[:, kept], before[:, kept])
    seen = attend(attn, x.at[:, 1].set(50.0), key_mask=key_mask)
    assert np.abs(np.asarray(seen - before))[:, kept].min(axis=-1).max() > 1e-3


def test_attention_looks_ahead():
    attn, x = attention(), normal(9, (1, 6, 16))
    moved = attend(attn, x.at[:, 5].add(1.0)) - attend(attn, x)
    assert jnp.abs(moved[:, 0]).max() > 1e-3


@pytest.mark.parametrize("name", ["q_bias", "k_bias", "v_bias"])
def test_each_bias_is_used(name):
    attn, x = attention(), normal(10, (1, 4, 16))
    before = attend(attn, x)
    bias = getattr(attn, name)
    bias[...] = bias[...] + jnp.arange(bias[...].size, dtype=jnp.float32)
    assert jnp.abs(attend(attn, x) - before).max() > 1e-2


def test_without_biases_there_are_none():
    attn = attention(dataclasses.replace(CFG, qkv_bias=False))
    assert not any(hasattr(attn, f"{name}_bias") for name in "qkv")
    assert attend(attn, normal(11, (1, 4, 16))).shape == (1, 4, 16)


def test_gated_mlp_written_out():
    mlp = gated_mlp()
    x = normal(12, (2, 3, 16))
    weights = (mlp.gate, mlp.up, mlp.down)
    gate_w, up_w, down_w = (np.asarray(p[...], float) for p in weights)
    gate = np.asarray(x, float) @ gate_w
    silu = gate / (1 + np.exp(-gate))
    want = (silu * (np.asarray(x, float) @ up_w)) @ down_w
    close(mlp(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, BF16])
def test_layers_keep_the_dtype_under_strict_promotion(dtype):
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    x = normal(13, (2, 4, 16), dtype)
    attended = attend(attention(dtype=dtype), x)
    mlp = gated_mlp(dtype)
    for rows in (attended, mlp(x)):
        assert rows.dtype == dtype
        assert jnp.isfinite(rows).all()


@pytest.mark.parametrize(("dtype", "full"), [(jnp.float32, True), (BF16, False)])
def test_every_product_of_float32_is_at_full_precision(dtype, full):
    # Else TPUs and GPUs round what they multiply; a CPU shows no difference.
    def both(x):
        return gated_mlp(dtype)(x) + attend(attention(dtype=dtype), x)

    program = str(jax.make_jaxpr(both)(normal(17, (1, 4, 16), dtype)))
    products = program.count("dot_general[")
    assert products >= 8  # Of nine, k and v are printed as one.
    assert program.lower().count("(precision.highest, ") == (products if full else 0)


def test_bfloat16_attention_is_near_float32():
    attn, x = attention(), normal(14, (2, 6, 16)).astype(BF16)
    low = attention(dtype=BF16)
    want = attend(attn, x.astype(jnp.float32))
    got = attend(low, x).astype(jnp.float32)
    assert jnp.abs(got - want).max() < 0.03 * jnp.abs(want).max()


@pytest.mark.parametrize("start", [None, np.array([0, 4])])
def test_write_slots_touches_only_the_rows_slots(start):
    slots, rows = normal(15, (2, 6, 2, 8), BF16), normal(16, (2, 2, 2, 8))
    at = None if start is None else jnp.asarray(start)
    got = np.asarray(layers.write_slots(slots, rows, at))
    assert got.dtype == BF16
    want = np.array(slots)
    for row, first in enumerate([0, 0] if start is None else start):
        want[row, first : first + 2] = np.asarray(rows[row].astype(BF16))
    np.testing.assert_array_equal(got, want)
