"""Jobs -> rows of token ids -> padded batches of one size."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, UInt32

from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.jobs import Job
from lrd_jax.text import (
    check_ids,
    encode_infill,
    encode_prompt,
    left_pad,
)
from lrd_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt, encoded and checked.

    Attributes:
        id: of the result.
        line: makes the row's random key.
        ids: the prompt, or for infilling the whole text.
        open: for infilling, which of `ids` are to be filled; None otherwise.
    """

    id: int | str
    line: int
    ids: list[int]
    open: list[bool] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows that are decoded together, in arrays for `decode_fn`.

    Attributes:
        ids: `[B, P]` left-padded prompts.
        mask: `[B, P]` True at real tokens.
        lines: `[B]` line number of each row.
        open_mask: `[B, P]` True where to fill, for infilling; None otherwise.
    """

    ids: Int32[np.ndarray, "B P"]
    mask: Bool[np.ndarray, "B P"]
    lines: UInt32[np.ndarray, " B"]
    open_mask: Bool[np.ndarray, "B P"] | None = None


def encode_job(
    job: Job,
    tokenizer: Tokenizer | None,
    cfg: ModelConfig,
    *,
    gen_length: int | None,
    raw: bool = False,
) -> Row:
    """Encodes one job and checks that it fits the model.

    Args:
        job: what the user gave.
        tokenizer: the checkpoint's, if it has one.
        cfg: of the model.
        gen_length: positions to generate behind the prompt; None for infilling, which
            fills positions of the text itself.
        raw: whether the chat template is left out.

    Raises:
        UserError: says which job it is.
    """
    try:
        if gen_length is None:
            ids, opened = _infill_ids(job, tokenizer, cfg)
        else:
            ids, opened = _prompt_ids(job, tokenizer, cfg, raw), None
        check_ids(ids, cfg)  # Also a text's: its tokenizer may be another model's.
    except UserError as error:
        raise UserError(f"{job.where}: {error}") from None
    if len(ids) + (gen_length or 0) > cfg.max_length:
        added = "" if gen_length is None else f" and gen_length {gen_length} make "
        total = "" if gen_length is None else f"{len(ids) + gen_length}"
        raise UserError(
            f"{job.where}: id {job.id!r}: {len(ids)} tokens{added}{total}, more than "
            f"the model's context of {cfg.max_length}."
        )
    return Row(id=job.id, line=job.line, ids=ids, open=opened)


def _prompt_ids(
    job: Job, tokenizer: Tokenizer | None, cfg: ModelConfig, raw: bool
) -> list[int]:
    if job.open is not None:
        raise UserError("`open` is for infilling; give `--infill` or leave it out.")
    if job.prompt_ids is not None:
        return job.prompt_ids
    return encode_prompt(
        tokenizer, cfg, prompt=job.prompt, messages=job.messages, raw=raw
    )


def _infill_ids(
    job: Job, tokenizer: Tokenizer | None, cfg: ModelConfig
) -> tuple[list[int], list[bool]]:
    if job.messages is not None:
        raise UserError("messages cannot be infilled; give the text as a prompt.")
    if job.prompt_ids is None:
        return encode_infill(tokenizer, cfg, job.prompt or "")
    length = len(job.prompt_ids)
    if not job.open:
        raise UserError(
            "to infill prompt_ids, list the positions to fill in `open`, from 0."
        )
    opened = [False] * length
    for position in job.open:
        if not 0 <= position < length:
            raise UserError(f"`open` has {position}, outside [0, {length}).")
        opened[position] = True
    return job.prompt_ids, opened


def stack(
    rows: Sequence[Row | None], length: int, pad_id: int, *, infill: bool
) -> Batch:
    """One batch of these rows; None makes a row that stands for nothing.

    Args:
        rows: B rows.
        length: P, at least the longest row's.
        pad_id: fills the front of shorter rows.
        infill: whether positions of the rows themselves are to be filled.
    """
    # All of it real, so that its forward is an ordinary one; nothing to fill.
    nothing = Row(id="", line=0, ids=[pad_id] * length, open=[False] * length)
    filled = [nothing if row is None else row for row in rows]
    ids, mask = left_pad([row.ids for row in filled], length, pad_id)
    open_mask = None
    if infill:
        opened = [[int(x) for x in row.open or []] for row in filled]
        open_mask = left_pad(opened, length, 0)[0].astype(bool)
    return Batch(
        ids=ids,
        mask=mask,
        lines=np.array([row.line for row in filled], np.uint32),
        open_mask=open_mask,
    )
