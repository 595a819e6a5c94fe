"""Tests of lrd_jax.chat."""

import dataclasses

import pytest
import standin
from standin import user_error

from lrd_jax import text
from lrd_jax.tokenizer import Tokenizer

CHAT = dataclasses.replace(standin.LLADA, chat=True)
HI = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "user", "content": "  two words\n"},
    {"role": "assistant", "content": "<b>&amp;</b> café"},
    {"role": "user", "content": "again"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return standin.write_llada(tmp_path_factory.mktemp("llada"))


@pytest.fixture(scope="module")
def llada(folder):
    return Tokenizer.load(folder)


def test_llada_chat_is_the_published_text(llada):
    assert llada.apply_chat_template(TALK) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\ntwo words<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<b>&amp;</b> café<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nagain<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chat_ids_have_one_bos_and_the_published_frame(llada):
    ids = text.encode_prompt(llada, CHAT, prompt="1")
    assert ids[0] == 126080
    assert ids.count(126080) == 1
    # Published: start header, "user", end header, two line ends, ..., end of turn.
    special = [i for i in ids if i >= 126080]
    assert special == [126080, 126346, 126347, 126348, 126346, 126347]
    assert ids[ids.index(126347) :][:5] == [126347, 198, 198, 16, 126348]
    assert ids[-3:] == [126347, 198, 198]


# A template with all that transformers adds to Jinja.
EXTRAS = (
    "{%- for m in messages %}\n    {%- if loop.index > 2 %}{% break %}{% endif %}\n"
    "{% generation %}{{ m | tojson }}{% endgeneration %}\n{%- endfor %}\n"
    "{{ {'a': '<é>'} | tojson(indent=2) }} {{ strftime_now('%%') }} {{ tools is none }}"
    "{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }} {{ dict(a=eos_token) }}"
    "  {% if true %}\n    kept\n  {% endif %}\n"
)


@pytest.mark.parametrize(
    "template", [standin.LLADA_TEMPLATE, standin.DREAM_TEMPLATE, EXTRAS]
)
@pytest.mark.parametrize("system", [False, True])
def test_chat_text_equals_transformers(llada, folder, template, system):
    from transformers import PreTrainedTokenizerFast

    messages = [{"role": "system", "content": "Be brief. "}] * system + TALK
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = dataclasses.replace(llada, chat_template=template)
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], ["[]"]),
        ("Hi", ["'Hi'"]),
        (["Hi"], ["messages[0]", "'Hi'"]),
        ([*HI, {"content": "Hi"}], ["messages[1]", "role", "None"]),
        ([{"role": "usr", "content": "Hi"}], ["messages[0]", "role", "'usr'"]),
        ([{"role": "user"}], ["messages[0]", "content", "None"]),
        ([{"role": "user", "content": ["Hi"]}], ["messages[0]", "content", "['Hi']"]),
    ],
)
def test_malformed_messages_are_refused(llada, messages, named):
    with user_error(*named):
        text.encode_prompt(llada, CHAT, messages=messages)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('not\nso') }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ dict.__class__.__base__ }}",
        "{% include 'other' %}",
    ],
)
def test_broken_and_unsafe_templates_are_refused(llada, template):
    with user_error("chat template fails"):
        dataclasses.replace(llada, chat_template=template).apply_chat_template(HI)


def test_no_template_is_refused(llada):
    bare = dataclasses.replace(llada, chat_template=None)
    with user_error("no chat template"):
        text.encode_prompt(bare, CHAT, prompt="Hi")
