"""Decodes prompts from the command line: `python -m lrd_jax.generate --help`.

Exit codes: 0 fine; 1 some row met non-finite logits; 2 a mistake in what was given, or
no room for the result; 130 interrupted; 141 the reader of the output went away.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import lrd_jax.cli
from lrd_jax.cli import Request, use_compilation_cache
from lrd_jax.jobs import jobs_from_file, jobs_from_prompts
from lrd_jax.process import exit_code, leave, nonfinite_code, say
from lrd_jax.runfile import RunFile
from lrd_jax.settings import plain
from lrd_jax.source import Source, open_checkpoint

# Modules that import JAX are imported in the functions that use them: `--help` and
# mistakes in the arguments are answered without it.


def main(
    argv: Sequence[str],
    *,
    open_source: Callable[[str | None, str | None], Source] = open_checkpoint,
    make_decode_fn: Callable[..., Any] | None = None,
) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: the arguments behind the program's name.
        open_source: finds the model; tests pass their own.
        make_decode_fn: `lrd_jax.decode.loop.make_decode_fn`, or a test's own.
    """
    request: Request | None = None

    def run() -> int:
        nonlocal request
        request = lrd_jax.cli.parse(argv)
        return _run(request, open_source, make_decode_fn)

    def way_on() -> str:
        kept = request is not None and request.output is not None
        return "the same command" if kept else "a run with `--output`, started again,"

    return exit_code(run, way_on)


def _run(
    request: Request,
    open_source: Callable[[str | None, str | None], Source],
    make_decode_fn: Callable[..., Any] | None,
) -> int:
    if request.input is not None:
        jobs, input_hash = jobs_from_file(request.input)
    else:
        jobs, input_hash = jobs_from_prompts(request.prompts)
    source = open_source(request.ckpt, request.dtype)

    from lrd_jax.batches import encode_job

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
        return _decode(request, source, rows, None, make_decode_fn)
    settings = _settings(request, source, input_hash)
    with RunFile(request.output, settings, [row.id for row in rows]) as file:
        if file.num_done == len(rows):
            say(f"{request.output} is complete: {len(rows)} results; nothing to do.")
            return nonfinite_code(file.nonfinite)
        if file.num_done:
            say(f"{request.output}: {file.num_done} of {len(rows)} are done already.")
        return _decode(request, source, rows, file, make_decode_fn)


def _decode(
    request: Request,
    source: Source,
    rows: Sequence[Any],
    file: RunFile | None,
    make_decode_fn: Callable[..., Any] | None,
) -> int:
    """Decodes the rows that are not done and hands each batch on as it ends."""
    from tqdm import tqdm

    from lrd_jax.batches import make_batches
    from lrd_jax.engine import Engine
    from lrd_jax.report import Totals, make_record, shown

    denoiser, params = source.load()
    decode_fn = (make_decode_fn or _decode_loop())(denoiser, request.decode)
    engine = Engine(decode_fn, params, request.seed)
    gen_length = None if request.infill else request.decode.gen_length
    done = 0
    if file is not None:
        file.start()
        done = file.num_done
    totals = Totals(nonfinite=list(file.nonfinite) if file else [])
    # Not more than there are in all: a run taken up again compiles the same shapes.
    size = min(request.batch_size, len(rows))
    quiet = len(rows) - done <= size or not sys.stderr.isatty()
    with tqdm(total=len(rows), initial=done, unit="prompt", disable=quiet) as bar:
        for batch in make_batches(rows[done:], size, source.config, gen_length):
            result = engine.decode(batch)
            records = [
                make_record(row, result, i, source.tokenizer, source.config)
                for i, row in enumerate(batch.rows)
            ]
            totals.add(records)
            if file is not None:
                file.append(records)
            else:
                with contextlib.nullcontext() if quiet else bar.external_write_mode():
                    for record in records:
                        print(shown(record, heading=len(rows) > 1), flush=True)
            bar.update(len(records))
    print(totals.figures(engine.compile_seconds, engine.run_seconds))
    return nonfinite_code(totals.nonfinite)


def _decode_loop() -> Callable[..., Any]:
    from lrd_jax.decode.loop import make_decode_fn

    return make_decode_fn


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
        "input_sha256": input_hash,
        "seed": request.seed,
        "raw": request.raw,
        "infill": request.infill,
        "method": request.decode.method,
    } | decode


if __name__ == "__main__":
    use_compilation_cache()
    leave(main(sys.argv[1:]))
