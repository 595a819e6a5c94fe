"""Examples to fine-tune on, from a JSONL file of prompts with their responses."""

from collections.abc import Sequence
from typing import Any

from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.jsonl import check_keys, only_key, read_lines, short
from lrd_jax.text import check_ids, encode_prompt
from lrd_jax.tokenizer import Tokenizer
from lrd_jax.training.data import Example, misfit, with_end

PROMPTS = ("prompt", "messages", "prompt_ids")
RESPONSES = ("response", "response_ids")


def read_examples(
    path: str,
    tokenizer: Tokenizer | None,
    cfg: ModelConfig,
    windows: Sequence[int],
) -> tuple[list[Example], str]:
    """Reads a file of examples.

    A response in text gets the end that the model's own answers have: end of turn for a
    chat model that has one, then end of text. `response_ids` are taken as they are, and
    padded like all responses.

    Args:
        path: JSONL, a {"prompt" | "messages" | "prompt_ids": ..., "response" |
            "response_ids": ...} in each line.
        tokenizer: the checkpoint's, None if it has none.
        cfg: the model.
        windows: lengths that each response must fit.

    Returns:
        The examples and the sha256 of the file.

    Raises:
        UserError: not readable, empty, or the first line that cannot be used.
    """
    examples, digest = read_lines(
        path, lambda _, value: _read(value, tokenizer, cfg, windows)
    )
    if not examples:
        raise UserError(f"{path}: has no examples in it.")
    return examples, digest


def _read(
    value: dict[str, Any],
    tokenizer: Tokenizer | None,
    cfg: ModelConfig,
    windows: Sequence[int],
) -> Example:
    check_keys(value, (*PROMPTS, *RESPONSES, "id"))
    prompt_kind, response_kind = only_key(value, PROMPTS), only_key(value, RESPONSES)
    if prompt_kind == "prompt_ids":
        check_ids(value["prompt_ids"], cfg)
        prompt = value["prompt_ids"]
    else:
        prompt = encode_prompt(tokenizer, cfg, **{prompt_kind: value[prompt_kind]})
    if response_kind == "response_ids":
        response = _checked_ids(value["response_ids"], cfg)
    else:
        response = _encode_response(value["response"], tokenizer, cfg)
    if why := misfit(len(prompt), len(response), windows, cfg):
        raise UserError(f"the {why}.")
    return Example(prompt, response, 0)


def _checked_ids(ids: Any, cfg: ModelConfig) -> list[int]:
    try:
        check_ids(ids, cfg)
    except UserError as error:
        message = str(error).replace("prompt_ids", "response_ids")
        raise UserError(message) from None
    if cfg.mask_id in ids:
        raise UserError(
            f"response_ids[{ids.index(cfg.mask_id)}] is the mask token, "
            f"{cfg.mask_id}, which a model never predicts."
        )
    return list(ids)


def _encode_response(
    text: Any, tokenizer: Tokenizer | None, cfg: ModelConfig
) -> list[int]:
    if not isinstance(text, str):
        raise UserError(f"the response must be text, got {short(text)}.")
    if tokenizer is None:
        raise UserError(
            "this checkpoint has no tokenizer.json, so it cannot read text; give "
            "response_ids instead."
        )
    ids = tokenizer.encode(text)
    if cfg.mask_id in ids:
        raise UserError("the response holds the mask token, never to be predicted.")
    return with_end(ids, cfg)
