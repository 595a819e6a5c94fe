"""Measures what a decode costs: `python -m lrd_jax.bench --help`.

Prints tables; `--output` keeps all figures as JSON. Exit codes: 0; 2 for a mistake in
what was given; 130 when interrupted; 141 when the reader of its output goes away.
"""

import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from lrd_jax.benchmark.request import Request, parse
from lrd_jax.benchmark.table import tables
from lrd_jax.errors import UserError
from lrd_jax.process import exit_code, leave, memory_errors, say
from lrd_jax.staging import write_atomically

# Modules that import JAX are imported in the functions that use them.


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _run(parse(argv)), lambda: "a benchmark starts anew")


def _run(request: Request) -> int:
    import jax

    flags, libraries = request.flags, ["lrd_jax", "jax", "jaxlib"]
    threads = _num_cores()
    if flags.peer is not None:
        libraries += ["torch", "transformers"]
        _use_threads(threads)
    report: dict[str, Any] = {
        "settings": {
            "model": flags.model,
            "platform": jax.default_backend(),
            "threads": threads,
            "decode": flags.decode,
            "batch_size": flags.batch_size,
            "prompt": flags.prompt,
            "gen_length": flags.gen_length,
            "sharpness": flags.sharpness,
            "repeats": flags.repeats,
            "seed": flags.seed,
            "versions": {name: importlib.metadata.version(name) for name in libraries},
        }
    }
    with memory_errors("for this: give a smaller `--batch-size` or `--gen-length`"):
        report |= _measured(request, report["settings"])
    print(tables(report), end="")
    if flags.output is not None:
        text = json.dumps(report, indent=1) + "\n"
        write_atomically(pathlib.Path(flags.output), text)
        say(f"all figures: {flags.output}")
    return 0


def _measured(request: Request, settings: dict[str, Any]) -> dict[str, Any]:
    """The figures; completes `settings` by the prompts' length."""
    if request.sweep:
        from lrd_jax.benchmark.sweep import measure_sweep

        return {"sweep": measure_sweep(request)}
    from lrd_jax.benchmark.measure import measure
    from lrd_jax.benchmark.subject import make_subject

    subject = make_subject(request)
    settings["prompt"] = subject.batches[0].ids.shape[1]
    return measure(request, subject)


def _num_cores() -> int:
    """Cores that this process may use, which is how many threads XLA takes."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _use_threads(count: int) -> None:
    """As many threads for PyTorch as XLA takes, one for each core of the process."""
    import jax
    import torch

    if jax.default_backend() != "cpu":
        raise UserError(
            f"`--peer torch` compares on CPU, and JAX would use the "
            f"{jax.default_backend()}: set JAX_PLATFORMS=cpu."
        )
    torch.set_num_threads(count)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
