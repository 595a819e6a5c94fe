"""The built-in model's tokenizer."""

import pytest

from lrd_jax.errors import UserError
from lrd_jax.tokenizer import Tokenizer
from lrd_jax.training.settings import VocabularyConfig
from lrd_jax.training.vocabulary import (
    ASSISTANT,
    CHAT_TEMPLATE,
    NAMED,
    USER,
    build_tokenizer,
    special_ids,
    task_texts,
)

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


def test_a_number_of_two_digits_is_one_token():
    tokenizer = build(digits="pairs")
    assert tokenizer.encode("34+567-8=1234").tokens == [
        *"34 + 5 6 7 - 8 = 1 2 3 4".split()
    ]
    for number in range(100):
        assert len(tokenizer.encode(str(number)).ids) == 1


@pytest.mark.parametrize("digits", ["single", "pairs"])
def test_sudoku_cells_are_one_token_each(digits):
    rows = "4001\n2130"
    assert build(digits=digits).encode(rows).tokens == [*"4001", "Ċ", *"2130"]


@pytest.mark.parametrize(
    ("size", "digits"),
    # The first of each is the least that the settings take.
    [(260, "single"), (380, "single"), (360, "pairs"), (380, "pairs")],
)
def test_the_size_and_the_special_tokens(size, digits):
    tokenizer = build(size, digits)
    assert special_ids(tokenizer) == {
        "chat": True, "vocab_size": size, "mask_id": 1, "eos_ids": (0,), "pad_id": 0,
    }  # fmt: skip
    assert tokenizer.decode([0, 1, 2, 3]) == ""


def test_an_item_is_the_same_token_wherever_it_stands():
    tokens = build().encode("x: 7, 8, 7-7 = 7 + 7").tokens
    assert tokens == [
        "x",
        ":Ġ",
        *"7",
        ",Ġ",
        *"8",
        ",Ġ",
        *"7-7",
        "Ġ=Ġ",
        *"7",
        "Ġ+Ġ",
        *"7",
    ]


def test_a_prompt_stands_between_two_tokens():
    tokenizer = Tokenizer(build(), NAMED, CHAT_TEMPLATE)
    message = {"role": "user", "content": "7"}
    ids = tokenizer.encode(tokenizer.apply_chat_template([message]))
    assert [tokenizer.backend.id_to_token(i) for i in ids] == [USER, "7", ASSISTANT]
    with pytest.raises(UserError, match="the roles user and assistant only"):
        tokenizer.apply_chat_template([{"role": "system", "content": "7"}])
