"""Published tokenizer files <-> the `tokenizer.json` that this package reads.

Classes are named here, whatever a checkpoint's files ask for: nothing that was
downloaded runs and nothing is unpickled.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

from convert.variant import Variant, variant_of
from lrd_jax import chat
from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.tokenizer import (
    named_tokens,
    read_backend,
    read_json_object,
    write_backend,
)

_END_OF_TURN = {"llada": "<|eot_id|>", "dream": "<|im_end|>"}
# LLaDA's files do not name their mask token.
_MASK = {"llada": "<|mdm_mask|>", "dream": "<|mask|>"}
_DREAM_BOS = "<|beginoftext|>"


def normalise_tokenizer(
    src: pathlib.Path,
    dst: pathlib.Path,
    cfg: ModelConfig,
    variant: Variant | None = None,
) -> ModelConfig:
    """Writes the tokenizer of a published checkpoint as `tokenizer.json`.

    Args:
        src: directory with the published files.
        dst: existing directory that gets `tokenizer.json` and `tokenizer_config.json`;
            untouched if `src` has no tokenizer.
        cfg: as read from `config.json`.
        variant: Base and Instruct share their `config.json`; None goes by the names.

    Returns:
        `cfg` with `chat`, `raw_bos_id` and all `eos_ids`.

    Raises:
        UserError: damaged or incomplete files, ids that are not the published ones,
            beyond the vocabulary or at odds with `cfg`, or an unknown variant.
    """
    config = read_json_object(src / "tokenizer_config.json", missing_ok=True)
    special = read_json_object(src / "special_tokens_map.json", missing_ok=True)
    named = named_tokens(special) | named_tokens(config)
    backend = _load(src, bool(config))
    if backend is None:
        found = variant or variant_of(src, cfg.family)
        return dataclasses.replace(cfg, chat=found == "instruct")
    _check_added(backend, src, config)
    _check_ids(backend, src, cfg, named)
    template = _chat_template(src, config)
    found = variant or variant_of(src, cfg.family) or _without_names(src, template)
    if found == "instruct":
        if template is None:
            raise UserError(
                f"{src}: an Instruct model needs a chat template and there is none; "
                "download tokenizer_config.json or chat_template.jinja, or pass "
                "--variant base."
            )
        # A template that cannot be used is better found now than at the first prompt.
        chat.render(template, [{"role": "user", "content": "Hello"}], named)
    kept = named if template is None else named | {"chat_template": template}
    for name, text in kept.items():
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{src}: {name} has half of a surrogate pair: no text.")
    _write_backend(backend, src, dst)
    _write_json(dst / "tokenizer_config.json", kept)
    return _complete(cfg, backend, found)


def _load(src: pathlib.Path, has_config: bool) -> Any:
    """The tokenizer of `src` as `tokenizers.Tokenizer`, None if it has no files."""
    parts = [src / "vocab.json", src / "merges.txt"]
    if (src / "tokenizer.json").is_file():
        return read_backend(src / "tokenizer.json")
    if all(path.is_file() for path in parts):
        return _load_qwen2(src)
    if has_config or any(path.is_file() for path in parts):
        raise UserError(
            f"{src}: the tokenizer is incomplete: it needs tokenizer.json, or "
            "vocab.json and merges.txt."
        )
    return None


def _load_qwen2(src: pathlib.Path) -> Any:
    """Reads `vocab.json` and `merges.txt` the way Dream's own class does."""
    # Told to every user without PyTorch, and this package never uses it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.models.qwen2 import Qwen2Tokenizer

    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(str(src), local_files_only=True)
    # Bad JSON, broken merges and the like each raise something else.
    except Exception as error:
        raise UserError(
            f"{src}: vocab.json and merges.txt are no tokenizer: {chat.one_line(error)}"
        ) from None
    return tokenizer.backend_tokenizer


def _check_added(backend: Any, src: pathlib.Path, config: dict[str, Any]) -> None:
    """Compares ids and special flags with those that the published files list."""
    ids, special = _listed(src, config)
    got = {
        token.content: (number, token.special)
        for number, token in backend.get_added_tokens_decoder().items()
    }
    for content, number in ids.items():
        found, flag = got.get(content, (None, None))
        if found != number:
            raise UserError(
                f"{src}: the added token {content!r} must have the id {number}, "
                f"got {found}."
            )
        if flag != special.get(content, flag):
            raise UserError(
                f"{src}: the added token {content!r} must have special = "
                f"{special[content]}, got {flag}."
            )


