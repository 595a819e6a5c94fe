"""Tests of lrd_jax.tokenizer."""

import dataclasses
import json

import numpy as np
import pytest
import standin
from standin import user_error

from lrd_jax import text
from lrd_jax.tokenizer import Tokenizer

CHAT = dataclasses.replace(standin.LLADA, chat=True)


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return Tokenizer.load(standin.write_llada(tmp_path_factory.mktemp("llada")))


def test_published_special_ids(llada):
    want = {
        "<|startoftext|>": 126080,
        "<|endoftext|>": 126081,
        "<|reserved_token_251|>": 126335,
        "<|mdm_mask|>": 126336,
        "<|reserved_token_253|>": 126337,
        "<|start_header_id|>": 126346,
        "<|eot_id|>": 126348,
    }
    assert {name: llada.encode(name) for name in want} == {
        name: [i] for name, i in want.items()
    }


def test_the_published_list_of_added_tokens():
    path = standin.shared("data", "tokenizers", "llada", "tokenizer_config.json")
    if not path.is_file():
        pytest.skip("published files not at hand")
    published = json.loads(path.read_text(encoding="utf-8"))
    assert published["chat_template"] == standin.LLADA_TEMPLATE
    assert {
        int(i): t["content"] for i, t in published["added_tokens_decoder"].items()
    } == (dict(enumerate(standin.LLADA_ADDED, standin.LLADA_BASE)))


def test_encode_adds_nothing_and_splits_digits(llada):
    # Published: digits are tokens of their own, "0" is id 15, a space 220.
    assert llada.encode("12 3") == [16, 17, 220, 18]
    assert llada.encode("\n\n") == [198, 198]
    assert llada.encode("") == []


def test_encode_merges_inside_words_only(llada):
    assert llada.encode("hello") == [256, 257, llada.encode("o")[0]]
    assert llada.encode("h e") == [71, 220, 68]


def test_encode_normalises_to_nfc(llada):
    assert llada.encode("cafe\u0301 A\u030a") == llada.encode("caf\u00e9 \u00c5")


def test_special_strings_inside_text_are_ids(llada):
    assert llada.encode("a<|mdm_mask|>b") == [64, 126336, 65]


def test_every_byte_decodes(llada):
    word = bytes(range(256)).decode("latin-1")
    assert llada.decode(llada.encode(word)) == word
    # A byte that is no character alone must not crash either.
    assert llada.decode([255]) == "\ufffd"


def test_decode_drops_specials_and_rows_without_token(llada):
    rows_without_token = [126349, 126463, 2**31 - 1, -1]
    ids = [126080, 64, *rows_without_token, 126336, 65, 126348]
    assert llada.decode(ids) == "ab"
    assert llada.decode(np.asarray([64, 65])) == "ab"


def test_settings_that_cut_or_fill_prompts_are_ignored(tmp_path):
    cut = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    fill = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    standin.write_llada(tmp_path, base=300, truncation=cut, padding=fill)
    assert Tokenizer.load(tmp_path).encode("abc") == [64, 65, 66]


def test_a_bos_that_the_file_would_add_is_not_added(tmp_path):
    first = {"SpecialToken": {"id": "<|startoftext|>", "type_id": 0}}
    rest = {"Sequence": {"id": "A", "type_id": 0}}
    token = {"id": "<|startoftext|>", "ids": [300], "tokens": ["<|startoftext|>"]}
    adds_bos = {
        "type": "TemplateProcessing",
        "single": [first, rest],
        "pair": [first, rest, rest],
        "special_tokens": {"<|startoftext|>": token},
    }
    standin.write_llada(tmp_path, base=300, post_processor=adds_bos)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.backend.encode("a").ids == [300, 64]
    assert tokenizer.encode("a") == [64]
    assert text.encode_prompt(tokenizer, CHAT, prompt="a").count(300) == 1


def test_no_tokenizer_is_none(tmp_path):
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "\xff"])
def test_a_damaged_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with user_error("tokenizer.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": 3}', "\xff"])
def test_a_damaged_tokenizer_config_is_refused(tmp_path, content):
    standin.write_llada(tmp_path, base=300)
    (tmp_path / "tokenizer_config.json").write_bytes(content.encode("latin-1"))
    with user_error("tokenizer_config.json"):
        Tokenizer.load(tmp_path)


def test_half_a_surrogate_pair_is_refused(llada):
    with user_error(r"'\ud800'", "character 1"):
        llada.encode("a\ud800")
