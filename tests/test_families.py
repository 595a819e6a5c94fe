"""Denoisers of LLaDA and Dream: alignment, head, dtypes, fields that must matter."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrd_jax.base import HiddenFn
from lrd_jax.model import backbone, families

PUBLISHED = pathlib.Path(__file__).parent / "golden" / "published"
T = 9
PADDING = np.array([0, 2])
KEY_MASK = np.arange(T)[None] >= PADDING[:, None]
POSITIONS = np.maximum(np.arange(T)[None] - PADDING[:, None], 0).astype(np.int32)
BF16 = jnp.bfloat16
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)

LLADA = json.loads((PUBLISHED / "LLaDA-8B-Base.config.json").read_text()) | dict(
    d_model=32, n_heads=4, n_kv_heads=4, n_layers=2, mlp_hidden_size=40,
    embedding_size=48, vocab_size=48, mask_token_id=40, eos_token_id=41,
    pad_token_id=41,
)  # fmt: skip
DREAM = json.loads((PUBLISHED / "Dream-v0-Base-7B.config.json").read_text()) | dict(
    hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
    intermediate_size=40, vocab_size=48, mask_token_id=40, eos_token_id=41,
    pad_token_id=41,
)  # fmt: skip
SMALL = {"llada": LLADA, "dream": DREAM}


def draw(cfg, dtype="float32"):
    """Random weights, biases too; the same numbers for the same name and shape."""

    def one(path, leaf):
        rng = np.random.default_rng(sum(map(ord, str(path))))
        values = 0.5 * rng.normal(size=leaf.shape)
        return jnp.asarray(values.astype(jnp.dtype(dtype)))

    return jax.tree_util.tree_map_with_path(one, backbone.abstract_params(cfg))


def embeds_of(dtype=np.float32):
    return np.random.default_rng(1).normal(size=(2, T, 32)).astype(dtype)


@functools.cache
def hidden_fn(cfg):
    return jax.jit(families.make_denoiser(cfg).hidden)


def hidden_of(cfg, params, embeds):
    return hidden_fn(cfg)(params, embeds, POSITIONS, KEY_MASK)[0]


def small(family, **changes):
    return families.from_published(SMALL[family] | changes)


@pytest.mark.parametrize("family", SMALL)
def test_the_denoiser_has_the_ids_of_the_config(family):
    cfg = dataclasses.replace(small(family), eos_ids=(41, 43), pad_id=42)
    denoiser = families.make_denoiser(cfg)
    assert denoiser.mask_id == 40
    assert denoiser.eos_ids == (41, 43)
    assert denoiser.pad_id == 42
    assert denoiser.vocab_size == 48
    assert denoiser.max_length == cfg.max_length
    assert denoiser.lead == {"llada": 0, "dream": 1}[family]
    assert isinstance(denoiser.hidden, HiddenFn)


def test_llada_predicts_a_token_in_its_own_row():
    cfg, embeds = small("llada"), embeds_of()
    params = draw(cfg)
    raw, _ = jax.jit(functools.partial(backbone.run_blocks, cfg))(
        params, embeds, POSITIONS, KEY_MASK
    )
    close(hidden_of(cfg, params, embeds), raw)


def test_dream_predicts_a_token_in_the_row_before():
    cfg, embeds = small("dream"), embeds_of()
    params = draw(cfg)
    raw, _ = jax.jit(functools.partial(backbone.run_blocks, cfg))(
        params, embeds, POSITIONS, KEY_MASK
    )
    got = hidden_of(cfg, params, embeds)
    for row, first in enumerate(PADDING):
        # The first real position has only itself to read, left-padded or not.
        close(got[row, first], raw[row, first])
        close(got[row, first + 1 :], raw[row, first:-1])
        assert np.abs(raw[row, first + 1] - raw[row, first]).max() > 0.1


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_finite_float32(family, dtype):
    cfg = small(family)
    params = draw(cfg, dtype)
    hidden = hidden_of(cfg, params, embeds_of(jnp.dtype(dtype)))
    assert hidden.dtype == dtype
    logits = families.make_denoiser(cfg).logits(params, hidden.reshape(-1, 32))
    assert (logits.shape, logits.dtype) == ((2 * T, 48), jnp.float32)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("family", SMALL)
def test_bfloat16_is_near_float32(family):
    cfg = small(family)
    denoiser = families.make_denoiser(cfg)

    def logits(dtype):
        params = draw(cfg, dtype)
        hidden = hidden_of(cfg, params, embeds_of(jnp.dtype(dtype)))
        return np.asarray(denoiser.logits(params, hidden[KEY_MASK]))

    exact = logits("float32")
    assert np.abs(logits("bfloat16") - exact).max() < 0.1 * np.abs(exact).max()


def test_the_bfloat16_head_sums_in_float32():
    cfg = small("llada", d_model=512)
    params = {"head": jnp.ones((512, 48), BF16), "embed": jnp.ones((48, 512), BF16)}
    hidden = jnp.ones((1, 512), BF16).at[0, 0].set(1 / 128)
    # 511 + 1/128 is no bfloat16 number.
    logits = families.make_denoiser(cfg).logits(params, hidden)
    np.testing.assert_array_equal(logits, np.full((1, 48), 511 + 1 / 128, np.float32))


@pytest.mark.parametrize(
    ("family", "field"), [("llada", "weight_tying"), ("dream", "tie_word_embeddings")]
)
def test_a_tied_head_is_the_embedding_table(family, field):
    cfg = small(family, **{field: True})
    params = draw(cfg)
    assert "head" not in params
    rows = jnp.asarray(embeds_of()[0])
    logits = families.make_denoiser(cfg).logits(params, rows)
    close(logits, np.asarray(rows) @ np.asarray(params["embed"]).T)
    untied = draw(small(family))
    logits = families.make_denoiser(small(family)).logits(untied, rows)
    close(logits, np.asarray(rows) @ np.asarray(untied["head"]))


@pytest.mark.parametrize("family", SMALL)
def test_logits_are_linear_in_the_hidden_rows(family):
    # Classifier-free guidance mixes hidden rows instead of logits.
    cfg = small(family)
    logits = functools.partial(families.make_denoiser(cfg).logits, draw(cfg))
    a, b = jnp.asarray(embeds_of())
    close(logits(1.5 * a - 0.5 * b), 1.5 * logits(a) - 0.5 * logits(b), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expect_is_the_mean_embedding(dtype):
    cfg = small("dream")
    params = draw(cfg, dtype)
    probs = np.random.default_rng(3).dirichlet(np.ones(48), size=5).astype(np.float32)
    got = families.make_denoiser(cfg).expect(params, jnp.asarray(probs))
    table = np.asarray(params["embed"], np.float64)
    assert got.dtype == jnp.float32
    # 2^-8: a rounded probability errs by at most half of that, relatively.
    bound = probs @ np.abs(table) * (2.0**-8 if dtype == "bfloat16" else 1e-6)
    assert (np.abs(got - probs @ table) <= bound).all()


def test_embed_takes_rows_of_the_table():
    cfg = small("llada")
    params = draw(cfg)
    embed = families.make_denoiser(cfg).embed
    ids = jnp.array([[3, 40], [47, 0]])
    want = np.asarray(params["embed"])[np.asarray(ids)]
    np.testing.assert_array_equal(embed(params, ids), want)
    np.testing.assert_array_equal(embed(params, jnp.int32(40)), params["embed"][40])


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llada", {"rope_theta": 1e3}),
        ("dream", {"rope_theta": 1e3}),
        ("llada", {"rms_norm_eps": 0.1}),
        ("dream", {"rms_norm_eps": 0.1}),
        ("llada", {"include_qkv_bias": True}),
        ("llada", {"n_heads": 2, "n_kv_heads": 2}),
        ("llada", {"n_kv_heads": 2}),
        ("llada", {"n_kv_heads": None, "multi_query_attention": True}),
        ("dream", {"num_key_value_heads": 1}),
    ],
)
def test_a_published_field_changes_the_computation(family, change):
    plain, other = small(family), small(family, **change)
    assert plain != other
    params, embeds = draw(other), embeds_of()
    if jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, draw(plain)):
        before = hidden_of(plain, params, embeds)
    else:
        before = hidden_of(plain, draw(plain), embeds)
    assert np.abs(hidden_of(other, params, embeds) - before)[KEY_MASK].max() > 1e-2
