"""The built-in model's tokenizer."""

import pytest

from lrd_jax.training.settings import VocabularyConfig
from lrd_jax.training.vocabulary import build_tokenizer, special_ids, task_texts

TEXTS = tuple(task_texts(count=60))


def build(size=380, digits="single"):
    return build_tokenizer(VocabularyConfig(size=size, digits=digits), TEXTS)


@pytest.mark.parametrize("digits", ["single", "pairs"])
def test_equal_texts_give_an_equal_tokenizer(digits):
    assert build(digits=digits).to_str() == build(digits=digits).to_str()


@pytest.mark.parametrize("digits", ["single", "pairs"])
@pytest.mark.parametrize("text", ["12 + 345 =\n#### 7", "é ☃ 东", *TEXTS[:4]])
def test_any_text_comes_back(digits, text):
    tokenizer = build(digits=digits)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_are_read_one_by_one():
    tokenizer = build()
    assert tokenizer.encode("1234+56").tokens == list("1234+56")
    vocabulary = tokenizer.get_vocab()
    assert not [t for t in vocabulary if len(t) > 1 and any(c.isdigit() for c in t)]


def test_pairs_of_digits_are_read_from_the_end():
    tokenizer = build(digits="pairs")
    assert tokenizer.encode("1234+567-8").tokens == "12 34 + 5 67 - 8".split()
    for number in range(100):
        assert len(tokenizer.encode(str(number)).ids) == 1


def test_sudoku_cells_are_one_token_each():
    assert build().encode("4..1").tokens == list("4..1")


@pytest.mark.parametrize("digits", ["single", "pairs"])
@pytest.mark.parametrize("size", [360, 380])
def test_the_size_and_the_special_tokens(size, digits):
    tokenizer = build(size, digits)
    assert special_ids(tokenizer) == {
        "vocab_size": size, "mask_id": 1, "eos_ids": (0,), "pad_id": 0,
    }  # fmt: skip
    assert tokenizer.decode([0, 1]) == ""
