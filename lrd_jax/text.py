"""Text to prompt ids and back, prompts to padded batches; all on the host."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, SupportsInt

import numpy as np
from jaxtyping import Bool, Int32

from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.tokenizer import Tokenizer

# What `--infill` text shows where the model is to write.
INFILL_MARKER = "[MASK]"


def encode_prompt(
    tokenizer: Tokenizer | None,
    cfg: ModelConfig,
    *,
    prompt: Any = None,
    messages: Any = None,
    raw: bool = False,
) -> list[int]:
    """Ids of one request, given as text or as chat messages.

    A prompt to a chat model is wrapped as one user message. What no template wraps gets
    `cfg.raw_bos_id` in front, unless the text begins with that token already.

    Args:
        tokenizer: the checkpoint's, None if it has none.
        cfg: says whether the model is a chat model.
        prompt: text, or None.
        messages: `[{"role": ..., "content": ...}, ...]`, or None.
        raw: takes the prompt as it is, also for a chat model.

    Returns:
        At least one id.

    Raises:
        UserError: both or neither given, no tokenizer, an empty prompt, messages for a
            base model or together with `raw`, malformed messages.
    """
    if (prompt is None) == (messages is None):
        raise UserError("give either a prompt or messages.")
    if messages is not None and raw:
        raise UserError("messages cannot be taken raw; give the text as a prompt.")
    if messages is not None and not cfg.chat:
        raise UserError(
            "messages need a chat model and this is a base model; give a prompt."
        )
    tokenizer = _required(tokenizer)
    if messages is not None:
        return tokenizer.encode(tokenizer.apply_chat_template(messages))
    prompt = _checked(prompt)
    if cfg.chat and not raw:
        turn = {"role": "user", "content": prompt}
        return tokenizer.encode(tokenizer.apply_chat_template([turn]))
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError(f"the prompt has no tokens: {prompt!r:.80}.")
    return _with_bos(ids, cfg)


def _required(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise UserError(
            "this checkpoint has no tokenizer.json, so it cannot read text; "
            "give prompt_ids instead."
        )
    return tokenizer


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise UserError(f"the prompt must be text, got {text!r:.80}.")
    if not text:
        raise UserError("the prompt is empty: ''.")
    return text


def _with_bos(ids: list[int], cfg: ModelConfig) -> list[int]:
    bos = cfg.raw_bos_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def split_infill(text: str, marker: str = INFILL_MARKER) -> list[str | int]:
    """Splits a text at its markers.

    A marker opens one position. One that ends in a closing bracket can also name a
    count before the bracket: `[MASK:8]` opens eight.

    Args:
        text: with at least one marker.
        marker: what stands for one open position.

    Returns:
        Pieces of given text (never empty) and counts of open positions, in order.

    Raises:
        UserError: no marker in the text, a count of 0, or an empty marker.
    """
    if not marker:
        raise UserError(f"the infill marker must be some text, got {marker!r}.")
    pattern = re.escape(marker) + "()"
    if len(marker) > 1 and marker[-1] in "]>})":
        pattern = re.escape(marker[:-1]) + r"(?::([0-9]{1,9}))?" + re.escape(marker[-1])
    # Splitting at a pattern with one group: text, group, text, group, ..., text.
    pieces: list[str | int] = []
    for i, piece in enumerate(re.split(pattern, text)):
        if i % 2 == 0:
            pieces += [piece] if piece else []
        elif piece and int(piece) == 0:
            raise UserError(f"an infill marker must open at least 1 position: {piece}.")
        else:
            pieces.append(int(piece) if piece else 1)
    if all(isinstance(piece, str) for piece in pieces):
        raise UserError(
            f"nothing to infill: no marker {marker!r} in the text {text!r:.80}."
        )
    return pieces


def encode_infill(
    tokenizer: Tokenizer | None,
    cfg: ModelConfig,
    text: Any,
    marker: str = INFILL_MARKER,
) -> tuple[list[int], list[bool]]:
    """Ids of a text with open positions.

    The text is taken raw, for chat models too: a template would hide where the given
    text ends. Pieces between markers are encoded one by one, so no token spans a marker
    and a space beside one belongs to the given text. The mask token written out in the
    text stays as given; only markers open positions.

    Args:
        tokenizer: the checkpoint's, None if it has none.
        cfg: gives the mask id, the raw BOS id and the longest text.
        text: with markers, see `split_infill`.
        marker: what stands for one open position.

    Returns:
        The ids, with `cfg.mask_id` at the open positions, and where those are.

    Raises:
        UserError: as `split_infill`, no text, no tokenizer, or longer than the
            model's context.
    """
    tokenizer = _required(tokenizer)
    ids: list[int] = []
    open_mask: list[bool] = []
    for piece in split_infill(_checked(text), marker):
        if isinstance(piece, str):
            new = tokenizer.encode(piece)
        # Checked before a list of that length is made.
        elif len(ids) + piece <= cfg.max_length:
            new = [cfg.mask_id] * piece
        else:
            raise UserError(
                f"the infill text opens {piece} positions at position {len(ids)}; the "
                f"model's context is {cfg.max_length}."
            )
        ids += new
        open_mask += [not isinstance(piece, str)] * len(new)
    with_bos = _with_bos(ids, cfg)
    return with_bos, [False] * (len(with_bos) - len(ids)) + open_mask


def text_of(
    tokenizer: Tokenizer,
    token_ids: Iterable[SupportsInt],
    eos_ids: Sequence[int],
    mask_id: int,
) -> str:
    """The text of a generated row: up to the first eos id, without open positions."""
    kept = []
    for token in map(int, token_ids):
        if token in eos_ids:
            break
        if token != mask_id:
            kept.append(token)
    return tokenizer.decode(kept)


def check_ids(ids: Any, cfg: ModelConfig) -> None:
    """Checks prompt ids that the user gave.

    Raises:
        UserError: not a list, empty, or the first element that is no whole number (a
            bool is none) or lies outside `[0, cfg.vocab_size)`.
    """
    if isinstance(ids, str | bytes | dict) or not hasattr(ids, "__iter__"):
        raise UserError(f"prompt_ids must be a list of ids, got {ids!r:.80}.")
    if len(ids) == 0:
        raise UserError(f"prompt_ids is empty: {ids!r}.")
    for place, value in enumerate(ids):
        # In Python a bool is an int.
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise UserError(f"prompt_ids[{place}] must be a whole number: {value!r}.")
        if not 0 <= value < cfg.vocab_size:
            raise UserError(
                f"prompt_ids[{place}] = {value} is outside the vocabulary, "
                f"[0, {cfg.vocab_size})."
            )


def bucket(length: int, longest: int) -> int:
    """Rounds a prompt length up to one of few, so that few shapes are compiled.

    The lengths are 32, 48, 64, 96, 128, 192, ...: powers of two and their halves
    between; beyond 32 at most a third of a row is padding.

    Args:
        length: real tokens of the longest prompt of a batch, at least 1.
        longest: the cap, what the model's context leaves for a prompt.

    Raises:
        ValueError: `length` is not in `[1, longest]`.
    """
    if not 1 <= length <= longest:
        raise ValueError(f"`length` must be in [1, {longest}], got {length}.")
    power = 32
    while power < length:
        power *= 2
    between = power * 3 // 4
    return min(between if length <= between and power > 32 else power, longest)


def left_pad(
    rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[Int32[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """Stacks prompts, their ends aligned, so that all windows start together.

    Args:
        rows: ids of B prompts.
        length: P, at least the longest row.
        pad_id: fills the front of shorter rows.

    Returns:
        ids `[B, P]` and mask `[B, P]`, True at real tokens.

    Raises:
        ValueError: a row is longer than `length`.
    """
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {i} has {len(row)} ids, more than {length}.")
        start = length - len(row)
        ids[i, start:] = row
        mask[i, start:] = True
    return ids, mask
