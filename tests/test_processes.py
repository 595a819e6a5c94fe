"""Several processes that share a run: as real ones, and what can be seen from one."""

import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import measure_restore
import pytest
import toy_evaluate
from test_generate import SHORT, read, wanted, write_input
from toy_run import POISON, run_toy, toy_config

from lrd_jax import cli, sharding
from lrd_jax.errors import UserError
from lrd_jax.evaluation import request as evaluation_request
from lrd_jax.mesh_shape import MeshShape
from lrd_jax.parts import open_output
from lrd_jax.processes import AUTO, Meeting, Team, join

HERE = pathlib.Path(__file__).parent
GENERATE = [sys.executable, str(HERE / "toy_run.py")]
EVALUATE = [sys.executable, str(HERE / "toy_evaluate.py")]
TRIO = ("--coordinator", "10.0.0.1:1234", "--num-processes", "2", "--process-id", "1")


@pytest.fixture
def start():
    """Starts commands as the processes of one run; none outlives the test."""
    with contextlib.ExitStack() as stack:

        def start(*commands):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            children = []
            for i, command in enumerate(commands):
                flags = ["--coordinator", address, "--process-id", i]
                words = [*command, *flags, "--num-processes", len(commands)]
                child = subprocess.Popen(
                    [*map(str, words)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                stack.enter_context(child)
                stack.callback(child.kill)
                children.append(child)
            return children

        yield start


def ends(children):
    """Exit code, stdout and stderr of each."""
    told = [child.communicate(timeout=300) for child in children]
    return [(c.returncode, *t) for c, t in zip(children, told, strict=True)]


def parts(path):
    return sorted(path.parent.glob(path.name + ".*"))


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_one_is_killed_and_all_are_started_again(tmp_path, start):
    source, output = write_input(tmp_path / "in.jsonl", 11), tmp_path / "out.jsonl"
    same = wanted(tmp_path, source)
    flags = ["--input", source, "--output", output, "--batch-size", 1, *SHORT]
    children = start(*[[*GENERATE, 0.3, *flags]] * 2)
    mine = [output.with_name(f"out.jsonl.part-{i}-of-2") for i in range(2)]
    deadline = time.monotonic() + 120
    while min(map(count_lines, mine)) < 2:
        assert time.monotonic() < deadline
        assert [child.poll() for child in children] == [None, None]
        time.sleep(0.02)
    children[0].kill()
    (code, *_), (other, out, _) = ends(children)
    assert code == -signal.SIGKILL
    assert other != 0  # It may stop, or find at its end that it is alone.
    assert out == ""
    assert not output.exists()
    kept = [count_lines(path) for path in mine]
    assert kept[0] < 6

    made = ends(start(*[[*GENERATE, 0, *flags]] * 2))
    for i, (code, out, err) in enumerate(made):
        assert code == 0, err
        assert out == ""
        left = (6, 5)[i] - kept[i]
        if left:
            assert f"part-{i}-of-2: {kept[i]} of {(6, 5)[i]} are done already" in err
            assert f"process {i} of 2: prompts {left} | " in err
    assert output.read_bytes() == same
    assert parts(output) == [tmp_path / "out.jsonl.meta.json"]
    # As one process would have left it.
    assert run_toy([*flags]) == 0
    assert output.read_bytes() == same


def test_a_mistake_of_one_is_told_by_all(tmp_path, start):
    source, other = tmp_path / "in.jsonl", tmp_path / "other.jsonl"
    write_input(source, 3)
    write_input(other, 4)
    flags = ["--output", tmp_path / "out.jsonl", *SHORT]
    made = ends(
        start(*[[*GENERATE, 0, "--input", path, *flags] for path in (source, other)])
    )
    for i, (code, out, err) in enumerate(made):
        assert (code, out) == (2, "")
        assert f"process {1 - i} has other settings or another input" in err
    assert not parts(tmp_path / "out.jsonl")


def test_evaluate(tmp_path, start):
    short = "--gen-length 4 --batch-size 4 --tasks toys,single --n 9 --methods lrd"
    flags = [*short.split(), "--output"]
    made = ends(start(*[[*EVALUATE, 0, *flags, tmp_path / "two"]] * 2))
    whole = [sys.executable, EVALUATE[1], "0", *flags, str(tmp_path / "one")]
    one = subprocess.run(whole, capture_output=True, text=True)
    (code, out, err), (code_1, out_1, _) = made
    assert (code, code_1, one.returncode) == (0, 0, 0), err
    assert out == (tmp_path / "two" / "table.md").read_text()
    assert out_1 == ""
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "lrd.jsonl",
        "lrd.jsonl.meta.json",
        "report.json",
        "table.md",
    ]
    records = [
        [record | {"seconds": 0} for record in read(tmp_path / name / "lrd.jsonl")]
        for name in ("one", "two")
    ]
    assert len(records[0]) == 18
    assert records[0] == records[1]
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["settings"]["processes"] == 2


def test_a_checkpoint_is_read_by_each_for_itself(tmp_path, start):
    """One has nothing to do and so reads no weights; the other must not wait for it."""
    output = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "lrd_jax.generate",
        "--prompt",
        "1 + 2",
        "--output",
    ]
    small = ["--decode.gen-length", 2, "--batch-size", 1]
    for code, out, err in ends(start(*[[*command, output, *small]] * 2)):
        assert code == 0, err
        assert out == ""
    assert len(read(output)) == 1


