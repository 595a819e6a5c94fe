"""README's Python runs as printed, in order, on the checkpoint that it makes."""

import pathlib
import re

import pytest

from convert import convert, random_checkpoint

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.fixture
def demo(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_checkpoint.write(tmp_path / "demo/hf", "llada", seed=0)
    convert.from_hf(tmp_path / "demo/hf", tmp_path / "demo/ckpt")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("demo")
def test_the_python_blocks_run_as_printed(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert capsys.readouterr().out


def test_every_setting_in_the_table_is_a_setting():
    from lrd_jax.config import DecodeConfig
    from lrd_jax.settings import field_names

    first_cells = r"^\| ((?:`\w+`(?:, | / )?)+) \|"
    rows = re.findall(first_cells, README.read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    methods = {"lrd", "baseline", "llada", "dream"}
    assert named - methods
    assert named - methods <= set(field_names(DecodeConfig))
