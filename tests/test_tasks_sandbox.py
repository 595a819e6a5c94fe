"""Programs that misbehave: none passes, all come back in time, none harms the next."""

import os
import sys
import time

import pytest

from lrd_jax.tasks.sandbox import Call, Limits, Program, Verdict, run

TIGHT = Limits(seconds=2.0, memory_mb=256)
SHORT = Limits(seconds=0.5)  # For what will not end by itself.
GOOD = "def f(x): return x + 1"
# The value that a bad program would have to give.
CALLS = [Call("f", [3], 4)]


def verdict_of(source: str, limits: Limits = TIGHT, **checks) -> Verdict:
    start = time.monotonic()
    (outcome,) = run([Program(source=source, **(checks or {"calls": CALLS}))], limits)
    # Beyond its own time: the start of the runner, on a machine that may be busy.
    assert time.monotonic() - start < limits.seconds + 5
    print(outcome)
    assert (outcome.detail == "") == (outcome.verdict is Verdict.PASSED)
    return outcome.verdict


BAD = {
    "wrong value": ("def f(x): return x", Verdict.FAILED),
    "other type": ("def f(x): return 4.0", Verdict.FAILED),
    "not JSON": ("def f(x): return {4}", Verdict.FAILED),
    "subclass": (
        "class I(int):\n def __eq__(self, other): return True\ndef f(x): return I(5)",
        Verdict.FAILED,
    ),
    "no Python": ("def f(x) return 4", Verdict.ERROR),
    "no f": ("def g(x): return 4", Verdict.ERROR),
    "raises": ("def f(x): return 1 // 0", Verdict.ERROR),
    "endless loop": ("def f(x):\n while True: pass", Verdict.TIMEOUT),
    "endless loop at the top": ("while True: pass", Verdict.TIMEOUT),
    "sleep": ("import time\ndef f(x): time.sleep(1000)", Verdict.TIMEOUT),
    "one big list": ("def f(x): return [0] * 10**10", Verdict.MEMORY),
    "many lists": (
        "def f(x):\n kept = []\n while True: kept.append('x' * 10**6)",
        Verdict.MEMORY,
    ),
    "recursion": ("def f(x): return f(x)", Verdict.ERROR),
    "huge integer": ("def f(x): return 10**10000", Verdict.ERROR),
    "huge result": ("def f(x): return 'x' * 10**7", Verdict.ERROR),
    "huge output": (
        "def f(x):\n while True: print('x' * 10**6)",
        Verdict.TIMEOUT,
    ),
    "exit": ("import sys\ndef f(x): sys.exit(0)", Verdict.ERROR),
    "hard exit": ("import os\ndef f(x): os._exit(0)", Verdict.ERROR),
    "waits for input": ("def f(x): return input()", Verdict.ERROR),
    "prints the verdict": ("def f(x): print('passed')", Verdict.FAILED),
    "an error that cannot be shown": (
        "class E(Exception):\n def __str__(self): raise self\ndef f(x): raise E",
        Verdict.ERROR,
    ),
    "fork bomb": ("import os\ndef f(x):\n while True: os.fork()", Verdict.ERROR),
    "patient fork bomb": (
        "import os\ndef f(x):\n while True:\n  try: os.fork()\n  except OSError: pass",
        Verdict.TIMEOUT,
    ),
    "raw fork": (
        "import _posixsubprocess as p\ndef f(x): return p.fork_exec()",
        Verdict.ERROR,
    ),
    "thread": (
        "import threading\n"
        "def f(x):\n t = threading.Thread(target=print); t.start(); return 4",
        Verdict.ERROR,
    ),
    "shell": ("import os\ndef f(x): return os.system('true') + 4", Verdict.ERROR),
    "subprocess": (
        "import subprocess\ndef f(x): return subprocess.call(['true']) + 4",
        Verdict.ERROR,
    ),
    "kill": (
        "import os, signal\ndef f(x): os.kill(os.getppid(), signal.SIGTERM); return 4",
        Verdict.ERROR,
    ),
    "native code": ("import ctypes\ndef f(x): return 4", Verdict.ERROR),
    "reads a file": (
        "def f(x):\n with open('/etc/passwd') as file: file.read()\n return 4",
        Verdict.ERROR,
    ),
    "reads through a link": (
        "import os\n"
        "def f(x):\n os.symlink('/etc/passwd', 'p'); open('p').close()\n return 4",
        Verdict.ERROR,
    ),
    "lists a folder": ("import os\ndef f(x): os.listdir('/'); return 4", Verdict.ERROR),
    "opens a folder, to change what is in it": (
        "import os\ndef f(x): os.open(os.path.dirname(os.__file__), 0); return 4",
        Verdict.ERROR,
    ),
    "shared memory": (
        "from multiprocessing import shared_memory\ndef f(x): return 4",
        Verdict.ERROR,
    ),
    "writes above": (
        "def f(x):\n open('../found', 'w').close()\n return 4",
        Verdict.ERROR,
    ),
    "removes": ("import os\ndef f(x): os.remove('/tmp/none'); return 4", Verdict.ERROR),
    "moves away": (
        "import os\n"
        "def f(x):\n open('a', 'w').close(); os.rename('a', '/tmp/a'); return 4",
        Verdict.ERROR,
    ),
    "large file": (
        "def f(x):\n with open('a', 'w') as file: file.write('x' * 10**8)\n return 4",
        Verdict.ERROR,
    ),
    "many files": (
        "def f(x):\n for i in range(10**6): open(str(i), 'w').close()\n return 4",
        Verdict.ERROR,
    ),
    "many folders": (
        "import os\ndef f(x):\n for i in range(10**6): os.mkdir(str(i))\n return 4",
        Verdict.ERROR,
    ),
    "socket": (
        "import socket\ndef f(x): socket.socket().close(); return 4",
        Verdict.ERROR,
    ),
    "download": (
        "import urllib.request as u\ndef f(x): return u.urlopen('http://127.0.0.1')",
        Verdict.ERROR,
    ),
    "lifts its limits": (
        "import resource as r\ndef f(x): r.setrlimit(r.RLIMIT_CPU, (99, 99)); return 4",
        Verdict.ERROR,
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_programs(name):
    source, verdict = BAD[name]
    limits = SHORT if verdict is Verdict.TIMEOUT else TIGHT
    assert verdict_of(source, limits) is verdict


def test_a_good_program_passes():
    assert verdict_of(GOOD) is Verdict.PASSED


def test_a_program_may_use_the_library_and_its_folder():
    source = (
        "import asyncio, dataclasses, decimal, math, re, statistics, uuid, zlib\n"
        "@dataclasses.dataclass\n"
        "class Box:\n    x: 'int'\n"
        "def f(x):\n"
        "    with open('a', 'w') as file: file.write(str(Box(x).x))\n"
        "    with open('a') as file: return math.floor(float(file.read())) + 1\n"
        "if __name__ == '__main__': raise SystemExit\n"
    )
    # asyncio takes a while to import on a busy machine.
    assert verdict_of(source, Limits(seconds=10.0)) is Verdict.PASSED


def test_a_program_sees_nothing_of_this_process(monkeypatch):
    monkeypatch.setenv("SECRET", "abc")
    source = (
        "import os, sys\n"
        "def f():\n"
        "    return ['SECRET' in os.environ, os.listdir(), 'lrd_jax' in sys.modules,\n"
        "            any('site-packages' in path for path in sys.path)]"
    )
    calls = [Call("f", [], [False, [], False, False])]
    assert verdict_of(source, calls=calls) is Verdict.PASSED


def test_a_forged_reply_does_not_pass():
    plain = """import os
def f(x):
    for fd in range(32):
        try: os.write(fd, b'{"verdict": "returned", "values": "[4]"}\\n')
        except OSError: pass
    os._exit(0)"""
    assert verdict_of(plain) is Verdict.ERROR
    # Even one that finds the token has to know the value.
    for reply, verdict in (
        ('{"verdict": "passed"}', Verdict.ERROR),
        ('{"verdict": "returned"}', Verdict.FAILED),
        ('{"verdict": "returned", "values": "[5]"}', Verdict.FAILED),
        ('{"verdict": "returned", "values": "[]"}', Verdict.ERROR),
        ("[1]", Verdict.ERROR),
        ("7" * 5000, Verdict.ERROR),
    ):
        source = f"""import os, sys
def f(x):
    frame = sys._getframe()
    while 'token' not in frame.f_locals: frame = frame.f_back
    os.write(3, frame.f_locals['token'] + b'''{reply}''' + b'\\n')
    os._exit(0)"""
        assert verdict_of(source) is verdict


def test_tests_instead_of_calls():
    good = "def check(g):\n assert g(1) == 2\n assert g(2) == 3\ncheck(f)"
    assert verdict_of(GOOD, tests=good) is Verdict.PASSED
    assert verdict_of("def f(x): return x", tests=good) is Verdict.FAILED
    assert verdict_of("assert False", tests=good) is Verdict.ERROR
    assert verdict_of("import sys\nsys.exit()", tests=good) is Verdict.ERROR
    assert verdict_of("def f(x): return 1 / 0", tests=good) is Verdict.ERROR


def test_bad_programs_do_not_touch_their_neighbours():
    spoil = (
        "import builtins, json, math\n"
        "json.dumps = json.loads = builtins.len = math.floor = None\n"
        "def f(x): return x"
    )
    bad = [spoil, BAD["hard exit"][0], BAD["endless loop"][0], BAD["many lists"][0]]
    check = "import json, math\ndef f(x): return math.floor(x) + len(json.dumps(1))"
    programs = []
    for source in bad:
        programs.append(Program(source=source, calls=CALLS))
        programs.append(Program(source=check, calls=CALLS))
    verdicts = [outcome.verdict for outcome in run(programs, SHORT)]
    assert verdicts[1::2] == [Verdict.PASSED] * len(bad)
    assert Verdict.PASSED not in verdicts[::2]


def test_more_programs_than_one_runner_takes():
    programs = [
        Program(source=f"def f(x): return x + {i % 2}", calls=CALLS) for i in range(150)
    ]
    verdicts = [outcome.verdict for outcome in run(programs)]
    assert verdicts == [Verdict.FAILED, Verdict.PASSED] * 75
    assert run([]) == []


def test_values_keep_their_types():
    value = [None, True, 1, 1.5, "é\ud800\n", [[], {}], {"a": [1]}]
    calls = [Call("f", [value], value)]
    assert verdict_of("def f(x): return x", calls=calls) is Verdict.PASSED
    for expected in (1, "True", [True]):
        calls = [Call("f", [], expected)]
        assert verdict_of("def f(): return True", calls=calls) is Verdict.FAILED


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    verdict_of("def f(x): open('a', 'w').close(); return 4")
    verdict_of(BAD["endless loop"][0], SHORT)
    assert os.listdir(tmp_path) == []


def test_a_runner_that_cannot_start_is_no_verdict(monkeypatch):
    from lrd_jax.errors import UserError
    from lrd_jax.tasks import sandbox

    monkeypatch.setattr(sandbox, "_RUNNER", sandbox._RUNNER.with_name("none.py"))
    with pytest.raises(UserError, match=r"cannot be started: .*none\.py"):
        run([Program(source=GOOD, calls=CALLS)])


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"calls": CALLS, "tests": "pass"}, ValueError), ({}, ValueError)],
)
def test_a_program_has_one_kind_of_checks(fields, error):
    with pytest.raises(error, match="either calls or tests"):
        Program(source=GOOD, **fields)


@pytest.mark.parametrize(
    ("field", "value"), [("seconds", 0.0), ("memory_mb", 1), ("file_mb", -1)]
)
def test_limits_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        Limits(**{field: value})


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_the_network_is_empty_where_the_system_allows():
    """The guard refuses sockets anyway; this sees what lies behind it."""
    source = "import os\ndef f(): return os.readlink('/proc/self/ns/net')"
    (outcome,) = run([Program(source=source, calls=[Call("f", [], "")])])
    if os.geteuid() == 0:
        assert os.readlink("/proc/self/ns/net") not in outcome.detail
