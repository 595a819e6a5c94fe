"""Checkpoints written and restored, on one device and on eight, whole and damaged."""

import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrd_jax import checkpoint
from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.model import backbone

CFG = ModelConfig(
    family="dream",
    vocab_size=64,
    d_model=32,
    num_layers=3,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    mlp_dim=48,
    rope_theta=1e4,
    norm_eps=1e-6,
    qkv_bias=True,
    tie_embeddings=False,
    max_length=128,
    mask_id=63,
    eos_ids=(61, 62),
    pad_id=61,
    raw_bos_id=60,
    chat=True,
)


@pytest.fixture(scope="module")
def params():
    return backbone.init_params(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "ckpt"
    checkpoint.save_params(path, CFG, params)
    return path


@pytest.fixture
def ckpt(saved, tmp_path):
    """A checkpoint that a test may damage."""
    return shutil.copytree(saved, tmp_path / "ckpt")


def edit_model_file(path, **changes):
    file = path / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Values and dtypes.
assert_trees_equal = functools.partial(chex.assert_trees_all_equal, strict=True)


def test_what_is_saved_is_restored(saved, params):
    assert_trees_equal(checkpoint.restore(saved), params)
    assert checkpoint.read_config(saved) == CFG
    assert checkpoint.read_dtype(saved) == "float32"


def test_restores_in_another_dtype(saved, params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert_trees_equal(checkpoint.restore(saved, jnp.bfloat16), half)
    with jax.enable_x64(True):
        wide = checkpoint.restore(saved, "float64")
        assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float64"}


def test_bfloat16_is_kept(params, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    checkpoint.save_params(tmp_path / "half", CFG, half)
    assert_trees_equal(checkpoint.restore(tmp_path / "half"), half)


def test_saving_leaves_the_parameters_alone(params, tmp_path):
    before = jax.tree.map(np.array, params)
    checkpoint.save_params(tmp_path / "ckpt", CFG, params)
    assert_trees_equal(params, before)


def test_a_leaf_may_come_as_an_array_or_in_pieces(saved, params, tmp_path):
    def by_layer(array):
        for layer in reversed(range(len(array))):
            yield (layer, *(0 for _ in array.shape[1:])), array[layer : layer + 1]

    flat = jax.tree_util.tree_leaves_with_path(jax.tree.map(np.asarray, params))
    named = [(tuple(key.key for key in path), leaf) for path, leaf in flat]
    leaves = [
        (name, leaf if number % 2 else lambda leaf=leaf: by_layer(leaf))
        for number, (name, leaf) in enumerate(reversed(named))
    ]
    checkpoint.save(tmp_path, CFG, leaves, jnp.float32)
    assert_trees_equal(checkpoint.restore(tmp_path), params)
    same = checkpoint.read_fingerprint(tmp_path)
    assert same == checkpoint.read_fingerprint(saved)


def test_the_fingerprint_tells_values_and_dtypes_apart(saved, params, tmp_path):
    changed = dict(params, embed=params["embed"].at[3, 4].add(1e-6))
    checkpoint.save_params(tmp_path / "changed", CFG, changed)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    checkpoint.save_params(tmp_path / "half", CFG, half)
    paths = (saved, tmp_path / "changed", tmp_path / "half")
    assert len({checkpoint.read_fingerprint(path) for path in paths}) == 3


def test_saving_again_needs_overwrite(ckpt, params):
    old = checkpoint.read_fingerprint(ckpt)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    with pytest.raises(UserError, match="exists; give --overwrite"):
        checkpoint.save_params(ckpt, CFG, doubled)
    assert checkpoint.read_fingerprint(ckpt) == old
    checkpoint.save_params(ckpt, CFG, doubled, overwrite=True)
    assert_trees_equal(checkpoint.restore(ckpt), doubled)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ([], "missing leaves"),
        ([(("nonsense",), np.zeros(3))], "unexpected leaf"),
        ([(("embed",), np.zeros((64, 31)))], r"\(64, 31\), expected \(64, 32\)"),
        ([(("embed",), lambda: [((0, 0), np.zeros((63, 32)))])], "wrote 2016 elements"),
        ([(("norm", "scale"), np.zeros(32))] * 2, "unexpected leaf"),
    ],
    ids=["missing", "unknown", "misshaped", "incomplete", "doubled"],
)
def test_a_caller_must_give_every_leaf_once(tmp_path, leaves, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, CFG, leaves, jnp.float32)


def test_no_such_checkpoint(tmp_path):
    with pytest.raises(UserError, match=f"no such checkpoint: {tmp_path}/absent"):
        checkpoint.read_config(tmp_path / "absent")


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"not a checkpoint, .* no model\.json; give"):
        checkpoint.restore(tmp_path)


