"""The command line's arguments, without a model."""

import dataclasses
import errno
import pathlib
import shlex
import subprocess
import sys

import pytest

from convert.__main__ import main as convert_main
from lrd_jax import aot, bench, builtin, evaluate, generate, plan, train
from lrd_jax.cli import parse
from lrd_jax.config import (
    METHODS,
    BaselineConfig,
    DecodeConfig,
    DreamConfig,
    LladaConfig,
)
from lrd_jax.errors import UserError
from lrd_jax.flags import MAX_SEED
from lrd_jax.settings import field_names

PROMPT = ("--prompt", "hello")
# A checkpoint that brings no settings, so that the defaults are `lrd_jax.config`'s.
OWN = (*PROMPT, "--ckpt", "my-checkpoint")


def write_toml(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def test_it_needs_no_jax():
    code = (
        "import sys, lrd_jax.generate, lrd_jax.cli, lrd_jax.jobs, lrd_jax.runfile;"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_defaults():
    request = parse(PROMPT)
    assert request.decode == DecodeConfig(gen_length=64)  # As in configs/tiny.toml.
    assert request.prompts == ("hello",)
    assert (request.batch_size, request.seed) == (8, 0)
    assert not request.raw
    assert not request.infill
    unset = (request.ckpt, request.input, request.output, request.dtype)
    assert unset == (None, None, None, None)


def test_every_flag_arrives():
    request = parse(
        "--ckpt C --input I --output O --batch-size 3 --seed 4 --raw --infill "
        "--dtype bfloat16".split()
    )
    assert (request.ckpt, request.input, request.output) == ("C", "I", "O")
    assert (request.batch_size, request.seed, request.dtype) == (3, 4, "bfloat16")
    assert request.raw
    assert request.infill


def test_several_prompts():
    request = parse(["--prompt", "a b", "c", "--seed", "1", "--prompt", "-3 + 5 ="])
    assert request.prompts == ("a b", "c", "-3 + 5 =")


@pytest.mark.parametrize(
    ("method", "cls"),
    [
        ("lrd", DecodeConfig),
        ("baseline", BaselineConfig),
        ("llada", LladaConfig),
        ("dream", DreamConfig),
    ],
)
def test_method_chooses_the_settings(method, cls):
    assert parse([*OWN, "--method", method]).decode == cls()
    assert parse([*OWN, f"--method={method}"]).decode == cls()


# A value other than the default for every setting, valid with all others at default.
OTHER = {
    "gen_length": 64,
    "temperature": 0.5,
    "stop_at_eos": False,
    "block_length": 32,
    "r_f": 0.3,
    "r_f_decode": 0.2,
    "top_p": 0.8,
    "tau_refine": 0.2,
    "tau_decode": 0.2,
    "max_refine_steps": 3,
    "refine_per_commit": 2,
    "kl_reduction": "sum",
    "kl_criterion": "delta",
    "kl_patience": 2,
    "stop_entropy": float("inf"),
    "commit_order": "margin",
    "tokens_per_step": 2,
    "threshold": 0.9,
    "entropy_bound": 0.1,
    "klass_conf": 0.9,
    "klass_kl": 0.02,
    "klass_steps": 3,
    "sample_top_p": 0.9,
    "sample_top_k": 5,
    "max_steps": 7,
    "cache": "dual",
    "cache_refresh_steps": 4,
    "cache_refresh_kl": 0.5,
    "cache_lane": 2,
    "trim_tail": True,
    "steps": 128,
    "cfg_scale": 1.5,
    "remasking": "random",
    "logits_eos_inf": True,
    "confidence_eos_eot_inf": True,
    "alg": "origin",
    "alg_temp": 0.1,
    "eps": 0.01,
}
NEEDS = {
    "klass_kl": ["--decode.klass-conf", "0.9"],
    "klass_steps": ["--decode.klass-conf", "0.9"],
    "sample_top_p": ["--decode.temperature", "1"],
    "sample_top_k": ["--decode.temperature", "1"],
    "cache_refresh_steps": ["--decode.cache", "dual"],
    "cache_refresh_kl": ["--decode.cache", "prefix"],
    "cache_lane": ["--decode.cache", "dual"],
}
BASELINE_REFUSES = {"r_f_decode", "refine_per_commit"}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method, cls in METHODS.items()
        for name in field_names(cls)
        if not (method == "baseline" and name in BASELINE_REFUSES)
    ],
)
def test_every_setting_is_a_flag(method, name):
    value = OTHER[name]
    flag = f"--decode.{name.replace('_', '-')}"
    words = [flag, str(value)]
    if isinstance(value, bool):
        words = [flag if value else f"--decode.no-{name.replace('_', '-')}"]
    request = parse([*OWN, "--method", method, *NEEDS.get(name, []), *words])
    assert getattr(request.decode, name) == value
    changed = {f.name for f in dataclasses.fields(request.decode)} - {name}
    default = METHODS[method]()
    moved = [n for n in changed if getattr(request.decode, n) != getattr(default, n)]
    assert len(moved) == len(NEEDS.get(name, [])) // 2


