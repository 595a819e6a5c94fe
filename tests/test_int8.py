"""Weights in int8: how far they are off, what they weigh, and where they go."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_checkpoint import CFG, assert_trees_equal
from test_convert import GOLDEN

from convert.__main__ import main as convert
from lrd_jax import checkpoint, cli, evaluate, generate, pretrained, sharding
from lrd_jax.errors import UserError
from lrd_jax.evaluation import request
from lrd_jax.mesh_shape import MeshShape
from lrd_jax.model import backbone, families, int8, layers
from lrd_jax.quantization import KINDS, join, kind_of
from lrd_jax.shapes import SHAPES
from lrd_jax.source import open_checkpoint
from lrd_jax.training import start

TIED = dataclasses.replace(CFG, family="llada", tie_embeddings=True, qkv_bias=False)
ONE_AND_A_BIT = 1 + 1e-4  # For the rounding of float32 itself.


def normal(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(len(shape)), shape).astype(dtype)


def dequantised(tree):
    def one(path, leaf):
        if not int8.is_qtensor(leaf):
            return leaf
        names = tuple(key.key for key in path)
        axis = int8.out_axis(names, KINDS[1])
        scale = jnp.expand_dims(leaf.scale, int8._in_axis(axis))
        return leaf.int8.astype(leaf.dtype) * scale

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=int8.is_qtensor)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_is_off_by_half_a_scale_at_most(axis, dtype):
    weights = normal(3, 8, 16, dtype=dtype) * jnp.asarray(3.0, dtype)
    weights = weights.at[1, 2, 3].set(0)
    got = int8.quantise(weights, axis)
    assert (got.int8.dtype, got.dtype, got.shape) == (jnp.int8, dtype, weights.shape)
    scale = np.expand_dims(np.asarray(got.scale, np.float64), int8._in_axis(axis))
    error = np.asarray(got.int8, np.float64) * scale - np.asarray(weights, np.float64)
    assert (abs(error) <= scale / 2 * ONE_AND_A_BIT).all()
    # One scale for each output, none larger than it has to be.
    assert got.scale.shape == (3, 16 if axis == -1 else 8)
    assert (abs(np.asarray(got.int8)).max(axis=int8._in_axis(axis)) == 127).all()


def test_a_channel_of_zeros_stays_zero_and_of_nan_nan():
    weights = normal(4, 3).at[:, 1].set(0).at[0, 2].set(jnp.nan)
    got = layers.project(jnp.ones((1, 1, 4)), int8.quantise(weights, -1))[0, 0]
    assert np.isfinite(got[0])
    assert got[1] == 0
    assert np.isnan(got[2])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_off_by_what_its_weights_are(transposed):
    x, kernel = normal(2, 5, 64), normal(64, 32)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    q = int8.quantise(kernel.T if transposed else kernel, -2 if transposed else -1)
    got = layers.project(x, q, transposed=transposed)
    most = np.abs(x).sum(-1, keepdims=True) * np.asarray(q.scale) / 2
    error = np.abs(np.asarray(got, np.float64) - exact)
    assert (error <= most * ONE_AND_A_BIT).all()
    assert error.max() > 1e-3  # int8 was used.


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_that_of_the_rounded_weights(cfg, kind):
    """With a cache, too: every product takes the scale of its own output."""
    params = backbone.init_params(cfg, jax.random.key(0))
    rounded = int8.quantise_params(params, kind)
    assert int8.is_qtensor(rounded["embed"]) == (kind == KINDS[1])
    denoiser = families.make_denoiser(cfg)
    ids, positions = jnp.arange(14).reshape(2, 7), jnp.arange(7)[None].repeat(2, 0)

    @jax.jit
    def run(params):
        cache = denoiser.init_cache(params, 2, 7, jnp.float32)
        mask = jnp.ones((2, 7), bool)
        embeds = denoiser.embed(params, ids)
        hidden, cache = denoiser.hidden(params, embeds, positions, mask, cache)
        logits = denoiser.logits(params, hidden.reshape(14, -1))
        probs = jax.nn.softmax(logits, axis=-1)
        few = denoiser.expect(
            params, probs[:, :3], ids.reshape(14, 1) + jnp.arange(3)[None]
        )
        return embeds, logits, denoiser.expect(params, probs), few, cache.keys

    want = run(dequantised(rounded))
    for got, expected in zip(run(rounded), want, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)
    assert abs(want[1] - run(params)[1]).max() > 1e-3


def test_it_lowers_for_a_tpu():
    cfg = SHAPES["dream-7b"]
    denoiser = families.make_denoiser(cfg)
    params = backbone.abstract_params(cfg, jnp.bfloat16, KINDS[1])

    def run(params, ids, mask):
        embeds = denoiser.embed(params, ids)
        return denoiser.hidden(params, embeds, ids, mask)[0]

    args = jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1, 8), bool)
    exported = jax.export.export(jax.jit(run), platforms=["tpu"])(params, *args)
    assert "i8" in exported.mlir_module()
    # What a layer multiplies with is one layer's, not a copy of the whole stack.
    stack = "x".join(map(str, params["blocks"]["mlp"]["gate"].shape))
    assert f"tensor<{stack}xbf16>" not in exported.mlir_module()


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("kind", "most"), [(KINDS[0], 0.57), (KINDS[1], 0.52)])
def test_it_is_about_half_of_bfloat16(name, kind, most):
    whole, rounded = (
        num_bytes(backbone.abstract_params(SHAPES[name], jnp.bfloat16, k))
        for k in (None, kind)
    )
    assert 0.5 < rounded / whole <= most
    assert sharding.weight_bytes(SHAPES[name], jnp.bfloat16, 1, kind) == rounded


def test_a_scale_is_split_as_its_outputs_are():
    specs = sharding.specs(CFG, 2, KINDS[1])
    attn, mlp = specs["blocks"]["attn"], specs["blocks"]["mlp"]
    assert attn["q"] == int8.QTensor(P(None, "model"), P(None, "model"))
    assert attn["out"] == int8.QTensor(P(None, "model"), P(None, None))
    assert mlp["gate"] == int8.QTensor(P(None, None, "model"), P(None, "model"))
    assert specs["head"] == int8.QTensor(P(None, "model"), P("model"))
    assert specs["embed"] == int8.QTensor(P("model"), P("model"))
    assert attn["q_bias"] == P(None, "model")


@pytest.fixture(scope="module")
def params():
    return backbone.init_params(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "ckpt"
    checkpoint.save_params(path, CFG, params)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_in_int8(saved, params, kind):
    model = pretrained.load(
        saved, quantize="int8", quantize_embeddings=kind == KINDS[1]
    )
    assert_trees_equal(model.params, int8.quantise_params(params, kind))


def test_it_is_rounded_where_it_lies(saved, params):
    """A matrix's sharding is enough: its scale goes along."""
    mesh = sharding.make_mesh(MeshShape(1, 1), jax.devices()[:1])
    shardings = sharding.param_shardings(CFG, mesh)
    got = checkpoint.restore(saved, shardings=shardings, quantization=KINDS[1])
    assert_trees_equal(got, int8.quantise_params(params, KINDS[1]))
    assert got["head"].scale.sharding.spec == P("model")
    assert got["blocks"]["mlp"]["down"].scale.sharding.spec == P(None, None)


