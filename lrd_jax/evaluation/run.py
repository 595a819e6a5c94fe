"""Runs methods over problems: one record for each problem."""

import functools
import itertools
import json
import pathlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from lrd_jax.batches import Batch, make_batches
from lrd_jax.engine import Engine
from lrd_jax.evaluation.methods import Method
from lrd_jax.evaluation.problems import Group, Problem
from lrd_jax.report import make_record
from lrd_jax.runfile import RunFile
from lrd_jax.source import Source

Record = dict[str, Any]


class Runner:
    """Decodes and scores the same problems with one method after the other."""

    def __init__(
        self,
        source: Source,
        groups: Sequence[Group],
        make_decode_fn: Callable[..., Any],
        batch_size: int,
        seed: int,
    ) -> None:
        self._source = source
        self._groups = groups
        self._make_decode_fn = make_decode_fn
        self._batch_size = batch_size
        self._seed = seed

    @functools.cached_property
    def _model(self) -> tuple[Any, Any]:
        """Denoiser and weights, read when the first problem is to be decoded."""
        return self._source.load()

    def run(self, method: Method, file: RunFile | None = None) -> list[Record]:
        """The records of all problems, in order.

        Args:
            method: how to decode.
            file: holds those that are done, and takes the others; None for memory.
        """
        count = sum(len(group.problems) for group in self._groups)
        done = 0 if file is None else file.num_done
        records: list[Record] = []
        if done < count:
            if file is not None:
                file.start()
            hidden = not sys.stderr.isatty()
            with tqdm(
                total=count,
                initial=done,
                desc=method.name,
                unit="problem",
                disable=hidden,
            ) as bar:
                for part in self._batches(method, done):
                    if file is not None:
                        file.append(part)
                    else:
                        records += part
                    bar.update(len(part))
        return records if file is None else _read_records(file.path)

    def _batches(self, method: Method, done: int) -> Iterator[list[Record]]:
        """The records of the problems behind the first `done`, batch by batch.

        Batches do not span groups, so each group's seconds are its own.
        """
        denoiser, params = self._model
        decode_fn = self._make_decode_fn(denoiser, method.cfg)
        engine = Engine(decode_fn, params, self._seed)
        gen_length = method.cfg.gen_length
        for group in self._groups:
            problems = group.problems[done:]
            done = max(done - len(group.problems), 0)
            if not problems:
                continue
            # As for the whole group: a run taken up again compiles the same shapes.
            size = min(self._batch_size, len(group.problems))
            rows, left = [problem.row for problem in problems], iter(problems)
            for batch in make_batches(rows, size, self._source.config, gen_length):
                part = list(itertools.islice(left, len(batch.rows)))
                yield _decode(batch, part, engine, self._source)


def _decode(
    batch: Batch, problems: Sequence[Problem], engine: Engine, source: Source
) -> list[Record]:
    """The records of one batch; its seconds are shared evenly."""
    before = engine.run_seconds
    result = engine.decode(batch)
    seconds = (engine.run_seconds - before) / len(problems)
    whole = [
        make_record(problem.row, result, i, source.tokenizer, source.config)
        for i, problem in enumerate(problems)
    ]
    correct = score(problems, [record["text"] for record in whole])
    return [
        {
            "id": record["id"],
            "task": problem.task.name,
            "correct": right,
            "text": record["text"],
            "num_forwards": record["num_forwards"],
            "num_full_forwards": record["num_full_forwards"],
            "useful_tokens": record["useful_tokens"],
            "refine_steps": sum(record["refine_steps"]),
            "stop_reason": record["stop_reason"],
            "seconds": seconds,
        }
        for problem, record, right in zip(problems, whole, correct, strict=True)
    ]


def score(problems: Sequence[Problem], responses: Sequence[str]) -> list[bool]:
    """Whether each response is right; each task judges all of its own at once."""
    of_task: dict[str, list[int]] = defaultdict(list)
    for i, problem in enumerate(problems):
        of_task[problem.task.name].append(i)
    correct = [False] * len(problems)
    for places in of_task.values():
        task = problems[places[0]].task
        instances = [problems[i].instance for i in places]
        grades = task.score_all(instances, [responses[i] for i in places])
        for i, right in zip(places, grades, strict=True):
            correct[i] = right
    return correct


def _read_records(path: pathlib.Path) -> list[Record]:
    """The records of a complete run."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
