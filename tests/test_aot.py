"""Compiling for a TPU that is not here; without libtpu, for the CPU that is."""

import importlib.util
import json
import pathlib

import jax
import pytest

from lrd_jax import aot
from lrd_jax.config import DecodeConfig, ModelConfig
from lrd_jax.model import backbone
from lrd_jax.model.published import from_published
from lrd_jax.shapes import SHAPES

PUBLISHED = pathlib.Path(__file__).parent / "golden" / "published"
SMALL = ModelConfig(
    family="llada",
    vocab_size=512,
    d_model=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=256,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
    tie_embeddings=False,
    max_length=256,
    mask_id=511,
    eos_ids=(509,),
    pad_id=509,
)


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [("llada-8b", "LLaDA-8B-Base"), ("dream-7b", "Dream-v0-Base-7B")],
)
def test_shapes_are_the_published_ones(name, checkpoint):
    text = (PUBLISHED / f"{checkpoint}.config.json").read_text(encoding="utf-8")
    assert SHAPES[name] == from_published(json.loads(text))


def weight_bytes(params):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def test_memory_is_that_of_the_weights_and_of_the_window():
    device = jax.devices("cpu")[0]
    small, large = (
        aot.decode_memory(SMALL, DecodeConfig(gen_length=n), device, 1, 16)
        for n in (16, 64)
    )
    weights = weight_bytes(backbone.abstract_params(SMALL, "bfloat16"))
    assert weights < small.weights < weights + 1024  # Prompt and key are there, too.
    assert small.weights == large.weights
    assert large.temporaries > small.temporaries > 2 * 4 * 16 * SMALL.vocab_size


def test_each_model_has_a_line_for_one_block_and_one_for_blocks(monkeypatch, capsys):
    sizes = {1024: aot.Memory(16 * aot.GIB, aot.GIB // 2), 32: aot.Memory(aot.GIB, 0)}
    monkeypatch.setattr(aot, "tpu_chip", lambda chip: chip)
    monkeypatch.setattr(
        aot,
        "decode_memory",
        lambda model, cfg, *_: sizes[cfg.block_length or cfg.gen_length],
    )
    assert aot.main(["--models", "dream-7b", "llada-8b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "v5p" in lines[0]
    assert [line.split() for line in lines[2:]] == [
        ["dream-7b", "1024", "16.00", "0.500"],
        ["dream-7b", "32", "1.00", "0.000"],
        ["llada-8b", "1024", "16.00", "0.500"],
        ["llada-8b", "32", "1.00", "0.000"],
    ]


def test_every_flag_reaches_the_compiler(monkeypatch):
    asked = []
    monkeypatch.setattr(aot, "tpu_chip", lambda chip: chip)
    monkeypatch.setattr(
        aot, "decode_memory", lambda *args: asked.append(args) or aot.Memory(0, 0)
    )
    flags = "--models llada-8b --chip v6e --batch-size 3 --prompt 64"
    window = "--gen-length 128 --block-length 16"
    assert aot.main([*flags.split(), *window.split()]) == 0
    assert [args[1].block_length for args in asked] == [None, 16]
    for model, cfg, device, batch_size, prompt in asked:
        assert model == SHAPES["llada-8b"]
        assert (cfg.gen_length, device, batch_size, prompt) == (128, "v6e", 3, 64)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--models gpt", "`--models` must be among llada-8b, dream-7b, got 'gpt'."),
        ("--prompt 3073", "`--prompt` must be 1 to 3072"),
        ("--prompt 0", "got 0."),
        (
            "--batch-size 0",
            "`--batch-size` must be 1 to 1398101, rows of 1536 positions, got 0.",
        ),
        ("--block-length 33", "block_length"),
        ("--gen-length 0", "gen_length"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv, told, capsys):
    assert aot.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert told in err
    assert err.count("\n") == 1


def test_without_libtpu_it_is_skipped_with_a_code_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert aot.main([]) == aot.NO_LIBTPU == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("skipped: ")
    assert "lrd_jax[tpu-aot]" in err


def test_what_does_not_fit_is_said_in_one_line(monkeypatch, capsys):
    def refuse(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: hbm\nand a table")

    monkeypatch.setattr(aot, "tpu_chip", lambda chip: chip)
    monkeypatch.setattr(aot, "decode_memory", refuse)
    assert aot.main(["--models", "llada-8b"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the device has too little memory for llada-8b with ")
    assert err.count("\n") == 1


def test_a_decode_compiles_for_a_tpu_chip():
    pytest.importorskip("libtpu", reason="the extra tpu-aot is not installed")
    device = aot.tpu_chip("v5p")
    memory = aot.decode_memory(SMALL, DecodeConfig(gen_length=64), device, 1, 64)
    assert memory.weights > weight_bytes(backbone.abstract_params(SMALL, "bfloat16"))
    assert memory.temporaries > 0