def test_the_commands_ask_for_it(saved):
    asked = []

    def spy(*args):
        asked.append(args)
        raise UserError("enough")

    for main, argv in (
        (generate.main, ["--prompt", "a"]),
        (evaluate.main, ["--methods", "baseline", "--n", "1"]),
    ):
        assert main([*argv, "--quantize", "int8"], open_source=spy) == 2
        assert asked.pop() == (None, None, "int8")
        more = "--ckpt C --dtype bfloat16 --quantize int8 --quantize-embeddings"
        assert main([*argv, *more.split()], open_source=spy) == 2
        assert asked.pop() == ("C", "bfloat16", KINDS[1])
    source = open_checkpoint(str(saved), None, KINDS[0])
    assert source.quantization == "int8"
    _, params = source.load()
    assert int8.is_qtensor(params["head"])
    assert not int8.is_qtensor(params["embed"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_in_int8_is_restored(params, tmp_path, kind):
    leaves = checkpoint.flat(params)
    checkpoint.save(tmp_path, CFG, leaves.items(), jnp.float32, kind)
    assert checkpoint.read_quantization(tmp_path) == kind
    assert_trees_equal(checkpoint.restore(tmp_path), int8.quantise_params(params, kind))
    assert_trees_equal(
        checkpoint.restore(tmp_path, quantization=KINDS[1]),
        int8.quantise_params(params, KINDS[1]),
    )
    with pytest.raises(UserError, match="in int8, which training cannot change"):
        start.from_checkpoint(str(tmp_path))
    file = tmp_path / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization": "int4"}))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize("flags", [[], ["--quantize-embeddings"]])
def test_convert_writes_int8_and_not_back(flags, tmp_path, capsys):
    src, dst = GOLDEN / "llada_tiny", tmp_path / "dst"
    flags = ["--src", str(src), "--dst", str(dst), "--quantize", "int8", *flags]
    assert convert(flags) == 0
    kind = KINDS[len(flags) - 6]
    assert f"and {kind}" in capsys.readouterr().out
    params = checkpoint.restore(dst)
    assert int8.is_qtensor(params["blocks"]["mlp"]["down"])
    assert int8.is_qtensor(params["embed"]) == (kind == KINDS[1])
    back = ["--to", "hf", "--src", str(dst), "--dst", str(tmp_path / "hf")]
    assert convert(back) == 2
    assert "in int8, which the published layout has not" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_the_flags_say_which_matrices():
    both = ["--quantize", "int8", "--quantize-embeddings"]
    assert cli.parse(["--prompt", "a", *both]).quantization == KINDS[1]
    assert cli.parse(["--prompt", "a", *both[:2]]).quantization == KINDS[0]
    assert cli.parse(["--prompt", "a"]).quantization is None
    for parse in (cli.parse, request.parse):
        with pytest.raises(UserError, match="give both"):
            parse(["--quantize-embeddings"])
    with pytest.raises(UserError, match="must be int8 or nothing, got 'int4'"):
        kind_of("int4", False)
    assert join(None, *KINDS) == KINDS[1]
    assert join(None, None) is None
