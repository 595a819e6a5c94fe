import dataclasses

import numpy as np
import pytest
from toy_run import EOS, MASK, toy_backend, toy_config

from lrd_jax.batches import Row, encode_job, stack
from lrd_jax.errors import UserError
from lrd_jax.jobs import Job
from lrd_jax.tokenizer import Tokenizer

CFG = toy_config()  # Context of 96.
TOKENIZER = Tokenizer(toy_backend(), {})
JOB = Job(id="x", line=4, where="in.jsonl, line 5")


def encode(gen_length=8, tokenizer=TOKENIZER, cfg=CFG, raw=False, **fields):
    job = dataclasses.replace(JOB, **fields)
    return encode_job(job, tokenizer, cfg, gen_length=gen_length, raw=raw)


def test_text_and_ids():
    assert encode(prompt="w3 w4") == Row(id="x", line=4, ids=[3, 4])
    assert encode(prompt_ids=[5, MASK, 6]).ids == [5, MASK, 6]
    assert encode(prompt_ids=[5], tokenizer=None).ids == [5]


def test_raw_leaves_the_template_out():
    template = "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}"
    tokenizer = dataclasses.replace(TOKENIZER, chat_template=template)
    chat = {"tokenizer": tokenizer, "cfg": toy_config(chat=True)}
    assert encode(prompt="w7", **chat).ids == [1, 7, 2]
    assert encode(prompt="w7", raw=True, **chat).ids == [7]
    messages = [{"role": "user", "content": "w8"}]
    assert encode(messages=messages, **chat).ids == [1, 8, 2]


def test_infilling():
    row = encode(None, prompt="w1 [MASK:2] w3 [MASK]")
    assert row.ids == [1, MASK, MASK, 3, MASK]
    assert row.open == [False, True, True, False, True]
    row = encode(None, prompt_ids=[1, MASK, 3], open=[2, 0])
    assert row.ids == [1, MASK, 3]
    assert row.open == [True, False, True]


def test_the_context_is_the_limit():
    assert len(encode(gen_length=16, prompt_ids=[1] * 80).ids) == 80
    with pytest.raises(
        UserError,
        match=r"line 5: id 'x': 81 tokens and gen_length 16 make 97, more than the "
        r"model's context of 96",
    ):
        encode(gen_length=16, prompt_ids=[1] * 81)
    assert len(encode(None, prompt_ids=[1] * 96, open=[0]).ids) == 96
    with pytest.raises(UserError, match=r"id 'x': 97 tokens, more than the .* of 96"):
        encode(None, prompt_ids=[1] * 97, open=[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "w1", "tokenizer": None}, "no tokenizer.json"),
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"prompt_ids": [1, 64]}, "= 64 is outside the vocabulary, [0, 64)"),
        ({"prompt_ids": [-1]}, "= -1 is outside the vocabulary"),
        ({"prompt": "<mask>", "cfg": toy_config(vocab_size=62, mask_id=40)}, "= 63"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages need a chat mo"),
        ({"messages": [], "cfg": toy_config(chat=True)}, "messages must be a list"),
        ({"prompt_ids": [1], "open": [0]}, "`open` is for infilling"),
        ({"gen_length": None, "prompt": "w1"}, "no marker '[MASK]'"),
        ({"gen_length": None, "prompt": ""}, "the prompt is empty"),
        ({"gen_length": None, "messages": []}, "messages cannot be infilled"),
        ({"gen_length": None, "prompt_ids": [1]}, "list the positions to fill in `o"),
        ({"gen_length": None, "prompt_ids": [1], "open": []}, "list the positions"),
        ({"gen_length": None, "prompt_ids": [1], "open": [1]}, "outside [0, 1)"),
        ({"gen_length": None, "prompt_ids": [1], "open": [-1]}, "outside [0, 1)"),
        ({"gen_length": None, "prompt_ids": [], "open": [0]}, "outside [0, 0)"),
    ],
)
def test_mistakes_name_the_line(fields, message):
    with pytest.raises(UserError) as caught:
        encode(**fields)
    assert str(caught.value).startswith("in.jsonl, line 5: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def rows_of(*lengths):
    return [Row(id=i, line=10 + i, ids=[i + 1] * n) for i, n in enumerate(lengths)]


def test_rows_are_padded_on_the_left():
    batch = stack(rows_of(3, 40), 48, EOS, infill=False)
    assert batch.open_mask is None
    np.testing.assert_array_equal(batch.lines, [10, 11])
    np.testing.assert_array_equal(batch.mask.sum(1), [3, 40])
    np.testing.assert_array_equal(batch.ids[0], [EOS] * 45 + [1] * 3)


def test_a_row_that_stands_for_nothing_has_nothing_to_fill():
    batch = stack([None, *rows_of(2)], 4, EOS, infill=True)
    assert batch.mask[0].all()
    assert not batch.open_mask[0].any()


def test_infilling_batches():
    rows = [
        Row(id=0, line=0, ids=[1, 2, 3], open=[False, True, False]),
        Row(id=1, line=1, ids=[4], open=[True]),
    ]
    batch = stack(rows, 32, EOS, infill=True)
    assert batch.open_mask.shape == batch.ids.shape == (2, 32)
    np.testing.assert_array_equal(batch.open_mask[:, 29:], [[0, 1, 0], [0, 0, 1]])
    assert not batch.open_mask[:, :29].any()
