"""Prompts as the user gives them: the lines of a JSONL file, or `--prompt` texts.

A job's `line` counts from 0, blank ones included; it is the default id and makes the
row's random key.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from lrd_jax.errors import UserError
from lrd_jax.jsonl import check_keys, only_key, read_lines, short

KINDS = ("prompt", "messages", "prompt_ids")
KEYS = (*KINDS, "id", "open")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One thing to decode; exactly one of prompt, messages and prompt_ids is not None.

    Attributes:
        id: what the result is called in the output.
        line: number of its line, from 0.
        where: what to call it in an error message.
        prompt: text, to be wrapped by the chat template if the model has one.
        messages: a conversation for the chat template.
        prompt_ids: token ids, taken as they are.
        open: positions of `prompt_ids` to be filled, for infilling; None if not given.
    """

    id: int | str
    line: int
    where: str
    prompt: str | None = None
    messages: list[Any] | None = None
    prompt_ids: list[int] | None = None
    open: list[int] | None = None


def jobs_from_prompts(prompts: Sequence[str]) -> tuple[list[Job], str]:
    """The jobs of `--prompt` texts, and a hash of them."""
    for prompt in prompts:
        try:
            _check_text(prompt)
        except UserError as error:
            raise UserError(f"--prompt: {error}") from None
    jobs = [
        Job(id=i, line=i, where=f"--prompt {i + 1}", prompt=prompt)
        for i, prompt in enumerate(prompts)
    ]
    return jobs, hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def jobs_from_file(path: str) -> tuple[list[Job], str]:
    """The jobs of a JSONL file, and the sha256 of its bytes.

    Raises:
        UserError: not readable, no jobs in it, or the first line that is not a job.
    """
    first_line: dict[int | str, int] = {}

    def read(line: int, value: dict[str, Any]) -> Job:
        _check(value)
        name = value.get("id", line)
        if name in first_line:
            raise UserError(
                f"id {name!r} is taken by line {first_line[name]} already (a line "
                "without an id has its number, from 0)."
            )
        first_line[name] = line + 1
        where = f"{path}, line {line + 1}"
        return Job(**(value | {"id": name, "line": line, "where": where}))

    jobs, digest = read_lines(path, read)
    if not jobs:
        raise UserError(f"{path}: has no prompts in it.")
    return jobs, digest


def _check(value: dict[str, Any]) -> None:
    """Raises a `UserError` unless it is a job, as far as can be told without model."""
    check_keys(value, KEYS)
    kind = only_key(value, KINDS)
    if "open" in value and kind != "prompt_ids":
        raise UserError('"open" goes with "prompt_ids" only.')
    if kind == "prompt":
        _check_text(value[kind])
    elif kind == "prompt_ids":
        _check_ids(value[kind], kind)
    # What is in messages `lrd_jax.text` checks, with the model's template at hand.
    elif not isinstance(value[kind], list):
        raise UserError(f"`messages` must be a list, got {short(value[kind])}.")
    if "open" in value:
        _check_ids(value["open"], "open")
    name = value.get("id", 0)
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise UserError(f"`id` must be a string or a whole number, got {short(name)}.")
    if isinstance(name, str):
        _check_text(name)


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise UserError(f"must be a text, got {short(text)}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("not valid Unicode text (half a pair).") from None


def _check_ids(ids: object, name: str) -> None:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(f"`{name}` must be a list of whole numbers, got {short(ids)}.")
