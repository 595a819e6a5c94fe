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

from lrd_jax.devices import Placed
from lrd_jax.evaluation.methods import Method
from lrd_jax.evaluation.problems import Group, Problem
from lrd_jax.report import make_record
from lrd_jax.runfile import RunFile
from lrd_jax.scheduler import Scheduler
from lrd_jax.source import Source

Record = dict[str, Any]

# What a record keeps of `report.make_record`.
_KEPT = (
    "id",
    "text",
    "num_forwards",
    "num_full_forwards",
    "useful_tokens",
    "stop_reason",
)


class Runner:
    """Decodes and scores the same problems with one method after the other."""

    def __init__(
        self,
        source: Source,
        groups: Sequence[Group],
        place: Callable[[], Placed],
        batch_size: int,
        seed: int,
    ) -> None:
        self._source = source
        self._groups = groups
        self._place = place
        self._batch_size = batch_size
        self._seed = seed

    @functools.cached_property
    def _model(self) -> Placed:
        """The weights are read when the first problem is to be decoded."""
        return self._place()

    def run(self, method: Method) -> list[Record]:
        """The records of all problems, in order."""
        return [*itertools.chain(*self._parts(method, self._groups, 0))]

    def run_into(self, file: RunFile, share: slice, method: Method) -> None:
        """Decodes the problems whose records `file` lacks.

        Args:
            file: holds those that are done, and takes the others.
            share: which of all problems it is for.
            method: how to decode.
        """
        groups = share_of(self._groups, share)
        if file.num_done < sum(len(group.problems) for group in groups):
            file.start()
            for part in self._parts(method, groups, file.num_done):
                file.append(part)

    def _parts(
        self, method: Method, groups: Sequence[Group], done: int
    ) -> Iterator[list[Record]]:
        """The records behind the first `done`, a few at a time, with a progress bar."""
        with tqdm(
            total=sum(len(group.problems) for group in groups),
            initial=done,
            desc=method.name,
            unit="problem",
            disable=not sys.stderr.isatty(),
        ) as bar:
            for part in self._measured(method, groups, done):
                yield part
                bar.update(len(part))

    def _measured(
        self, method: Method, groups: Sequence[Group], done: int
    ) -> Iterator[list[Record]]:
        """As `_parts`; a group after the other, so each one's seconds are its own."""
        slots = self._model.make_slots(method.cfg)
        for group in groups:
            begin = min(done, len(group.problems))
            done -= begin
            if begin == len(group.problems):
                continue
            # As for the whole group: a run taken up again compiles the same shapes.
            scheduler = Scheduler(
                slots,
                self._model.params,
                self._seed,
                num_slots=min(self._batch_size, len(group.problems)),
                config=self._source.config,
                gen_length=method.cfg.gen_length,
            )
            stream = self._decoded(scheduler, group.problems, begin)
            # Programs are judged many at once, as starting them takes its time.
            while part := list(itertools.islice(stream, self._batch_size)):
                problems, records = zip(*part, strict=True)
                right = score(problems, [record["text"] for record in records])
                yield [
                    record | {"correct": correct}
                    for record, correct in zip(records, right, strict=True)
                ]

    def _decoded(
        self, scheduler: Scheduler, problems: Sequence[Problem], begin: int
    ) -> Iterator[tuple[Problem, Record]]:
        """`problems[begin:]` with their records, which are still to be judged."""
        told = 0.0
        rows = [problem.row for problem in problems]
        # Judging answers is no part of the seconds of a decode.
        stream = scheduler.stream(rows, begin, ahead=False)
        for problem, (row, result) in zip(problems[begin:], stream, strict=True):
            # Rows that end in the same round share one time: the first has all of it.
            seconds, told = scheduler.run_seconds - told, scheduler.run_seconds
            source = self._source
            record = make_record(row, result, 0, source.tokenizer, source.config)
            kept = {name: record[name] for name in _KEPT}
            refined = {"refine_steps": sum(record["refine_steps"])}
            yield (
                problem,
                {"task": problem.task.name, **kept, **refined} | {"seconds": seconds},
            )


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


def share_of(groups: Sequence[Group], share: slice) -> list[Group]:
    """The groups with those of their problems that are in a share of all problems."""
    problems = [problem for group in groups for problem in group.problems]
    mine = {problem.row.id for problem in problems[share]}
    return [
        Group(group.name, [p for p in group.problems if p.row.id in mine])
        for group in groups
    ]


def read_records(path: pathlib.Path) -> list[Record]:
    """The records of a complete run."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