def _listed(
    src: pathlib.Path, config: dict[str, Any]
) -> tuple[dict[str, int], dict[str, bool]]:
    """Ids and special flags of the added tokens, as far as the files list them."""
    ids = read_json_object(src / "added_tokens.json", missing_ok=True)
    special = {}
    try:
        for number, token in config.get("added_tokens_decoder", {}).items():
            ids[token["content"]] = int(number)
            special[token["content"]] = bool(token.get("special"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{src}/tokenizer_config.json: added_tokens_decoder is malformed: "
            f"{type(error).__name__} {chat.one_line(error)}"
        ) from None
    return ids, special


def _check_ids(
    backend: Any, src: pathlib.Path, cfg: ModelConfig, named: dict[str, str]
) -> None:
    vocab = backend.get_vocab()
    if not vocab:
        raise UserError(f"{src}: the tokenizer has no tokens.")
    token, largest = max(vocab.items(), key=lambda item: item[1])
    if largest >= cfg.vocab_size:
        raise UserError(
            f"{src}: the tokenizer's id {largest} ({token!r}) is outside the model's "
            f"vocabulary, [0, {cfg.vocab_size})."
        )
    mask = named.get("mask_token", _MASK[cfg.family])
    mask_id = backend.token_to_id(mask)
    # Only a mask token that is named must be there.
    if mask_id != cfg.mask_id and (mask_id is not None or "mask_token" in named):
        raise UserError(
            f"{src}: the tokenizer's mask token {mask!r} has the id {mask_id}, "
            f"config.json says {cfg.mask_id}."
        )


def _chat_template(src: pathlib.Path, config: dict[str, Any]) -> str | None:
    """The chat template, from its own file or the config; of several the default."""
    path = src / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        by_name = {str(item.get("name")): item.get("template") for item in named}
        if "default" not in by_name:
            names = ", ".join(by_name)
            raise UserError(
                f"{src}: no chat template is named default, there are: {names}."
            )
        template = by_name["default"]
    if template is not None and not isinstance(template, str):
        raise UserError(f"{src}: chat_template must be text, got {template!r:.80}.")
    return template


def _without_names(src: pathlib.Path, template: str | None) -> Variant:
    # Dream-Base ships the chat template too, so having one proves nothing.
    if template is not None:
        raise UserError(
            f"{src}: cannot tell from its names whether this is a Base or an Instruct "
            "model; pass --variant base or --variant instruct."
        )
    return "base"


def _complete(cfg: ModelConfig, backend: Any, variant: Variant) -> ModelConfig:
    end_of_turn = backend.token_to_id(_END_OF_TURN[cfg.family])
    eos_ids = cfg.eos_ids
    if end_of_turn is not None and end_of_turn not in eos_ids:
        eos_ids = (*eos_ids, end_of_turn)
    # Dream-Base is evaluated with this in front; its config's bos is end of text.
    with_bos = cfg.family == "dream" and variant == "base"
    raw_bos_id = backend.token_to_id(_DREAM_BOS) if with_bos else None
    return dataclasses.replace(
        cfg, chat=variant == "instruct", eos_ids=eos_ids, raw_bos_id=raw_bos_id
    )


def _write_backend(backend: Any, src: pathlib.Path, dst: pathlib.Path) -> None:
    if (src / "tokenizer.json").is_file():
        shutil.copyfile(src / "tokenizer.json", dst / "tokenizer.json")
    else:
        write_backend(backend, dst / "tokenizer.json")


def _write_json(path: pathlib.Path, value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def write_hf_tokenizer(src: pathlib.Path, dst: pathlib.Path, cfg: ModelConfig) -> None:
    """Writes a converted checkpoint's tokenizer for the published PyTorch code.

    Dream's own class reads `vocab.json` and `merges.txt`; its source,
    `tokenization_dream.py`, comes with the published model and is not written here.

    Args:
        src: checkpoint directory; without a `tokenizer.json` nothing is written.
        dst: existing directory that gets the files.
        cfg: says which family.

    Raises:
        UserError: a damaged tokenizer, or one for Dream that is not byte-level BPE.
    """
    if not (src / "tokenizer.json").is_file():
        return
    # Read before anything is written; damaged files end here.
    backend = read_backend(src / "tokenizer.json")
    kept = read_json_object(src / "tokenizer_config.json", missing_ok=True)
    added = {
        str(number): _added_token(token)
        for number, token in sorted(backend.get_added_tokens_decoder().items())
    }
    config = {"added_tokens_decoder": added, **kept}
    if cfg.family == "dream":
        named = named_tokens(kept)
        extra = [named[name] for name in ("bos_token", "mask_token") if name in named]
        _write_dream_files(src, dst, added, named, extra)
        config |= _dream_settings(cfg, extra)
    else:
        config |= _llada_settings()
    shutil.copyfile(src / "tokenizer.json", dst / "tokenizer.json")
    _write_json(dst / "tokenizer_config.json", dict(sorted(config.items())))


def _added_token(token: Any) -> dict[str, Any]:
    names = "content lstrip normalized rstrip single_word special".split()
    return {name: getattr(token, name) for name in names}


def _llada_settings() -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        # What transformers writes for "no limit".
        "model_max_length": int(1e30),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _dream_settings(cfg: ModelConfig, extra: list[str]) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": extra,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": cfg.max_length,
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }


def _write_dream_files(
    src: pathlib.Path,
    dst: pathlib.Path,
    added: dict[str, dict[str, Any]],
    named: dict[str, str],
    extra: list[str],
) -> None:
    whole = read_json_object(src / "tokenizer.json")
    model, before = whole.get("model", {}), whole.get("pre_tokenizer")
    if model.get("type") != "BPE" or '"ByteLevel"' not in json.dumps(before):
        raise UserError(
            f"{src}/tokenizer.json: Dream's tokenizer must be byte-level BPE, got "
            f"{model.get('type')!r} behind {json.dumps(before):.80}."
        )
    _write_json(dst / "vocab.json", model["vocab"])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    lines = "\n".join(["#version: 0.2", *merges]) + "\n"
    (dst / "merges.txt").write_text(lines, encoding="utf-8")
    ids = {token["content"]: int(number) for number, token in added.items()}
    _write_json(dst / "added_tokens.json", dict(sorted(ids.items())))
    flags = {token["content"]: token for token in added.values()}
    special: dict[str, Any] = {"additional_special_tokens": extra}
    for name, content in named.items():
        token = dict(flags.get(content, {"content": content}))
        token.pop("special", None)
        special[name] = token
    _write_json(dst / "special_tokens_map.json", dict(sorted(special.items())))
