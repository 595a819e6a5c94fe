"""README's Python runs as printed, in order."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


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