def test_processes_in_groups_share_a_copy_of_the_weights(tmp_path, start):
    """Four of one device each, two copies; the prompts are of two lengths."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["Copy this: cow", "Reverse this list: " + ", ".join(["owl"] * 12)] * 2
    source.write_text("\n".join(json.dumps({"prompt": p}) for p in prompts[:3]))
    command = [sys.executable, "-m", "lrd_jax.generate", "--input", source, "--seed", 3]
    command += ["--decode.gen-length", 8, "--decode.temperature", 0.5]
    command += ["--batch-size", 2, "--output"]
    made = ends(start(*[[*command, output, "--mesh", "model=2"]] * 4))
    for i, (code, out, err) in enumerate(made):
        assert code == 0, err
        assert out == ""
        assert (f"process {i} of 4: prompts {2 - i // 2} | " in err) == (i % 2 == 0)
    alone = tmp_path / "alone.jsonl"
    subprocess.run([*map(str, [*command, alone])], check=True)
    texts = [[record["text"] for record in read(path)] for path in (output, alone)]
    assert len(texts[0]) == 3
    assert texts[0] == texts[1]
    assert parts(output) == [tmp_path / "out.jsonl.meta.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mesh_over_two_processes_is_read_by_both(tmp_path):
    """Each checks its devices' shards; what it takes of memory is not looked at."""
    measure_restore.make(tmp_path, measure_restore.config(scale=16))
    assert len(measure_restore.measure(tmp_path)) == 2


class Alone(Team):
    """One of several processes, when nobody waits for the others."""

    def exchange(self, text=""):
        return [text] * self.count


def write(path, ids, team, count=None, settings=None):
    """Writes results of a process, `count` of them and then it dies."""
    settings = settings or {"seed": 0}
    with (
        contextlib.suppress(KeyboardInterrupt),
        open_output(path, settings, ids, team) as (file, share),
    ):
        taken = file.num_done
        if left := ids[share][taken:][:count]:
            file.start()
            file.append([{"id": name, "by": [team.id, team.count]} for name in left])
        if count is not None:
            raise KeyboardInterrupt
        return taken


def made_by(path):
    return [record["by"] for record in read(path)]


def test_parts_become_one_in_order(tmp_path):
    path, ids = tmp_path / "out", ["a", 1, "c", 3, "e"]
    for i in (2, 1, 0):
        assert write(path, ids, Alone(i, 3)) == 0
    assert [record["id"] for record in read(path)] == ids
    assert made_by(path) == [[0, 3], [1, 3], [2, 3], [0, 3], [1, 3]]
    assert parts(path) == [tmp_path / "out.meta.json"]


def test_more_processes_than_results(tmp_path):
    for i in (2, 1, 0):
        write(tmp_path / "out", [0, 1], Alone(i, 3))
    assert made_by(tmp_path / "out") == [[0, 3], [1, 3]]


