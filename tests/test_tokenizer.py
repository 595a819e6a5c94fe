"""Tests of convert.tokenizer: published files -> tokenizer.json."""

import dataclasses
import json
import pathlib
import shutil

import pytest
import standin
from standin import (
    DREAM,
    DREAM_IDS,
    LLADA,
    PUBLISHED_DREAM,
    SMALL,
    TINY,
    edit,
    needs_published_dream,
    read,
    user_error,
)

from convert import tokenizer as convert
from lrd_jax import text
from lrd_jax.tokenizer import Tokenizer


@pytest.fixture
def src(tmp_path):
    # Inside a directory of a neutral name: pytest's own bear the test's name.
    return tmp_path / "model"


@pytest.fixture
def dst(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def dream_files(tmp_path_factory):
    return standin.write_dream(tmp_path_factory.mktemp("d"))


@pytest.fixture(scope="module")
def dream_out(dream_files, tmp_path_factory):
    dst = tmp_path_factory.mktemp("o")
    return dst, convert.normalise_tokenizer(dream_files, dst, DREAM, "instruct")


# --- Dream


def check_dream(folder: pathlib.Path) -> None:
    tokenizer = Tokenizer.load(folder)
    got = tokenizer.backend.get_added_tokens_decoder()
    assert {token.content: i for i, token in got.items()} == DREAM_IDS
    assert {token.content for token in got.values() if not token.special} == (
        standin.DREAM_NOT_SPECIAL
    )
    assert all(tokenizer.encode(name) == [i] for name, i in DREAM_IDS.items())
    ids = [DREAM_IDS["<|im_start|>"], 64, DREAM_IDS["<tool_call>"]]
    assert tokenizer.decode(ids) == "a<tool_call>"


def test_dream_has_all_ids_and_flags(dream_out):
    folder, cfg = dream_out
    check_dream(folder)
    assert cfg == dataclasses.replace(DREAM, chat=True, eos_ids=(151643, 151645))
    assert read(folder / "tokenizer_config.json") == (
        standin.DREAM_NAMED | {"chat_template": standin.DREAM_TEMPLATE}
    )


def test_dream_base_has_its_own_bos(dream_files, dst):
    cfg = convert.normalise_tokenizer(dream_files, dst, DREAM, "base")
    assert (cfg.chat, cfg.raw_bos_id) == (False, 151665)
    tokenizer = Tokenizer.load(dst)
    assert text.encode_prompt(tokenizer, cfg, prompt="a") == [151665, 64]


@needs_published_dream
def test_published_dream_tokenizer(dst):
    cfg = convert.normalise_tokenizer(PUBLISHED_DREAM, dst, DREAM, "instruct")
    check_dream(dst)
    tokenizer = Tokenizer.load(dst)
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert tokenizer.encode("2025") == [17, 15, 17, 20]
    ids = text.encode_prompt(tokenizer, cfg, prompt="Hello, world!")
    assert ids.count(151644) == 3
    assert ids[-5:] == [151645, 198, 151644, *tokenizer.encode("assistant\n")]
    assert tokenizer.decode(ids) == (
        "system\nYou are a helpful assistant.\nuser\nHello, world!\nassistant\n"
    )


@needs_published_dream
@pytest.mark.parametrize("system", [False, True])
def test_published_dream_chat_text_equals_transformers(dst, system):
    from transformers.models.qwen2 import Qwen2Tokenizer

    messages = [{"role": "system", "content": "Be brief."}] * system
    messages += [{"role": "user", "content": " Hi "}]
    convert.normalise_tokenizer(PUBLISHED_DREAM, dst, DREAM, "instruct")
    theirs = Qwen2Tokenizer.from_pretrained(str(PUBLISHED_DREAM))
    ours = Tokenizer.load(dst).apply_chat_template(messages)
    assert ours == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert ("Be brief." in ours) == system


@needs_published_dream
def test_the_standins_of_dream_are_true():
    config = read(PUBLISHED_DREAM / "tokenizer_config.json")
    assert read(PUBLISHED_DREAM / "added_tokens.json") == DREAM_IDS
    assert {
        token["content"]
        for token in config["added_tokens_decoder"].values()
        if not token["special"]
    } == standin.DREAM_NOT_SPECIAL
    assert {n: config[n] for n in standin.DREAM_NAMED} == standin.DREAM_NAMED
    ids = read(PUBLISHED_DREAM / "vocab.json")
    assert [ids[token] for token in standin.byte_tokens()] == list(range(256))


def test_a_shifted_added_id_is_refused(dream_files, src, dst):
    shutil.copytree(dream_files, src)
    # The listed ids hold; one entry less below them would shift what is loaded.
    content = read(src / "vocab.json")
    content.popitem()
    standin.write_json(src / "vocab.json", content)
    with user_error("added token", "must have the id", "got"):
        convert.normalise_tokenizer(src, dst, DREAM, "base")
    assert not any(dst.iterdir())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"special": False}, ["'<|eot_id|>'", "special = False", "got True"]),
        ({"content": "<|eot|>"}, ["'<|eot|>'", "the id 568", "got None"]),
        ({"content": "[CLS]"}, ["'[CLS]'", "the id 568", "got 302"]),
    ],
)
def test_an_added_token_that_is_off_is_refused(src, dst, changes, named):
    standin.write_llada(src, base=SMALL)
    path = src / "tokenizer_config.json"
    added = read(path)["added_tokens_decoder"]
    added["568"] |= changes
    edit(path, added_tokens_decoder=added)
    with user_error(*named):
        convert.normalise_tokenizer(src, dst, TINY, "base")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_a_bpe_tokenizer_is_refused(dream_files, src, dst, name):
    shutil.copytree(dream_files, src)
    (src / name).unlink()
    with user_error(str(src), "incomplete", "merges.txt"):
        convert.normalise_tokenizer(src, dst, DREAM, "base")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", '{"a": 0'),
        ("vocab.json", "[1]"),
        ("merges.txt", "#version: 0.2\nzz qq\n"),
    ],
)
def test_damaged_bpe_files_are_refused(dream_files, src, dst, name, content):
    shutil.copytree(dream_files, src)
    (src / name).write_text(content)
    with user_error(str(src)):
        convert.normalise_tokenizer(src, dst, DREAM, "base")


