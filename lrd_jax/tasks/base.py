"""What a task is: problems from a generator, and how an answer is read and judged."""

import dataclasses
import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

from lrd_jax.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
Payload = dict[str, Any]

# Draws in a row without anything new after which a held-out stream ends: a problem that
# one draw in a thousand gives is then missed one time in 20 000.
_MAX_BARREN = 10_000

# The text of an end, padding or mask token, in case a caller decodes these too.
_SPECIAL_TOKEN = re.compile(r"<\|[\w ]*\|>|</?s>|<pad>|<eos>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instance:
    """One problem.

    Attributes:
        prompt: what the user types.
        answer: the full response that a model should give.
        payload: what the scorer needs, made of JSON values.
        key: the problem without the wording of its prompt; equal keys are duplicates.
        group: what decides the split. Problems that would give each other away (the
            puzzles of one sudoku grid, two phrasings of one function) share a group.
    """

    prompt: str
    answer: str
    payload: Payload
    key: str
    group: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of problem.

    Attributes:
        name: what the command line calls it.
        family: tasks that are reported together.
        generate: draws a problem, of any split.
        extract: the answer within a response, or None if there is none.
        grade: judges extracted answers by their payloads, many at once because running
            programs one by one is slow.
        held_out: percentage of the groups in validation, and again in test.
    """

    name: str
    family: str
    generate: Callable[[random.Random], Instance]
    extract: Callable[[str], str | None]
    grade: Callable[[Sequence[Payload], Sequence[str]], list[bool]]
    held_out: int = 5

    def score(self, instance: Instance, response: str) -> bool:
        """Whether the response answers the problem."""
        return self.score_all([instance], [response])[0]

    def score_all(
        self, instances: Sequence[Instance], responses: Sequence[str]
    ) -> list[bool]:
        """`score` of each pair; for programs far faster than one by one."""
        answers = [self.extract(response) for response in responses]
        read = [
            (i, instance.payload, answer)
            for i, (instance, answer) in enumerate(zip(instances, answers, strict=True))
            if answer is not None
        ]
        grades = self.grade([p for _, p, _ in read], [a for _, _, a in read])
        right = {i for (i, _, _), good in zip(read, grades, strict=True) if good}
        return [i in right for i in range(len(answers))]

    def split_of(self, instance: Instance) -> Split:
        """The split, by a hash of the group alone: the same for every seed and task."""
        digest = hashlib.sha256(instance.group.encode()).digest()
        bucket = int.from_bytes(digest[:8], "big") % 100
        if bucket < 100 - 2 * self.held_out:
            return "train"
        return "validation" if bucket < 100 - self.held_out else "test"


def one_by_one(
    judge: Callable[[Payload, str], bool],
) -> Callable[[Sequence[Payload], Sequence[str]], list[bool]]:
    """A `Task.grade` from a judge of single answers."""

    def grade(payloads: Sequence[Payload], answers: Sequence[str]) -> list[bool]:
        return [judge(p, a) for p, a in zip(payloads, answers, strict=True)]

    return grade


def instances(task: Task, split: str, seed: int) -> Iterator[Instance]:
    """The problems of one split, in an order that the seed alone decides.

    The stream is the same on every machine and Python version. Training never ends and
    may repeat itself. Validation and test never repeat a problem, so where the task has
    few (sums of two small numbers) they end when all have come.

    Raises:
        UserError: no such split.
    """
    if split not in SPLITS:
        raise UserError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    return _stream(task, split, seed)


def _stream(task: Task, split: str, seed: int) -> Iterator[Instance]:
    digest = hashlib.sha256(f"{task.name}/{split}/{seed}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    seen: set[str] = set()
    barren = 0
    while barren < _MAX_BARREN:
        barren += 1
        instance = task.generate(rng)
        if task.split_of(instance) != split or instance.key in seen:
            continue
        if split != "train":
            seen.add(instance.key)
        barren = 0
        yield instance


def until_end(response: str) -> str:
    """The response up to the first special token, without outer white space."""
    return _SPECIAL_TOKEN.split(response, maxsplit=1)[0].strip()


def first_line(response: str) -> str | None:
    """The first line that is not blank; what follows it is no part of the answer."""
    return until_end(response).partition("\n")[0].strip() or None
