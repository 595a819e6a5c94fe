"""`python -m lrd_jax.bench`: the command, and what its figures mean."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from flags import with_flags
from toy_bench import model_file
from train_toy import quick_compile as quick_compile

import lrd_jax.model_file
from lrd_jax import builtin, staging
from lrd_jax.bench import main
from lrd_jax.benchmark import clock, measure, ours, sweep
from lrd_jax.benchmark.parts import part_runs, summarise_parts
from lrd_jax.benchmark.request import parse
from lrd_jax.benchmark.subject import make_subject
from lrd_jax.config import BaselineConfig, DecodeConfig
from lrd_jax.decode.state import Phase
from lrd_jax.errors import UserError

SMALL = "--prompt 6 --gen-length 4 --repeats 1"


def run(folder, flags, fields=None):
    """The report of the toy, and what was printed is left to capsys."""
    output = folder / "report.json"
    model = model_file(folder, **({} if fields is None else {"fields": fields}))
    shared = ["--model", model, "--output", str(output), *SMALL.split()]
    assert main(with_flags(shared, flags.split())) == 0
    return json.loads(output.read_text())


def rounds_of(monkeypatch, module):
    """Of each time that `module` takes what it compares in turn."""
    seen = []

    def interleave(runs, repeats):
        seen.append(repeats)
        return clock.interleave(runs, repeats)

    monkeypatch.setattr(module, "interleave", interleave)
    return seen


def test_each_method_has_its_parts_and_its_decode(tmp_path, capsys, monkeypatch):
    rounds = rounds_of(monkeypatch, measure)
    report = run(tmp_path, "--methods baseline,lrd --n 4 --batch-size 2 --repeats 2")
    assert rounds == [2, 2]  # Of the parts, and of the whole decodes.
    out, err = capsys.readouterr()
    assert list(report["methods"]) == ["baseline", "lrd"]
    baseline = report["methods"]["baseline"]
    assert baseline["forwards_per_prompt"] == 4  # One for each position.
    assert baseline["tokens_per_forward"] == baseline["useful_tokens"] / (4 * 4)
    assert baseline["useful_tokens"] <= 4 * 4
    assert baseline["accuracy"] is None
    for figures in report["methods"].values():
        parts = figures["parts"]
        assert sum(parts["share"].values()) == pytest.approx(1, abs=0.5)
        assert parts["ms"]["forward"]["median"] > 0
        assert figures["compile_seconds"] > 0
        assert figures["temporaries_mib"] > 0
        seconds = figures["seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        rate = figures["tokens_per_second"]["median"]
        assert rate <= figures["useful_tokens"] / seconds["low"]
    assert report["peak_gflops"]["jax"]["median"] > 0
    settings = report["settings"]
    assert settings["threads"] >= 1
    assert (settings["batch_size"], settings["prompt"]) == (2, 6)
    for name in ("baseline", "lrd"):
        assert out.count(f"| {name} ") == 2
    assert "all figures: " in err


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def no_room(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: hbm\nand a table")

    monkeypatch.setattr(measure, "measure", no_room)
    assert main(["--model", model_file(tmp_path), *SMALL.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the device has too little memory for this: give a ")
    assert err.count("\n") == 1


def test_where_rows_wait_no_time_is_told_for_a_forward(tmp_path, capsys):
    file = tmp_path / "methods.toml"
    file.write_text('[dual]\nmethod = "baseline"\ncache = "dual"\n')
    for rows in (1, 2):
        flags = f"--method-file {file} --methods dual --n 2 --batch-size {rows}"
        figures = run(tmp_path, flags)["methods"]["dual"]
        assert (figures["ms_per_forward"] is None) == (rows > 1)
        assert figures["tokens_per_second"]["median"] > 0


def test_without_decoding_only_the_parts_are_measured(tmp_path, capsys):
    report = run(tmp_path, "--methods lrd --no-decode")
    assert "forwards_per_prompt" not in report["methods"]["lrd"]
    assert report["methods"]["lrd"]["parts"]["ms"]["belief"]
    assert "whole decode" not in capsys.readouterr().out


def test_a_sweep_measures_one_axis_at_a_time(tmp_path, capsys, monkeypatch):
    rounds = rounds_of(monkeypatch, sweep)
    report = run(tmp_path, "--sweep B=1,2 W=2,4 --sweep V=64,128 --repeats 2")
    assert {*rounds} == {2}
    values = {
        axis: [point["value"] for point in found["points"]]
        for axis, found in report["sweep"].items()
    }
    assert values == {"B": [1, 2], "W": [2, 4], "V": [64, 128]}
    for found in report["sweep"].values():
        assert set(found["exponents"]) == {"forward", "belief", "bookkeeping"}
    out = capsys.readouterr().out
    assert "| W 4 " in out
    assert "rows of the batch: forward grows like B^" in out


def test_a_checkpoint_is_asked_problems_and_graded(tmp_path):
    output = tmp_path / "report.json"
    flags = "--tasks copy --n 4 --methods threshold --gen-length 32 --repeats 1"
    asked = make_subject(parse(flags.split())).problems
    assert {problem.task.name for problem in asked} == {"copy"}
    assert main([*flags.split(), "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["methods"]["threshold"]["accuracy"] >= 0.75
    assert report["settings"]["model"] == "tiny"


def request(folder, *flags):
    return parse(with_flags(["--model", model_file(folder), *SMALL.split()], flags))


def test_flags_of_random_weights_reach_the_subject(tmp_path):
    import jax
    import numpy as np

    from lrd_jax.benchmark.subject import make_subject

    base, longer, other, sharp = (
        make_subject(request(tmp_path, *flags))
        for flags in ((), ("--prompt", "9"), ("--seed", "1"), ("--sharpness", "3"))
    )
    assert base.batches[0].ids.shape == (1, 6)
    assert longer.batches[0].ids.shape == (1, 9)
    assert not np.array_equal(base.batches[0].ids, other.batches[0].ids)
    assert not np.array_equal(base.params["embed"], other.params["embed"])
    scales = sharp.params["norm"]["scale"] / base.params["norm"]["scale"]
    assert np.all(np.asarray(scales) == 3)
    jax.tree.map(
        np.testing.assert_array_equal, base.params["blocks"], sharp.params["blocks"]
    )
    assert not np.isin(base.batches[0].ids, [60, 61, 63]).any()


def test_the_seed_makes_the_sample(tmp_path):
    subject = make_subject(request(tmp_path, "--n", "4", "--batch-size", "2"))
    cfg = DecodeConfig(gen_length=4, temperature=5.0, stop_at_eos=False)
    first, other = (ours.compile_method(subject, cfg, seed) for seed in (0, 1))
    tokens = first.run().tokens
    np.testing.assert_array_equal(first.run().tokens, tokens)
    assert np.any(other.run().tokens != tokens)


def test_runs_are_taken_in_turn_and_the_first_round_does_not_count():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = clock.interleave(runs, 3)
    assert calls == ["a", "b"] * 4
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 3, "b": 3}


def test_a_spread_is_median_and_ends():
    assert clock.spread([3.0, 1.0, 2.0], 10.0) == {"median": 20, "low": 10, "high": 30}


def test_memory_that_a_run_takes_is_seen():
    size = 96 * 2**20
    answer, small = clock.memory_growth(lambda: 7)
    _, large = clock.memory_growth(lambda: bytearray(size).count(1))
    assert answer == 7
    if large is None:
        pytest.skip("the system does not tell")
    assert small < size / 4 < 0.9 * size < large < 2 * size


@pytest.mark.parametrize("threshold", [None, 1e-6])
def test_the_turn_that_is_measured_runs_a_forward(tmp_path, threshold):
    """Also of a method that commits all it has at once, and then is done."""
    small = ["--model", model_file(tmp_path), *SMALL.split()]
    subject = make_subject(parse([*small, "--n", "2", "--batch-size", "2"]))
    cfg = BaselineConfig(gen_length=4, threshold=threshold)
    batch = subject.batches[0]
    runs = part_runs(subject.denoiser, subject.params, cfg, batch)
    state = runs["turn"]()
    assert np.all(state.phase != Phase.DONE)


def test_belief_is_what_goes_beyond_one_head_product():
    seconds = {
        "forward": [1.0, 2.0],
        "head": [0.25, 0.25],
        "read": [0.5, 0.5],
        "bookkeeping": [0.25, 0.5],
        "turn": [1.5, 1.5],
    }
    found = summarise_parts(seconds)
    assert found["ms"]["belief"]["median"] == 250
    assert found["turn_ms"]["median"] == 1500
    assert found["beyond_forward"] == {"median": 0.4375, "low": 0.375, "high": 0.5}
    assert found["share"]["belief"] == pytest.approx((1 / 6 + 1 / 11) / 2)


def test_exponents_are_those_of_the_ends():
    ms = [
        {"forward": {"median": m}, "belief": {"median": b}}
        for m, b in ((2, 1), (16, -1))
    ]
    found = sweep.exponents([1, 2], ms)
    assert found == {"forward": pytest.approx(3), "belief": None}
    assert sweep.exponents([4], ms[:1]) == {"forward": None, "belief": None}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--model nothing", "no model 'nothing'; give a checkpoint's directory"),
        ("--model llada-100m --repeats 0", "`--repeats` must be at least 1, got 0."),
        ("--batch-size 2 --n 3", "`--n` must be a multiple of `--batch-size` 2"),
        ("--model llada-100m --prompt 4096", "model's context of 4096"),
        ("--sharpness 2", "`--sharpness` changes nothing for a checkpoint"),
        ("--prompt 16", "`--prompt` changes nothing for a checkpoint"),
        ("--model dream-7b --tasks code", "`--tasks` changes nothing for random"),
        ("--sweep B=1 --no-decode", "`--no-decode` changes nothing for `--sweep`"),
        ("--sweep B=1 --n 2", "`--n` changes nothing for `--sweep`"),
        ("--model llada-100m --sharpness 0", "`--sharpness` must be a finite number"),
        ("--methods nothing", "no method 'nothing'"),
        ("--methods lrd,", "`--methods` must be names with commas between"),
        ("--tasks nothing", "nothing"),
        ("--sweep B=1 --peer torch", "give either `--peer` or `--sweep`"),
        ("--sweep B=1 --methods lrd,baseline", "`--sweep` measures one method"),
        ("--sweep", "`--sweep` must be AXIS=N,..., got 'nothing'."),
        ("--sweep B", "`--sweep` must be"),
        ("--sweep Q=1", "`--sweep` must be an axis: B (rows of the batch)"),
        ("--sweep B=1 B=2", "B is given twice"),
        ("--sweep B=1 --sweep B=2", "B is given twice"),
        ("--sweep B=0", "`--sweep B` must be a whole number, at least 1, got 0."),
        ("--sweep B=x", "`--sweep B` must be a whole number, at least 1, got 'x'."),
        ("--sweep V=1024", "V is fixed by a checkpoint"),
        ("--model llada-100m --sweep V=3", "at least 16, got 3."),
        ("--model llada-100m --sweep W=48", "must be a multiple of `block_length`"),
        ("--model llada-100m --sweep P=4090", "a prompt of 4090"),
        ("--sweep W=8 --methods dream", "method dream has one block only"),
        ("--output no/such/dir/x.json", "--output no/such/dir/x.json: no such"),
        ("--output .", "--output '.': must be the name of a file"),
        ("--output=", "--output '': must be the name of a file"),
        ("--output {folder}", "must be the name of a file"),
        ("--output {folder}/new/", "must be the name of a file"),
        ("--output {folder}/" + "x" * 300, "cannot be written: File name too long"),
        ("--seed -1", "`--seed` must be in"),
        ("--model {empty}", "a model needs family, vocab_size"),
        ("--model {wrong}", "unknown setting 'd_mode'; did you mean d_model"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(flags, told, capsys, tmp_path):
    (tmp_path / "empty.toml").write_text("")
    text = pathlib.Path(model_file(tmp_path)).read_text()
    (tmp_path / "wrong.toml").write_text(text + "d_mode = 3\n")
    files = {name: tmp_path / f"{name}.toml" for name in ("empty", "wrong")}
    files["folder"] = tmp_path
    argv = [word.format(**files) for word in flags.split()]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert told in err
    assert err.count("\n") == 1


def test_an_output_that_cannot_be_written_is_told_at_once(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(staging.os, "access", lambda path, mode: False)
    assert main(["--output", str(tmp_path / "new.json")]) == 2
    assert "new.json: its directory is not writable" in capsys.readouterr().err


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(UserError, match=r"report\.json: cannot be written: "):
        staging.write_atomically(tmp_path / "report.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_peer_takes_no_weights_in_int8(monkeypatch, capsys):
    file = dataclasses.replace(
        lrd_jax.model_file.read(builtin.find(None)), quantization="int8"
    )
    monkeypatch.setattr(lrd_jax.model_file, "read", lambda path: file)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert main(["--peer", "torch"]) == 2
    err = capsys.readouterr().err
    assert "`--peer torch` takes no weights in int8, as those of `--model tiny`" in err


def test_without_torch_the_peer_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--peer", "torch"]) == 2
    assert capsys.readouterr().err == (
        "error: `--peer torch` needs PyTorch: pip install torch==2.13.0\n"
    )
