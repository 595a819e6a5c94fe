"""The problems to measure on, as rows of token ids."""

import dataclasses
import itertools
import zlib
from collections.abc import Sequence

from lrd_jax import tasks
from lrd_jax.batches import Row, encode_job
from lrd_jax.errors import UserError
from lrd_jax.jobs import Job
from lrd_jax.source import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem.

    Attributes:
        task: that can score it.
        instance: the problem itself.
        row: its prompt, encoded.
    """

    task: tasks.Task
    instance: tasks.Instance
    row: Row


@dataclasses.dataclass(frozen=True)
class Group:
    """The problems of one entry of `--tasks`, shortest prompts first."""

    name: str
    problems: Sequence[Problem]


def make_groups(
    members: dict[str, list[tasks.Task]],
    *,
    n: int,
    split: str,
    seed: int,
    gen_length: int,
    source: Source,
) -> list[Group]:
    """The first problems of each task's stream.

    Args:
        members: the tasks of each group.
        n: problems of each group, shared evenly by its tasks; fewer where a held-out
            stream ends before.
        split: of the problems.
        seed: of their order.
        gen_length: positions behind each prompt.
        source: of the tokenizer.

    Raises:
        UserError: no such split, no tokenizer, a prompt is too long for the model, or
            a group is empty.
    """
    if source.tokenizer is None:
        raise UserError(
            "this checkpoint has no tokenizer.json, so it cannot read the problems."
        )
    groups = []
    for name, found in members.items():
        problems = []
        for i, task in enumerate(found):
            share = n // len(found) + (i < n % len(found))
            stream = itertools.islice(tasks.instances(task, split, seed), share)
            for k, instance in enumerate(stream):
                row = _encode(f"{task.name}/{k}", instance, gen_length, source)
                problems.append(Problem(task=task, instance=instance, row=row))
        if not problems:
            raise UserError(f"--tasks: {name} has no problems in split {split}.")
        # Prompts of about one length make batches with little padding.
        problems.sort(key=lambda problem: len(problem.row.ids))
        groups.append(Group(name, problems))
    return groups


def _encode(
    name: str, instance: tasks.Instance, gen_length: int, source: Source
) -> Row:
    # The random key is made of the name, so that a problem's sample does not depend on
    # what else is measured.
    job = Job(
        id=name, line=zlib.crc32(name.encode()), where=name, prompt=instance.prompt
    )
    return encode_job(job, source.tokenizer, source.config, gen_length=gen_length)
