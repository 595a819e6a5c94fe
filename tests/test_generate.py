"""`lrd_jax.generate` with a toy decode; with a real model in test_generate_model.py."""

import contextlib
import importlib.metadata
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from toy_run import POISON, run_toy

from lrd_jax.process import use_compilation_cache

TOY = str(pathlib.Path(__file__).parent / "toy_run.py")
SHORT = ("--decode.gen-length", "4")
KEYS = (
    "id text token_ids num_forwards num_full_forwards useful_tokens stop_reason "
    "block_stop refine_steps kl phase nucleus_size commit_step commit_prob "
    "commit_entropy"
).split()


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def read(path):
    text = pathlib.Path(path).read_text()
    assert text.endswith("\n")
    return [
        json.loads(line, parse_constant=refuse_constant) for line in text.splitlines()
    ]


def write_input(path, count, **more):
    lines = [json.dumps({"prompt_ids": [i + 1, 2]} | more) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def files(tmp_path):
    return write_input(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"


def wanted(tmp_path, source):
    """What an undisturbed run writes."""
    path = tmp_path / "undisturbed.jsonl"
    run_toy(["--input", source, "--output", path, *SHORT])
    return path.read_bytes()


def test_one_prompt_prints_its_text_and_the_figures(capsys):
    assert run_toy(["--prompt", "w1 w2", *SHORT]) == 0
    out, err = capsys.readouterr()
    text, figures = out.splitlines()
    assert len(text.split()) == 4
    assert set(text) <= set("w0123456789 ")
    for word in ("forwards 3", "tokens per forward 0.67", "useful tokens/s"):
        assert word in figures
    assert "compile" in figures
    assert "run" in figures
    assert err == ""


def test_several_prompts_are_headed_by_their_ids(capsys):
    assert run_toy(["--prompt", "w1", "w2", *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "=== 0 ==="
    assert lines[2] == "=== 1 ==="
    assert lines[4].startswith("prompts 2 | forwards 6 (2 full) | ")


def test_without_a_tokenizer_the_ids_are_printed(capsys, tmp_path):
    source = write_input(tmp_path / "in.jsonl", 1)
    assert run_toy(["--input", source, *SHORT], tokenizer=False) == 0
    assert all(
        word.isdigit() for word in capsys.readouterr().out.split("\n")[0].split()
    )


def test_results_go_to_the_output(files, capsys, tmp_path):
    source, output = files
    assert run_toy(["--input", source, "--output", output, *SHORT]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert out.startswith("prompts 5 | ")
    assert err == ""
    records = read(output)
    assert [record["id"] for record in records] == [0, 1, 2, 3, 4]
    assert list(records[0]) == KEYS
    first = records[0]
    assert first["kl"] == [None, 0.1, None]  # NaN and infinity.
    assert first["phase"] == [0, 1, 2]
    assert first["block_stop"] == ["eos", None]
    assert len(first["token_ids"]) == len(first["commit_step"]) == 4
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["decode.gen_length"] == 4
    assert meta["checkpoint"] == "toy"
    assert meta["method"] == "lrd"
    assert meta["lrd_jax"] == importlib.metadata.version("lrd_jax")
    left = {"in.jsonl", "out.jsonl", "out.jsonl.meta.json"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_prompts_can_go_to_an_output_too(tmp_path):
    output = tmp_path / "out.jsonl"
    assert run_toy(["--prompt", "w1", "w2", "--output", output, *SHORT]) == 0
    assert [record["id"] for record in read(output)] == [0, 1]


def test_batch_size_changes_the_batches_and_not_the_results(files, tmp_path):
    source, output = files
    same = wanted(tmp_path, source)
    for size, shapes in {1: [(1, 4)] * 5, 2: [(2, 4)] * 3, 8: [(5, 4)]}.items():
        calls = []
        output.unlink(missing_ok=True)
        words = ["--input", source, "--output", output, "--batch-size", size, *SHORT]
        assert run_toy(words, calls=calls) == 0
        assert calls == shapes
        assert output.read_bytes() == same


def test_the_seed_and_the_line_make_the_sample(tmp_path):
    def tokens(lines, *flags):
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("\n".join(lines))
        output.unlink(missing_ok=True)
        assert run_toy(["--input", source, "--output", output, *SHORT, *flags]) == 0
        return [record["token_ids"] for record in read(output)]

    line = '{"prompt_ids": [3]}'
    first, second = tokens([line, line])
    assert first != second
    assert tokens(["", line]) == [second]
    assert tokens([line], "--seed", "1") != [first]


def test_a_run_is_taken_up_where_it_was(files, tmp_path, capsys):
    source, output = files
    same = wanted(tmp_path, source)
    words = ["--input", source, "--output", output, "--batch-size", "2", *SHORT]
    assert run_toy(words) == 0
    for done in (0, 1, 2, 4):
        kept = b"".join(same.splitlines(keepends=True)[:done])
        output.write_bytes(kept + b'{"id": 3, "tex')
        calls = []
        capsys.readouterr()
        assert run_toy(words, calls=calls) == 0
        assert output.read_bytes() == same
        assert len(calls) == (5 - done + 1) // 2
        out, err = capsys.readouterr()
        assert out.startswith(f"prompts {5 - done} | ")
        assert (f"{done} of 5 are done already" in err) == (done > 0)


def test_a_complete_run_says_so_and_does_nothing(files, capsys):
    source, output = files
    words = ["--input", source, "--output", output, *SHORT]
    assert run_toy(words) == 0
    before = output.read_bytes()
    capsys.readouterr()
    assert run_toy(words, load=pytest.fail) == 0  # The weights are not even read.
    out, err = capsys.readouterr()
    assert out == ""
    assert "is complete: 5 results; nothing to do" in err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--seed", "1"], "seed was 0, now 1"),
        (["--raw"], "raw was False, now True"),
        (["--decode.r-f", "0.2"], "decode.r_f was 0.15, now 0.2"),
        (["--decode.stop-entropy", "inf"], "decode.stop_entropy was 0.1, now 'inf'"),
        (["--method", "baseline"], "method was 'lrd', now 'baseline'"),
    ],
)
def test_an_output_of_other_settings_is_refused(files, capsys, flags, name):
    source, output = files
    words = ["--input", source, "--output", output, *SHORT]
    assert run_toy(words) == 0
    before = output.read_bytes()
    capsys.readouterr()
    assert run_toy([*words, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert name in err
    assert err.count("\n") == 1
    assert output.read_bytes() == before


def test_an_output_of_another_input_is_refused(files, capsys):
    source, output = files
    words = ["--input", source, "--output", output, *SHORT]
    assert run_toy(words) == 0
    write_input(source, 6)
    assert run_toy(words) == 2
    assert "input_sha256 was" in capsys.readouterr().err


def test_raw_leaves_the_template_out(tmp_path):
    def tokens(*flags):
        output = tmp_path / "out.jsonl"
        output.unlink(missing_ok=True)
        words = ["--prompt", "w1", "--output", output, *SHORT, *flags]
        template = "{% for m in messages %}w2 {{ m.content }}{% endfor %}"
        assert run_toy(words, chat=True, template=template) == 0
        return read(output)[0]["token_ids"]

    wrapped, raw = tokens(), tokens("--raw")
    assert [(b + 2) % 60 for b in raw] == wrapped


def test_a_letter_that_stdout_cannot_show(tmp_path, monkeypatch):
    source = write_input(tmp_path / "in.jsonl", 1)
    source.write_text('{"prompt": "w1", "id": "é"}\n{"prompt": "w2"}')
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run_toy(["--input", source, *SHORT]) == 0
    assert b"=== \\xe9 ===" in stdout.buffer.getvalue()


def test_infill(tmp_path):
    output = tmp_path / "out.jsonl"
    assert run_toy(["--prompt", "w1 [MASK:2] w3", "--infill", "--output", output]) == 0
    (record,) = read(output)
    assert record["token_ids"][0] == 1
    assert record["token_ids"][3:] == [3]
    assert record["commit_step"] == [None, 1, 1, None]
    assert record["text"].split()[0::3] == ["w1", "w3"]
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["infill"] is True
    assert meta["decode.stop_at_eos"] is False
    assert "decode.gen_length" not in meta


def test_nonfinite_rows_are_named_and_the_exit_code_is_1(tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt_ids": [1]}, {"prompt_ids": [POISON], "id": "bad"}]
    source.write_text("\n".join(map(json.dumps, lines)))
    words = ["--input", source, "--output", output, *SHORT]
    for _ in range(2):  # Also when there is nothing left to do.
        assert run_toy(words) == 1
        err = capsys.readouterr().err
        assert "NaN or infinite logits for id bad;" in err
    assert [record["stop_reason"] for record in read(output)] == ["kl", "nonfinite"]


def bad_inputs():
    ids = '{"prompt_ids": [1]}'
    return {
        "empty prompt": (["--prompt", ""], None, "the prompt is empty"),
        "bad second prompt": (
            ["--prompt", "w1", "", *SHORT],
            None,
            "--prompt 2: the prompt",
        ),
        "too long": (["--decode.gen-length", "96"], ids, "model's context of 96"),
        "vocabulary": (
            SHORT,
            ids + '\n{"prompt_ids": [64]}',
            "line 2: prompt_ids[0] = 6",
        ),
        "malformed": ([], ids + "\n{", "in.jsonl, line 2: not valid JSON"),
        "no input": (["--input", "nowhere.jsonl"], None, "nowhere.jsonl: cannot be re"),
        "field": (["--decode.top-p", "2"], ids, "`top_p` must be in [0, 1], got 2.0"),
        "blocks": (["--decode.block-length", "3"], ids, "a multiple of `block_length`"),
        "no marker": (["--prompt", "w1", "--infill"], None, "no marker '[MASK]'"),
        "open": ([], '{"prompt_ids": [1], "open": [0]}', "`open` is for infilling"),
        "messages": (
            [],
            '{"messages": [{"role": "user", "content": "a"}]}',
            "chat mod",
        ),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_writes_nothing(name, tmp_path, capsys, monkeypatch):
    flags, lines, message = bad_inputs()[name]
    monkeypatch.chdir(tmp_path)
    if lines is not None:
        pathlib.Path("in.jsonl").write_text(lines)
        flags = ["--input", "in.jsonl", *flags]
    before = sorted(tmp_path.iterdir())
    assert run_toy([*flags, "--output", "out.jsonl"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_text_without_a_tokenizer(capsys):
    assert run_toy(["--prompt", "w1"], tokenizer=False) == 2
    assert "no tokenizer.json" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    assert run_toy(["--prompt", "w1", "--output", tmp_path / "no" / "out", *SHORT]) == 2
    err = capsys.readouterr().err
    assert "out: cannot be written: No such file or directory" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("terminal", "size"), [(True, 2), (True, 8), (False, 2)])
def test_progress_is_shown_for_long_runs_on_a_terminal(
    files, capsys, monkeypatch, terminal, size
):
    source, output = files
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    words = ["--input", source, "--output", output, "--batch-size", size, *SHORT]
    assert run_toy(words) == 0
    out, err = capsys.readouterr()
    assert ("5/5" in err) == (terminal and size == 2)
    assert out.count("\n") == 1


@pytest.fixture
def start():
    """Starts the command as a process of its own; none outlives the test."""
    with contextlib.ExitStack() as stack:

        def start(words, seconds, stdout=subprocess.PIPE):
            command = [sys.executable, TOY, str(seconds), *map(str, words), *SHORT]
            child = subprocess.Popen(
                command, stdout=stdout, stderr=subprocess.PIPE, text=True
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            return child

        yield start


def wait_for_lines(path, count):
    for _ in range(1000):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError("no results")


def test_killed_and_started_again(tmp_path, start, capsys):
    """kill -9 twice, under another batch size each; every prompt is there once."""
    source, output = write_input(tmp_path / "in.jsonl", 9), tmp_path / "out.jsonl"
    same = wanted(tmp_path, source)
    words = ["--input", source, "--output", output, "--batch-size"]
    for size, lines in ((2, 2), (1, 4)):
        child = start([*words, size], 0.25)
        wait_for_lines(output, lines)
        # While it runs nobody else may write.
        assert run_toy([*words, size, *SHORT]) == 2
        assert "another run is writing it now" in capsys.readouterr().err
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        assert output.read_bytes().count(b"\n") < 9
        assert output.with_name("out.jsonl.lock").exists()
    assert run_toy([*words, 3, *SHORT]) == 0
    assert output.read_bytes() == same
    assert not output.with_name("out.jsonl.lock").exists()


def test_interrupted(tmp_path, start):
    source, output = write_input(tmp_path / "in.jsonl", 9), tmp_path / "out.jsonl"
    same = wanted(tmp_path, source)
    words = ["--input", source, "--output", output, "--batch-size", 1]
    child = start(words, 0.2)
    wait_for_lines(output, 1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate()
    assert child.returncode == 130
    assert err == "interrupted; the same command goes on where it was.\n"
    assert out == ""
    assert run_toy([*words, *SHORT]) == 0
    assert output.read_bytes() == same


def test_an_interrupt_does_not_wait_for_the_device(start):
    child = start(["--prompt", "w1"], "inf")
    assert child.stderr.readline() == "busy\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert "a run with `--output`, started again, goes on where it was" in err
    assert out == ""


def test_the_compilation_cache_is_the_users(monkeypatch, tmp_path):
    name = "JAX_COMPILATION_CACHE_DIR"
    monkeypatch.setenv(name, "mine")
    use_compilation_cache()
    assert os.environ[name] == "mine"
    monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_compilation_cache()
    assert os.environ[name] == str(tmp_path / "lrd_jax" / "compiled")
    monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    use_compilation_cache()
    assert os.environ[name] == str(tmp_path / ".cache" / "lrd_jax" / "compiled")


def test_a_reader_that_goes_away(tmp_path, start):
    source = write_input(tmp_path / "in.jsonl", 9)
    end, writer = os.pipe()
    os.close(end)
    with os.fdopen(writer, "w") as stdout:
        child = start(["--input", source], 0, stdout)
        _, err = child.communicate()
    assert child.returncode == 141
    assert err == ""
