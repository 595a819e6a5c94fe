"""Checks settings and reads them from TOML: one clear line for every mistake."""

import dataclasses
import difflib
import math
import os
import pathlib
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from lrd_jax.errors import UserError

ConfigT = TypeVar("ConfigT")

MAX_INT = 2**31 - 1  # JAX takes no larger one without 64-bit integers.


def check(ok: bool, name: str, value: object, expected: str) -> None:
    """Raises a one-line `UserError` that names the setting unless `ok`."""
    if not ok:
        raise UserError(f"`{name}` must be {expected}, got {value!r}.")


def check_given_once(argv: Sequence[str], repeatable: Sequence[str] = ()) -> None:
    """Raises a `UserError` for a flag whose first value would be dropped in silence.

    Args:
        argv: the words of a command line.
        repeatable: flags all of whose values count.
    """
    seen = set()
    for word in argv:
        match = re.fullmatch(r"(--[a-z][\w.-]*)(=.*)?", word, re.DOTALL)
        if match is None:
            continue
        flag = match[1].replace("_", "-")
        if flag in seen and flag not in repeatable:
            raise UserError(f"`{flag}` is given twice: leave one of them out.")
        seen.add(flag)


def check_rows(batch_size: int, length: int) -> None:
    """Raises a `UserError` unless JAX can count the positions of such a batch."""
    most = MAX_INT // length
    expected = f"1 to {most}, rows of {length} positions"
    check(1 <= batch_size <= most, "--batch-size", batch_size, expected)


def _matches(value: object, kind: Any) -> bool:
    """Whether `value` fits the annotation; an int passes for a float, no bool does."""
    if isinstance(kind, types.UnionType):
        return any(_matches(value, k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_matches(v, item) for v in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _describe(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_describe(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if kind is types.NoneType:
        return "nothing"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )


def check_types(config: Any) -> None:
    """Raises `UserError` at the first field whose value is of another type."""
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), kinds[field.name]
        check(_matches(value, kind), field.name, value, _describe(kind))
        fits = type(value) is not int or value <= MAX_INT
        with_point = ", or with a decimal point" if _matches(0.5, kind) else ""
        check(fits, field.name, value, f"at most {MAX_INT}{with_point}")


def field_names(cls: type) -> list[str]:
    """Names of the settings of `cls` that can be set."""
    return [f.name for f in dataclasses.fields(cls) if f.init]


def plain(config: Any, prefix: str = "decode.") -> dict[str, Any]:
    """The settings of a config by their prefixed names, as JSON values."""
    return {
        # JSON has no infinity.
        prefix + name: str(value) if value == math.inf else value
        for name, value in dataclasses.asdict(config).items()
    }


def unknown_name(name: str, known: list[str], where: str) -> UserError:
    """The error for a misspelt name, with the nearest known ones."""
    near = difflib.get_close_matches(name, known, n=3)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}."
    )
    return UserError(f"{where}: unknown setting {name!r}; {hint}")


def build(cls: type[ConfigT], values: dict[str, Any], where: str) -> ConfigT:
    """Makes a `cls` of `values`; `where` says in errors which file they come from.

    Raises:
        UserError: unknown key (with near matches), wrong type or out of range.
    """
    for name in values:
        if name not in field_names(cls):
            raise unknown_name(name, field_names(cls), where)
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def shipped_configs() -> dict[str, pathlib.Path]:
    """Name -> path of the configs that come with the package."""
    here = pathlib.Path(__file__).parent
    # In the wheel they lie inside the package, in a checkout beside it.
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {}


def read_toml(path_or_name: str) -> tuple[dict[str, Any], str]:
    """Reads a config file, or a shipped one by its name.

    Returns:
        The top-level table and the path it came from.

    Raises:
        UserError: no such file, or not valid TOML.
    """
    path = pathlib.Path(path_or_name)
    if not os.path.isfile(path):  # `Path.is_file` raises at names that are too long.
        shipped = shipped_configs()
        if path_or_name not in shipped:
            raise UserError(
                f"no config file {path_or_name!r}; give a path to a .toml file or one "
                f"of the shipped names: {', '.join(shipped)}."
            )
        path = shipped[path_or_name]
    try:
        # Some editors on Windows put a byte order mark first.
        return tomllib.loads(path.read_text(encoding="utf-8-sig")), str(path)
    except RecursionError:
        raise UserError(f"{path}: not valid TOML: nested too deeply") from None
    except ValueError as error:  # Also of a number with thousands of digits.
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
