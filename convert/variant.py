"""Base or Instruct: a published `config.json` is the same for both, names differ."""

import os
import pathlib
import re
from typing import Literal

from lrd_jax.tokenizer import read_json_object

Variant = Literal["base", "instruct"]

# A word of its own, so that `database` or `knowledgebase` says nothing.
_BASE = re.compile(r"(?<![a-z])base(?![a-z])")
_INSTRUCT = re.compile(r"(?<![a-z])instruct(?![a-z])")
# LLaDA-1.5 is LLaDA-Instruct after preference optimisation.
_LLADA_1_5 = re.compile(r"(?<![0-9.])1\.5(?![0-9a-z])")


def _variants_in(text: str, family: str) -> set[Variant]:
    text, found = text.lower(), set[Variant]()
    if _BASE.search(text):
        found.add("base")
    if _INSTRUCT.search(text) or (family == "llada" and _LLADA_1_5.search(text)):
        found.add("instruct")
    return found


def variant_of(src: pathlib.Path, family: str) -> Variant | None:
    """Goes by `_name_or_path` and the path, as given and with its links resolved.

    Of a path the part nearest to the files that says anything counts: in
    `base/LLaDA-8B-Instruct` that is the last.

    Args:
        src: directory with the published files.
        family: `llada` or `dream`.

    Returns:
        None if the names say nothing or both.
    """
    config = read_json_object(src / "config.json", missing_ok=True)
    found = _variants_in(str(config.get("_name_or_path", "")), family)
    for path in (pathlib.Path(os.path.abspath(src)), src.resolve()):
        for part in reversed(path.parts):
            if said := _variants_in(part, family):
                found |= said
                break
    return found.pop() if len(found) == 1 else None
