"""The steps that the code tasks put together, and the inputs that tell functions apart.

A step is a phrase and a piece of Python for the same thing.
"""

import ast
import dataclasses
import enum
import functools
import re
from collections.abc import Sequence
from typing import Any


class Bind(enum.IntEnum):
    """How tightly an expression binds; one that binds too loosely gets parentheses."""

    CHOICE = 0  # a if b else c
    COMPARE = 1
    SUM = 2
    PRODUCT = 3  # With unary minus and powers: none of them is the base of a power.
    ATOM = 4


@dataclasses.dataclass(frozen=True)
class Step:
    """What can be done with a value.

    Attributes:
        says: phrasings of it as a command, with | between them. Letters are quoted,
            as in the code: behind a space a letter would be another token.
        code: the expression. {x} stands for the value, or {i} for each item of it; the
            other names in braces are `CONSTANTS`, as in `says`.
        gives: kind of the result; "keep" if the code is a condition on the items kept.
    """

    says: str
    code: str
    gives: str

    @property
    def needs(self) -> Bind:
        """How tightly the value must bind."""
        return _binding(self.code)[0]

    @property
    def binds(self) -> Bind:
        """How tightly the expression binds."""
        return _binding(self.code)[1]


@functools.cache
def _binding(code: str) -> tuple[Bind, Bind]:
    """What the hole {x} or {i} in the code needs, and how tightly the whole binds."""
    text = re.sub(r"\{\w!r\}", "''", re.sub(r"\{[xi]\}", "HOLE", code))
    tree = ast.parse(re.sub(r"\{\w\}", "1", text), mode="eval").body
    parents = {
        child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)
    }
    hole = next(n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "HOLE")
    match parents[hole]:
        case ast.Call():
            needs = Bind.CHOICE
        case ast.Compare():
            needs = Bind.SUM
        case ast.BinOp(left=left, op=op) if not isinstance(op, ast.Pow):
            # Python groups to the left, so the right side must bind tighter.
            needs = Bind(_own(parents[hole]) + (left is not hole))
        case _:
            needs = Bind.ATOM
    return needs, _own(tree)


def _own(node: ast.AST) -> Bind:
    match node:
        case ast.Compare():
            return Bind.COMPARE
        case ast.BinOp(op=ast.Add() | ast.Sub()):
            return Bind.SUM
        case ast.BinOp() | ast.UnaryOp():
            return Bind.PRODUCT
    return Bind.ATOM


# Name in braces -> what it can be. A step has each of them once.
CONSTANTS: dict[str, Sequence[Any]] = {
    "k": range(1, 10),
    "f": range(2, 10),
    "m": range(2, 10),
    "n": range(2, 7),
    "d": range(2, 6),
    "c": "aeilnorst",
    "o": "xyz",
    "e": "s!?.",
    "s": "a-#",
    "j": "-+/",
}

STEPS: dict[str, tuple[Step, ...]] = {
    "number": (
        Step("add {k}|increase it by {k}", "{x} + {k}", "number"),
        Step("subtract {k}|take away {k}", "{x} - {k}", "number"),
        Step("multiply by {f}|take it {f} times", "{x} * {f}", "number"),
        Step("divide by {f} rounding down", "{x} // {f}", "number"),
        Step("take the remainder by {m}|take it modulo {m}", "{x} % {m}", "number"),
        Step("square it", "{x} ** 2", "number"),
        Step("negate it|flip the sign", "-{x}", "number"),
        Step("take the absolute value", "abs({x})", "number"),
        Step("take at most {k}", "min({x}, {k})", "number"),
        Step("take at least {k}", "max({x}, {k})", "number"),
        Step("make it a text|turn it into a text", "str({x})", "text"),
        Step("tell if it is even", "{x} % 2 == 0", "truth"),
        Step("tell if it is odd", "{x} % 2 == 1", "truth"),
        Step("tell if it is more than {k}", "{x} > {k}", "truth"),
        Step("tell if it is less than {k}", "{x} < {k}", "truth"),
    ),
    "text": (
        Step("make it upper case|turn it into capitals", "{x}.upper()", "text"),
        Step("make it lower case", "{x}.lower()", "text"),
        Step("swap upper and lower case", "{x}.swapcase()", "text"),
        Step("reverse it|turn it around", "{x}[::-1]", "text"),
        Step("take the first {n} characters", "{x}[:{n}]", "text"),
        Step("take the last {n} characters", "{x}[-{n}:]", "text"),
        Step("drop the first {d} characters", "{x}[{d}:]", "text"),
        Step("drop the last {d} characters", "{x}[:-{d}]", "text"),
        Step("take every second character", "{x}[::2]", "text"),
        Step("strip the spaces around it", "{x}.strip()", "text"),
        Step(
            "replace '{c}' by '{o}'|change every '{c}' to '{o}'",
            "{x}.replace({c!r}, {o!r})",
            "text",
        ),
        Step("remove every '{c}'|delete each '{c}'", "{x}.replace({c!r}, '')", "text"),
        Step("put '{e}' at the end|append '{e}'", "{x} + {e!r}", "text"),
        Step("put '{s}' in front", "{s!r} + {x}", "text"),
        Step("repeat it {f} times", "{x} * {f}", "text"),
        Step("sort its characters", "''.join(sorted({x}))", "text"),
        Step("take its length|count its characters", "len({x})", "number"),
        Step("count the letter '{c}'", "{x}.count({c!r})", "number"),
        Step("split it into words", "{x}.split()", "words"),
        Step("split it at commas", "{x}.split(',')", "words"),
        Step("tell if it starts with '{c}'", "{x}.startswith({c!r})", "truth"),
        Step("tell if it ends with '{c}'", "{x}.endswith({c!r})", "truth"),
        Step("tell if it contains '{c}'", "{c!r} in {x}", "truth"),
    ),
    "numbers": (
        Step("add {k} to each", "{i} + {k}", "numbers"),
        Step("subtract {k} from each", "{i} - {k}", "numbers"),
        Step("multiply each by {f}", "{i} * {f}", "numbers"),
        Step("square each", "{i} ** 2", "numbers"),
        Step("keep the even ones|keep the even numbers", "{i} % 2 == 0", "keep"),
        Step("keep the odd ones|keep the odd numbers", "{i} % 2 == 1", "keep"),
        Step("keep those above {k}|keep the numbers above {k}", "{i} > {k}", "keep"),
        Step("keep those below {k}|keep the numbers below {k}", "{i} < {k}", "keep"),
        Step("sort it|sort from small to large", "sorted({x})", "numbers"),
        Step("sort from large to small", "sorted({x})[::-1]", "numbers"),
        Step("reverse it|reverse the order", "{x}[::-1]", "numbers"),
        Step("take the first {n} items", "{x}[:{n}]", "numbers"),
        Step("take the last {n} items", "{x}[-{n}:]", "numbers"),
        Step("drop the first {d} items", "{x}[{d}:]", "numbers"),
        Step("take every second item", "{x}[::2]", "numbers"),
        Step("add them up|take the sum", "sum({x})", "number"),
        Step("take the largest or else 0", "max({x}, default=0)", "number"),
        Step("take the smallest or else 0", "min({x}, default=0)", "number"),
        Step("count the items|take its length", "len({x})", "number"),
    ),
    "words": (
        Step("make each upper case", "{i}.upper()", "words"),
        Step("reverse each", "{i}[::-1]", "words"),
        Step("take the first {d} letters of each", "{i}[:{d}]", "words"),
        Step("put '{e}' after each", "{i} + {e!r}", "words"),
        Step("take the length of each", "len({i})", "numbers"),
        Step("keep those that start with '{c}'", "{i}.startswith({c!r})", "keep"),
        Step("keep those that end with '{c}'", "{i}.endswith({c!r})", "keep"),
        Step("keep those that contain '{c}'", "{c!r} in {i}", "keep"),
        Step("keep those longer than {n}", "len({i}) > {n}", "keep"),
        Step("sort them|sort alphabetically", "sorted({x})", "words"),
        Step("sort by length", "sorted({x}, key=len)", "words"),
        Step("reverse the order", "{x}[::-1]", "words"),
        Step("take the first {n} words", "{x}[:{n}]", "words"),
        Step("drop the first {d} words", "{x}[{d}:]", "words"),
        Step("join them with spaces", "' '.join({x})", "text"),
        Step("join them with '{j}'", "{j!r}.join({x})", "text"),
        Step("join them without a gap", "''.join({x})", "text"),
        Step("count the words", "len({x})", "number"),
    ),
}

