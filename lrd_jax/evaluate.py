"""Measures decode methods on tasks: `python -m lrd_jax.evaluate --help`.

Exit codes: those of `lrd_jax.generate`.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lrd_jax import processes
from lrd_jax.errors import UserError
from lrd_jax.evaluation.plot import plot
from lrd_jax.evaluation.request import Request, parse
from lrd_jax.evaluation.statistics import summarise
from lrd_jax.evaluation.table import tables
from lrd_jax.parts import open_output
from lrd_jax.process import (
    exit_code,
    leave,
    nonfinite_code,
    say,
    use_compilation_cache,
)
from lrd_jax.processes import Team
from lrd_jax.quantization import kind_of
from lrd_jax.settings import plain
from lrd_jax.source import Source, open_checkpoint
from lrd_jax.staging import one_line_disk_errors, write_atomically

# Modules that import JAX are imported in the functions that use them.

# What is beside the records of a method, or a process's part of them.
META = r".*\.jsonl(\.part-[0-9]+-of-[0-9]+)?\.meta\.json"


def main(
    argv: Sequence[str],
    *,
    open_source: Callable[..., Source] = open_checkpoint,
    make_slots: Callable[..., Any] | None = None,
) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: the arguments behind the program's name.
        open_source: finds the model; tests pass their own.
        make_slots: `lrd_jax.decode.slots.make_slots`, or a test's own.
    """

    def way_on() -> str:
        return "the same command, if it has `--output`, goes on where it was"

    return exit_code(lambda: _run(parse(argv), open_source, make_slots), way_on)


def _run(
    request: Request,
    open_source: Callable[..., Source],
    make_slots: Callable[..., Any] | None,
) -> int:
    team = processes.join(request.meeting)

    from lrd_jax import devices
    from lrd_jax.evaluation.problems import make_groups

    flags = request.flags
    if request.baseline is None:
        say("no method is called `baseline`: the differences to it are left out.")
    kind = kind_of(flags.quantize, flags.quantize_embeddings)
    source = open_source(flags.ckpt, flags.dtype, kind)
    mesh = devices.open_mesh(flags.mesh, source)
    team = team.in_groups(devices.span(mesh))
    place = functools.partial(devices.place, source, mesh, make_slots)
    groups = make_groups(
        request.members,
        n=flags.n,
        split=flags.split,
        seed=flags.seed,
        gen_length=flags.gen_length,
        source=source,
    )
    settings = _settings(request, source, groups, mesh, team)
    records = _measure_all(request, source, groups, settings, place, team)
    if team.leads:
        _tell(request, make_report(request, settings, groups, records))
    return nonfinite_code(
        [
            f"{record['id']} ({name})"
            for name, part in records.items()
            for record in part
            if record["stop_reason"] == "nonfinite"
        ]
    )


def _tell(request: Request, report: dict[str, Any]) -> None:
    """Writes, prints and draws the figures."""
    flags, text = request.flags, tables(report)
    if flags.output is not None:
        folder = pathlib.Path(flags.output)
        write_atomically(
            folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n"
        )
        write_atomically(folder / "table.md", text)
    print(text, end="")
    if flags.plot is not None:
        plot(report, flags.plot)


def _measure_all(
    request: Request,
    source: Source,
    groups: Sequence[Any],
    settings: dict[str, Any],
    place: Callable[[], Any],
    team: Team,
) -> dict[str, list[Any]]:
    """The records of each method; those that an earlier run has left are kept."""
    from lrd_jax.evaluation.run import Runner, read_records

    flags = request.flags
    ids = [problem.row.id for group in groups for problem in group.problems]
    runner = Runner(source, groups, place, flags.batch_size, flags.seed)
    if flags.output is None:
        return {method.name: runner.run(method) for method in request.methods}
    folder = pathlib.Path(flags.output)
    _check_folder(folder)
    paths = {method.name: folder / f"{method.name}.jsonl" for method in request.methods}
    with contextlib.ExitStack() as stack:
        # All at once: a file that is refused is found before hours are spent.
        files = {
            method.name: stack.enter_context(
                open_output(
                    paths[method.name],
                    settings | {"method": method.cfg.method} | plain(method.cfg),
                    ids,
                    team,
                )
            )
            for method in request.methods
        }
        for method in request.methods:
            runner.run_into(*files[method.name], method)
    return {name: read_records(path) for name, path in paths.items()}


def _check_folder(folder: pathlib.Path) -> None:
    """Makes the directory, or sees that it is one of this command's.

    Raises:
        UserError: it holds other things, or cannot be made.
    """
    with one_line_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if not name.endswith((".lock", ".part"))]
    if others and not any(re.fullmatch(META, name) for name in others):
        raise UserError(
            f"{folder} holds {others[0]} and no records of an evaluation; choose "
            "another `--output`."
        )


def _settings(
    request: Request, source: Source, groups: Sequence[Any], mesh: Any, team: Team
) -> dict[str, Any]:
    """What the records of all methods depend on, flat."""
    import importlib.metadata

    import jax

    flags = request.flags
    texts = [
        [problem.instance.prompt, problem.instance.payload]
        for group in groups
        for problem in group.problems
    ]
    return {
        "lrd_jax": importlib.metadata.version("lrd_jax"),
        "checkpoint": source.fingerprint,
        "dtype": source.dtype,
        "quantization": source.quantization,
        "tasks": list(request.members),
        "n": flags.n,
        "split": flags.split,
        "seed": flags.seed,
        # The answers do not depend on these, but the seconds do.
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "batch_size": flags.batch_size,
        "mesh": {} if mesh is None else dict(mesh.shape),
        "processes": team.count,
        "problems_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }


def make_report(
    request: Request,
    settings: dict[str, Any],
    groups: Sequence[Any],
    records: dict[str, list[Any]],
) -> dict[str, Any]:
    """All figures as JSON values, for the files, the table and the plot."""
    reference = records.get(request.baseline or "")
    clusters = {
        problem.row.id: problem.instance.group
        for group in groups
        for problem in group.problems
    }
    methods = {}
    for method in request.methods:
        figures, start = {}, 0
        for group in groups:
            part = slice(start, start + len(group.problems))
            theirs = None if reference is None else reference[part]
            mine = records[method.name][part]
            figures[group.name] = summarise(mine, theirs, clusters)
            start = part.stop
        methods[method.name] = {
            "entry": method.entry,
            # JSON has no infinity.
            "value": str(method.value) if method.value == math.inf else method.value,
            "swept": method.swept,
            "method": method.cfg.method,
            "settings": plain(method.cfg),
            "all": summarise(records[method.name], reference, clusters),
            "tasks": figures,
        }
    return {
        "settings": settings
        | {
            "gen_length": request.flags.gen_length,
            "sweep": request.sweep and request.sweep.setting,
        },
        "baseline": request.baseline,
        "methods": methods,
    }


if __name__ == "__main__":
    use_compilation_cache()
    leave(main(sys.argv[1:]))