@pytest.mark.parametrize("count", [1, 2])
def test_what_other_numbers_of_processes_left_is_taken_over(tmp_path, count):
    path, ids = tmp_path / "out", list(range(9))
    write(path, ids, Team(), 1)  # One process makes row 0,
    for i, some in enumerate((2, 1, 1)):  # three have that, and make 3; 1; 2.
        write(path, ids, Alone(i, 3), some - (i == 0))
    with open(tmp_path / "out.part-1-of-3", "ab") as file:
        file.write(b'{"id": 4, "b')  # It was killed within a line.
    taken = [write(path, ids, Alone(i, count)) for i in reversed(range(count))]
    assert sum(taken) == 4
    assert [record["id"] for record in read(path)] == ids
    assert made_by(path)[:5] == [[0, 1], [1, 3], [2, 3], [0, 3], [0, count]]
    assert parts(path) == [tmp_path / "out.meta.json"]


def test_parts_of_other_settings_are_refused(tmp_path):
    path, ids = tmp_path / "out", [0, 1, 2]
    write(path, ids, Alone(1, 2), 1)
    for team in (Team(), Alone(1, 2)):
        with pytest.raises(UserError, match=r"part-1-of-2 .* seed was 0, now 1"):
            write(path, ids, team, settings={"seed": 1})
    assert not path.exists()


def test_a_joining_that_was_killed_goes_on(tmp_path):
    path, ids = tmp_path / "out", [0, 1, 2, 3]
    write(path, ids, Alone(1, 2))
    write(path, ids, Alone(0, 2), 2)
    part = tmp_path / "out.part-0-of-2"
    meta = part.with_name(part.name + ".meta.json").read_bytes()
    (tmp_path / "out.meta.json").write_bytes(meta)
    first = part.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(first + b'{"id": 1, "b')
    assert write(path, ids, Alone(0, 2)) == 2
    assert [record["id"] for record in read(path)] == ids


def test_a_part_on_another_file_system_is_missed(tmp_path):
    with pytest.raises(
        UserError, match="result of id 1 is in none of the 1 part files"
    ):
        write(tmp_path / "out", [0, 1, 2], Alone(0, 2))
    assert parts(tmp_path / "out")  # What there is stays.


def test_a_nonfinite_row_of_a_part_is_known(tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'{{"prompt_ids": [1]}}\n{{"prompt_ids": [{POISON}]}}')
    flags = ["--input", source, "--output", output, *SHORT]
    assert run_toy(flags) == 1
    lines = output.read_bytes().splitlines(keepends=True)
    meta = (tmp_path / "out.jsonl.meta.json").read_bytes()
    output.unlink()
    for i in range(2):
        (tmp_path / f"out.jsonl.part-{i}-of-2").write_bytes(lines[i])
        (tmp_path / f"out.jsonl.part-{i}-of-2.meta.json").write_bytes(meta)
    capsys.readouterr()
    assert run_toy(flags) == 1
    assert "logits for id 1;" in capsys.readouterr().err


def test_what_failed_elsewhere_fails_here():
    class Two(Team):
        def exchange(self, text=""):
            return [text, "no room"]

    with pytest.raises(UserError, match=r"^process 1: no room$"):
        Two(0, 2).together(lambda: 1)
    assert Team().together(lambda: 1) == 1


def changed(**values):
    """The three flags, with others in place of some; None leaves one out."""
    flags = dict(zip(TRIO[::2], TRIO[1::2], strict=True))
    flags |= {f"--{name.replace('_', '-')}": value for name, value in values.items()}
    return [word for pair in flags.items() if pair[1] is not None for word in pair]


BAD = {
    "no address": (changed(coordinator=None), "`--num-processes 2` needs `--coord"),
    "no number": (changed(num_processes=None), "needs `--num-processes N` and"),
    "no id": (changed(process_id=None), "needs `--num-processes N` and `--process-id"),
    "no port": (changed(coordinator="host"), "must be HOST:PORT .* got 'host'"),
    "port": (changed(coordinator="host:70000"), "got 'host:70000'"),
    "too few": (changed(num_processes="0"), "must be at least 1, got 0"),
    "id": (changed(process_id="2"), r"must be in \[0, 2\).* got 2"),
    "negative": (changed(process_id="-1"), r"must be in \[0, 2\).* got -1"),
    "auto": (changed(coordinator="auto"), "leave out `--num-processes 2`"),
}
PARSERS = {
    "generate": lambda words: cli.parse(["--prompt", "hello", *words]),
    "evaluate": evaluation_request.parse,
}