def test_config_file_and_flags_over_it(tmp_path):
    path = write_toml(
        tmp_path,
        'method = "lrd"\n[decode]\ngen_length = 64\nblock_length = 32\nr_f = 1.0\n',
    )
    request = parse([*PROMPT, "--config", path])
    assert request.decode == DecodeConfig(gen_length=64, block_length=32, r_f=1.0)
    request = parse([*PROMPT, f"--config={path}", "--decode.r-f", "0.2"])
    assert request.decode == DecodeConfig(gen_length=64, block_length=32, r_f=0.2)
    request = parse([*PROMPT, "--config", path, "--decode.block-length", "None"])
    assert request.decode == DecodeConfig(gen_length=64, r_f=1.0)
    # Each alone would not fit the other's old value.
    flags = "--decode.gen-length 30 --decode.block-length 10".split()
    request = parse([*PROMPT, "--config", path, *flags])
    assert request.decode == DecodeConfig(gen_length=30, block_length=10, r_f=1.0)


@pytest.mark.parametrize(("method", "cls"), METHODS.items())
def test_a_built_in_model_brings_its_config(method, cls, tmp_path):
    words = [*PROMPT, "--method", method]
    for ckpt in ([], ["--ckpt", "tiny"], ["--ckpt=tiny"]):
        assert parse([*words, *ckpt]).decode == cls(gen_length=64)
    flag = ["--decode.gen-length", "8"]
    assert parse([*words, *flag]).decode == cls(gen_length=8)
    given = ["--config", write_toml(tmp_path, "")]
    assert parse([*words, *given]).decode == cls()
    assert parse([*words, "--ckpt", str(tmp_path)]).decode == cls()


def test_config_file_names_the_method(tmp_path):
    path = write_toml(tmp_path, 'method = "llada"\n[decode]\nsteps = 8\n')
    request = parse([*PROMPT, "--config", path, "--decode.gen-length", "16"])
    assert request.decode == LladaConfig(gen_length=16, steps=8)
    # Both have `steps`, so the config serves the other method as well.
    request = parse([*PROMPT, "--config", path, "--method", "dream"])
    assert request.decode == DreamConfig(steps=8)


