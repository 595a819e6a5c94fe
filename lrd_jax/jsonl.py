"""JSONL as users write it: one object a line, each mistake told with file and line.

Line numbers in messages count from 1, as editors do; those that are passed on count
from 0. Blank lines count, too.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from lrd_jax.errors import UserError

T = TypeVar("T")


def read_lines(
    path: str, read: Callable[[int, dict[str, Any]], T]
) -> tuple[list[T], str]:
    """What `read` makes of each line that is not blank, and the sha256 of the file.

    Args:
        path: of the file.
        read: takes a line's number, from 0, and its object.

    Raises:
        UserError: not readable, or the first line that is no object or that `read`
            refuses by a `UserError` of its own, whose message follows the place.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    found = []
    # Only \n ends a line: the separators that `splitlines` knows may be in a text.
    for line, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n")):
        if not text.strip():
            continue
        try:
            found.append(read(line, _object(text)))
        except UserError as error:
            raise UserError(f"{path}, line {line + 1}: {error}") from None
    return found, hashlib.sha256(data).hexdigest()


def check_keys(value: dict[str, Any], known: Collection[str]) -> None:
    """Raises a `UserError` for the first key that is not known."""
    for key in value:
        if key not in known:
            raise UserError(f"unknown key {key!r}; known: {', '.join(known)}.")


def only_key(value: dict[str, Any], kinds: Sequence[str]) -> str:
    """The one key of these that is there.

    Raises:
        UserError: none is, or more than one.
    """
    given = [kind for kind in kinds if kind in value]
    if len(given) != 1:
        raise UserError(
            f"must have exactly one of {', '.join(kinds)}; it has "
            f"{' and '.join(given) or 'none'}."
        )
    return given[0]


def short(value: object) -> str:
    """A value as a message quotes it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError:
        raise UserError("not valid UTF-8.") from None
    except RecursionError:
        raise UserError("not valid JSON: nested too deeply.") from None
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"must be a JSON object, got {short(value)}.")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; json's own reader keeps the last of two equal keys in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is given twice")
    return value