def test_a_tokenizer_without_tokens_is_refused(src, dst):
    standin.write_llada(src, base=SMALL)
    edit(src / "tokenizer.json", added_tokens=[], post_processor=None)
    edit(src / "tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []})
    edit(src / "tokenizer_config.json", added_tokens_decoder=None)
    with user_error(str(src), "has no tokens"):
        convert.normalise_tokenizer(src, dst, TINY, "base")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bos_token": "\ud800"}, "bos_token has half of a surrogate pair"),
        ({"chat_template": [{"name": [1], "template": "x"}]}, "named default"),
    ],
)
def test_texts_that_are_none_are_refused(src, dst, changes, named):
    standin.write_llada(src, base=SMALL)
    file = src / "tokenizer_config.json"
    file.write_text(json.dumps(read(file) | changes))
    with user_error(str(src), named):
        convert.normalise_tokenizer(src, dst, TINY, "base")


def test_a_config_nested_too_deeply_is_refused(src, dst):
    standin.write_llada(src, base=SMALL)
    (src / "tokenizer_config.json").write_text("[" * 3000)
    with user_error("tokenizer_config.json: not valid JSON: nested too deeply"):
        convert.normalise_tokenizer(src, dst, TINY, "base")


def test_downloaded_code_does_not_run(dream_files, src, dst):
    shutil.copytree(dream_files, src)
    flag = src / "it-ran"
    code = f"open({str(flag)!r}, 'w').close()\nclass DreamTokenizer: pass\n"
    (src / "tokenization_dream.py").write_text(code)
    convert.normalise_tokenizer(src, dst, DREAM, "base")
    assert not flag.exists()
    assert "auto_map" not in read(dst / "tokenizer_config.json")


# --- LLaDA


def test_llada_is_copied_and_completed(src, dst):
    standin.write_llada(src)
    cfg = convert.normalise_tokenizer(src, dst, LLADA, "instruct")
    # No raw BOS for LLaDA; end of turn comes after end of text.
    assert cfg == dataclasses.replace(LLADA, chat=True, eos_ids=(126081, 126348))
    before, after = (path / "tokenizer.json" for path in (src, dst))
    assert before.read_bytes() == after.read_bytes()
    assert read(dst / "tokenizer_config.json") == (
        standin.LLADA_NAMED | {"chat_template": standin.LLADA_TEMPLATE}
    )


def test_llada_base_takes_nothing_in_front(src, dst):
    standin.write_llada(src, base=SMALL)
    cfg = convert.normalise_tokenizer(src, dst, TINY, "base")
    assert (cfg.chat, cfg.raw_bos_id) == (False, None)


def test_only_dream_has_a_raw_bos(src, dst):
    standin.write_llada(src, base=SMALL)
    content = (src / "tokenizer.json").read_text().replace("[CLS]", "<|beginoftext|>")
    (src / "tokenizer.json").write_text(content)
    edit(src / "tokenizer_config.json", added_tokens_decoder=None)
    assert convert.normalise_tokenizer(src, dst, TINY, "base").raw_bos_id is None


def test_tokens_may_be_named_in_the_special_tokens_map(src, dst):
    standin.write_llada(src, base=SMALL)
    edit(src / "tokenizer_config.json", bos_token=None)
    named = {"bos_token": standin.added_token("<role>"), "eos_token": "<s>"}
    standin.write_json(src / "special_tokens_map.json", named)
    convert.normalise_tokenizer(src, dst, TINY, "base")
    got = Tokenizer.load(dst).named
    # Where both files name one, the config's counts.
    assert got == standin.LLADA_NAMED | {"bos_token": "<role>"}


def test_end_of_turn_is_not_doubled(src, dst):
    standin.write_llada(src, base=SMALL)
    both = (SMALL + 1, SMALL + 268)
    cfg = dataclasses.replace(TINY, eos_ids=both)
    assert convert.normalise_tokenizer(src, dst, cfg, "base").eos_ids == both
    assert convert.normalise_tokenizer(src, dst, TINY, "base").eos_ids == both


