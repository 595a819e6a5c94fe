"""The scanned blocks, and the KV cache through each family's `Denoiser.hidden`."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lrd_jax.base import KVCache
from lrd_jax.config import ModelConfig
from lrd_jax.model import backbone, families, layers

LLADA = ModelConfig(
    family="llada",
    vocab_size=48,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=40,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
    tie_embeddings=False,
    max_length=64,
    mask_id=40,
    eos_ids=(41,),
    pad_id=41,
)
DREAM = dataclasses.replace(LLADA, family="dream", num_kv_heads=2, qkv_bias=True)
FAMILIES = {"llada": LLADA, "dream": DREAM}
B, T, W = 3, 14, 4
PADDING = np.array([0, 3, 1])  # Left padding of each row.
STARTS = np.array([6, 9, 5])  # First window position of each row.
KEY_MASK = np.arange(T)[None] >= PADDING[:, None]
POSITIONS = np.maximum(np.arange(T)[None] - PADDING[:, None], 0).astype(np.int32)
BF16 = jnp.bfloat16
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@functools.cache
def params_of(cfg, dtype="float32"):
    """Random weights, biases and scales too; drawn by NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        size = 0.3 * rng.normal(size=leaf.shape)
        return jnp.asarray(size.astype(jnp.dtype(dtype)))

    return jax.tree.map(draw, backbone.abstract_params(cfg))


@functools.cache
def hidden_fn(cfg):
    return jax.jit(families.make_denoiser(cfg).hidden)


def embeds_of(dtype=np.float32):
    return np.random.default_rng(1).normal(size=(B, T, LLADA.d_model)).astype(dtype)


def full_call(cfg, embeds, cache=None):
    params = params_of(cfg, str(embeds.dtype))
    return hidden_fn(cfg)(params, embeds, POSITIONS, KEY_MASK, cache)


def window_call(cfg, embeds, cache, write=None):
    """The rows that each batch row's window passes, lead row included."""
    lead = families.make_denoiser(cfg).lead
    slots = STARTS[:, None] + np.arange(-lead, W)
    params = params_of(cfg, str(embeds.dtype))
    return hidden_fn(cfg)(
        params,
        np.take_along_axis(embeds, slots[..., None], axis=1),
        np.take_along_axis(POSITIONS, slots, axis=1),
        KEY_MASK,
        cache,
        STARTS,
        write,
    )


def empty_cache(cfg, dtype=jnp.float32):
    return families.make_denoiser(cfg).init_cache(params_of(cfg), B, T, dtype)


def in_window(rows):
    """The window's rows of `[B, T, D]`."""
    at = STARTS[:, None] + np.arange(W)
    return np.take_along_axis(np.asarray(rows), at[..., None], axis=1)


def changed(embeds, slots):
    other = embeds.copy()
    for row, slot in slots:
        other[row, slot] += np.random.default_rng(slot).normal(size=LLADA.d_model)
    return other


def window_slots():
    return {(row, s + i) for row, s in enumerate(STARTS) for i in range(W)}


def test_shapes_of_the_params():
    shapes = jax.tree.map(lambda leaf: leaf.shape, backbone.abstract_params(DREAM))
    assert shapes == {
        "embed": (48, 32),
        "head": (32, 48),
        "norm": {"scale": (32,)},
        "blocks": {
            "attn_norm": {"scale": (2, 32)},
            "mlp_norm": {"scale": (2, 32)},
            "attn": {
                "q": (2, 32, 32),
                "k": (2, 16, 32),
                "v": (2, 16, 32),
                "out": (2, 32, 32),
                "q_bias": (2, 32),
                "k_bias": (2, 16),
                "v_bias": (2, 16),
            },
            "mlp": {"gate": (2, 32, 40), "up": (2, 32, 40), "down": (2, 40, 32)},
        },
    }


def test_tied_embeddings_have_no_head_and_llada_no_biases():
    params = backbone.abstract_params(dataclasses.replace(LLADA, tie_embeddings=True))
    assert "head" not in params
    assert set(params["blocks"]["attn"]) == {"q", "k", "v", "out"}


