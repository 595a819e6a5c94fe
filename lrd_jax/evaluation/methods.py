"""The methods to compare: entries of a TOML file, and sweeps over one setting."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from lrd_jax.config import METHODS, MethodConfig
from lrd_jax.errors import UserError
from lrd_jax.settings import build, field_names, read_toml, unknown_name

ALL = "all"
# A name is a word on the command line and a part of a file's name.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_SHARE_OF_WINDOW = re.compile(r"gen_length ?/ ?([1-9][0-9]{0,8})")


@dataclasses.dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        name: what the table calls it.
        cfg: its settings.
        entry: the entry it comes from; `name` unless it is part of a sweep.
        swept: whether it is.
        value: that the sweep gave it.
    """

    name: str
    cfg: MethodConfig
    entry: str
    swept: bool = False
    value: Any = None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A setting and the values that it takes, one method for each."""

    setting: str
    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of a method file by name, and the file for error messages.

    A name that is no entry's but a decode method's means that with its defaults.
    """

    tables: Mapping[str, Mapping[str, Any]]
    where: str

    def method(self, name: str, gen_length: int) -> Method:
        """The method of that name, decoding `gen_length` positions.

        Raises:
            UserError: no such entry, or a setting is unknown or out of range.
        """
        if name not in self.tables and name not in METHODS:
            known = [*self.tables, *(m for m in METHODS if m not in self.tables)]
            raise UserError(
                f"no method {name!r} in {self.where}; known: {', '.join(known)}."
            )
        table = dict(self.tables.get(name, {"method": name}))
        where = f"{self.where}: [{name}]"
        cls = METHODS[table.pop("method")]
        if "gen_length" in table:
            raise UserError(
                f"{where}: gen_length is the same for all methods: leave it out, and "
                "give `--gen-length`."
            )
        values = {
            k: _of_window(v, gen_length, f"{where} {k}") for k, v in table.items()
        }
        cfg = build(cls, {"gen_length": gen_length} | values, where)
        return Method(name=name, cfg=cfg, entry=name)


def read_entries(path_or_name: str) -> Entries:
    """Reads a method file, or a shipped one by its name.

    Raises:
        UserError: not readable, or an entry is no table with a decode method.
    """
    tables, where = read_toml(path_or_name)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{where}: `{name}` must be a table, [{name}].")
        if not _NAME.fullmatch(name) or name == ALL:
            raise UserError(
                f"{where}: [{name}] cannot be a method's name: give it letters, "
                f"digits, `_`, `-` and `.` only, and not {ALL!r}."
            )
        method = table.get("method")
        if not isinstance(method, str) or method not in METHODS:
            raise UserError(
                f"{where}: [{name}] `method` must be one of {', '.join(METHODS)}, got "
                f"{method!r}."
            )
    if not tables:
        raise UserError(f"{where}: has no methods in it.")
    return Entries(tables, where)


def choose(names: Sequence[str], entries: Entries, gen_length: int) -> list[Method]:
    """The methods of those names, in that order; `all` is all that the file has.

    Raises:
        UserError: as `Entries.method`, or a name is given twice.
    """
    listed = [
        entry for name in names for entry in (entries.tables if name == ALL else [name])
    ]
    for name in listed:
        if listed.count(name) > 1:
            raise UserError(f"--methods: {name!r} is given twice; name it once.")
    return [entries.method(name, gen_length) for name in listed]


def parse_sweep(text: str) -> Sweep:
    """Reads `SETTING=VALUE,VALUE,...`; a value is TOML, or a bare word.

    Raises:
        UserError: not of that form, or a value is given twice.
    """
    setting, equals, values = text.partition("=")
    words = [word.strip() for word in values.split(",")]
    if not equals or not setting.strip() or not all(words):
        raise UserError(
            f"`--sweep` must be SETTING=VALUE,VALUE,..., as in r_f=0,0.1,0.2; got "
            f"{text!r}."
        )
    read = [_toml_value(word) for word in words]
    for value in read:
        if read.count(value) > 1:
            raise UserError(f"--sweep: {value!r} is given twice; name it once.")
    return Sweep(setting.strip().replace("-", "_"), tuple(read))


def swept(method: Method, sweep: Sweep) -> list[Method]:
    """The method with each value of the sweep.

    Raises:
        UserError: the setting is none of the method's, or a value is out of range.
    """
    cls = type(method.cfg)
    if sweep.setting == "gen_length":
        raise UserError("--sweep: gen_length is the same for all methods.")
    if sweep.setting not in field_names(cls):
        where = f"--sweep: method {method.name}"
        raise unknown_name(sweep.setting, field_names(cls), where)
    base = {name: getattr(method.cfg, name) for name in field_names(cls)}
    return [
        Method(
            name=f"{method.name} {sweep.setting}={_word(value)}",
            cfg=build(cls, base | {sweep.setting: value}, "--sweep"),
            entry=method.entry,
            swept=True,
            value=value,
        )
        for value in sweep.values
    ]


def _of_window(value: Any, gen_length: int, where: str) -> Any:
    """`"gen_length/2"` as a number; any other value as it is."""
    share = _SHARE_OF_WINDOW.fullmatch(value) if isinstance(value, str) else None
    if share is None:
        return value
    whole, rest = divmod(gen_length, int(share[1]))
    if rest or not whole:
        raise UserError(
            f"{where} = {value!r}: gen_length {gen_length} is not a multiple of "
            f"{share[1]}."
        )
    return whole


def _toml_value(word: str) -> Any:
    try:
        return tomllib.loads(f"value = {word}")["value"]
    except tomllib.TOMLDecodeError:
        return word


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
