"""What the command lines share: kinds of flags, and how some are read.

Imports neither JAX nor a model, so that `--help` and mistakes are answered at once.
"""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from lrd_jax.errors import UserError
from lrd_jax.settings import check

MAX_SEED = 2**32 - 1  # What `jax.random.key` takes without 64-bit integers.


def shown(metavar: str) -> Any:
    """What `--help` puts in the place of a value."""
    return tyro.conf.arg(metavar=metavar)


Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
OptionalText = Annotated[str | None, tyro.conf.DisallowNone]
Number = Annotated[int, shown("N")]
OptionalNumber = Annotated[int | None, tyro.conf.DisallowNone, shown("N")]
DtypeFlag = Annotated[Literal["float32", "bfloat16"] | None, tyro.conf.DisallowNone]
QuantizeFlag = Annotated[Literal["int8"] | None, tyro.conf.DisallowNone]
MeshFlag = Annotated[OptionalText, shown("data=N,model=N|auto")]
CoordinatorFlag = Annotated[OptionalText, shown("HOST:PORT|auto")]


def check_seed(seed: int) -> None:
    """Raises a `UserError` for a `--seed` that makes no random key."""
    check(0 <= seed <= MAX_SEED, "--seed", seed, f"in [0, {MAX_SEED}]")


def check_counts(flags: Any, *names: str) -> None:
    """Raises a `UserError` for one of these flags that is below 1."""
    for name in names:
        value = getattr(flags, name)
        check(value >= 1, f"--{name.replace('_', '-')}", value, "at least 1")


def read_names(text: str, flag: str) -> list[str]:
    """The names of a flag that has commas between them.

    Raises:
        UserError: one of them is empty.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"`{flag}` must be names with commas between, got {text!r}.")
    return names


def last_value(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag that decides which flags there are; the last one wins."""
    found = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            found = argv[i + 1]
        elif word.startswith(flag + "="):
            found = word[len(flag) + 1 :]
    return found


def with_defaults(cls: type[Any], values: dict[str, Any]) -> type:
    """`cls` with `values` as its defaults.

    A subclass and not an instance as tyro's default: given an instance, tyro offers the
    fields that cannot be set, too. It checks nothing: single settings may fit only
    together with those still to come, and the checks are `cls`'s own.
    """
    hints = typing.get_type_hints(cls)
    return dataclasses.make_dataclass(
        cls.__name__,
        [
            (name, hints[name], dataclasses.field(default=value))
            for name, value in values.items()
        ],
        bases=(cls,),
        namespace={"__post_init__": lambda self: None, "__doc__": cls.__doc__},
        frozen=True,
        kw_only=True,
    )
