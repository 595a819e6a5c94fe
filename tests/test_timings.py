"""`--timings`: where the time of a command goes."""

import pathlib
import re
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from toy_run import run_toy

from lrd_jax import timings
from lrd_jax.timings import Timings, since_launch

WORDS = ["--prompt", "w1", "--decode.gen-length", "4"]
PHASES = ["launch", "import", "load", "compile", "run", "total"]


def seconds_of(line):
    assert re.fullmatch(r"timings: \w+ [\d.]+ s( \| \w+ [\d.]+ s)*", line)
    pairs = [part.split() for part in line.removeprefix("timings: ").split(" | ")]
    return {name: float(seconds) for name, seconds, _ in pairs}


def test_the_switch_prints_one_line_on_stderr(capsys):
    assert run_toy(WORDS) == 0
    without = capsys.readouterr()
    assert without.err == ""
    assert run_toy([*WORDS, "--timings"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == without.out.splitlines()[0]
    assert err.count("\n") == 1
    seconds = seconds_of(err.strip())
    assert list(seconds) == PHASES
    assert seconds["compile"] > 0
    assert sum(seconds.values()) <= 2 * seconds["total"] + 0.03  # Each is rounded.


def test_a_phase_has_its_own_time(capsys):
    def load(_):
        time.sleep(0.2)
        return None, jnp.zeros(())

    assert run_toy([*WORDS, "--timings"], load=load) == 0
    seconds = seconds_of(capsys.readouterr().err.strip())
    assert seconds["load"] >= 0.2


def test_a_run_with_nothing_to_do_has_fewer_phases(capsys, tmp_path):
    words = [*WORDS, "--output", str(tmp_path / "out.jsonl"), "--timings"]
    for _ in range(2):
        capsys.readouterr()
        assert run_toy(words) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert list(seconds_of(line)) == ["launch", "import", "load", "total"]


def test_a_phase_adds_up(monkeypatch):
    now = iter([0, 1, 3, 10, 14, 20])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(timings, "since_launch", lambda: None)
    spent = Timings()
    for _ in range(2):
        with spent.phase("load"):
            pass
    assert spent.line() == "timings: launch unknown | load 6.00 s | total 20.00 s"


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="needs /proc")
def test_launch_is_since_the_process_began():
    code = (
        "import time; time.sleep(0.3); from lrd_jax.timings import since_launch; "
        "print(since_launch())"
    )
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    # The kernel counts hundredths.
    assert 0.29 < float(out.stdout) < time.monotonic() - start + 0.02


def test_a_process_of_any_name_and_a_system_that_does_not_say(monkeypatch):
    fields = " ".join(["S"] + ["0"] * 18 + ["250"] + ["0"] * 20)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: f"7 (a) b 9) {fields}")
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: 4.0)
    assert since_launch() == 1.5

    def absent(path):
        raise FileNotFoundError

    monkeypatch.setattr(pathlib.Path, "read_text", absent)
    assert since_launch() is None
