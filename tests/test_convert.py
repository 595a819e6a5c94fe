"""Published numbers through the real converter, the way back, and every refusal."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import keymap, reader
from convert.__main__ import main
from lrd_jax import checkpoint
from lrd_jax.model import families

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = ("llada", "dream")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Both tiny checkpoints, converted once: family -> directory."""
    folder = tmp_path_factory.mktemp("converted")
    for family in FAMILIES:
        src = GOLDEN / f"{family}_tiny"
        assert main(["--src", str(src), "--dst", str(folder / family)]) == 0
    return {family: folder / family for family in FAMILIES}


def read_tensors(folder):
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def denoiser_logits(path, dtype, embeds_or_ids, mask):
    """Logits [B, T, V], row i predicting token i."""
    cfg = checkpoint.read_config(path)
    params = checkpoint.restore(path, dtype)
    denoiser = families.make_denoiser(cfg)
    if embeds_or_ids.ndim == 2:
        embeds = denoiser.embed(params, jnp.asarray(embeds_or_ids, jnp.int32))
    else:
        embeds = jnp.asarray(embeds_or_ids, dtype)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    hidden, _ = denoiser.hidden(params, embeds, positions, jnp.asarray(mask))
    rows = denoiser.logits(params, hidden.reshape(-1, cfg.d_model))
    return np.asarray(rows).reshape(*mask.shape, -1)


def golden_cases():
    """Name -> (family, what is read, mask, expected logits, rows that count)."""
    llada = np.load(GOLDEN / "llada_forward.npz")
    full = np.ones(llada["input_ids"].shape, bool)
    dream = np.load(GOLDEN / "dream_forward.npz")
    mask = dream["attention_mask"].astype(bool)
    # Row i of the published logits predicts i + 1; a row's first real token reads
    # itself.
    shifted = np.roll(dream["raw_logits"], 1, axis=1)
    for row, first in enumerate(mask.argmax(axis=1)):
        shifted[row, first] = dream["raw_logits"][row, first]
    return {
        "llada": ("llada", llada["input_ids"], full, llada["logits"]),
        "llada_embeds": (
            "llada",
            llada["inputs_embeds"],
            full,
            llada["logits_from_embeds"],
        ),
        "dream": ("dream", dream["input_ids"], mask, shifted),
    }


@pytest.mark.parametrize("case", golden_cases())
@pytest.mark.parametrize(("x64", "tolerance"), [(False, 2e-3), (True, 1e-4)])
def test_logits_are_those_of_the_published_code(converted, case, x64, tolerance):
    family, read, mask, expected = golden_cases()[case]
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        logits = denoiser_logits(converted[family], dtype, read, mask)
    assert np.abs(logits - expected)[mask].max() <= tolerance


@pytest.mark.parametrize("case", golden_cases())
def test_bfloat16_is_finite_and_near(converted, case):
    family, read, mask, expected = golden_cases()[case]
    logits = denoiser_logits(converted[family], jnp.bfloat16, read, mask)
    assert np.isfinite(logits).all()
    scale = np.abs(expected[mask]).max()
    assert np.abs(logits - expected)[mask].max() < 0.1 * scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_identity(tmp_path, family, dtype):
    src = GOLDEN / f"{family}_tiny"
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["--src", str(src), "--dst", str(there), "--dtype", dtype]) == 0
    assert main(["--src", str(there), "--dst", str(back), "--to", "hf"]) == 0
    published, returned = read_tensors(src), read_tensors(back)
    assert published.keys() == returned.keys()
    for name, tensor in published.items():
        assert returned[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(returned[name], tensor.astype(jnp.dtype(dtype)))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    sizes = sum(tensor.nbytes for tensor in returned.values())
    assert index["metadata"]["total_size"] == sizes
    assert {back / shard for shard in index["weight_map"].values()} == set(
        back.glob("*.safetensors")
    )
    config = json.loads((back / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    generation = json.loads((back / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]
    assert generation["pad_token_id"] == config["pad_token_id"]
    assert families.from_published(config) == families.from_published(
        json.loads((src / "config.json").read_text())
    )


def random_llada(folder, **options):
    """A random LLaDA with the given config fields, as one bfloat16 file."""
    config = json.loads((GOLDEN / "llada_tiny" / "config.json").read_text()) | options
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=entry.published_shape).astype(jnp.bfloat16)
        for entry in keymap.entries(families.from_published(config))
        for name in entry.names
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize(
    "options",
    [
        {"weight_tying": True},
        {"n_kv_heads": 2},
        {"n_kv_heads": None, "multi_query_attention": True},
        {"include_qkv_bias": True},
        {"weight_tying": True, "n_kv_heads": 2, "include_qkv_bias": True},
    ],
    ids=str,
)
def test_variants_of_llada_come_back_bit_for_bit(tmp_path, monkeypatch, options):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1000)  # Many blocks a tensor.
    src, there, back = tmp_path / "src", tmp_path / "there", tmp_path / "back"
    tensors = random_llada(src, **options)
    assert main(["--src", str(src), "--dst", str(there)]) == 0
    assert checkpoint.read_dtype(there) == "bfloat16"
    assert main(["--src", str(there), "--dst", str(back), "--to", "hf"]) == 0
    returned = read_tensors(back)
    assert tensors.keys() == returned.keys()
    for name, tensor in tensors.items():
        assert returned[name].tobytes() == tensor.tobytes(), name


def test_a_tied_head_that_is_published_is_dropped_if_equal(tmp_path, capsys):
    src = tmp_path / "src"
    tensors = random_llada(src, weight_tying=True)
    head = "model.transformer.ff_out.weight"
    tensors[head] = tensors["model.transformer.wte.weight"].copy()
    save_file(tensors, src / "model.safetensors")
    assert main(["--src", str(src), "--dst", str(tmp_path / "a")]) == 0
    assert "head" not in checkpoint.restore(tmp_path / "a")

    tensors[head][0, 0] += 1
    save_file(tensors, src / "model.safetensors")
    assert main(["--src", str(src), "--dst", str(tmp_path / "b")]) == 2
    assert f"{head} differs from" in capsys.readouterr().err


def test_constants_beside_the_weights_are_ignored(tmp_path):
    src = tmp_path / "src"
    tensors = random_llada(src)
    tensors["model.transformer.blocks.0.rotary_emb.inv_freq"] = np.ones(8, np.float64)
    save_file(tensors, src / "model.safetensors")
    assert main(["--src", str(src), "--dst", str(tmp_path / "dst")]) == 0


def test_half_precision_becomes_float32(tmp_path):
    src = tmp_path / "src"
    tensors = random_llada(src)
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(halves, src / "model.safetensors")
    assert main(["--src", str(src), "--dst", str(tmp_path / "dst")]) == 0
    assert checkpoint.read_dtype(tmp_path / "dst") == "float32"
    table = checkpoint.restore(tmp_path / "dst")["embed"]
    np.testing.assert_array_equal(table, halves["model.transformer.wte.weight"])


def test_the_summary_goes_to_stdout_and_nothing_to_stderr(tmp_path, capsys):
    src = GOLDEN / "llada_tiny"
    assert main(["--src", str(src), "--dst", str(tmp_path / "dst")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "llada: 30 tensors, 190,912 parameters, 763,648 bytes of float32" in out
    back = ["--src", str(tmp_path / "dst"), "--dst", str(tmp_path / "hf"), "--to", "hf"]
    assert main(back) == 0
    assert "modeling_*.py" in capsys.readouterr().out
