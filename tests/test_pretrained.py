"""Tests of lrd_jax.pretrained: a checkpoint becomes a Model."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standin

from lrd_jax import checkpoint
from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.model import backbone, families
from lrd_jax.pretrained import load

LLADA = ModelConfig(
    family="llada",
    vocab_size=600,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
    tie_embeddings=False,
    max_length=12,
    mask_id=556,
    eos_ids=(301,),
    pad_id=301,
)
DREAM = dataclasses.replace(LLADA, family="dream", num_kv_heads=1, qkv_bias=True)
IDS = np.asarray([[64, 65, 66, 556, 67, 68]], np.int32)


def random_params(cfg: ModelConfig):
    """Random weights, biases too; drawn by NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)
    shapes = backbone.abstract_params(cfg, jnp.bfloat16)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


@pytest.fixture(scope="module")
def params():
    return {cfg.family: random_params(cfg) for cfg in (LLADA, DREAM)}


@pytest.fixture(scope="module")
def folders(params, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for cfg in (LLADA, DREAM):
        checkpoint.save_params(root / cfg.family, cfg, params[cfg.family])
    standin.write_llada(root / "llada", base=300)
    return root


@pytest.fixture(scope="module")
def models(folders):
    return {family: load(folders / family) for family in ("llada", "dream")}


def test_config_tokenizer_and_denoiser(models):
    assert models["llada"].config == LLADA
    assert models["llada"].tokenizer.encode("a<|mdm_mask|>") == [64, 556]
    assert models["llada"].denoiser.lead == 0
    assert models["dream"].config == DREAM
    assert models["dream"].tokenizer is None
    assert models["dream"].denoiser.lead == 1


def test_weights_are_float32_on_cpu_unless_asked(folders, models, params):
    assert jax.default_backend() == "cpu"
    stored = params["llada"]
    want = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    chex.assert_trees_all_equal(models["llada"].params, want)
    assert models["llada"].params["embed"].dtype == jnp.float32
    asked = load(str(folders / "llada"), dtype="bfloat16").params
    chex.assert_trees_all_equal(asked, stored)
    assert asked["embed"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "float16", "bool"])
def test_a_dtype_that_it_does_not_compute_in_is_refused(folders, dtype):
    with pytest.raises(UserError, match=f"must be bfloat16 or float32, got {dtype}"):
        load(folders / "llada", dtype=dtype)


def test_weights_go_where_the_shardings_say(folders):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    wanted = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = load(folders / "llada", shardings=wanted)
    assert {leaf.sharding for leaf in jax.tree.leaves(model.params)} == {wanted}


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_logits_are_those_of_the_denoiser(models, family):
    model = models[family]
    got = model.logits(model.params, IDS)
    assert got.shape == (1, 6, 600)
    assert got.dtype == jnp.float32
    one = model.denoiser
    hidden, _ = one.hidden(
        model.params,
        one.embed(model.params, jnp.asarray(IDS)),
        jnp.arange(6)[None],
        jnp.ones((1, 6), bool),
    )
    np.testing.assert_allclose(got[0], one.logits(model.params, hidden[0]), atol=1e-5)


def test_dream_rows_predict_their_own_token(models):
    # Without its shift Dream is LLaDA's network with biases.
    model = models["dream"]
    unshifted = families.make_denoiser(dataclasses.replace(DREAM, family="llada"))
    plain = dataclasses.replace(model, denoiser=unshifted)
    got = model.logits(model.params, IDS)
    raw = plain.logits(model.params, IDS)
    np.testing.assert_allclose(got[:, 1:], raw[:, :-1], atol=1e-5)
    np.testing.assert_allclose(got[:, 0], raw[:, 0], atol=1e-5)
    assert np.abs(got[:, 1:] - raw[:, 1:]).max() > 0.1


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(("before", "behind"), [(3, 0), (0, 3), (2, 1)])
def test_padding_changes_nothing(models, family, before, behind):
    model = models[family]
    ids = np.pad(IDS, ((0, 0), (before, behind)), constant_values=model.config.pad_id)
    mask = np.pad(np.ones((1, 6), bool), ((0, 0), (before, behind)))
    padded = model.logits(model.params, ids, mask)[:, before : before + 6]
    np.testing.assert_allclose(padded, model.logits(model.params, IDS), atol=1e-5)


def test_logits_compile_once_and_have_gradients(models):
    model = models["llada"]
    traces = []

    def embed(params, ids):
        traces.append("traced")
        return model.denoiser.embed(params, ids)

    counted = dataclasses.replace(model.denoiser, embed=embed)
    other = dataclasses.replace(model, denoiser=counted)
    other.logits(model.params, IDS)
    other.logits(jax.tree.map(lambda x: 2 * x, model.params), IDS + 1)
    assert len(traces) == 1
    gradient = jax.grad(lambda p: model.logits(p, IDS)[0, 0, 5])(model.params)
    assert np.abs(gradient["head"][:, 5]).max() > 0
    # Ids and masks may be traced too.
    inside = jax.jit(model.logits)(model.params, IDS, np.ones((1, 6), bool))
    np.testing.assert_allclose(inside, model.logits(model.params, IDS), atol=1e-5)
    # Or at hand, with the weights alone traced, as in a loss of one batch.
    batch = jnp.asarray(IDS), jnp.ones((1, 6), bool)
    closed = jax.jit(lambda p: model.logits(p, *batch))(model.params)
    np.testing.assert_allclose(closed, inside, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (IDS[0], None, r"input_ids.*\[6\]"),
        (IDS.astype(np.float32), None, r"input_ids.*float32"),
        (IDS, np.ones((1, 5), bool), r"prompt_mask.*\[1, 6\].*\[1, 5\]"),
        (IDS, np.ones((1, 6), np.int32), r"prompt_mask.*int32"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(models, ids, mask, message):
    model = models["llada"]
    with pytest.raises(ValueError, match=message):
        model.logits(model.params, ids, mask)


@pytest.mark.parametrize("bad", [600, -1])
def test_ids_outside_the_vocabulary_are_refused(models, bad):
    model = models["llada"]
    with pytest.raises(UserError, match=rf"\Aid {bad} .*\[0, 600\)[^\n]*\Z"):
        model.logits(model.params, np.asarray([[1, bad]]))


def test_a_row_beyond_the_context_is_refused(models):
    model, ids = models["llada"], np.ones((1, 13), np.int32)
    with pytest.raises(UserError, match=r"\A[^\n]*13[^\n]*12[^\n]*\Z"):
        model.logits(model.params, ids)
    # Padding does not count.
    model.logits(model.params, ids, np.arange(13)[None] > 0)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\A[^\n]*no-such[^\n]*\Z"):
        load(tmp_path / "no-such")
    with pytest.raises(UserError, match=r"\A[^\n]*no-such-name[^\n]*\Z"):
        load("no-such-name")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"\A[^\n]*python -m convert[^\n]*\Z"):
        load(tmp_path)


def test_a_damaged_tokenizer_is_found_before_the_weights_are_read(folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders / "llada", copy)
    shutil.rmtree(copy / "params")
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"\A[^\n]*tokenizer\.json[^\n]*\Z"):
        load(copy)
