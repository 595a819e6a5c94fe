"""`python -m lrd_jax.generate` with a small random checkpoint."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import EOS, MASK, POISON, TURN, toy_backend, toy_config
from train_toy import quick_compile as quick_compile

from lrd_jax import checkpoint, pretrained
from lrd_jax.config import BaselineConfig
from lrd_jax.decode.loop import make_decode_fn
from lrd_jax.generate import main
from lrd_jax.model import backbone
from lrd_jax.text import left_pad, text_of

GEN = 8
PROMPTS = ([1, 2, 3], [9], [4, 5])


def make_checkpoint(path, poison=False):
    params = backbone.init_params(toy_config(), jax.random.key(0))
    if poison:
        params["embed"] = params["embed"].at[POISON].set(jnp.nan)
    checkpoint.save_params(path, toy_config(), params)
    toy_backend().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("toy") / "ckpt")


@pytest.fixture
def run(tmp_path):
    """Runs the command in this process; returns the exit code and the results."""

    def run(ckpt, *words, lines=None, code=0):
        output = tmp_path / "out.jsonl"
        output.unlink(missing_ok=True)
        words = ["--ckpt", str(ckpt), "--output", str(output), *words]
        if "--infill" not in words:
            words += ["--decode.gen-length", str(GEN)]
        if lines is not None:
            (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
            words += ["--input", str(tmp_path / "in.jsonl")]
        assert main(words) == code
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_it_gives_what_the_api_gives(ckpt, run):
    lines = [{"prompt_ids": ids} for ids in PROMPTS]
    flags = ["--method", "baseline", "--decode.temperature", "1.5", "--seed", "3"]
    records = run(ckpt, *flags, lines=lines)

    model = pretrained.load(ckpt)
    cfg = BaselineConfig(gen_length=GEN, temperature=1.5)
    ids, mask = left_pad(PROMPTS, 32, EOS)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(3))
    result = make_decode_fn(model.denoiser, cfg)(model.params, ids, mask, keys)
    assert [record["token_ids"] for record in records] == result.tokens.tolist()
    for name in ("num_forwards", "num_full_forwards"):
        assert [r[name] for r in records] == getattr(result, name).tolist()
    for record in records:
        assert len(record["kl"]) == len(record["phase"]) == record["num_forwards"]
        text = text_of(model.tokenizer, record["token_ids"], (EOS, TURN), MASK)
        assert record["text"] == text


@pytest.mark.parametrize(("method", "forwards"), [("llada", 4), ("dream", 4)])
def test_other_methods(ckpt, run, method, forwards):
    words = ["--method", method, "--decode.no-stop-at-eos", "--decode.steps", "4"]
    (record,) = run(ckpt, "--prompt", "w1 w2", *words)
    assert record["num_forwards"] == forwards
    assert record["stop_reason"] == "committed"
    assert len(record["token_ids"]) == GEN


def test_rows_do_not_depend_on_the_batch(ckpt, run):
    lines = [{"prompt_ids": [1, 2]}, {"prompt_ids": list(range(40))}]
    flags = ["--method", "baseline"]
    together = run(ckpt, *flags, lines=lines)
    alone = run(ckpt, *flags, "--batch-size", "1", lines=lines)
    for one, other in zip(together, alone, strict=True):
        assert one["token_ids"] == other["token_ids"]
        assert one["commit_step"] == other["commit_step"]
        np.testing.assert_allclose(one["commit_prob"], other["commit_prob"], rtol=1e-4)


def test_a_literal_mask_token_is_kept(ckpt, run):
    """It stays what it is: a prompt position that is not generated over."""
    given, swapped = run(
        ckpt, lines=[{"prompt": "w1 <mask> w3"}, {"prompt_ids": [1, 2, 3]}]
    )
    for record in (given, swapped):
        assert len(record["token_ids"]) == GEN
        assert MASK not in record["token_ids"]
    assert given["commit_prob"] != swapped["commit_prob"]


def test_infill(ckpt, run):
    lines = [{"prompt": "w1 [MASK:3] w3"}, {"prompt_ids": [5, EOS, 6], "open": [2]}]
    first, second = run(ckpt, "--infill", lines=lines)
    assert len(first["token_ids"]) == 5
    assert first["token_ids"][0] == 1
    assert first["token_ids"][4] == 3
    assert MASK not in first["token_ids"]
    assert first["useful_tokens"] == 3
    assert [step is None for step in first["commit_step"]] == [True] + [False] * 3 + [
        True
    ]
    assert second["token_ids"][:2] == [5, EOS]
    assert second["useful_tokens"] == 1


def test_nonfinite_rows_harm_no_others(tmp_path, ckpt, run, capsys):
    broken = make_checkpoint(tmp_path / "broken", poison=True)
    lines = [
        {"prompt_ids": [1]},
        {"prompt_ids": [POISON], "id": "bad"},
        {"prompt_ids": [2]},
    ]
    # Not LRD: averaging the embedding table would bring its NaN to every row.
    records = run(broken, "--method", "baseline", lines=lines, code=1)
    assert "NaN or infinite logits for id bad;" in capsys.readouterr().err
    assert records[1]["stop_reason"] == "nonfinite"
    sound = run(ckpt, "--method", "baseline", lines=lines)
    for i in (0, 2):
        assert records[i]["token_ids"] == sound[i]["token_ids"]


def test_dtype_is_that_of_the_weights(ckpt, run, monkeypatch):
    load, seen = pretrained.load, []

    def spy(*args, **options):
        model = load(*args, **options)
        seen.append(model.params["embed"].dtype.name)
        return model

    monkeypatch.setattr(pretrained, "load", spy)
    run(ckpt, "--prompt", "w1", "--dtype", "bfloat16")
    assert seen == ["bfloat16"]


def test_as_a_program(ckpt, tmp_path):
    """Nothing but results on stdout, nothing at all on stderr; the cache is filled."""
    words = [sys.executable, "-m", "lrd_jax.generate", "--ckpt", ckpt]
    words += ["--prompt", "w1", "--decode.gen-length", "4", "--config", "run.toml"]
    (tmp_path / "run.toml").write_text('method = "baseline"\n')
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    # As fast as the compilation may be here, it is to be kept.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    child = subprocess.run(
        words, capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert (child.returncode, child.stderr) == (0, "")
    text, figures = child.stdout.splitlines()
    assert len(text.split()) <= 4
    assert figures.startswith("prompts 1 | forwards 4 (4 full) | ")
    assert any((tmp_path / "cache" / "lrd_jax" / "compiled").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"run.toml", "cache"}


def bad_checkpoints(tmp_path, ckpt):
    hugging_face = tmp_path / "hf"
    hugging_face.mkdir()
    (hugging_face / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.json").write_text("{")
    no_tokenizer = tmp_path / "no_tokenizer"
    no_tokenizer.mkdir()
    (no_tokenizer / "model.json").write_bytes((ckpt / "model.json").read_bytes())
    no_weights = tmp_path / "no_weights"
    no_weights.mkdir()
    for name in ("model.json", "tokenizer.json"):
        (no_weights / name).write_bytes((ckpt / name).read_bytes())
    return {
        "absent": "no such checkpoint",
        "hf": "python -m convert --src",
        "empty": "is not a checkpoint",
        "damaged": "damaged",
        "no_tokenizer": "no tokenizer.json",
        "no_weights": "no_weights",
    }


@pytest.mark.parametrize(
    "name", ["absent", "hf", "empty", "damaged", "no_tokenizer", "no_weights"]
)
def test_bad_checkpoints(name, ckpt, tmp_path, capsys):
    message = bad_checkpoints(tmp_path, ckpt)[name]
    words = ["--ckpt", str(tmp_path / name), "--prompt", "w1"]
    words += ["--output", str(tmp_path / "out.jsonl"), "--decode.gen-length", "8"]
    before = sorted(tmp_path.iterdir())
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
