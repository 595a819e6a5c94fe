"""Arithmetic: single facts, and expressions worked out step by step.

Multiplication always has a factor below ten. A small model has to do each step at one
go, and products of two-digit numbers would need steps of their own.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from lrd_jax.tasks.base import (
    Instance,
    Payload,
    Task,
    first_line,
    one_by_one,
    until_end,
)
from lrd_jax.tasks.draw import between, chance, pick

# A number, the name of one, or (operator, left tree, right tree).
Tree = int | str | tuple[str, Any, Any]

_EXPRESSION_FRAMES = (
    "Compute {expression}",
    "Work out {expression} step by step",
)
_FACT_FRAMES = ("{fact} =", "What is {fact}?")
_OPERATION_FRAMES = ("Compute each: {operations}", "Work out each: {operations}")
_EQUATION_FRAMES = (
    "Write {count} equations like {examples}",
    "Give {count} equations such as {examples}",
)
_LEVEL = {"+": 1, "-": 1, "*": 2}
_EQUATION = re.compile(r"\d+ [-+*] \d+ = \d+")
# Of any number on the way: a small model has to see each fact hundreds of times.
LARGEST = 12


def solve(op: str, left: int, right: int) -> int:
    """The value of one operation."""
    if op == "*":
        return left * right
    return left + right if op == "+" else left - right


def value_of(tree: Tree, names: Mapping[str, int], steps: list[str]) -> int:
    """The value of a tree; appends a line like `3 + 4 = 7` for each operation."""
    if isinstance(tree, str):
        return names[tree]
    if isinstance(tree, int):
        return tree
    op, left_tree, right_tree = tree
    left = value_of(left_tree, names, steps)
    right = value_of(right_tree, names, steps)
    value = solve(op, left, right)
    steps.append(f"{left} {op} {right} = {value}")
    return value


def written_out(steps: list[str], value: int) -> str:
    """The answer as GSM8K writes it: the steps, then the value after `####`."""
    return "\n".join([*steps, f"#### {value}"])


def _render(tree: Tree, level: int = 0) -> str:
    """The expression, with parentheses only where they matter."""
    if not isinstance(tree, tuple):
        return str(tree)
    op, left, right = tree
    own = _LEVEL[op]
    text = f"{_render(left, own)} {op} {_render(right, own + 1)}"
    return f"({text})" if own < level else text


def _grow(rng: random.Random, num_ops: int) -> Tree:
    if num_ops == 0:
        return between(rng, 1, LARGEST)
    op = pick(rng, "+-*")
    if op == "*":  # One factor is a single digit, the other holds all operations.
        digit: Tree = between(rng, 2, 9)
        rest = _grow(rng, num_ops - 1)
        return (op, digit, rest) if chance(rng, 0.3) else (op, rest, digit)
    on_the_left = between(rng, 0, num_ops - 1)
    left, right = _grow(rng, on_the_left), _grow(rng, num_ops - 1 - on_the_left)
    return (op, left, right)


def _plain(tree: Tree) -> bool:
    """Whether all numbers on the way are in [0, `LARGEST`]."""
    if not isinstance(tree, tuple):
        return True
    op, left, right = tree
    a, b = value_of(left, {}, []), value_of(right, {}, [])
    fits = 0 <= solve(op, a, b) <= LARGEST
    return fits and _plain(left) and _plain(right)


def _draw_tree(rng: random.Random) -> Tree:
    num_ops = between(rng, 2, 3)
    tree = _grow(rng, num_ops)
    while not _plain(tree):
        tree = _grow(rng, num_ops)
    return tree


def _draw_pair(rng: random.Random) -> Tree:
    """A tree whose last operation takes the results of two others."""
    while True:
        tree = (pick(rng, "+-*"), _grow(rng, 1), _grow(rng, 1))
        if _plain(tree):
            return tree


def _expression(
    rng: random.Random, draw: Callable[[random.Random], Tree] = _draw_tree
) -> Instance:
    tree = draw(rng)
    steps: list[str] = []
    value = value_of(tree, {}, steps)
    expression = _render(tree)
    return Instance(
        prompt=pick(rng, _EXPRESSION_FRAMES).format(expression=expression),
        answer=written_out(steps, value),
        payload={"answer": value},
        key=f"expression: {expression}",
        group=f"expression: {expression}",
    )


def _fact(rng: random.Random, *, ops: str, largest: int, name: str) -> Instance:
    op = pick(rng, ops)
    a, b = between(rng, 0, 99), between(rng, 0, largest)
    if largest < 99 and chance(rng, 0.5):
        a, b = b, a
    value = solve(op, a, b)
    return Instance(
        prompt=pick(rng, _FACT_FRAMES).format(fact=f"{a} {op} {b}"),
        answer=str(value),
        payload={"answer": value},
        key=f"{name}: {a} {op} {b}",
        # A pair of numbers is new or known as a whole: a + b, b + a, a - b and b - a.
        group=f"{name}: {min(a, b)} {max(a, b)}",
    )


def _operations(rng: random.Random) -> Instance:
    """Single steps of expressions, so with all the numbers that steps come to.

    In an expression the value of a step is an operand of another, and the last one
    stands there twice: a model learns to copy it, and seldom has to compute it. Here
    nothing else tells a value.
    """
    lines = [_any_step(rng) for _ in range(between(rng, 3, 4))]
    operations = ", ".join(line.partition(" = ")[0] for line in lines)
    answer = "\n".join(lines)
    return Instance(
        prompt=pick(rng, _OPERATION_FRAMES).format(operations=operations),
        answer=answer,
        payload={"answer": answer},
        key=f"operations: {operations}",
        group=f"operations: {operations}",
    )


def _equations(rng: random.Random) -> Instance:
    """True equations, any ones.

    Nothing in the prompt tells an operand, so that a value has to be computed from what
    stands beside it, as in the later steps of an expression.
    """
    count = between(rng, 3, 4)
    drawn: dict[str, None] = {}  # In order, and each once.
    while len(drawn) < count + 2:
        drawn[_any_step(rng)] = None
    *lines, first, second = drawn
    examples = f"{first}, {second}"
    return Instance(
        prompt=pick(rng, _EQUATION_FRAMES).format(count=count, examples=examples),
        answer="\n".join(lines),
        payload={"count": count},
        key=f"equations: {count} {examples}",
        group=f"equations: {examples}",
    )


def _any_step(rng: random.Random) -> str:
    steps: list[str] = []
    value_of(_draw_tree(rng), {}, steps)
    return pick(rng, steps)


def _number(text: str) -> str | None:
    """The number that the text starts with, as written but without its commas."""
    match = re.match(r"\s*(-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)", text)
    return match and match[1].replace(",", "")


def final_number(response: str) -> str | None:
    """The number after the first `####`."""
    _, mark, rest = until_end(response).partition("####")
    return _number(rest) if mark else None


def _only_number(response: str) -> str | None:
    """The number that is the whole first line."""
    line = first_line(response)
    return line if line and re.fullmatch(r"-?\d+", line) else None


def same_number(payload: Payload, answer: str) -> bool:
    """Whether the answer is the payload's whole number (`7.0` is not, nor is `07`)."""
    return answer == str(payload["answer"])


