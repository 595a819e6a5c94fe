"""`python -m lrd_jax.evaluate` with a toy decode, and once with a real one."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
from flags import with_flags
from toy_evaluate import TOYS, run_toy
from toy_run import toy_config, toy_make_decode_fn, toy_source
from train_toy import quick_compile as quick_compile

from lrd_jax import tasks
from lrd_jax.evaluate import main
from lrd_jax.evaluation import plot as plot_module
from lrd_jax.model import backbone, families
from lrd_jax.scheduler import Scheduler

TOY = str(pathlib.Path(__file__).parent / "toy_evaluate.py")
SHORT = "--gen-length 4 --batch-size 4 --tasks toys,single --n 10".split()
PAIR = ("--methods", "baseline,lrd")


@pytest.fixture(autouse=True)
def _toy_tasks(monkeypatch):
    for name, task in TOYS.items():
        monkeypatch.setitem(tasks.TASKS, name, task)


def records(folder, method="lrd"):
    """Without what differs from one run to the next."""
    lines = (folder / f"{method}.jsonl").read_text().splitlines()
    read = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read]


def report(folder):
    return json.loads((folder / "report.json").read_text())


def error_of(capsys, *words):
    """The one line that a refused command prints."""
    assert run_toy(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_all_is_reported(tmp_path, capsys):
    assert run_toy([*SHORT, *PAIR, "--output", tmp_path / "out"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    made = report(tmp_path / "out")
    assert (tmp_path / "out" / "table.md").read_text() == out
    assert list(made["methods"]) == ["baseline", "lrd"]
    assert made["baseline"] == "baseline"
    assert made["settings"]["split"] == "test"
    ours = made["methods"]["lrd"]
    assert ours["settings"]["decode.gen_length"] == 4
    assert {name: f["n"] for name, f in ours["tasks"].items()} == {
        "toys": 10,
        "single": 10,
    }
    assert ours["all"]["n"] == 20
    kept = records(tmp_path / "out")
    right = [int(record["text"].split()[0][1:]) % 2 == 0 for record in kept]
    assert 0 < sum(right) < 20
    assert [record["correct"] for record in kept] == right
    assert ours["all"]["correct"] == sum(right)
    assert ours["all"]["forwards"] == 20 * 3
    assert ours["all"]["useful_tokens"] == 20 * 2
    assert ours["all"]["stop_reasons"] == {"kl": 20}
    assert ours["all"]["difference"] == 0
    assert "difference" in ours["tasks"]["toys"]
    assert not list((tmp_path / "out").glob("*.lock"))


def test_a_family_is_shared_by_its_tasks_from_the_start_of_their_streams(tmp_path):
    assert run_toy([*SHORT, "--methods", "lrd", "--output", tmp_path]) == 0
    names = [record["id"] for record in records(tmp_path)]
    wanted = [f"toy_a/{k}" for k in range(4)]
    wanted += [f"{task}/{k}" for task in ("toy_b", "toy_c") for k in range(3)]
    assert sorted(names[:10]) == wanted
    assert sorted(names[10:]) == [f"single/{k}" for k in range(10)]
    assert names[:10] != wanted  # By length.


def test_without_output_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_toy([*SHORT, *PAIR]) == 0
    assert "| lrd " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_markdown(capsys):
    assert run_toy([*SHORT, *PAIR]) == 0
    blocks = capsys.readouterr().out.rstrip("\n").split("\n\n")
    assert len(blocks) == 6
    for place, columns, lines in ((1, 7, 2), (3, 3, 2), (5, 3, 1)):
        head, rule, *rows = blocks[place].split("\n")
        assert len(rows) == lines
        for line in (head, rule, *rows):
            assert line.startswith("| ")
            assert line.endswith(" |")
            assert line.count("|") == columns + 1
        assert re.fullmatch(r"\| -{3,} \|( -{2,}: \|)+", rule)
    assert blocks[0].startswith("All tasks together: 20 problems of split test, ")
    assert re.search(r"\| +single \(10\) \|", blocks[3])
    number = r"\d+\.\d"
    pattern = (
        rf"\| lrd      \| +{number} \[{number}, {number}\] \| +3\.0 \| +0\.67 "
        rf"\| +\d+ \| \+0\.0 \[-8\.9, \+8\.9\] \| +\d+\.\d\d \|"
    )
    assert re.search(pattern, blocks[1])
    assert blocks[4] == "Difference to baseline for each task, points."
    # 1.96 of 12 problems, two of them added.
    assert blocks[5].count("+0.0 [-16.3, +16.3]") == 2


def test_batch_size_and_other_tasks_change_no_record(tmp_path):
    flags = [*SHORT[:2], "--n", 10, "--methods", "lrd", "--output"]
    many = ["--tasks", "toys,single"]
    assert run_toy([*flags, tmp_path / "a", *many, "--batch-size", 4]) == 0
    assert run_toy([*flags, tmp_path / "b", *many, "--batch-size", 7]) == 0
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert run_toy([*flags, tmp_path / "c", "--tasks", "single"]) == 0
    assert records(tmp_path / "c") == records(tmp_path / "a")[10:]


def test_the_seed_and_the_split_change_the_problems(tmp_path):
    flags = [*SHORT, "--methods", "lrd", "--output"]
    texts = []
    for name, more in (("a", ()), ("b", ("--seed", 1)), ("c", ("--split", "train"))):
        assert run_toy([*flags, tmp_path / name, *more]) == 0
        texts.append([record["text"] for record in records(tmp_path / name)])
    assert texts[0] != texts[1]
    assert texts[0] != texts[2]


def test_a_baseline_that_is_better(tmp_path, capsys):
    """The other method's answers are all odd, so all wrong."""

    def make(denoiser, cfg):
        decode_fn = toy_make_decode_fn(denoiser, cfg)
        first = 1 if cfg.method == "lrd" else 2

        def decode(params, *arrays):
            result = decode_fn(params, *arrays)
            return result.replace(tokens=result.tokens.at[:, 0].set(first))

        return decode

    flags = [*SHORT, "--methods", "llada,lrd", "--baseline", "llada"]
    assert run_toy([*flags, "--output", tmp_path], make_decode_fn=make) == 0
    made = report(tmp_path)["methods"]
    assert made["llada"]["all"]["accuracy"] == 1
    assert made["lrd"]["all"]["difference"] == -1
    assert "-100.0 [-100.0, -76.0]" in capsys.readouterr().out  # Of 20 problems.