def test_a_hugging_face_directory_gets_the_convert_command(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        checkpoint.read_config(tmp_path)
    command = f"python -m convert --src {tmp_path} --dst {tmp_path}-lrd"
    assert str(caught.value).endswith(command)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "its format is 2, this version of lrd_jax reads 1"),
        ({"dtype": "int8"}, "damaged"),
        ({"weights_sha256": None}, "damaged"),
        ({"sizes": None}, "damaged"),
        ({"model": {"family": "dream"}}, "damaged: .*missing"),
        ({"model": {"famly": "dream"}}, "did you mean family"),
    ],
    ids=str,
)
def test_a_damaged_model_file(ckpt, changes, message):
    edit_model_file(ckpt, **changes)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.restore(ckpt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_a_broken_model_file(ckpt, content):
    (ckpt / "model.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read_fingerprint(ckpt)


def test_all_shapes_that_do_not_fit_are_listed(ckpt):
    model = json.loads((ckpt / "model.json").read_text())["model"]
    edit_model_file(ckpt, model=model | {"vocab_size": 80, "qkv_bias": False})
    with pytest.raises(UserError) as caught:
        checkpoint.restore(ckpt)
    for problem in (
        "embed is [64, 32], expected [80, 32]",
        "head is [32, 64], expected [32, 80]",
        "blocks.attn.q_bias is unknown",
    ):
        assert problem in str(caught.value)


def test_absent_and_truncated_files_are_listed(ckpt):
    first, second, *_ = sorted((ckpt / "params").rglob("d/*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(UserError, match="absent or truncated: ") as caught:
        checkpoint.restore(ckpt)
    for file in (first, second):
        assert str(file.relative_to(ckpt)) in str(caught.value)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_values_that_are_not_what_was_written_are_noticed(
    ckpt, quantization, monkeypatch
):
    largest = max((ckpt / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(UserError, match="its weights are not what was written"):
        checkpoint.restore(ckpt, jnp.bfloat16, quantization=quantization)
    # Of a large one only the sizes are looked at.
    monkeypatch.setattr(checkpoint, "VERIFIED_BYTES", 1000)
    checkpoint.restore(ckpt, jnp.bfloat16, quantization=quantization)


EIGHT_DEVICES = """
    import json, pathlib, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from lrd_jax import checkpoint, leaf_buffer

    saved, chunked = map(pathlib.Path, sys.argv[1:])
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    whole = checkpoint.restore(saved)

    def spec(leaf):
        even = leaf.ndim > 1 and leaf.shape[-2] % 2 == 0
        return P(*[None] * (leaf.ndim - 2), "x", "y") if even else P()

    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), whole)
    replicated = NamedSharding(mesh, P())

    # The same weights, in a grid of chunks, have the same fingerprint.
    leaf_buffer._CHUNKED_BYTES = 1000
    names = [
        (tuple(key.key for key in path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(whole)
    ]
    chunked.mkdir()
    checkpoint.save(chunked, checkpoint.read_config(saved), names, jnp.float32)
    assert checkpoint.read_fingerprint(chunked) == checkpoint.read_fingerprint(saved)
    metadata = json.loads((chunked / "params/state/_METADATA").read_text())
    chunks = {
        tuple(map(str, eval(name))): leaf["value_metadata"]["write_shape"]
        for name, leaf in metadata["tree_metadata"].items()
    }
    assert chunks["embed",] == [8, 32]
    assert chunks["blocks", "mlp", "gate"] == [3, 4, 48]
    assert chunks["blocks", "attn", "out"] == [3, 4, 32]

    for path in (saved, chunked):
        for want in (shardings, replicated):
            got = checkpoint.restore(path, shardings=want)
            wants = jax.tree.map(lambda leaf: want, got) if want is replicated else want
            jax.tree.map(np.testing.assert_array_equal, got, whole)
            same = jax.tree.map(lambda leaf, one: leaf.sharding == one, got, wants)
            assert all(jax.tree.leaves(same)), same
    half = checkpoint.restore(chunked, jnp.bfloat16, shardings)
    assert half["embed"].sharding == shardings["embed"]
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
        half,
        whole,
    )
    # Sharded parameters can be saved as they are.
    checkpoint.save_params(chunked, checkpoint.read_config(saved), half, overwrite=True)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(chunked), half)
"""


def test_chunks_and_shardings_on_eight_devices(saved, tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(EIGHT_DEVICES),
            str(saved),
            str(tmp_path / "chunked"),
        ],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
