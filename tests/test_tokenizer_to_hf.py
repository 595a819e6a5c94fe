"""Tests of convert.tokenizer: tokenizer.json -> published files."""

import pytest
import standin
from standin import (
    DREAM,
    PUBLISHED_DREAM,
    SMALL,
    TINY,
    needs_published_dream,
    read,
    user_error,
)

from convert import tokenizer as convert
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


def test_llada_goes_back(src, dst, tmp_path):
    from transformers import PreTrainedTokenizerFast

    standin.write_llada(src, base=SMALL)
    cfg = convert.normalise_tokenizer(src, dst, TINY, "instruct")
    back = tmp_path / "back"
    back.mkdir()
    convert.write_hf_tokenizer(dst, back, cfg)
    assert {path.name for path in back.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = read(back / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (
        config["added_tokens_decoder"]
        == (read(src / "tokenizer_config.json")["added_tokens_decoder"])
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(str(back))
    given = "hello<|mdm_mask|> 12"
    ours = Tokenizer.load(dst)
    assert theirs.encode(given) == ours.encode(given)
    turn = [{"role": "user", "content": "Hi"}]
    want = theirs.apply_chat_template(turn, tokenize=False)
    assert ours.apply_chat_template(turn) == want
    # And in again: nothing is lost on the way.
    again = tmp_path / "again"
    again.mkdir()
    assert convert.normalise_tokenizer(back, again, TINY, "instruct") == cfg
    assert read(again / "tokenizer_config.json") == read(dst / "tokenizer_config.json")


def test_dream_goes_back(dream_files, dream_out, tmp_path):
    folder, cfg = dream_out
    convert.write_hf_tokenizer(folder, tmp_path, cfg)
    for name in ("vocab.json", "added_tokens.json"):
        assert read(tmp_path / name) == read(dream_files / name)
    before, after = (path / "merges.txt" for path in (dream_files, tmp_path))
    assert before.read_bytes() == after.read_bytes()
    before, after = (
        read(path / "tokenizer_config.json") for path in (dream_files, tmp_path)
    )
    assert before == {name: after[name] for name in before}


@needs_published_dream
def test_published_dream_files_come_back(dst, tmp_path):
    cfg = convert.normalise_tokenizer(PUBLISHED_DREAM, dst, DREAM, "instruct")
    back = tmp_path / "back"
    back.mkdir()
    convert.write_hf_tokenizer(dst, back, cfg)
    for name in (
        "vocab.json",
        "added_tokens.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ):
        assert read(back / name) == read(PUBLISHED_DREAM / name), name
    before, after = (path / "merges.txt" for path in (PUBLISHED_DREAM, back))
    assert before.read_bytes() == after.read_bytes()


def test_no_tokenizer_to_write_back(src, dst):
    src.mkdir()
    convert.write_hf_tokenizer(src, dst, DREAM)
    assert not any(dst.iterdir())


WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
PAIRS = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
METASPACE = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}


@pytest.mark.parametrize(
    ("model", "before", "named"),
    [(WORDS, None, "'WordLevel'"), (PAIRS, METASPACE, "Metaspace")],
)
def test_only_byte_level_bpe_can_become_dreams(src, dst, model, before, named):
    src.mkdir()
    content = {"version": "1.0", "model": model, "pre_tokenizer": before}
    standin.write_json(src / "tokenizer.json", content)
    with user_error("must be byte-level BPE", named):
        convert.write_hf_tokenizer(src, dst, DREAM)
    assert not any(dst.iterdir())
