"""`python -m lrd_jax.train`: runs, resumes, fine-tunes, and says what is wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import lrd_jax
from lrd_jax import checkpoint
from lrd_jax.config import BaselineConfig
from lrd_jax.decode.loop import make_decode_fn
from lrd_jax.model import backbone
from lrd_jax.train import main
from lrd_jax.training import data as data_module
from lrd_jax.training import loop, plot, rundir, vocabulary
from lrd_jax.training import start as start_module
from tests.flags import with_flags
from tests.train_toy import (
    FLAGS,
    copy_lines,
    curve,
    model_config,
    read_jsonl,
    write_checkpoint,
    write_jsonl,
)

RECIPE = """
[train]
steps = 4
batch_size = 4
windows = [8]
warmup_steps = 1
log_steps = 2
optimiser = "adamw"
[model]
family = "llada"
d_model = 16
num_layers = 1
num_heads = 2
num_kv_heads = 2
head_dim = 8
mlp_dim = 32
rope_theta = 10000.0
norm_eps = 1e-5
qkv_bias = false
tie_embeddings = false
max_length = 64
[vocabulary]
size = 270
[[phase]]
fraction = 1.0
weights = { facts = 1 }
"""


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """Runs of equal shapes share what is compiled, across processes too."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        # Compiling is most of what these tests do.
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        # Else a process that has compiled something already would never look.
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def _little_text(monkeypatch):
    monkeypatch.setattr(vocabulary, "EXAMPLES_PER_TASK", 30)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint and data to fine-tune it on, as flags."""
    folder = tmp_path_factory.mktemp("start")
    write_checkpoint(folder / "ckpt", model_config())
    write_jsonl(folder / "data.jsonl", copy_lines())
    return [
        "--init",
        str(folder / "ckpt"),
        "--data",
        str(folder / "data.jsonl"),
        *FLAGS,
    ]


def run(out, start, *flags):
    return main(with_flags(["--out", str(out), *start], flags))


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run without a break."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(out, start) == 0
    return out


def interrupted_at(monkeypatch, step):
    batch = data_module.Data.batch

    def interrupt(self, number):
        if number == step:
            raise KeyboardInterrupt
        return batch(self, number)

    monkeypatch.setattr(data_module.Data, "batch", interrupt)


def same_weights(left, right):
    return checkpoint.read_fingerprint(left) == checkpoint.read_fingerprint(right)


def test_the_log(whole):
    lines = read_jsonl(whole / "log.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    for line in lines:
        assert line["losses"] == {"data": line["loss"]}
        assert line["tokens_per_second"] > 0
        assert 0 < line["learning_rate"] < 2.001e-3
    assert lines == sorted(lines, key=lambda line: line["seconds"])


def test_interrupted_and_started_again_it_is_the_same_run(
    whole, start, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    for step in (5, 7):
        with monkeypatch.context() as patch:
            interrupted_at(patch, step)
            # A checkpoint after every step.
            assert run(out, start, "--train.save-seconds", "1e-9") == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert (out / "checkpoints" / "7").is_dir()
    # Half of a line, and half of a checkpoint.
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    (out / "checkpoints" / "8.tmp").mkdir()
    assert run(out, start) == 0
    assert "7 of 12 steps are done already" in capsys.readouterr().err
    assert curve(out) == curve(whole)
    assert same_weights(out / "export", whole / "export")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["12", "7"]


def test_lines_behind_the_checkpoint_are_written_again_once(
    whole, start, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupted_at(patch, 7)
        assert run(out, start) == 130  # No checkpoint yet, but two lines.
    assert len(curve(out)) == 2
    assert run(out, start) == 0
    assert curve(out) == curve(whole)


def test_killed_and_started_again_it_is_the_same_run(whole, start, tmp_path, capsys):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lrd_jax.train", "--out", str(out), *start]
    process = subprocess.Popen(
        [*command, "--train.save-seconds", "1e-9"], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "4").is_dir():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert run(out, start) == 0
    assert "steps are done already" in capsys.readouterr().err
    assert curve(out) == curve(whole)
    assert same_weights(out / "export", whole / "export")


def test_a_finished_run_is_left_alone(whole, start, capsys):
    before = (whole / "log.jsonl").read_bytes()
    assert run(whole, start) == 0
    assert (whole / "log.jsonl").read_bytes() == before
    assert "12 of 12 steps are done already" in capsys.readouterr().err


def test_export_on_request(start, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert run(out, start, "--export") == 2
    assert "no checkpoints to export" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        interrupted_at(patch, 4)
        assert run(out, start, "--train.save-seconds", "1e-9") == 130
    assert not (out / "export").exists()
    assert run(out, start, "--export") == 0
    assert "after 4 steps" in capsys.readouterr().err
    lrd_jax.load(out / "export")


def test_what_is_exported_is_the_average(whole, start, tmp_path):
    assert run(tmp_path / "last", start, "--train.average-decay", "0") == 0
    # The same weights all along: only what is kept of them differs.
    assert curve(tmp_path / "last") == curve(whole)
    assert not same_weights(tmp_path / "last/export", whole / "export")


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_fine_tuning_teaches_the_lines(family, tmp_path):
    cfg = model_config(family)
    init = write_checkpoint(tmp_path / "init", cfg)
    lines = copy_lines()
    file = write_jsonl(tmp_path / "data.jsonl", lines)
    flags = (
        f"--init {init} --data {file} --train.steps 200 --train.batch-size 16 "
        "--train.windows 4 --train.warmup-steps 5 --train.learning-rate 1e-2 "
        "--train.log-steps 10 --train.average-decay 0.9 --train.optimiser adamw"
    )
    assert main(["--out", str(tmp_path / "run"), *flags.split()]) == 0
    losses = [line["loss"] for line in curve(tmp_path / "run")]
    assert np.mean(losses[-3:]) < 0.3 * losses[0]

    model = lrd_jax.load(tmp_path / "run/export")
    assert model.config == cfg
    assert checkpoint.read_dtype(tmp_path / "run/export") == "bfloat16"
    decode = make_decode_fn(model.denoiser, BaselineConfig(gen_length=4))
    prompts = jnp.asarray([line["prompt_ids"] for line in lines])
    result = decode(
        model.params, prompts, jnp.ones(prompts.shape, bool), jax.random.key(0)
    )
    want = [[*line["response_ids"], 0, 0] for line in lines]
    np.testing.assert_array_equal(np.asarray(result.tokens), want)


def test_soft_inputs_change_the_run(whole, start, tmp_path):
    assert run(tmp_path / "run", start, "--train.soft-input", "0.5") == 0
    assert curve(tmp_path / "run")[0]["loss"] != curve(whole)[0]["loss"]


def test_from_random_weights_to_text(tmp_path, capsys):
    from lrd_jax import generate

    recipe = tmp_path / "a.toml"
    recipe.write_text(RECIPE)
    out, image = tmp_path / "run", tmp_path / "curve.svg"
    pytest.importorskip("matplotlib")
    flags = ["--config", str(recipe), "--out", str(out)]
    assert main([*flags, "--plot", str(image)]) == 0
    assert [line["step"] for line in curve(out)] == [2, 4]
    assert set(curve(out)[0]["losses"]) == {"facts"}
    assert image.read_text().count("<svg") == 1
    assert json.loads((out / "settings.json").read_text())["vocabulary"]["size"] == 270
    capsys.readouterr()
    prompt = ["--prompt", "1 + 2 =", "--decode.gen-length", "8"]
    assert generate.main(["--ckpt", str(out / "export"), *prompt]) == 0

    # Started again, it neither trains nor makes another tokenizer; it draws.
    image.unlink()
    assert main([*flags, "--plot", str(image)]) == 0
    assert image.is_file()


def test_other_settings_are_refused(whole, start, capsys):
    assert run(whole, start, "--train.seed", "3") == 2
    assert "train.seed was 0, now 3" in capsys.readouterr().err
    assert run(whole, start, "--train.save-seconds", "5") == 0


def test_a_directory_of_something_else_is_refused(start, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert run(tmp_path, start) == 2
    assert "holds thesis.tex but no settings.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_damaged_weights_to_start_from_leave_no_run(start, tmp_path, capsys):
    init = tmp_path / "init"
    shutil.copytree(start[1], init)
    largest = max((init / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert run(tmp_path / "run", ["--init", str(init), *start[2:]]) == 2
    assert "its weights are not what was written" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_under_the_tokenizer_is_one_line(
    start, tmp_path, monkeypatch, capsys
):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(start_module, "copy_tokenizer", full)
    assert run(tmp_path / "run", start) == 2
    err = capsys.readouterr().err
    assert "run/tokenizer: cannot be written: No space left on device" in err
    assert err.count("\n") == 1
    assert not list((tmp_path / "run").glob("tokenizer*"))


def test_two_runs_at_once_are_refused(whole, start, capsys):
    with rundir.RunDir(whole).locked():
        assert run(whole, start) == 2
    assert "another run is writing it now" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(start, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out, start) == 0
    for file in (out / "checkpoints" / "12").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert run(out, start) == 2
    error = capsys.readouterr().err
    assert "checkpoints/12: cannot be read" in error
    assert "remove it to go on from an older one" in error


def test_a_loss_that_is_no_number_ends_the_run(start, tmp_path, capsys):
    cfg = model_config()
    params = backbone.init_params(cfg, jax.random.key(0))
    params["embed"] = params["embed"] * jnp.nan
    checkpoint.save_params(tmp_path / "nan", cfg, params)
    flags = ["--init", str(tmp_path / "nan"), *start[2:]]
    assert run(tmp_path / "run", flags) == 2
    assert "the loss is nan" in capsys.readouterr().err


LINE = {"prompt_ids": [2, 3], "response_ids": [2, 3]}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        (json.dumps(LINE)[:-1] + ', "response_ids": [3]}', "a key is given twice"),
        ({"prompt_ids": [2]}, "exactly one of response, response_ids"),
        ({"response_ids": [2]}, "exactly one of prompt, messages, prompt_ids"),
        (LINE | {"prompt": "a"}, "prompt and prompt_ids"),
        (LINE | {"answer": 1}, "unknown key 'answer'"),
        (LINE | {"prompt_ids": [99]}, "prompt_ids[0] = 99 is outside"),
        (LINE | {"response_ids": [2, "a"]}, "response_ids[1] must be a whole number"),
        (LINE | {"response_ids": [2, 1]}, "response_ids[1] is the mask token"),
        (LINE | {"response_ids": [2] * 5}, "response has 5 tokens"),
        (LINE | {"prompt_ids": [2] * 61}, "prompt has 61 tokens"),
        ({"prompt": "a", "response_ids": [2]}, "no tokenizer.json"),
        ({"prompt_ids": [2], "response": "a"}, "no tokenizer.json"),
        ({"prompt_ids": [2], "response": 3}, "must be text"),
    ],
)
def test_a_wrong_line_is_named(line, named, start, tmp_path, capsys):
    text = line if isinstance(line, str) else json.dumps(line)
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(LINE)}\n\n{text}\n")
    flags = [*start[:3], str(file), *start[4:]]
    assert run(tmp_path / "run", flags) == 2
    error = capsys.readouterr().err
    assert f"{file}, line 3: " in error
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_one_line(start, tmp_path, monkeypatch, capsys):
    def no_room(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: hbm\nand a table")

    monkeypatch.setattr(loop, "make_step_fn", lambda *args, **kwargs: no_room)
    assert run(tmp_path / "run", start) == 2
    err = capsys.readouterr().err
    assert "error: the device has too little memory to train this model: give a " in err
    assert "Traceback" not in err


def test_weights_that_do_not_fit_are_one_line(start, tmp_path, monkeypatch, capsys):
    def no_room(*args):
        raise MemoryError

    monkeypatch.setattr(loop, "init_state", no_room)
    assert run(tmp_path / "run", start) == 2
    err = capsys.readouterr().err
    assert "error: this machine has too little memory for the weights, their av" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read: No such file"),
        (["--init", "nowhere"], "no such checkpoint: nowhere"),
        (["--train.steps", "0"], "`steps` must be at least 1"),
        (["--config", "nowhere"], "no config file 'nowhere'"),
        (["--plot", "curve.xyz"], "must end in one of: pdf, png, svg"),
        (["--plot", "curve.pgf"], "must end in one of"),
        (["--plot", "curve.png/"], "must be the name of a file"),
        (["--plot", "nowhere/curve.png"], "no such directory"),
    ],
)
def test_a_wrong_flag_is_named(flags, named, start, tmp_path, capsys):
    assert run(tmp_path / "run", start, *flags) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_empty_file_is_named(start, tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    file.write_text("\n")
    assert run(tmp_path / "run", [*start[:3], str(file), *start[4:]]) == 2
    assert "has no examples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("{ facts = 1 }", "{ fact = 1 }", "no task 'fact'; did you mean facts"),
        ("windows = [8]", "windows = [1]", "shortest window, 1"),
        ("num_heads = 2", "num_head = 2", "num_heads"),
        ("head_dim = 8", "head_dim = 7", "`head_dim` must be even"),
    ],
)
def test_a_wrong_recipe_is_named(old, new, named, tmp_path, capsys):
    assert old in RECIPE
    recipe = tmp_path / "a.toml"
    recipe.write_text(RECIPE.replace(old, new, 1))
    assert main(["--config", str(recipe), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_plots_need_matplotlib(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(tmp_path / "run", start, "--plot", "curve.png") == 2
    assert "pip install 'lrd_jax[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nothing_to_plot_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"log\.jsonl: nothing in it to plot"):
        plot.plot_log(tmp_path / "log.jsonl", str(tmp_path / "curve.png"))