def test_infill_fixes_its_settings(tmp_path):
    path = write_toml(
        tmp_path,
        "[decode]\ngen_length = 64\nblock_length = 32\nstop_at_eos = true\n"
        'cache = "dual"\ncache_lane = 2\n',
    )
    words_of_each = (
        [],
        ["--config", path],
        ["--config", "turbo"],
        ["--decode.no-stop-at-eos"],
        ["--decode.no-trim-tail"],
    )
    for words in words_of_each:
        request = parse([*PROMPT, "--infill", *words])
        assert not request.decode.stop_at_eos
        assert request.decode.block_length is None
        assert request.decode.cache == "none"
        assert not request.decode.trim_tail
    assert parse([*PROMPT, "--infill", "--method", "baseline"]).infill


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to decode: give `--prompt TEXT` or `--input FILE`"),
        (["--prompt"], "nothing to decode"),
        ([*PROMPT, "--input", "x"], "either `--prompt` or `--input`, not both"),
        (["--input", "a", "--input", "b"], "`--input` is given twice"),
        (["--input", "a", "--input=b"], "`--input` is given twice"),
        (
            [*PROMPT, "--decode.r_f", "0", "--decode.r-f=1"],
            "`--decode.r-f` is given twice",
        ),
        ([*PROMPT, "--batch-size", "0"], "`--batch-size` must be at least 1, got 0"),
        ([*PROMPT, "--seed", "-1"], f"`--seed` must be in [0, {MAX_SEED}], got -1"),
        ([*PROMPT, "--seed", str(2**32)], "`--seed` must be in"),
        ([*PROMPT, "--method", "lrdd"], "must be one of lrd, baseline, llada, dream"),
        ([*PROMPT, "--method", "None"], "must be one of lrd, baseline, llada, dream"),
        ([*PROMPT, "--config", "nowhere.toml"], "no config file 'nowhere.toml'"),
        ([*PROMPT, "--config", ""], "no config file ''"),
        (
            [*PROMPT, "--method", "llada", "--decode.r-f", "0.1"],
            "'r_f' is a setting of method lrd, not of llada",
        ),
        (
            [*PROMPT, "--decode.no-logits-eos-inf"],
            "'no_logits_eos_inf'",
        ),
        (
            [*PROMPT, "--decode.alg=origin"],
            "'alg' is a setting of method dream, not of lrd",
        ),
        (
            [*PROMPT, "--decode.steps", "3"],
            "'steps' is a setting of method llada and dream, not of lrd",
        ),
        (
            [*PROMPT, "--method", "baseline", "--decode.r_f", "0"],
            "'r_f' is fixed by method baseline",
        ),
        (
            [*PROMPT, "--method", "baseline", "--decode.tau-decode", "0.1"],
            "'tau_decode' is fixed by method baseline",
        ),
        (
            [*PROMPT, "--decode.tau-refin", "1"],
            "unknown setting 'tau_refin'; did you mean tau_refine",
        ),
        ([*PROMPT, "--decode.r-f", "1.5"], "`r_f` must be in [0, 1], got 1.5"),
        ([*PROMPT, "--decode.r-f", "nan"], "`r_f` must be in [0, 1], got nan"),
        (
            [*PROMPT, "--decode.kl-patience", "3000000000"],
            "`kl_patience` must be at most 2147483647, got 3000000000",
        ),
        (
            [*PROMPT, "--decode.gen-length", "30", "--decode.block-length", "16"],
            "`gen_length` must be a multiple of `block_length`, got 30 and 16",
        ),
        (
            [*PROMPT, "--decode.threshold", "0.9", "--decode.klass-conf", "0.9"],
            "only one multi-commit rule at a time",
        ),
        (
            [*PROMPT, "--infill", "--decode.stop-at-eos"],
            "leave out `--decode.stop-at-eos`",
        ),
        (
            [*PROMPT, "--infill", "--decode.trim-tail"],
            "`--infill` fills every marker: leave out `--decode.trim-tail`",
        ),
        (
            [*PROMPT, "--infill", "--decode.gen-length=8"],
            "leave out `--decode.gen-length`",
        ),
        (
            [*PROMPT, "--infill", "--decode.block-length", "8"],
            "leave out `--decode.block-length`",
        ),
        (
            [*PROMPT, "--infill", "--decode.cache", "dual"],
            "leave out `--decode.cache`",
        ),
        (
            [*PROMPT, "--method", "dream", "--decode.cache", "dual"],
            "'cache' is a setting of method lrd and baseline, not of dream",
        ),
        ([*PROMPT, "--infill", "--method", "dream"], "works with method lrd"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(UserError) as caught:
        parse(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("toml", "words", "message"),
    [
        ('methd = "lrd"', [], "unknown setting 'methd'; did you mean method"),
        ("method = 3", [], "`method` must be one of"),
        ("decode = 3", [], "`decode` must be a table"),
        ("[decode]\nr_ff = 1", [], "unknown setting 'r_ff'; did you mean r_f"),
        ("[decode]\nr_f = 2.0", [], "run.toml: `r_f` must be in [0, 1], got 2.0"),
        ("[decode]\nsteps = 2", [], "'steps' is a setting of method llada and dream"),
        (
            'method = "baseline"\n[decode]\nr_f = 0.0',
            [],
            "run.toml: 'r_f' is fixed by method baseline",
        ),
        (
            'method = "lrd"\n[decode]\nr_f = 0.1',
            ["--method", "llada"],
            "run.toml: 'r_f' is a setting of method lrd, not of llada",
        ),
        ("method = ", [], "run.toml: not valid TOML"),
    ],
)
def test_mistakes_in_a_config(tmp_path, toml, words, message):
    with pytest.raises(UserError) as caught:
        parse([*PROMPT, "--config", write_toml(tmp_path, toml), *words])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "printed"), [("1", "1"), ('"a"', "run.toml: `r_f` must be a number, got")]
)
def test_types_in_a_config(tmp_path, value, printed):
    """In a process without these tests' checker, which takes no int for a float."""
    path = write_toml(tmp_path, f"[decode]\nr_f = {value}")
    code = (
        "import sys; from lrd_jax.cli import parse\n"
        "try: print(parse(['--prompt', 'a', '--config', sys.argv[1]]).decode.r_f)\n"
        "except ValueError as error: print(error)"
    )
    words = [sys.executable, "-c", code, path]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert printed in out


