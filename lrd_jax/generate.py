"""Decodes prompts from the command line: `python -m lrd_jax.generate --help`.

Exit codes: 0 fine; 1 some row met non-finite logits; 2 a mistake in what was given, or
no room for the result; 130 interrupted; 141 the reader of the output went away.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import lrd_jax.cli
from lrd_jax import processes
from lrd_jax.cli import Request
from lrd_jax.jobs import jobs_from_file, jobs_from_prompts
from lrd_jax.parts import open_output
from lrd_jax.process import (
    exit_code,
    leave,
    nonfinite_code,
    say,
    use_compilation_cache,
)
from lrd_jax.processes import Team
from lrd_jax.runfile import RunFile
from lrd_jax.settings import plain
from lrd_jax.source import Source, open_checkpoint
from lrd_jax.timings import Timings

# Modules that import JAX are imported in the functions that use them: `--help` and
# mistakes in the arguments are answered without it.


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
    timings = Timings()
    request: Request | None = None

    def run() -> int:
        nonlocal request
        request = lrd_jax.cli.parse(argv)
        code = _run(request, open_source, make_slots, timings)
        if request.timings:
            sys.stdout.flush()
            say(timings.line())
        return code

    def way_on() -> str:
        kept = request is not None and request.output is not None
        who = "the same command" if kept else "a run with `--output`, started again,"
        return f"{who} goes on where it was"

    return exit_code(run, way_on)


def _run(
    request: Request,
    open_source: Callable[..., Source],
    make_slots: Callable[..., Any] | None,
    timings: Timings,
) -> int:
    if request.input is not None:
        jobs, input_hash = jobs_from_file(request.input)
    else:
        jobs, input_hash = jobs_from_prompts(request.prompts)
    team = processes.join(request.meeting)
    with timings.phase("import"):
        _import_modules()

    from lrd_jax import devices

    with timings.phase("load"):
        source = open_source(request.ckpt, request.dtype, request.quantization)

        mesh = devices.open_mesh(request.mesh, source)
    team = team.in_groups(devices.span(mesh))

    from lrd_jax.batches import encode_job

    place = functools.partial(devices.place, source, mesh, make_slots)
    gen_length = None if request.infill else request.decode.gen_length
    rows = [
        encode_job(
            job,
            source.tokenizer,
            source.config,
            gen_length=gen_length,
            raw=request.raw,
        )
        for job in jobs
    ]
    if request.output is None:
        return _decode(request, source, rows, None, place, timings, print)
    settings = _settings(request, source, input_hash)
    ids = [row.id for row in rows]
    with open_output(request.output, settings, ids, team) as (file, share):
        rows = rows[share]
        if file.num_done == len(rows):
            say(f"{file.path} is complete: {len(rows)} results; nothing to do.")
            return nonfinite_code(file.nonfinite)
        if file.num_done:
            say(f"{file.path}: {file.num_done} of {len(rows)} are done already.")
        tell = print if team.count == 1 else functools.partial(_say_part, team)
        return _decode(request, source, rows, file, place, timings, tell)


def _say_part(team: Team, figures: str) -> None:
    # To stderr: they are no result, and no process knows all of them.
    if team.writes:
        say(f"process {team.id} of {team.count}: {figures}")


def _import_modules() -> None:
    """Imports what decoding will need, so that it can be timed apart from the rest."""
    from orbax.checkpoint import v1  # noqa: F401

    import lrd_jax.devices
    import lrd_jax.pretrained
    import lrd_jax.report
    import lrd_jax.scheduler  # noqa: F401


def _decode(
    request: Request,
    source: Source,
    rows: Sequence[Any],
    file: RunFile | None,
    place: Callable[[], Any],
    timings: Timings,
    tell: Callable[[str], None],
) -> int:
    """Decodes the rows that are not done and hands each on as it ends."""
    from tqdm import tqdm

    from lrd_jax.report import Totals, make_record, shown
    from lrd_jax.scheduler import Scheduler

    with timings.phase("load"):
        placed = place()
    scheduler = Scheduler(
        placed.make_slots(request.decode),
        placed.params,
        request.seed,
        # Not more than there are rows in all: a run taken up again compiles the same.
        num_slots=min(request.batch_size, len(rows)),
        config=source.config,
        gen_length=None if request.infill else request.decode.gen_length,
    )
    done = 0
    if file is not None:
        file.start()
        done = file.num_done
    totals = Totals(nonfinite=list(file.nonfinite) if file else [])
    quiet = len(rows) - done <= request.batch_size or not sys.stderr.isatty()
    with tqdm(total=len(rows), initial=done, unit="prompt", disable=quiet) as bar:
        for row, result in scheduler.stream(rows, done):
            record = make_record(row, result, 0, source.tokenizer, source.config)
            totals.add([record])
            if file is not None:
                file.append([record])
            else:
                with contextlib.nullcontext() if quiet else bar.external_write_mode():
                    print(shown(record, heading=len(rows) > 1), flush=True)
            bar.update()
    timings.seconds["compile"] = scheduler.compile_seconds
    timings.seconds["run"] = scheduler.run_seconds
    tell(totals.figures(scheduler.compile_seconds, scheduler.run_seconds))
    return nonfinite_code(totals.nonfinite)


def _settings(request: Request, source: Source, input_hash: str) -> dict[str, Any]:
    """What a result depends on, flat, for the file beside the output."""
    import importlib.metadata

    decode = plain(request.decode)
    if request.infill:
        del decode["decode.gen_length"], decode["decode.block_length"]  # Not used.
    return {
        "lrd_jax": importlib.metadata.version("lrd_jax"),
        "checkpoint": source.fingerprint,
        "dtype": source.dtype,
        "quantization": source.quantization,
        "input_sha256": input_hash,
        "seed": request.seed,
        "raw": request.raw,
        "infill": request.infill,
        "method": request.decode.method,
    } | decode


if __name__ == "__main__":
    use_compilation_cache()
    leave(main(sys.argv[1:]))
