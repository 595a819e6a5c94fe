"""How the parts of one turn grow with batch, prompt, window, block and vocabulary."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lrd_jax.base import Denoiser, Params
from lrd_jax.batches import Batch, Row, stack
from lrd_jax.benchmark.axes import Point, method_at, shape_at
from lrd_jax.benchmark.clock import interleave
from lrd_jax.benchmark.parts import Run, part_runs, summarise_parts
from lrd_jax.benchmark.request import Request
from lrd_jax.benchmark.subject import random_ids, random_params
from lrd_jax.config import ModelConfig
from lrd_jax.model import families
from lrd_jax.source import open_checkpoint

Model = tuple[ModelConfig, Denoiser, Params]


def measure_sweep(request: Request) -> dict[str, Any]:
    """For each axis its points with their parts, and the exponents of their growth."""
    flags, name = request.flags, request.methods[0].name
    models = functools.cache(lambda vocab_size: _model(request, vocab_size))
    # The base point is on every axis, and is measured once.
    points = list(dict.fromkeys(p for points in request.sweep.values() for p in points))
    runs: dict[str, Run] = {}
    for i, point in enumerate(points):
        config, denoiser, params = models(point.V)
        cfg = method_at(request.entries, name, point)
        batch = _batch(config, point, flags.seed)
        parts = part_runs(denoiser, params, cfg, batch)
        runs |= {f"{i} {part}": run for part, run in parts.items()}
    seconds = interleave(runs, flags.repeats)
    found = {
        point: summarise_parts(
            {
                k.partition(" ")[2]: v
                for k, v in seconds.items()
                if k.startswith(f"{i} ")
            }
        )
        for i, point in enumerate(points)
    }
    return {
        axis: {
            "points": [
                {"value": getattr(point, axis), **found[point]} for point in points
            ],
            "exponents": exponents(
                [getattr(point, axis) for point in points],
                [found[point]["ms"] for point in points],
            ),
        }
        for axis, points in request.sweep.items()
    }


def exponents(
    values: Sequence[int], ms: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """k of each part, where it grows like value^k between the ends of the axis.

    None where there is only one value, or a median is not positive.
    """
    found: dict[str, float | None] = {}
    for part in ms[0]:
        first, last = ms[0][part]["median"], ms[-1][part]["median"]
        defined = values[0] != values[-1] and first > 0 and last > 0
        ratio = math.log(values[-1] / values[0])
        found[part] = math.log(last / first) / ratio if defined else None
    return found


def _model(request: Request, vocab_size: int) -> Model:
    flags = request.flags
    if request.shape is None:
        source = open_checkpoint(flags.model, None)
        return source.config, *source.load()
    shape = shape_at(request.shape, vocab_size)
    params = random_params(shape, flags.seed, flags.sharpness)
    return shape, families.make_denoiser(shape), params


def _batch(config: ModelConfig, point: Point, seed: int) -> Batch:
    ids = random_ids(config, (point.B, point.P), np.random.default_rng(seed))
    rows = [Row(id=i, line=i, ids=row.tolist()) for i, row in enumerate(ids)]
    return stack(rows, point.P, config.pad_id, infill=False)
