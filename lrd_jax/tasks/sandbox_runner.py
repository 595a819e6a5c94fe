"""The process that runs programs for `sandbox`: a script, which nothing imports.

Reads one JSON request, writes one line when ready and one for each program. It has to
do without the rest of the package, as programs, forked from it, see what it imported.
"""

import _thread
import contextlib
import ctypes
import json
import os
import posix
import resource
import select
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any

_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000  # unshare(2)
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38  # prctl(2)
_NOBODY = 65534
_LONGEST_REPLY = 1 << 18
_MOST_WRITES = (
    100  # Files that a program may open for writing: they outlive its memory.
)

# Audit events by their first letters (`cpython.PyInterpreterState_New`: a new one would
# have no audit hook). One that is not here and has no path below is let through.
_REFUSED = tuple(
    """
    socket. subprocess. ctypes. pty. resource. fcntl. sqlite3. syslog. cpython.run_
    cpython.PyInterpreterState_New os.exec os.fork os.kill os.posix_spawn os.spawn
    os.startfile os.system os.chdir os.fchdir os.chroot os.putenv signal.pthread_kill
    """.split()
)
# Modules that reach the system without an event.
_REFUSED_MODULES = frozenset(
    """
    ctypes _ctypes _posixsubprocess _posixshmem _sqlite3 _dbm _gdbm _xxsubinterpreters
    _interpreters _testcapi _testinternalcapi
    """.split()
)
# Events whose first argument, or whose first two, are paths that change.
_CHANGES = frozenset(
    """
    os.chflags os.chmod os.chown os.mkdir os.remove os.removexattr os.rmdir os.setxattr
    os.truncate os.utime os.link os.rename os.symlink
    """.split()
)
_TWO_PATHS = ("os.link", "os.rename", "os.symlink")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def leave_network(libc: Any) -> None:
    """Moves this process into an empty network, if the system allows it."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        libc.unshare(_NEW_NETWORK)
    elif libc.unshare(_NEW_USER | _NEW_NETWORK) == 0:
        # Without a map, some file systems refuse to make files for a user without name.
        with contextlib.suppress(OSError):
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)


def can_be_nobody() -> bool:
    """Whether programs can run as `nobody`: by root, if it can read the library."""
    if os.geteuid() != 0:
        return False
    try:
        os.seteuid(_NOBODY)
    except OSError:
        return False
    try:
        os.listdir(os.path.dirname(os.__file__))
    except OSError:
        return False
    finally:
        os.seteuid(0)
    return True


def make_guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """The audit hook: raises PermissionError at what a program may not do."""
    library = [
        os.path.realpath(path) for path in (*sys.path, os.path.dirname(os.__file__))
    ]
    realpath, isdir = os.path.realpath, os.path.isdir
    fsdecode, sep = os.fsdecode, os.sep
    devices = ("/dev/null", "/dev/urandom", "/dev/random")
    num_writes = 0

    def within(path: str, roots: list[str]) -> bool:
        return any(path == root or path.startswith(root + sep) for root in roots)

    def check_path(event: str, path: Any, *, writes: bool) -> None:
        if isinstance(path, int):
            return  # A file that is open already.
        real = realpath(fsdecode("." if path is None else path))
        if real in devices or within(real, [folder] if writes else [folder, *library]):
            return
        raise PermissionError(f"{event} is not allowed here")

    def guard(event: str, args: tuple[Any, ...]) -> None:
        nonlocal num_writes
        if event == "open":
            path, mode, flags = args
            writes = any(c in "wax+" for c in mode or "") or bool(flags & _WRITING)
            # Paths below an open folder (`dir_fd`) reach the guard without it.
            check_path(event, path, writes=writes or isdir(path))
            num_writes += writes
        elif event in ("os.listdir", "os.scandir"):
            check_path(event, args[0], writes=False)
        elif event in _CHANGES:
            for path in args[: 1 + (event in _TWO_PATHS)]:
                check_path(event, path, writes=True)
            num_writes += 1
        elif event.startswith(_REFUSED) or (
            event == "import" and args[0] in _REFUSED_MODULES
        ):
            raise PermissionError(f"{event} is not allowed here")
        if num_writes > _MOST_WRITES:
            raise PermissionError("too many changes to files")

    return guard


def refuse(*_args: Any, **_kwargs: Any) -> Any:
    """Stands in for functions of the system that raise no audit event."""
    raise PermissionError("not allowed here")


def refuse_unaudited() -> None:
    """Takes away what the audit hook and root's missing limits would let through."""
    for name in ("mkfifo", "mknod", "setsid", "setpgid", "setpgrp"):
        setattr(os, name, refuse)
        setattr(posix, name, refuse)
    for name in dir(_thread):
        if name.startswith("start_"):  # Python 3.11 has no event for them.
            setattr(_thread, name, refuse)
    # Programs may import modules that import subprocess, and no more.
    stub = types.ModuleType("_posixsubprocess")
    stub.fork_exec = refuse  # type: ignore[attr-defined]
    for name in _REFUSED_MODULES & sys.modules.keys():
        del sys.modules[name]
    sys.modules["_posixsubprocess"] = stub


