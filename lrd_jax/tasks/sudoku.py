"""4 x 4 sudoku: rows, columns and the four 2 x 2 boxes hold 1 to 4 once each.

There are 288 complete grids in all, so it is grids that are split: no puzzle of
validation or test has a solution that any puzzle of training has.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence

from lrd_jax.tasks.base import Instance, Payload, Task, one_by_one, until_end
from lrd_jax.tasks.draw import between, pick, shuffled

_FRAMES = (
    "Solve this 4x4 sudoku:\n{rows}",
    "Complete the sudoku:\n{rows}",
)
# Cells that must hold 1 to 4 between them, as indexes into the 16 characters.
_UNITS = (
    *(tuple(range(4 * r, 4 * r + 4)) for r in range(4)),
    *(tuple(range(c, 16, 4)) for c in range(4)),
    *(tuple(r + c for r in (i, i + 4) for c in (0, 1)) for i in (0, 2, 8, 10)),
)


def _valid(grid: str) -> bool:
    return all({grid[cell] for cell in unit} == set("1234") for unit in _UNITS)


@functools.cache
def grids() -> tuple[str, ...]:
    """All complete grids, each as its four rows in a row."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    # Rows 1 and 2 share boxes, so most pairs fall out before the full check.
    pairs = [(a, b) for a in rows for b in rows if not set(a[:2]) & set(b[:2])]
    whole = ("".join(top + low) for top in pairs for low in pairs)
    return tuple(grid for grid in whole if _valid(grid))


@functools.cache
def _holders() -> dict[tuple[int, str], int]:
    """(cell, digit) -> the grids with it there, as a bit set."""
    held = dict.fromkeys(itertools.product(range(16), "1234"), 0)
    for number, grid in enumerate(grids()):
        for cell_and_digit in enumerate(grid):
            held[cell_and_digit] |= 1 << number
    return held


def count_solutions(puzzle: str) -> int:
    """How many grids agree with the givens; any other character is a blank."""
    left = (1 << len(grids())) - 1
    for cell_and_digit in enumerate(puzzle):
        left &= _holders().get(cell_and_digit, left)
    return left.bit_count()


def _rows(cells: str) -> str:
    return "\n".join(cells[i : i + 4] for i in range(0, 16, 4))


def _puzzle(rng: random.Random, *, fewest: int, most: int) -> Instance:
    """Blanks cells in random order as long as the solution stays the only one.

    A puzzle that can spare no further given has six at most, so `fewest` is reached.
    """
    grid = pick(rng, grids())
    wanted = between(rng, fewest, most)
    cells = list(grid)
    for cell in shuffled(rng, range(16)):
        if cells.count(".") == wanted:
            break
        cells[cell] = "."
        if count_solutions("".join(cells)) > 1:
            cells[cell] = grid[cell]
    puzzle = "".join(cells)
    return Instance(
        prompt=pick(rng, _FRAMES).format(rows=_rows(puzzle.replace(".", "0"))),
        answer=_rows(grid),
        payload={"puzzle": puzzle},
        key=f"sudoku: {puzzle}",
        group=f"sudoku: {grid}",
    )


def _extract(response: str) -> str | None:
    """The first four lines, if each is four digits (spaces between them are fine)."""
    lines = [line for line in until_end(response).splitlines() if line.strip()][:4]
    rows = [re.sub(r"[ \t|]", "", line) for line in lines]
    if len(rows) < 4 or not all(re.fullmatch("[1-4]{4}", row) for row in rows):
        return None
    return "\n".join(rows)


def _solves(payload: Payload, answer: str) -> bool:
    grid, puzzle = answer.replace("\n", ""), payload["puzzle"]
    kept = all(given in (".", cell) for given, cell in zip(puzzle, grid, strict=True))
    return kept and _valid(grid)


def _task(name: str, generate: Callable[[random.Random], Instance]) -> Task:
    # With 5 % of 288, a test would rest on some 14 grids.
    return Task(
        name=name,
        family="sudoku",
        generate=generate,
        extract=_extract,
        grade=one_by_one(_solves),
        held_out=10,
    )


TASKS: Sequence[Task] = (
    _task("sudoku_easy", functools.partial(_puzzle, fewest=3, most=8)),
    _task("sudoku_hard", functools.partial(_puzzle, fewest=9, most=12)),
)