def test_without_a_baseline_there_are_no_differences(capsys):
    assert run_toy([*SHORT, "--methods", "lrd"]) == 0
    out, err = capsys.readouterr()
    assert "difference" not in out
    assert "no method is called `baseline`" in err


def test_nonfinite_rows_are_named_and_the_exit_code_is_1(capsys, monkeypatch, tmp_path):
    def poison(rng):
        return tasks.Instance(
            prompt=f"w13 w{rng.randrange(60)}",
            answer="",
            payload={},
            key=str(rng.random()),
            group=str(rng.random()),
        )

    task = TOYS["single"].__class__(**(vars(TOYS["single"]) | {"generate": poison}))
    monkeypatch.setitem(tasks.TASKS, "single", task)
    one = ("--methods", "lrd", "--n", 1, "--tasks", "single")
    flags = with_flags(SHORT, one)
    for _ in range(2):  # Also when there is nothing left to do.
        assert run_toy([*flags, "--output", tmp_path]) == 1
        assert "for id single/0 (lrd); those" in capsys.readouterr().err


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupts the run before round number `n`, if it has so many."""
    launch = Scheduler._launch

    def arm(n):
        left = iter(range(n))

        def launch_or_stop(*args):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return launch(*args)

        monkeypatch.setattr(Scheduler, "_launch", launch_or_stop)

    return arm


@pytest.mark.parametrize("rounds", [0, 1, 3, 8])
def test_an_interrupted_run_goes_on_where_it_was(rounds, tmp_path, interrupt, capsys):
    flags = [*SHORT, *PAIR, "--output"]
    assert run_toy([*flags, tmp_path / "whole"]) == 0
    interrupt(rounds)
    assert run_toy([*flags, tmp_path / "out"]) == 130
    assert "the same command, if it has `--output`, goes on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.json").exists()
    with open(tmp_path / "out" / "baseline.jsonl", "a") as file:
        if 0 < rounds < 6:
            file.write('{"id": "half')  # Killed within a line.
    interrupt(1000)
    assert run_toy([*flags, tmp_path / "out"]) == 0
    for method in ("baseline", "lrd"):
        same = records(tmp_path / "whole", method)
        assert records(tmp_path / "out", method) == same
    done = report(tmp_path / "out")["methods"]
    wanted = report(tmp_path / "whole")["methods"]
    for name in done:
        assert done[name]["all"]["correct"] == wanted[name]["all"]["correct"]


def test_a_complete_run_loads_no_weights(tmp_path):
    flags = [*SHORT, *PAIR, "--output", tmp_path]
    assert run_toy(flags) == 0
    before = report(tmp_path)

    def load(mesh):
        raise AssertionError("weights were read")

    assert run_toy(flags, load=load) == 0
    assert report(tmp_path) == before
    # A further method does what it lacks only, and the table has both.
    assert run_toy(with_flags(flags, ("--methods", "baseline,lrd,dream"))) == 0
    assert list(report(tmp_path)["methods"]) == ["baseline", "lrd", "dream"]
    assert report(tmp_path)["methods"]["lrd"] == before["methods"]["lrd"]


def test_a_baseline_that_goes_on_behind_the_text_is_said_to(tmp_path, capsys):
    said = "baseline goes on behind the end of the text, where others stop"
    flags = [*SHORT, "--output", tmp_path, "--methods"]
    assert run_toy([*flags, "baseline,lrd"]) == 0
    assert said in capsys.readouterr().out
    for enough in ("baseline,lrd,baseline_eos", "baseline", "lrd,baseline_eos"):
        assert run_toy([*flags, enough]) == 0
        assert said not in capsys.readouterr().out


def test_records_of_another_machine_are_refused(tmp_path, capsys, monkeypatch):
    flags = [*SHORT, *PAIR, "--output", tmp_path]
    assert run_toy(flags) == 0
    monkeypatch.setattr(os, "cpu_count", lambda: 999)
    assert run_toy(flags) == 2
    assert "cores was" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_one_line(tmp_path, capsys):
    def load(mesh):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: hbm\nand a table")

    flags = [*SHORT, *PAIR, "--output", tmp_path]
    assert run_toy(flags, load=load) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: the device has too little memory for the weights in ")
    assert err.endswith("or a `--mesh` with a larger `model`.")


def test_a_killed_process_loses_nothing(tmp_path):
    flags = [*SHORT, *PAIR, "--output"]
    assert run_toy([*flags, tmp_path / "whole"]) == 0
    words = [sys.executable, TOY, "0.2", *flags, str(tmp_path / "out")]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    target, deadline = tmp_path / "out" / "baseline.jsonl", time.monotonic() + 300
    while not (target.exists() and target.read_text().count("\n") >= 4):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out" / "report.json").exists()
    assert run_toy([*flags, tmp_path / "out"]) == 0
    for method in ("baseline", "lrd"):
        same = records(tmp_path / "whole", method)
        assert records(tmp_path / "out", method) == same


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--n", "11"], "n was 10, now 11"),
        (["--seed", "1"], "seed was 0, now 1"),
        (["--split", "train"], "split was 'test', now 'train'"),
        (["--batch-size", "5"], "batch_size was 4, now 5"),
        (["--gen-length", "8"], "decode.gen_length was 4, now 8"),
        (["--tasks", "single"], "tasks was ['toys', 'single'], now ['single']"),
    ],
)
def test_other_settings_are_refused(flags, named, tmp_path, capsys):
    assert run_toy([*SHORT, *PAIR, "--output", tmp_path]) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # Refused before the first method is run, although only the second is in the way.
    words = [*SHORT, "--methods", "dream,lrd", "--output", tmp_path]
    assert run_toy(with_flags(words, flags)) == 2
    assert named in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_of_others_is_left_alone(tmp_path, capsys):
    (tmp_path / "report.json").write_text("mine")
    message = error_of(capsys, *SHORT, *PAIR, "--output", str(tmp_path))
    assert "holds report.json and no records of an evaluation" in message
    assert (tmp_path / "report.json").read_text() == "mine"
    file = tmp_path / "report.json"
    assert "cannot be written" in error_of(capsys, *SHORT, *PAIR, "--output", str(file))


def test_a_sweep_reaches_the_decode(tmp_path):
    seen = {}

    def make(denoiser, cfg):
        seen[cfg.method, cfg.r_f, cfg.top_p] = cfg
        return toy_make_decode_fn(denoiser, cfg)

    flags = [*SHORT, *PAIR, "--sweep", "r_f=0.0,0.5", "--output", tmp_path]
    image = tmp_path.parent / f"{tmp_path.name}.svg"
    assert run_toy([*flags, "--plot", image], make_decode_fn=make) == 0
    assert list(seen) == [
        ("baseline", 0.0, 0.9),
        ("lrd", 0.0, 0.9),
        ("lrd", 0.5, 0.9),
    ]
    made = report(tmp_path)
    assert list(made["methods"]) == ["baseline", "lrd r_f=0.0", "lrd r_f=0.5"]
    assert made["settings"]["sweep"] == "r_f"
    assert [m["value"] for m in made["methods"].values()] == [None, 0, 0.5]
    assert made["methods"]["lrd r_f=0.5"]["settings"]["decode.r_f"] == 0.5
    assert image.read_text().count("<svg") == 1


def test_a_sweep_alone_is_lrds_and_any_part_can_be_the_baseline(tmp_path):
    flags = ["--sweep", "kl_reduction=mean,max", "--baseline", "lrd kl_reduction=mean"]
    assert run_toy([*SHORT, *flags, "--output", tmp_path]) == 0
    made = report(tmp_path)
    assert list(made["methods"]) == ["lrd kl_reduction=mean", "lrd kl_reduction=max"]
    assert made["methods"]["lrd kl_reduction=max"]["all"]["difference"] == 0


def test_infinity_is_a_word_in_the_report(tmp_path):
    assert (
        run_toy([*SHORT, "--sweep", "stop_entropy=0.5,inf", "--output", tmp_path]) == 0
    )
    made = report(tmp_path)["methods"]
    assert [method["value"] for method in made.values()] == [0.5, "inf"]
    assert made["lrd stop_entropy=inf"]["settings"]["decode.stop_entropy"] == "inf"


def figures(accuracy, forwards):
    low, high = accuracy - 0.1, accuracy + 0.1
    return {
        "accuracy": accuracy,
        "interval": [low, high],
        "forwards_per_problem": forwards,
    }


def drawn(monkeypatch, made):
    saved = []
    monkeypatch.setattr(plot_module, "save", lambda figure, path: saved.append(figure))
    plot_module.plot(made, "a.svg")
    return saved[0]


def test_the_plot_has_a_point_for_each_method(monkeypatch):
    made = {
        "settings": {"sweep": None},
        "methods": {
            name: {"all": figures(0.5, 4.0 + i)} for i, name in enumerate("abc")
        },
    }
    (axes,) = drawn(monkeypatch, made).axes
    points = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    assert points == [[[4, 50]], [[5, 50]], [[6, 50]]]
    ends = axes.containers[0].lines[2][0].get_segments()[0]
    assert ends.tolist() == [[4, pytest.approx(40)], [4, pytest.approx(60)]]


def test_the_plot_of_a_sweep_has_two_curves(monkeypatch):
    methods = {
        f"lrd r_f={x}": {
            "entry": "lrd",
            "value": x,
            "swept": True,
            "all": figures(x, 10 * x),
        }
        for x in (0.25, 0.5)
    }
    plain = {"entry": "b", "value": None, "swept": False, "all": figures(0.3, 7.0)}
    made = {"settings": {"sweep": "r_f"}, "methods": {"b": plain, **methods}}
    top, bottom = drawn(monkeypatch, made).axes
    assert top.containers[0].lines[0].get_xydata().tolist() == [[0.25, 25], [0.5, 50]]
    dashed, curve = bottom.lines
    assert list(dashed.get_ydata()) == [7, 7]
    assert curve.get_xydata().tolist() == [[0.25, 2.5], [0.5, 5]]


def test_values_that_are_no_numbers_stand_as_words():
    assert plot_module.positions([0.1, 2]) == [0.1, 2]
    assert plot_module.positions([0.1, float("inf")]) == ["0.1", "inf"]
    assert plot_module.positions([True, False]) == ["True", "False"]


def test_a_real_model_is_measured(tmp_path):
    cfg = toy_config()

    def load(mesh):
        params = backbone.init_params(cfg, jax.random.key(0))
        return families.make_denoiser(cfg), params

    flags = [*SHORT[:4], "--tasks", "toys", "--n", 4, *PAIR, "--output", tmp_path]
    source = toy_source(load=load)
    assert main([str(word) for word in flags], open_source=lambda *_: source) == 0
    made = report(tmp_path)["methods"]
    assert made["baseline"]["all"]["forwards"] == 4 * 4
    assert made["baseline"]["all"]["stop_reasons"] == {"committed": 4}
    assert made["lrd"]["all"]["refine_steps"] > 0


BAD = {
    "unknown task": (["--tasks", "lists,sudoko"], "no task 'sudoko'; did you mean sud"),
    "task twice": (["--tasks", "lists,copy"], "'copy' is in 'lists' and in 'copy'"),
    "no task": (["--tasks", ""], "`--tasks` must be names with commas between"),
    "unknown method": (["--methods", "lrt"], "no method 'lrt'"),
    "no method": (["--methods", ""], "`--methods` must be names with commas between"),
    "n": (["--n", "0"], "`--n` must be at least 1, got 0"),
    "batch size": (["--batch-size", "0"], "`--batch-size` must be at least 1, got 0"),
    "gen length": (["--gen-length", "0"], "`--gen-length` must be at least 1, got 0"),
    "seed": (["--seed", "-1"], "`--seed` must be in [0, 4294967295], got -1"),
    "method file": (["--method-file", "nowhere"], "no config file 'nowhere'"),
    "key": (["--method-file", "bad.toml"], "[a]: unknown setting 'r_g'"),
    "baseline": (
        ["--methods", "lrd", "--baseline", "dream"],
        "--baseline 'dream' is not among the methods: lrd",
    ),
    "sweep": (["--sweep", "r_f"], "must be SETTING=VALUE"),
    "nothing to sweep": (
        ["--sweep", "top_p=0.1", "--methods", "baseline"],
        "nothing to sweep besides the baseline",
    ),
    "plot": (["--plot", "a.txt"], "the name must end in one of"),
    "plot folder": (["--plot", "no/a.png"], "no such directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, tmp_path, capsys, monkeypatch):
    flags, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    pathlib.Path("bad.toml").write_text('[a]\nmethod = "lrd"\nr_g = 1\n')
    assert message in error_of(capsys, *flags, "--output", "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.toml"]


def test_what_the_model_cannot_do(tmp_path, capsys):
    out = ("--output", str(tmp_path / "out"))
    assert run_toy([*SHORT, *PAIR, *out], tokenizer=False) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    longer = with_flags([*SHORT, *PAIR, *out], ("--gen-length", "90"))
    message = error_of(capsys, *longer)
    assert "more than the model's context of 96" in message
    assert not (tmp_path / "out").exists()


def test_a_group_without_problems(monkeypatch, capsys):
    def never(rng):
        return tasks.Instance(prompt="w1", answer="", payload={}, key="", group="1")

    task = TOYS["single"].__class__(**(vars(TOYS["single"]) | {"generate": never}))
    monkeypatch.setitem(tasks.TASKS, "single", task)
    empty = next(
        split for split in ("test", "validation") if task.split_of(never(None)) != split
    )
    message = error_of(capsys, *SHORT, *PAIR, "--split", empty)
    assert f"single has no problems in split {empty}" in message


def test_a_stream_that_ends_early_gives_what_there_is(monkeypatch, tmp_path):
    def few(rng):
        word = f"w{rng.randrange(20)}"
        return tasks.Instance(prompt=word, answer="", payload={}, key=word, group=word)

    task = TOYS["single"].__class__(**(vars(TOYS["single"]) | {"generate": few}))
    monkeypatch.setitem(tasks.TASKS, "single", task)
    many = ("--methods", "lrd", "--n", 30, "--tasks", "single")
    flags = with_flags(SHORT, many)
    assert run_toy([*flags, "--output", tmp_path]) == 0
    there = len(list(tasks.instances(task, "test", 0)))
    assert 0 < there < 20
    assert report(tmp_path)["methods"]["lrd"]["tasks"]["single"]["n"] == there


def test_the_command_itself(tmp_path):
    """As a process: `--help`, a mistake of tyro's and one of ours, without JAX."""

    def run(*words):
        command = [sys.executable, "-X", "importtime", "-m", "lrd_jax.evaluate"]
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, cwd=tmp_path
        )
        lines = done.stderr.splitlines()
        said = "\n".join(x for x in lines if not x.startswith("import time:"))
        assert "Traceback" not in said
        assert not [line for line in lines if re.search(r"\| +jax$", line)]
        return done.returncode, done.stdout, said

    code, out, said = run("--help")
    assert (code, said) == (0, "")
    assert "--method-file" in out
    code, out, said = run("--split", "dev")
    assert code == 2
    assert "dev" in out + said
    code, out, said = run("--sweep", "kl_reduction=mean,total")
    assert (code, out) == (2, "")
    assert said.startswith("error: --sweep: `kl_reduction` must be one of mean, sum")
    code, out, said = run("--tasks", "sudoko")
    assert (code, out) == (2, "")
    assert said.startswith("error: no task 'sudoko'")
    assert list(tmp_path.iterdir()) == []