def _same_lines(payload: Payload, answer: str) -> bool:
    """The first lines are the payload's; what follows them is no part of the answer."""
    lines = payload["answer"].split("\n")
    return answer.split("\n")[: len(lines)] == lines


def _true_equations(payload: Payload, answer: str) -> bool:
    """As many different true ones as asked for; then the end, or something else."""
    lines = answer.split("\n")
    equations = list(itertools.takewhile(_EQUATION.fullmatch, lines))
    return len(equations) == len({*equations}) == payload["count"] and all(
        _is_true(line) for line in equations
    )


def _is_true(equation: str) -> bool:
    left, op, right, _, value = equation.split(" ")
    return str(solve(op, int(left), int(right))) == value


def stepwise_task(
    name: str, generate: Callable[[random.Random], Instance], *, held_out: int = 5
) -> Task:
    """A task judged, as GSM8K is, by the number after `####` alone."""
    return Task(
        name=name,
        family="arithmetic",
        generate=generate,
        extract=final_number,
        grade=one_by_one(same_number),
        held_out=held_out,
    )


def _fact_task(
    name: str,
    generate: Callable[[random.Random], Instance],
    *,
    extract: Callable[[str], str | None] = _only_number,
    judge: Callable[[Payload, str], bool] = same_number,
) -> Task:
    return Task(
        name=name,
        family="facts",
        generate=generate,
        extract=extract,
        grade=one_by_one(judge),
    )


TASKS = (
    _fact_task("facts", functools.partial(_fact, ops="+-", largest=99, name="facts")),
    _fact_task(
        "products", functools.partial(_fact, ops="*", largest=9, name="products")
    ),
    _fact_task("operations", _operations, extract=until_end, judge=_same_lines),
    _fact_task("equations", _equations, extract=until_end, judge=_true_equations),
    # Expressions of one kind, the hardest: their groups, so their splits, are the same.
    _fact_task(
        "pairs",
        functools.partial(_expression, draw=_draw_pair),
        extract=final_number,
    ),
    stepwise_task("expressions", _expression),
)