def test_ids_beyond_the_vocabulary_are_refused(src, dst):
    standin.write_llada(src, base=SMALL)
    # The last id is SMALL + 268.
    exact = dataclasses.replace(TINY, vocab_size=SMALL + 269)
    convert.normalise_tokenizer(src, dst, exact, "base")
    short = dataclasses.replace(TINY, vocab_size=SMALL + 268)
    with user_error(str(src), "568", "<|eot_id|>", "[0, 568)"):
        convert.normalise_tokenizer(src, dst, short, "base")


@pytest.mark.parametrize(
    ("named", "want"),
    [
        (None, ["'<|mdm_mask|>'", "556", "config.json says 557"]),
        ("[CLS]", ["'[CLS]'", "302", "config.json says 557"]),
        ("<none>", ["'<none>'", "None", "config.json says 557"]),
    ],
)
def test_another_mask_id_is_refused(src, dst, named, want):
    standin.write_llada(src, base=SMALL)
    edit(src / "tokenizer_config.json", mask_token=named)
    cfg = dataclasses.replace(TINY, mask_id=SMALL + 257)
    with user_error(*want):
        convert.normalise_tokenizer(src, dst, cfg, "base")


def test_a_mask_token_may_be_unnamed(src, dst):
    # Fine-tuned models with a vocabulary of their own: nothing to compare with.
    standin.write_llada(src, base=SMALL)
    content = (src / "tokenizer.json").read_text().replace("<|mdm_mask|>", "<hole>")
    (src / "tokenizer.json").write_text(content)
    edit(src / "tokenizer_config.json", added_tokens_decoder=None)
    cfg = dataclasses.replace(TINY, mask_id=SMALL + 257)
    assert convert.normalise_tokenizer(src, dst, cfg, "base").mask_id == SMALL + 257


def test_no_tokenizer_leaves_the_config(src, dst):
    src.mkdir()
    assert convert.normalise_tokenizer(src, dst, DREAM, None) == DREAM
    chat = convert.normalise_tokenizer(src, dst, DREAM, "instruct")
    assert chat == dataclasses.replace(DREAM, chat=True)
    assert not any(dst.iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": 1}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 2}}'),
        ("special_tokens_map.json", "{"),
        ("added_tokens.json", "{"),
    ],
)
def test_damaged_files_are_named(src, dst, name, content):
    standin.write_llada(src, base=SMALL)
    (src / name).write_text(content)
    with user_error(name):
        convert.normalise_tokenizer(src, dst, TINY, "base")
    assert not any(dst.iterdir())


def test_a_download_without_the_vocabulary_is_refused(src, dst):
    standin.write_llada(src, base=SMALL)
    (src / "tokenizer.json").unlink()
    with user_error("incomplete", "tokenizer.json"):
        convert.normalise_tokenizer(src, dst, TINY, "base")


# --- chat template


def test_a_template_file_of_its_own_wins(src, dst):
    standin.write_llada(src, base=SMALL)
    (src / "chat_template.jinja").write_text("mine: {{ messages[0].content }}")
    convert.normalise_tokenizer(src, dst, TINY, "instruct")
    hello = [{"role": "user", "content": "Hi"}]
    assert Tokenizer.load(dst).apply_chat_template(hello) == "mine: Hi"


def test_of_several_templates_the_default_is_taken(src, dst):
    standin.write_llada(src, base=SMALL)
    templates = [
        {"name": "tools", "template": "t"},
        {"name": "default", "template": "d"},
    ]
    edit(src / "tokenizer_config.json", chat_template=templates)
    convert.normalise_tokenizer(src, dst, TINY, "instruct")
    assert Tokenizer.load(dst).chat_template == "d"


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ([{"name": "tools", "template": "t"}], ["default", "tools"]),
        ([1], ["default"]),
        (3, ["chat_template", "3"]),
        ("{% for %}", ["chat template fails"]),
        (None, ["needs a chat template", "--variant base"]),
    ],
)
def test_unusable_templates_are_refused(src, dst, template, named):
    standin.write_llada(src, base=SMALL)
    edit(src / "tokenizer_config.json", chat_template=template)
    with user_error(*named):
        convert.normalise_tokenizer(src, dst, TINY, "instruct")


# --- Base or Instruct


def test_names_decide_and_the_flag_overrules(tmp_path, dst):
    src = standin.write_llada(tmp_path / "LLaDA-8B-Instruct", base=SMALL)
    assert convert.normalise_tokenizer(src, dst, TINY).chat
    assert not convert.normalise_tokenizer(src, dst, TINY, "base").chat


def test_without_names_a_template_proves_nothing(src, dst):
    standin.write_llada(src, base=SMALL)
    with user_error(str(src), "--variant base", "--variant instruct"):
        convert.normalise_tokenizer(src, dst, TINY)
    assert not any(dst.iterdir())


def test_without_names_no_template_means_base(src, dst):
    standin.write_llada(src, base=SMALL, template=None)
    assert not convert.normalise_tokenizer(src, dst, TINY).chat