@pytest.mark.parametrize(
    "words",
    [
        ["--promt", "a"],
        ["--decode.gen-length", "ten"],
        ["--decode.gen-length", "1.5"],
        ["--decode.commit-order", "best"],
        ["--dtype", "float16"],
        ["--seed", "x"],
        ["--ckpt"],
        ["--method"],
        ["stray"],
    ],
)
def test_tyro_refuses_the_rest(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(words)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err


def test_help_shows_the_settings_of_the_method(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--method", "baseline", "--help"])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "--decode.tokens-per-step" in out
    assert "--decode.r-f " not in out
    assert "--decode.tau-decode" not in out


COMMANDS = (
    "lrd_jax.generate lrd_jax.evaluate lrd_jax.train lrd_jax.bench lrd_jax.plan "
    "lrd_jax.aot convert"
).split()


def in_shell(command, module, *words):
    """Runs a command in a shell that does to its streams what `command` says."""
    script = command.format(shlex.join([sys.executable, "-m", module, *words]))
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True)


GIVEN_TWICE = {
    generate.main: "--input a --input b",
    evaluate.main: "--tasks lists --tasks=code",
    train.main: "--data a.jsonl --data b.jsonl",
    bench.main: "--batch-size 1 --batch_size 2",
    plan.main: "--device a100 --device h100",
    aot.main: "--chip v5p --chip v5e",
    convert_main: "--src a --src b",
}


@pytest.mark.parametrize(("main", "words"), GIVEN_TWICE.items())
def test_a_flag_given_twice_is_refused(main, words, capsys):
    assert main(words.split()) == 2
    flag = words.split()[0]
    assert capsys.readouterr().err == (
        f"error: `{flag}` is given twice: leave one of them out.\n"
    )


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (plan.main, "--model tiny --device a100 --prompt 8 --gen-length 32"),
        (bench.main, "--model llada-100m --no-decode --prompt 8 --gen-length 32"),
    ],
)
def test_more_rows_than_can_be_counted(main, words, capsys):
    assert main([*words.split(), "--batch-size", "99999999999"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: `--batch-size` must be 1 to 53687091, rows of 40")
    assert err.count("\n") == 1


@pytest.mark.parametrize("module", COMMANDS)
def test_a_reader_that_goes_away_ends_every_command(module):
    # Its end is closed when the command comes to write.
    done = in_shell("{{ sleep 0.1; {}; echo $? >&2; }} | true", module, "--help")
    assert done.stderr == "141\n"


def test_a_full_disk_behind_stdout_is_one_line():
    done = in_shell("{} > /dev/full", "lrd_jax.plan", "--help")
    assert done.stderr == "error: the output: No space left on device\n"
    assert done.returncode == 2


def test_closed_streams_are_no_mistake():
    done = in_shell("{} >&-", "lrd_jax.plan", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    done = in_shell("{} >&- 2>&-", "lrd_jax.plan", "--model", "x", "--device", "v5p")
    assert done.returncode == 2


LONG = "x" * 300


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("lrd_jax.generate", ["--prompt", "a", "--ckpt", LONG]),
        ("lrd_jax.generate", ["--prompt", "a", "--output", LONG]),
        ("lrd_jax.evaluate", ["--n", "5", "--ckpt", LONG]),
        ("lrd_jax.train", ["--config", "tiny_train", "--out", LONG]),
        ("lrd_jax.bench", ["--model", LONG]),
        ("lrd_jax.plan", ["--device", "v5p", "--model", LONG]),
        ("convert", ["--dst", "new", "--src", LONG]),
        ("convert", ["--src", "tiny", "--to", "hf", "--dst", LONG]),
    ],
)
def test_a_name_that_is_too_long_is_one_line(module, words, tmp_path):
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert LONG in done.stderr
    assert "File name too long" in done.stderr or "no model" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_one_line(monkeypatch, capsys):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "is_file", denied)
    argv = ["--model", "tiny", "--device", "v5p"]
    assert plan.main(argv) == 2
    err = capsys.readouterr().err
    assert err == f"error: {builtin.find('tiny') / 'model.json'}: Permission denied\n"
