"""Small stand-ins for the published tokenizers, which are too large to ship.

Settings, special ids, flags and chat templates are the published ones; the vocabulary
is the 256 single bytes at their published ids, two merges, and entries that no text
reaches up to where the special ids begin.
"""

import dataclasses
import json
import os
import pathlib
import re

import pytest

from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError

LLADA_BASE, DREAM_BASE = 126080, 151643
MERGES = [("h", "e"), ("l", "l")]

LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
# Without the branches for tools, which nothing here uses.
DREAM_TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != "system" or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLADA_ADDED = [
    "<|startoftext|>",
    "<|endoftext|>",
    "[CLS]",
    "[gMASK]",
    *(f"<|reserved_token_{i}|>" for i in range(252)),
    "<|mdm_mask|>",
    *(f"<|reserved_token_{i}|>" for i in range(253, 256)),
    "<role>",
    "</role>",
    "<|arithmetic_start|>",
    "<|arithmetic_end|>",
    "<|number_start|>",
    "<|number_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
DREAM_ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
    "<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> "
    "<|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> "
    "</tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|> <|beginoftext|> <|mask|>"
).split()
DREAM_IDS = {name: DREAM_BASE + i for i, name in enumerate(DREAM_ADDED)}
DREAM_NOT_SPECIAL = set(DREAM_ADDED[14:22])

LLADA_NAMED = {
    "bos_token": "<|startoftext|>",
    "cls_token": "[CLS]",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
DREAM_NAMED = {
    "bos_token": "<|beginoftext|>",
    "eos_token": "<|endoftext|>",
    "mask_token": "<|mask|>",
    "pad_token": "<|endoftext|>",
}

_LLADA_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


LLADA = ModelConfig(
    family="llada",
    vocab_size=126464,
    d_model=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=8,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
    tie_embeddings=False,
    max_length=4096,
    mask_id=126336,
    eos_ids=(126081,),
    pad_id=126081,
)
DREAM = dataclasses.replace(
    LLADA,
    family="dream",
    vocab_size=152064,
    max_length=131072,
    mask_id=151666,
    eos_ids=(151643,),
    pad_id=151643,
)
# LLaDA with all special ids shifted down, so that a test costs little.
SMALL = 300
TINY = dataclasses.replace(
    LLADA, vocab_size=600, mask_id=SMALL + 256, eos_ids=(SMALL + 1,), pad_id=SMALL + 1
)


def shared(*parts: str) -> pathlib.Path:
    """A file of the data folder that lies beside the repository on some machines."""
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared"
    return pathlib.Path(os.environ.get("LRD_SHARED", beside)).joinpath(*parts)


PUBLISHED_DREAM = shared("data", "tokenizers", "dream")
needs_published_dream = pytest.mark.skipif(
    not PUBLISHED_DREAM.is_dir(), reason="published files not at hand"
)


def byte_tokens() -> list[str]:
    """The tokens of ids 0..255: printable bytes first, as GPT-2 orders them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def vocab(base: int) -> dict[str, int]:
    """Token -> id of everything below the special ids."""
    tokens = byte_tokens() + [left + right for left, right in MERGES]
    # No byte is written as NUL, so no text reaches these.
    tokens += [f"\0{i}" for i in range(len(tokens), base)]
    return {token: i for i, token in enumerate(tokens)}


def added_token(content: str, special: bool = True) -> dict:
    off = dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
    return {"content": content, **off, "special": special}


def write_json(path: pathlib.Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_llada(
    folder: pathlib.Path,
    base: int = LLADA_BASE,
    template: str | None = LLADA_TEMPLATE,
    **changes: object,
) -> pathlib.Path:
    """Writes LLaDA's files; `base` shifts all special ids down, for small models."""
    folder.mkdir(parents=True, exist_ok=True)
    added = {base + i: added_token(name) for i, name in enumerate(LLADA_ADDED)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _LLADA_SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab(base),
            "merges": MERGES,
        },
    }
    write_json(folder / "tokenizer.json", tokenizer | changes)
    config = {
        **LLADA_NAMED,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if template is not None:
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)
    return folder


def write_dream(folder: pathlib.Path, base: int = DREAM_BASE) -> pathlib.Path:
    """Writes Dream's files, which hold no tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocab(base))
    merges = "".join(f"{left} {right}\n" for left, right in MERGES)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    ids = {name: base + i for i, name in enumerate(DREAM_ADDED)}
    write_json(folder / "added_tokens.json", ids)
    added = {
        str(i): added_token(name, name not in DREAM_NOT_SPECIAL)
        for name, i in ids.items()
    }
    config = {
        **DREAM_NAMED,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "chat_template": DREAM_TEMPLATE,
        "tokenizer_class": "DreamTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    return folder


def edit(path: pathlib.Path, **changes: object) -> None:
    """Changes keys of a JSON file; None takes one out."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {name: value for name, value in content.items() if value is not None}
    write_json(path, kept)


def read(path: pathlib.Path):
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def user_error(*named: str):
    """Expects a UserError of one line in which all of `named` occur, in order."""
    between = r"[^\n]*"
    inside = between.join(map(re.escape, named))
    return pytest.raises(UserError, match=rf"\A{between}{inside}{between}\Z")
