"""Prompts as the user gives them: the lines of a JSONL file, or `--prompt` texts.

Line numbers in error messages count from 1, as editors do. A job's `line` counts from
0; it is the default id and makes the row's random key, and blank lines count too.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from lrd_jax.errors import UserError

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
        _check_text(prompt, "--prompt")
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
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    jobs: list[Job] = []
    first_line: dict[int | str, int] = {}
    # Only \n ends a line: the separators that `splitlines` knows may be in a text.
    for line, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n")):
        if not text.strip():
            continue
        job = _read_line(text, line, f"{path}, line {line + 1}")
        if job.id in first_line:
            raise UserError(
                f"{job.where}: id {job.id!r} is taken by line {first_line[job.id]} "
                "already (a line without an id has its number, from 0)."
            )
        first_line[job.id] = line + 1
        jobs.append(job)
    if not jobs:
        raise UserError(f"{path}: has no prompts in it.")
    return jobs, hashlib.sha256(data).hexdigest()


def _read_line(text: bytes, line: int, where: str) -> Job:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not valid UTF-8.") from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: nested too deeply.") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, got {_short(value)}.")
    for key in value:
        if key not in KEYS:
            known = ", ".join(KEYS)
            raise UserError(f"{where}: unknown key {key!r}; known: {known}.")
    given = [kind for kind in KINDS if kind in value]
    if len(given) != 1:
        raise UserError(
            f"{where}: must have exactly one of {', '.join(KINDS)}; it has "
            f"{' and '.join(given) or 'none'}."
        )
    if "open" in value and given != ["prompt_ids"]:
        raise UserError(f'{where}: "open" goes with "prompt_ids" only.')
    _CHECKS[given[0]](value[given[0]], where)
    if "open" in value:
        _check_ids(value["open"], where, "open")
    name = value.get("id", line)
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise UserError(
            f"{where}: `id` must be a string or a whole number, got {_short(name)}."
        )
    if isinstance(name, str):
        _check_text(name, where)
    return Job(**({**value, "id": name} | {"line": line, "where": where}))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json's own reader keeps the last of two equal keys in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is given twice")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_text(text: object, where: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{where}: must be a text, got {_short(text)}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: not valid Unicode text (half a pair).") from None


def _check_messages(messages: object, where: str) -> None:
    # What is in them `lrd_jax.text` checks, with the model's template at hand.
    if not isinstance(messages, list):
        raise UserError(f"{where}: `messages` must be a list, got {_short(messages)}.")


def _check_ids(ids: object, where: str, name: str = "prompt_ids") -> None:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(
            f"{where}: `{name}` must be a list of whole numbers, got {_short(ids)}."
        )


_CHECKS = {
    "prompt": _check_text,
    "messages": _check_messages,
    "prompt_ids": _check_ids,
}