@pytest.mark.parametrize("command", PARSERS)
@pytest.mark.parametrize("name", BAD)
def test_bad_flags(command, name):
    flags, message = BAD[name]
    with pytest.raises(UserError, match=message):
        PARSERS[command]([*flags, "--output", "out"])


@pytest.mark.parametrize("command", PARSERS)
def test_good_flags(command):
    parse = PARSERS[command]
    assert parse([]).meeting is None
    assert parse([*TRIO, "--output", "o"]).meeting == Meeting("10.0.0.1:1234", 2, 1)
    assert parse(["--coordinator", "auto", "--output", "o"]).meeting == Meeting(AUTO)
    with pytest.raises(UserError, match="`--coordinator` needs `--output`"):
        parse(TRIO)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_that_is_taken(family):
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("no such addresses on this machine")
    with taken:
        port = taken.getsockname()[1]
        where = f"`--coordinator localhost:{port}`: port {port} of this machine"
        with pytest.raises(UserError, match=f"{where} cannot be used .*in use"):
            join(Meeting(f"localhost:{port}", 2, 0))


def test_nothing_to_find(monkeypatch):
    def initialize(*args):
        assert args == (None, None, None)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(
        UserError, match=r"`--coordinator auto`: .*Give `--coordinator H"
    ):
        join(Meeting(AUTO))
    assert join(None) == Team(0, 1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MeshShape(None, 3), r"as many processes as divide 4\.$"),
        (MeshShape(None, 8), r"takes all 1 devices of each, .* as divide 4\.$"),
        (MeshShape(2, 2), "is what 2 of the 4 processes do, and needs 4 devices; they"),
        (MeshShape(2, 1), "is what 1 of the 4 processes do, and needs 2 devices; they"),
    ],
)
def test_a_mesh_that_processes_cannot_share(monkeypatch, shape, message):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match=message):
        sharding.open_mesh(shape, toy_config(), "float32")
    assert sharding.open_mesh(None, toy_config(), "float32")[0] is None


def test_the_first_of_a_group_writes(tmp_path):
    path, ids = tmp_path / "out", ["a", 1, "c", 3, "e"]
    taken = [write(path, ids, Alone(i, 4).in_groups(2)) for i in (2, 3, 0, 1)]
    assert taken == [0, 2, 0, 5]  # The last one finds that the file is whole.
    assert made_by(path) == [[0, 4], [2, 4], [0, 4], [2, 4], [0, 4]]
    assert parts(path) == [tmp_path / "out.meta.json"]


def test_a_group_goes_by_what_its_first_process_says(tmp_path):
    class Told(Team):
        def exchange(self, text=""):
            if not text.startswith("["):
                return [text] * self.count
            return ['[9, ["z"]]', '[9, ["z"]]', '[1, ["a"]]', text]

    team = Told(3, 4).in_groups(2)
    with open_output(tmp_path / "out", {}, ["a", "b", "c"], team) as (file, share):
        assert (file.num_done, file.nonfinite, share) == (1, ["a"], slice(1, None, 2))
        file.start()
        file.append([{"id": "a"}])
    assert not parts(tmp_path / "out")


def test_a_share_of_the_problems_keeps_their_groups():
    from lrd_jax.evaluation.problems import make_groups
    from lrd_jax.evaluation.run import share_of

    members = {name: [toy_evaluate.TOYS[name]] for name in ("toy_a", "single")}
    groups = make_groups(
        members,
        n=5,
        split="test",
        seed=0,
        gen_length=4,
        source=toy_evaluate.toy_source(),
    )
    numbered = [p for group in groups for p in group.problems]
    shares = [share_of(groups, slice(i, None, 3)) for i in range(3)]
    for i, share in enumerate(shares):
        assert [group.name for group in share] == ["toy_a", "single"]
        assert [p for group in share for p in group.problems] == numbered[i::3]
