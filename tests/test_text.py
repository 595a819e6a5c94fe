"""Tests of lrd_jax.text."""

import dataclasses

import numpy as np
import pytest
import standin
from standin import user_error

from lrd_jax import text
from lrd_jax.tokenizer import Tokenizer

BASE = dataclasses.replace(standin.LLADA, max_length=64, eos_ids=(126081, 126348))
CHAT = dataclasses.replace(BASE, chat=True)
WITH_BOS = dataclasses.replace(BASE, raw_bos_id=126080)
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return Tokenizer.load(standin.write_llada(tmp_path_factory.mktemp("llada")))


def test_a_prompt_to_a_chat_model_is_one_user_message(llada):
    assert text.encode_prompt(llada, CHAT, prompt="Hi") == text.encode_prompt(
        llada, CHAT, messages=HI
    )


def test_raw_and_base_prompts_are_taken_as_they_are(llada):
    assert text.encode_prompt(llada, CHAT, prompt="ab", raw=True) == [64, 65]
    assert text.encode_prompt(llada, BASE, prompt="ab") == [64, 65]


def test_raw_bos_comes_once(llada):
    assert text.encode_prompt(llada, WITH_BOS, prompt="a") == [126080, 64]
    assert text.encode_prompt(llada, WITH_BOS, prompt="<|startoftext|>a") == [
        126080,
        64,
    ]


def test_a_literal_mask_token_is_kept(llada):
    assert text.encode_prompt(llada, BASE, prompt="a<|mdm_mask|>") == [64, 126336]


@pytest.mark.parametrize(
    ("cfg", "given", "named"),
    [
        (BASE, {"messages": HI}, ["base model"]),
        (CHAT, {"messages": HI, "raw": True}, ["raw"]),
        (CHAT, {"messages": HI, "prompt": "Hi"}, ["either"]),
        (CHAT, {}, ["either"]),
        (BASE, {"prompt": ""}, ["empty", "''"]),
        (CHAT, {"prompt": ""}, ["empty", "''"]),
        (WITH_BOS, {"prompt": ""}, ["empty", "''"]),
        (BASE, {"prompt": 7}, ["text", "7"]),
    ],
)
def test_bad_prompts_are_refused(llada, cfg, given, named):
    with user_error(*named):
        text.encode_prompt(llada, cfg, **given)


def test_text_without_a_tokenizer_is_refused():
    with user_error("tokenizer.json", "prompt_ids"):
        text.encode_prompt(None, BASE, prompt="Hi")
    with user_error("tokenizer.json", "prompt_ids"):
        text.encode_infill(None, BASE, "a[MASK]")


# --- infilling


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("a [MASK] b", ["a ", 1, " b"]),
        ("[MASK:8]", [8]),
        ("[MASK][MASK:12]x", [1, 12, "x"]),
        ("[MASK:x] [MASK]", ["[MASK:x] ", 1]),
    ],
)
def test_split_infill(given, want):
    assert text.split_infill(given) == want


def test_another_marker():
    assert text.split_infill("a[MASK]___", "___") == ["a[MASK]", 1]
    # A count needs a bracket to stand in.
    assert text.split_infill("9:8__", "_") == ["9:8", 1, 1]
    assert text.split_infill("(?:3)", "(?)") == [3]


def test_infill_opens_markers_only(llada):
    ids, open_mask = text.encode_infill(llada, CHAT, "a<|mdm_mask|>[MASK:2]he[MASK]")
    assert ids == [64, 126336, 126336, 126336, 256, 126336]
    assert open_mask == [False, False, True, True, False, True]


def test_infill_has_the_raw_bos(llada):
    assert text.encode_infill(llada, WITH_BOS, "[MASK]a") == (
        [126080, 126336, 64],
        [False, True, False],
    )
    ids, open_mask = text.encode_infill(llada, WITH_BOS, "<|startoftext|>[MASK]")
    assert (ids, open_mask) == ([126080, 126336], [False, True])


@pytest.mark.parametrize(
    ("given", "marker", "named"),
    [
        ("no gap", "[MASK]", ["'[MASK]'", "'no gap'"]),
        ("", "[MASK]", ["empty", "''"]),
        (3, "[MASK]", ["text", "3"]),
        ("a[MASK:0]", "[MASK]", ["at least 1", "0"]),
        ("a[MASK:64]", "[MASK]", ["64 positions", "position 1", "context is 64"]),
        ("a", "", ["marker", "''"]),
    ],
)
def test_bad_infill_is_refused(llada, given, marker, named):
    with user_error(*named):
        text.encode_infill(llada, BASE, given, marker)


# --- ids and batches


def test_text_ends_before_the_first_eos(llada):
    ids = [64, 126336, 65, 126348, 66, 126081]
    assert text.text_of(llada, ids, BASE.eos_ids, BASE.mask_id) == "ab"
    assert text.text_of(llada, [126081, 64], BASE.eos_ids, BASE.mask_id) == ""
    # Open positions go by id: a file may not flag its mask token as special.
    assert text.text_of(llada, [64, 66, 65], BASE.eos_ids, mask_id=66) == "ab"


@pytest.mark.parametrize("ids", [[0, 126463], (5,), np.asarray([1, 2])])
def test_good_ids_pass(ids):
    text.check_ids(ids, BASE)


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([1, 126464, -1], ["prompt_ids[1]", "126464"]),
        ([-1], ["prompt_ids[0]", "-1"]),
        ([1, True], ["prompt_ids[1]", "True"]),
        ([1.0], ["prompt_ids[0]", "1.0"]),
        (["1"], ["prompt_ids[0]", "'1'"]),
        ([[1]], ["prompt_ids[0]", "[1]"]),
        ([None], ["prompt_ids[0]", "None"]),
        ([], ["empty", "[]"]),
        ("12", ["list", "'12'"]),
        (12, ["list", "12"]),
        ({"a": 1}, ["list", "{'a': 1}"]),
    ],
)
def test_bad_ids_are_refused(ids, named):
    with user_error(*named):
        text.check_ids(ids, BASE)


def test_buckets_are_few_and_waste_little():
    sizes = sorted({text.bucket(n, 4096) for n in range(1, 4097)})
    assert sizes == [
        *(32, 48, 64, 96, 128, 192, 256, 384, 512),
        *(768, 1024, 1536, 2048, 3072, 4096),
    ]
    for n in range(1, 4097):
        size = text.bucket(n, 4096)
        assert n <= size
        assert size <= 32 or (size - n) / size < 1 / 3


def test_buckets_are_capped():
    assert text.bucket(65, 70) == 70
    assert text.bucket(3, 5) == 5
    for length in (0, 71):
        with pytest.raises(ValueError, match=str(length)):
            text.bucket(length, 70)


def test_left_pad():
    ids, mask = text.left_pad([[1, 2], [3], []], 3, 9)
    np.testing.assert_array_equal(ids, [[9, 1, 2], [9, 9, 3], [9, 9, 9]])
    np.testing.assert_array_equal(mask, [[0, 1, 1], [0, 0, 1], [0, 0, 0]])
    assert ids.dtype == np.int32
    with pytest.raises(ValueError, match="row 1 has 3"):
        text.left_pad([[1], [1, 2, 3]], 2, 9)
