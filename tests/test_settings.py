"""Checks of settings and the reading of TOML: one clear line for every mistake."""

import dataclasses
import math
from typing import Literal

import pytest

from lrd_jax import settings
from lrd_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oven:
    minutes: int = 5
    degrees: float = 200.0
    fan: bool = False
    rack: int | None = None
    mode: Literal["top", "bottom"] = "top"
    racks: tuple[int, ...] = ()
    serial: int = dataclasses.field(default=7, init=False)

    def __post_init__(self):
        settings.check_types(self)
        positive = 0 < self.degrees < math.inf
        settings.check(positive, "degrees", self.degrees, "positive")


def refusal(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_check_names_the_setting_and_its_value():
    settings.check(True, "size", 3, "small")
    message = refusal(settings.check, False, "size", "a\nb", "small")
    assert message == r"`size` must be small, got 'a\nb'."


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"minutes": 1, "degrees": 0.5, "fan": True, "rack": 2, "mode": "bottom"},
        {"degrees": 1},
        {"rack": None},
        {"racks": (1, 2)},
        {"minutes": 2**31 - 1, "rack": 2**31 - 1, "degrees": 3e9},
    ],
)
def test_values_of_the_right_type_are_kept(values):
    oven = settings.build(Oven, values, "oven.toml")
    assert oven == Oven(**values)
    assert all(getattr(oven, name) == value for name, value in values.items())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"minutes": True}, "`minutes` must be a whole number, got True."),
        ({"minutes": 1.0}, "`minutes` must be a whole number, got 1.0."),
        ({"minutes": "1"}, "`minutes` must be a whole number, got '1'."),
        ({"minutes": None}, "`minutes` must be a whole number, got None."),
        ({"degrees": False}, "`degrees` must be a number, got False."),
        ({"degrees": "hot"}, "`degrees` must be a number, got 'hot'."),
        ({"degrees": math.nan}, "`degrees` must be positive, got nan."),
        ({"degrees": math.inf}, "`degrees` must be positive, got inf."),
        ({"degrees": -1}, "`degrees` must be positive, got -1."),
        ({"fan": 1}, "`fan` must be true or false, got 1."),
        ({"fan": "on"}, "`fan` must be true or false, got 'on'."),
        ({"rack": 1.5}, "`rack` must be a whole number or nothing, got 1.5."),
        ({"rack": True}, "`rack` must be a whole number or nothing, got True."),
        ({"mode": "grill"}, "`mode` must be one of top, bottom, got 'grill'."),
        ({"mode": ["top"]}, "`mode` must be one of top, bottom, got ['top']."),
        ({"minutes": 2**31}, "`minutes` must be at most 2147483647, got 2147483648."),
        ({"rack": 2**31}, "`rack` must be at most 2147483647, got 2147483648."),
        (
            {"degrees": 3000000000},
            "`degrees` must be at most 2147483647, or with a decimal point, got "
            "3000000000.",
        ),
        ({"racks": (1, True)}, "`racks` must be tuple, got (1, True)."),
        ({"racks": [1]}, "`racks` must be tuple, got [1]."),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(values, expected):
    assert refusal(settings.build, Oven, values, "o.toml") == f"o.toml: {expected}"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("minute", "did you mean minutes?"),
        ("rac", "did you mean rack or racks?"),
        ("colour", "known: minutes, degrees, fan, rack, mode, racks."),
        ("serial", "known: minutes, degrees, fan, rack, mode, racks."),
    ],
)
def test_an_unknown_setting_gets_the_nearest_names(name, hint):
    message = refusal(settings.build, Oven, {name: 1}, "o.toml")
    assert message == f"o.toml: unknown setting {name!r}; {hint}"


def test_settings_that_cannot_be_set_are_not_offered():
    assert "serial" not in settings.field_names(Oven)


def write(tmp_path, content):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    return str(path)


def test_toml_is_read_with_where_it_came_from(tmp_path):
    path = write(tmp_path, b'method = "lrd"\n[decode]\nstop_entropy = inf\n')
    want = {"method": "lrd", "decode": {"stop_entropy": math.inf}}
    assert settings.read_toml(path) == (want, path)


def test_a_byte_order_mark_is_let_through(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbfseed = 1")
    assert settings.read_toml(path)[0] == {"seed": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"a = ",
        b"a = 1\na = 2",
        b"[decode",
        b'a = "\x00"',
        b"a = " + b"[" * 3000,
        b"a = " + b"1" * 5000,
    ],
)
def test_a_file_that_is_not_toml_is_named(tmp_path, content):
    path = write(tmp_path, content)
    message = refusal(settings.read_toml, path)
    assert message.startswith(f"{path}: not valid TOML: ")


@pytest.mark.parametrize("name", ["missing.toml", "", "x" * 300, "bad\0name"])
def test_a_missing_file_lists_the_shipped_configs(name):
    message = refusal(settings.read_toml, name)
    assert message.startswith(f"no config file {name!r}; ")
    assert "llada_8b_base, llada_8b_instruct" in message


def test_a_directory_is_no_config(tmp_path):
    message = refusal(settings.read_toml, str(tmp_path))
    assert message.startswith(f"no config file {str(tmp_path)!r}; ")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, b"a = 1")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(settings.pathlib.Path, "read_text", denied)
    message = refusal(settings.read_toml, path)
    assert message == f"{path}: cannot be read: Permission denied"


def test_a_file_beats_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dream_7b_base").write_text("seed = 1")
    assert settings.read_toml("dream_7b_base")[0] == {"seed": 1}


def test_a_shipped_config_is_found_by_its_name():
    table, where = settings.read_toml("dream_7b_base")
    assert table["method"] == "lrd"
    assert where.endswith("dream_7b_base.toml")