def test_initial_params_are_scaled_by_fan_in_and_differ_by_layer():
    init = functools.partial(backbone.init_params, DREAM, dtype=BF16)
    # This kind of key compiles in a tenth of the time.
    params = jax.jit(init)(jax.random.key(0, impl="unsafe_rbg"))
    for leaf, want in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(backbone.abstract_params(DREAM, BF16)),
        strict=True,
    ):
        assert (leaf.shape, leaf.dtype) == (want.shape, BF16)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    attn, mlp = params["blocks"]["attn"], params["blocks"]["mlp"]
    for leaf, fan_in in [(attn["q"], 32), (attn["out"], 32), (mlp["down"], 40)]:
        assert np.std(leaf) == pytest.approx(fan_in**-0.5, rel=0.1)
        assert np.abs(leaf[0] - leaf[1]).max() > 0.1
    assert (attn["q_bias"] == 0).all()
    assert (params["blocks"]["mlp_norm"]["scale"] == 1).all()
    assert np.std(params["head"]) == pytest.approx(32**-0.5, rel=0.1)


def test_the_scan_is_a_loop_over_the_layers():
    cfg = DREAM
    params, x = params_of(cfg), jnp.asarray(embeds_of())
    positions, key_mask = jnp.asarray(POSITIONS), jnp.asarray(KEY_MASK)
    angles = layers.rotary_angles(positions, cfg.head_dim, cfg.rope_theta, x.dtype)
    got, cache = jax.jit(functools.partial(backbone.run_blocks, cfg))(
        params, x, positions, key_mask, empty_cache(cfg)
    )
    for layer in range(cfg.num_layers):
        one = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
        slots = (cache.keys[layer], cache.values[layer])
        block = loaded_block(cfg, one)
        normed = rms_norm(cfg, x, one["attn_norm"])
        mixed, written = block.attn(normed, angles, key_mask, slots, None)
        jax.tree.map(close, written, slots)
        x = x + mixed
        x = x + block.mlp(rms_norm(cfg, x, one["mlp_norm"]))
    close(got, rms_norm(cfg, x, params["norm"]))


def rms_norm(cfg, x, params):
    x, scale = np.asarray(x), np.asarray(params["scale"])
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    return jnp.asarray(x / np.sqrt(mean_square + cfg.norm_eps) * scale)


def loaded_block(cfg, params):
    """A block with the given weights, put in one by one."""
    block = nnx.eval_shape(lambda: backbone.Block(cfg, rngs=nnx.Rngs(0)))
    for part, weights in params.items():
        for name, value in weights.items():
            leaf = getattr(getattr(block, part), name)
            assert leaf.get_value().shape == value.shape
            leaf.set_value(value)
    return block