# Phrase after "if", and the condition on x.
CONDITIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "number": (
        ("it is even", "x % 2 == 0"),
        ("it is odd", "x % 2 == 1"),
        ("it is more than {k}", "x > {k}"),
        ("it is less than {k}", "x < {k}"),
        ("it is negative", "x < 0"),
        ("it is divisible by {f}", "x % {f} == 0"),
    ),
    "text": (
        ("it is empty", "not x"),
        ("it starts with '{c}'", "x.startswith({c!r})"),
        ("it ends with '{c}'", "x.endswith({c!r})"),
        ("it contains '{c}'", "{c!r} in x"),
        ("it is longer than {n}", "len(x) > {n}"),
    ),
    "numbers": (
        ("it is empty", "not x"),
        ("it has more than {n} items", "len(x) > {n}"),
        ("it contains {k}", "{k} in x"),
    ),
}

# Every constant above has inputs on both sides of it, and every letter comes at the
# start, in the middle and at the end of a text.
INPUTS: dict[str, tuple[Any, ...]] = {
    "number": (*range(-12, 26), 36, 47, 60, 99, 100, 144, -57),
    "text": (
        *("", "a", "Z", "no", "tea", "noon", "Otto", "stats", "level", "banana"),
        *("Hello World", "a,b,c", "  pad  ", "12345", "racecar", "eerie tree"),
        *("one two  three", "Is it OK?", "tea, toast, rice", "riot,noise", "solar eel"),
        *(
            "list all errors in it",
            "Not Now",
            "interest",
            "-#?!",
            "rotor",
            "onion soup",
        ),
    ),
    "numbers": (
        *([], [0], [7], [-3], [1, 2], [2, 1], [5, 5, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        *([20, 19, 18, 17, 16], [10, 11, 12, 13, 14, 15], [-5, 8, -13, 21, 34]),
        *([3, 1, 2], [100, -100, 50, -50], [2, 4, 6, 8], [9, 7, 5], [12, 0, 3, 12]),
        *([21, 22, 1, 0, -1], [6, 18, 9, 17, 4, 20, 3, 15], [14, 13], [16, 19, 8, 11]),
    ),
    "words": (
        *([], ["a"], ["tea", "toast"], ["one", "two", "three", "four", "five", "six"]),
        *(["rain", "sun", "snow", "ice"], ["Anna", "Otto", "bob"], ["stats", "level"]),
        *(["apple", "orange", "lemon", "egg", "salt"], ["", "oil", ""], ["noon"] * 2),
        *(["interest", "listen", "errors", "total"], ["solar", "radio", "idea", "era"]),
        *(
            ["nil", "lion", "so", "to", "in", "at", "is"],
            ["e", "i", "o", "n", "r", "l"],
        ),
        *(["seven", "letters", "s", "it", "hotel"], ["tennis", "rules", "t", "area"]),
    ),
}