def set_limits(limits: dict[str, Any]) -> None:
    """Limits this process for good, as far as the system knows the limit."""
    seconds = int(limits["seconds"]) + 1
    for name, value in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", limits["memory_mb"] << 20),
        ("RLIMIT_FSIZE", limits["file_mb"] << 20),
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_NPROC", 0),  # No process or thread beyond this one; root is exempt.
        ("RLIMIT_CORE", 0),
    ):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (value, value))


def confine(libc: Any, folder: str, reply_fd: int, request: dict[str, Any]) -> int:
    """Shuts this process in; returns where the reply goes."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.dup2(reply_fd, 3)
    os.closerange(4, 1024)
    os.chdir(folder)
    set_limits(request["limits"])
    if request["as_nobody"]:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    if sys.platform == "linux":
        # After the change of user, which would undo the first.
        libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    refuse_unaudited()
    sys.dont_write_bytecode = True
    sys.addaudithook(make_guard(folder))
    return 3


def is_plain(value: Any) -> bool:
    """Whether JSON gives it back with the same types."""
    kind = type(value)
    if kind is list:
        return all(map(is_plain, value))
    if kind is dict:
        return all(type(key) is str for key in value) and all(
            map(is_plain, value.values())
        )
    return kind in (bool, int, float, str, type(None))


def execute(program: dict[str, Any]) -> dict[str, Any]:
    """Runs a program and its checks in this process."""
    # A module of its own, since dataclasses and pickle look theirs up.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    space = module.__dict__
    testing = False
    try:
        exec(compile(program["source"], "<program>", "exec"), space)
        if program["tests"] is not None:
            testing = True
            exec(compile(program["tests"], "<tests>", "exec"), space)
        values = [space[name](*args) for name, args in program["calls"]]
        if not is_plain(values):
            return {"verdict": "failed", "detail": "a value of another type"}
        return {"verdict": "returned", "detail": "", "values": json.dumps(values)}
    except MemoryError:
        return {"verdict": "memory", "detail": "out of memory"}
    except BaseException as error:
        failed = testing and isinstance(error, AssertionError)
        try:
            detail = f"{type(error).__name__}: {error}"[:200]
        except BaseException:
            detail = "an exception that cannot be shown"
        return {"verdict": "failed" if failed else "error", "detail": detail}


def read_reply(fd: int, token: bytes, seconds: float) -> dict[str, Any]:
    """The program's reply; nothing is one that does not start with the token."""
    deadline = time.monotonic() + seconds
    data = b""
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return {"verdict": "timeout", "detail": f"{seconds} s"}
        chunk = os.read(fd, 1 << 16)
        data += chunk
        if not chunk or len(data) > _LONGEST_REPLY:
            break
    # The token keeps stray output out. A program that digs it up may forge a reply, but
    # not one that says "passed": there is none.
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        reply = json.loads(data.removeprefix(token)) if data.startswith(token) else {}
        if reply.get("verdict") in ("returned", "failed", "error", "memory"):
            return {
                "verdict": reply["verdict"],
                "detail": str(reply.get("detail"))[:200],
                "values": str(reply.get("values")),
            }
    detail = "ended without a result" if len(data) <= _LONGEST_REPLY else "huge result"
    return {"verdict": "error", "detail": detail}


def run_one(
    libc: Any, program: dict[str, Any], number: int, request: dict[str, Any]
) -> dict[str, Any]:
    """Forks a process for the program, waits for it, and clears up after it."""
    folder = os.path.join(request["folder"], str(number))
    os.mkdir(folder)
    if request["as_nobody"]:
        os.chown(folder, _NOBODY, _NOBODY)
    token = os.urandom(16).hex().encode()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            fd = confine(libc, folder, writing, request)
            data = token + json.dumps(execute(program)).encode() + b"\n"
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os._exit(0)
    os.close(writing)
    reply = read_reply(reading, token, request["limits"]["seconds"])
    os.close(reading)
    for kill in (os.killpg, os.kill):  # It may not have come as far as its own group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if reply["verdict"] == "error" and os.WIFSIGNALED(status):
        if os.WTERMSIG(status) == signal.SIGXCPU:
            reply = {"verdict": "timeout", "detail": "processor time"}
    shutil.rmtree(folder, ignore_errors=True)
    return reply


def main() -> None:
    """Serves the request."""
    request = json.load(sys.stdin)
    libc = ctypes.CDLL(None)
    if sys.platform == "linux":
        leave_network(libc)
    request["as_nobody"] = can_be_nobody()
    if request["as_nobody"]:
        os.chmod(request["folder"], 0o711)  # It must pass through to its own folder.
    print("ready", flush=True)
    for number, program in enumerate(request["programs"]):
        print(json.dumps(run_one(libc, program, number, request)), flush=True)


if __name__ == "__main__":
    main()
