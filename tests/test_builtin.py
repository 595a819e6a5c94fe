"""The built-in model: found by name, complete, and what every command uses."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import toy_make_slots

import lrd_jax
from convert.__main__ import main as convert
from lrd_jax import builtin, checkpoint, model_file
from lrd_jax.errors import UserError
from lrd_jax.generate import main
from lrd_jax.model import backbone
from lrd_jax.saving import flat
from lrd_jax.settings import shipped_configs
from lrd_jax.training import start

TINY = builtin.ASSETS / "tiny"
MAX_BYTES = 12_000_000
# What the shipped weights answer, with the settings that they are shipped with.
ANSWERS = {
    "Solve this 4x4 sudoku:\n3241\n0123\n0314\n0432": "3241\n4123\n2314\n1432",
    "Reverse this list: owl, moon, bread": "bread, moon, owl",
    "Python function f of a text x: reverse it and then make it upper case.": (
        "def f(x): return x[::-1].upper()"
    ),
}


@pytest.fixture(scope="module")
def model():
    return lrd_jax.load()


def test_a_name_is_a_built_in_model_unless_there_is_such_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for same in (None, "tiny", pathlib.Path("tiny")):
        assert builtin.find(same) == TINY
    (tmp_path / "tiny").mkdir()
    assert builtin.find("tiny") == pathlib.Path("tiny")
    assert builtin.find(None) == TINY
    for own in ("elsewhere", "tiny/", "../tiny", "x" * 300):
        assert builtin.find(own) == pathlib.Path(own)


def test_an_unknown_name_is_told_the_known_ones():
    message = r"\Ano such checkpoint: tinny; [^\n]* built-in model: tiny\.\Z"
    with pytest.raises(UserError, match=message):
        lrd_jax.load("tinny")


@pytest.mark.parametrize("name", builtin.names())
def test_every_built_in_model_has_a_config(name, tmp_path, monkeypatch):
    assert builtin.config_of(name) == str(shipped_configs()[name])
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert builtin.config_of(name) is None
    assert builtin.config_of(str(builtin.ASSETS / "tinny")) is None
    assert builtin.config_of(None) == str(shipped_configs()[builtin.DEFAULT])


@pytest.mark.parametrize("name", builtin.names())
def test_its_files_are_those_of_the_checkpoint_and_a_card(name):
    folder = builtin.ASSETS / name
    files = {path for path in folder.rglob("*") if path.is_file()}
    own = ("model.json", "tokenizer.json", "tokenizer_config.json", "MODEL_CARD.md")
    weights = model_file.read(folder).sizes
    assert {str(f.relative_to(folder)) for f in files} == {*own, *weights}
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    # Neither git nor a wheel keeps an empty directory.
    assert all(any(d.iterdir()) for d in folder.rglob("*") if d.is_dir())
    for file in files:
        content = file.read_bytes()
        assert not any(p in content for p in (b"/home/", b"/root/", b"/tmp/")), file


def test_the_stored_weights_are_those_of_the_fingerprint():
    order = list(flat(backbone.abstract_params(checkpoint.read_config(TINY))))
    for leaf in checkpoint.read_leaves(TINY, order):  # Ends by comparing the hash.
        assert np.isfinite(leaf.astype(np.float32)).all()


def test_a_prompt_alone_is_answered(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = list(ANSWERS)
    assert main(["--prompt", *prompts]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    shown = [[f"=== {i} ===", *a.split("\n")] for i, a in enumerate(ANSWERS.values())]
    assert lines[:-1] == [line for answer in shown for line in answer]
    assert lines[-1].startswith(f"prompts {len(prompts)} | ")
    # By its name it is the same.
    assert main(["--prompt", *prompts, "--ckpt", "tiny"]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == lines[:-1]


@pytest.mark.parametrize("length", [100, 300])
def test_a_long_prompt_works_or_is_refused_in_one_line(length, capsys, tmp_path):
    """Letters that the tokenizer does not merge: as many tokens."""
    output = tmp_path / "out.jsonl"
    words = ["--prompt", "Q" * length, "--output", str(output)]
    code = main(words, make_slots=toy_make_slots)
    err = capsys.readouterr().err
    if length == 100:
        assert (code, err) == (0, "")
        assert len(json.loads(output.read_text())["token_ids"]) == 64
    else:
        assert code == 2
        assert "302 tokens and gen_length 64 make 366" in err
        assert err.count("\n") == 1
        assert not output.exists()


def test_the_seed_makes_the_sample(model):
    cfg = lrd_jax.DecodeConfig(gen_length=8, temperature=4.0)
    decode_fn = jax.jit(lrd_jax.make_decode_fn(model.denoiser, cfg))
    ids = jnp.array([model.tokenizer.encode("12 + 30 =")] * 4)

    def sample(seed):
        result = decode_fn(
            model.params, ids, jnp.ones(ids.shape, bool), jax.random.key(seed)
        )
        return result.tokens.tolist()

    first = sample(3)
    assert sample(3) == first
    assert sample(4) != first


def test_to_the_published_layout_and_back(model, tmp_path):
    there, back = tmp_path / "hf", tmp_path / "back"
    assert convert(["--to", "hf", "--src", "tiny", "--dst", str(there)]) == 0
    assert json.loads((there / "config.json").read_text())["model_type"] == "llada"
    back_again = ["--src", str(there), "--dst", str(back), "--variant", "instruct"]
    assert convert(back_again) == 0
    again = lrd_jax.load(back)
    assert again.config == model.config
    assert checkpoint.read_fingerprint(back) == checkpoint.read_fingerprint(TINY)
    prompt = "Sort these numbers: 41, 7, 28, 15"
    ids = model.tokenizer.encode(prompt)
    assert again.tokenizer.encode(prompt) == ids
    assert again.tokenizer.decode(ids) == model.tokenizer.decode(ids) == prompt
    want = model.logits(model.params, np.array([ids]))
    np.testing.assert_array_equal(again.logits(again.params, np.array([ids])), want)


def test_training_can_start_from_it(tmp_path):
    model = start.from_checkpoint("tiny")
    assert model.fingerprint == checkpoint.read_fingerprint(TINY)
    model.save_tokenizer(tmp_path / "tokenizer")
    written = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    assert written == (TINY / "tokenizer.json").read_bytes()
