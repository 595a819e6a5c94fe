import json
import os
import subprocess
import sys

import pytest

from lrd_jax.errors import UserError
from lrd_jax.runfile import RunFile

SETTINGS = {"seed": 0, "decode.r_f": 0.15}
IDS = ["a", 1, "c", 3]


def record(name, **more):
    return {"id": name, "stop_reason": "kl"} | more


def open_run(folder, settings=SETTINGS, ids=IDS):
    return RunFile(folder / "out.jsonl", settings, ids)


def write(folder, *names):
    with open_run(folder) as run:
        run.start()
        for name in names:
            run.append([record(name)])


def lines(folder):
    text = (folder / "out.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line)["id"] for line in text.splitlines()]


def test_a_run_from_end_to_end(tmp_path):
    with open_run(tmp_path) as run:
        assert run.num_done == 0
        run.start()
        assert json.loads(run.meta_path.read_text()) == SETTINGS
        assert run.lock_path.exists()
        run.append([record("a"), record(1)])
        assert lines(tmp_path) == ["a", 1]  # On the disk already.
        run.append([record("c"), record(3)])
    assert lines(tmp_path) == IDS
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out.jsonl", "out.jsonl.meta.json"}


def test_it_goes_on_where_it_was(tmp_path):
    write(tmp_path, "a", 1)
    with open_run(tmp_path) as run:
        assert run.num_done == 2
        run.start()
        run.append([record("c")])
    assert lines(tmp_path) == ["a", 1, "c"]


def test_a_killed_run_stopped_anywhere(tmp_path):
    """Whatever part of the file was written, the whole lines stay and no others."""
    write(tmp_path, *IDS)
    path = tmp_path / "out.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with open_run(tmp_path) as run:
            assert run.num_done == whole[:size].count(b"\n")
            run.start()
            run.append([record(name) for name in IDS[run.num_done :]])
        assert path.read_bytes() == whole


def test_settings_without_results_bind_nobody(tmp_path):
    (tmp_path / "out.jsonl.meta.json").write_text('{"seed": 5}')
    write(tmp_path, "a")
    assert json.loads((tmp_path / "out.jsonl.meta.json").read_text()) == SETTINGS


def test_nonfinite_rows_are_remembered(tmp_path):
    with open_run(tmp_path) as run:
        run.start()
        run.append([record("a"), record(1, stop_reason="nonfinite")])
    with open_run(tmp_path) as run:
        assert run.nonfinite == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SETTINGS | {"seed": 1}, "seed was 0, now 1."),
        (SETTINGS | {"decode.r_f": 0.2}, "decode.r_f was 0.15, now 0.2."),
        ({"seed": 0}, "decode.r_f was 0.15, now None."),
        (SETTINGS | {"raw": None}, "raw was None, now None."),
        ({"seed": 1, "decode.r_f": None}, "was 0.15, now None; seed was 0, now 1."),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, settings, message):
    write(tmp_path, "a")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="made with other settings") as caught:
        open_run(tmp_path, settings).__enter__()
    assert message in str(caught.value)
    assert snapshot(tmp_path) == before


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("content", ["", "precious\n"])
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, content):
    (tmp_path / "out.jsonl").write_text(content)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"out\.jsonl exists, but no out\.jsonl\.meta"):
        open_run(tmp_path).__enter__()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("meta", ["", "[1]", "\0"])
def test_a_damaged_meta_is_refused(tmp_path, meta):
    write(tmp_path, "a")
    (tmp_path / "out.jsonl.meta.json").write_text(meta)
    with pytest.raises(UserError, match="not the settings of a run"):
        open_run(tmp_path).__enter__()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1', "line 2: not a result"),
        ("3", "line 2: not a result"),
        ("{}", "line 2: not a result"),
        ('{"id": "c"}', "line 2: has id 'c' where 1 was expected"),
        ('{"id": true}', "line 2: has id True where 1 was expected"),
    ],
)
def test_a_changed_output_is_refused(tmp_path, line, message):
    write(tmp_path, "a")
    with open(tmp_path / "out.jsonl", "a") as file:
        file.write(line + "\n")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=message):
        open_run(tmp_path).__enter__()
    assert snapshot(tmp_path) == before


def test_more_results_than_prompts_are_refused(tmp_path):
    write(tmp_path, "a", 1)
    with pytest.raises(UserError, match="line 2: has id 1 where None was expected"):
        open_run(tmp_path, ids=["a"]).__enter__()


def test_a_second_writer_is_refused(tmp_path):
    with open_run(tmp_path) as run:
        run.start()
        with pytest.raises(UserError, match="another run is writing it now"):
            open_run(tmp_path).__enter__()
        assert run.lock_path.exists()
        run.append([record("a")])
    write(tmp_path, 1)  # And now it is free.


HOLDER = """
import sys, time
from lrd_jax.runfile import RunFile
with RunFile(sys.argv[1], {"seed": 0, "decode.r_f": 0.15}, ["a", 1, "c", 3]) as run:
    run.start()
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_dead_process_blocks_nobody(tmp_path):
    path = str(tmp_path / "out.jsonl")
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another run is writing it now"):
        open_run(tmp_path).__enter__()
    child.kill()
    child.communicate()
    assert (tmp_path / "out.jsonl.lock").exists()
    write(tmp_path, "a")
    assert not (tmp_path / "out.jsonl.lock").exists()


RACER = """
import sys, time
from lrd_jax.runfile import RunFile
path, count, until = sys.argv[1], sys.argv[2], time.monotonic() + 1.0
entered = 0
while entered < 10 or time.monotonic() < until:  # A busy machine gives it little time.
    try:
        with RunFile(path, {}, []):
            value = int(open(count).read() or 0)
            open(count, "w").write(str(value + 1))
            print(1)
            entered += 1
    except ValueError:
        pass
"""


def test_removing_the_lock_lets_nobody_in_twice(tmp_path):
    """Two processes take turns; a lost update would show two inside at once."""
    count = tmp_path / "count"
    count.write_text("0")
    words = [sys.executable, "-c", RACER, str(tmp_path / "out.jsonl"), str(count)]
    children = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(2)]
    entered = sum(child.communicate(timeout=60)[0].count(b"1") for child in children)
    assert entered >= 20
    assert int(count.read_text()) == entered


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot be written: not a regular file"):
        RunFile(tmp_path, SETTINGS, IDS).__enter__()
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        RunFile(tmp_path / "no" / "out.jsonl", SETTINGS, IDS).__enter__()
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        RunFile(tmp_path / ("x" * 300), SETTINGS, IDS).__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        RunFile(tmp_path / "file" / "out.jsonl", SETTINGS, IDS).__enter__()


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path, "a")

    def full(handle):
        raise OSError(28, "No space left on device")

    with open_run(tmp_path) as run:
        run.start()
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="cannot be written: No space left"):
            run.append([record(1)])
    monkeypatch.undo()
    with open_run(tmp_path) as run:
        assert run.num_done >= 1


def test_the_meta_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def die(*names):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", die)
    with open_run(tmp_path) as run:
        with pytest.raises(UserError, match="cannot be written: Input/output error"):
            run.start()
    assert not (tmp_path / "out.jsonl.meta.json").exists()
    assert not (tmp_path / "out.jsonl").exists()


def test_nothing_but_json_is_written(tmp_path):
    with open_run(tmp_path) as run:
        run.start()
        with pytest.raises(ValueError, match="not JSON compliant"):
            run.append([record("a", kl=[float("nan")])])
    assert lines(tmp_path) == []