@pytest.mark.parametrize("family", FAMILIES)
def test_filling_a_cache_changes_no_result(family):
    cfg, embeds = FAMILIES[family], embeds_of()
    want, none = full_call(cfg, embeds)
    got, cache = full_call(cfg, embeds, empty_cache(cfg))
    assert none is None
    close(got, want)
    assert cache.keys.shape == (2, B, T, cfg.num_kv_heads, cfg.head_dim)
    assert np.abs(cache.keys).min(axis=-1).max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_window_equals_the_full_forward(family):
    cfg, embeds = FAMILIES[family], embeds_of()
    full, cache = full_call(cfg, embeds, empty_cache(cfg))
    window, after = window_call(cfg, embeds, cache)
    assert window.shape == (B, W, cfg.d_model)
    close(window, in_window(full))
    jax.tree.map(close, after, cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_call_restores_slots_that_were_spoilt(family):
    # The lead row's slots too, so they are really rewritten.
    cfg, embeds = FAMILIES[family], embeds_of()
    full, cache = full_call(cfg, embeds, empty_cache(cfg))
    lead = families.make_denoiser(cfg).lead
    slots = STARTS[:, None] + np.arange(-lead, W)

    def spoil(leaf):
        leaf = np.array(leaf)
        leaf[:, np.arange(B)[:, None], slots] = 7.0
        return leaf

    window, after = window_call(cfg, embeds, jax.tree.map(spoil, cache))
    close(window, in_window(full))
    jax.tree.map(close, after, cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_call_writes_its_own_slots_only(family):
    cfg, embeds = FAMILIES[family], embeds_of()
    lead = families.make_denoiser(cfg).lead
    _, cache = full_call(cfg, embeds, empty_cache(cfg))
    everywhere = {(row, t) for row in range(B) for t in range(T)}
    _, after = window_call(cfg, changed(embeds, everywhere), cache)
    for before, now in [(cache.keys, after.keys), (cache.values, after.values)]:
        moved = np.asarray(before != now).any(axis=(0, 3, 4))
        for row, start in enumerate(STARTS):
            want = range(start - lead, start + W)
            assert list(np.flatnonzero(moved[row])) == list(want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_call_leaves_slots_that_it_is_not_to_write(family):
    cfg, embeds = FAMILIES[family], embeds_of()
    lead = families.make_denoiser(cfg).lead
    _, cache = full_call(cfg, embeds, empty_cache(cfg))
    other = changed(embeds, {(row, t) for row in range(B) for t in range(T)})
    write = np.ones((B, lead + W), bool)
    write[1] = write[2, : lead + 1] = False
    window, after = window_call(cfg, other, cache, write)
    for before, now in [(cache.keys, after.keys), (cache.values, after.values)]:
        moved = np.asarray(before != now).any(axis=(0, 3, 4))
        assert list(np.flatnonzero(moved[0])) == list(range(6 - lead, 6 + W))
        assert not moved[1].any()
        assert list(np.flatnonzero(moved[2])) == list(range(5 + 1, 5 + W))
    everything, _ = window_call(cfg, other, cache)
    close(window[0], everything[0])
    # What is not written is not attended to either: the old slots are.
    assert np.abs(window[2] - everything[2]).max() > 1e-3


def test_a_window_of_dream_at_the_first_real_token_reads_it_as_the_full_call_does():
    cfg, embeds = DREAM, embeds_of()
    want, cache = full_call(cfg, embeds, empty_cache(cfg))
    row, start = 1, int(PADDING[1])
    slots = np.arange(start - 1, start + W)
    got, _ = hidden_fn(cfg)(
        params_of(cfg),
        embeds[row : row + 1, slots],
        POSITIONS[row : row + 1, slots],
        KEY_MASK[row : row + 1],
        jax.tree.map(lambda x: x[:, row : row + 1], cache),
        np.array([start]),
    )
    close(got[0], want[row, start : start + W])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_window_follows_its_changed_embeddings(family):
    # Keys of other rows depend on their own embeddings alone, in the first layer.
    cfg = dataclasses.replace(FAMILIES[family], num_layers=1)
    embeds = embeds_of()
    old, cache = full_call(cfg, embeds, empty_cache(cfg))
    other = changed(embeds, window_slots())
    window, _ = window_call(cfg, other, cache)
    want, _ = full_call(cfg, other, cache)
    close(window, in_window(want))
    assert np.abs(in_window(want) - in_window(old)).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_deeper_windows_read_a_stale_context_until_it_is_refreshed(family):
    cfg, embeds = FAMILIES[family], embeds_of()
    _, cache = full_call(cfg, embeds, empty_cache(cfg))
    other = changed(embeds, window_slots())
    want, _ = full_call(cfg, other)
    stale, cache = window_call(cfg, other, cache)
    assert np.abs(stale - in_window(want)).max() > 1e-3
    refreshed, cache = full_call(cfg, other, cache)
    close(refreshed, want)
    window, _ = window_call(cfg, other, cache)
    close(window, in_window(want))


def test_a_bfloat16_cache_of_a_bfloat16_model():
    cfg, embeds = DREAM, embeds_of(BF16)
    full, cache = full_call(cfg, embeds, empty_cache(cfg, BF16))
    window, after = window_call(cfg, embeds, cache)
    assert {x.dtype for x in (full, window, after.keys, after.values)} == {
        jnp.dtype(BF16)
    }
    assert np.isfinite(np.asarray(full, np.float32)[KEY_MASK]).all()
    want, scale = in_window(full).astype(np.float32), np.abs(full).max()
    assert np.abs(np.asarray(window, np.float32) - want).max() < 0.02 * scale


def test_a_bfloat16_cache_of_a_float32_model():
    cfg, embeds = DREAM, embeds_of()
    want, _ = full_call(cfg, embeds)
    full, cache = full_call(cfg, embeds, empty_cache(cfg, BF16))
    window, after = window_call(cfg, embeds, cache)
    assert full.dtype == window.dtype == jnp.float32
    assert after.keys.dtype == BF16
    for got, rows in [(full[KEY_MASK], want[KEY_MASK]), (window, in_window(want))]:
        assert np.abs(got - rows).max() < 0.05 * np.abs(rows).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing_for_real_rows(family):
    cfg, embeds = FAMILIES[family], embeds_of()
    params = params_of(cfg)
    padded, _ = full_call(cfg, embeds)
    row, n = 1, T - PADDING[1]
    alone, _ = hidden_fn(cfg)(
        params,
        embeds[row : row + 1, -n:],
        np.arange(n, dtype=np.int32)[None],
        np.ones((1, n), bool),
    )
    close(alone[0], padded[row, -n:])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_in_the_padding_does_not_matter(family):
    cfg, embeds = FAMILIES[family], embeds_of()
    padding = {(row, t) for row, t in np.argwhere(~KEY_MASK)}
    want, _ = full_call(cfg, embeds)
    got, _ = full_call(cfg, changed(embeds, padding))
    np.testing.assert_array_equal(np.asarray(got)[KEY_MASK], want[KEY_MASK])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_batch_do_not_touch_each_other(family):
    cfg, embeds = FAMILIES[family], embeds_of()
    want, _ = full_call(cfg, embeds)
    got, _ = full_call(cfg, changed(embeds, {(1, t) for t in range(T)}))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[2], want[2])
    assert np.abs(got[1] - want[1]).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_certain_probabilities_read_as_ids(family):
    # What the model reads is an embedding; ids are one way to get it.
    cfg = FAMILIES[family]
    denoiser, params = families.make_denoiser(cfg), params_of(cfg)
    ids = np.random.default_rng(2).integers(0, cfg.vocab_size, (B, T))
    by_ids = denoiser.embed(params, jnp.asarray(ids))
    certain = jax.nn.one_hot(ids.reshape(-1), cfg.vocab_size)
    by_probs = denoiser.expect(params, certain).reshape(by_ids.shape)
    assert by_ids.shape == (B, T, cfg.d_model)
    close(full_call(cfg, by_probs)[0], full_call(cfg, by_ids)[0])


PUBLISHED = pathlib.Path(__file__).parent / "golden" / "published"
PARAMETERS = {
    "LLaDA-8B-Base": 8_015_581_184,
    "LLaDA-8B-Instruct": 8_015_581_184,
    "Dream-v0-Base-7B": 7_615_616_512,
    "Dream-v0-Instruct-7B": 7_615_616_512,
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_published_sizes(model):
    # Shapes only: the weights would be 16 GB. LLaDA-1.5 has LLaDA-Instruct's config.
    published = json.loads((PUBLISHED / f"{model}.config.json").read_text())
    cfg = families.from_published(published)
    params = backbone.abstract_params(cfg, BF16)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == PARAMETERS[model]
    denoiser = families.make_denoiser(cfg)
    one, length, window = 1, 768, 512
    cache = jax.eval_shape(lambda: denoiser.init_cache(params, one, length, BF16))
    n = window + denoiser.lead
    rows, cache = jax.eval_shape(
        denoiser.hidden,
        params,
        jax.ShapeDtypeStruct((one, n, cfg.d_model), BF16),
        jax.ShapeDtypeStruct((one, n), jnp.int32),
        jax.ShapeDtypeStruct((one, length), bool),
        cache,
        jax.ShapeDtypeStruct((one,), jnp.int32),
    )
    assert (rows.shape, rows.dtype) == ((one, window, cfg.d_model), BF16)
    assert isinstance(cache, KVCache)
    assert cache.keys.shape == (
        cfg.num_layers,
        one,
        length,
        cfg.num_kv_heads,
        cfg.head_dim,
    )
    logits = jax.eval_shape(
        denoiser.logits, params, jax.ShapeDtypeStruct((4, cfg.d_model), BF16)
    )
    assert (logits.shape, logits.dtype) == ((4, cfg.vocab_size), jnp.float32)
