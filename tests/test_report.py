import json

import jax
import numpy as np
import pytest
from toy_run import EOS, MASK, toy_backend, toy_config

from lrd_jax.batches import Row
from lrd_jax.decode.state import NEVER, DecodeResult
from lrd_jax.report import Totals, make_record, shown
from lrd_jax.tokenizer import Tokenizer

NAN = float("nan")
TOKENIZER = Tokenizer(toy_backend(), {})
ROW = Row(id="a", line=0, ids=[7, 8])


@pytest.fixture
def result():
    """Row 1 of two: three forwards, an end of text after two tokens."""
    row = DecodeResult(
        tokens=np.int32([1, 2, EOS, 3, MASK]),
        committed=np.array([True, True, True, True, False]),
        num_forwards=np.int32(3),
        num_full_forwards=np.int32(2),
        useful_tokens=np.int32(2),
        stop_reason=np.int32(4),
        block_stop=np.int32([2, 0]),
        refine_steps=np.int32([1, 0]),
        kl=np.float32([NAN, 0.1, np.inf, 9, NAN]),
        phase=np.int32([0, 1, 2, 2, NEVER]),
        nucleus_size=np.float32([3, 2.5, NAN, 9, NAN]),
        commit_step=np.int32([0, 1, 2, 2, NEVER]),
        commit_prob=np.float32([0.1, 0.2, 0.3, 1, NAN]),
        commit_entropy=np.float32([1, 2, 3, 0, NAN]),
    )
    return jax.tree.map(lambda x: np.stack([np.zeros_like(x), x]), row)


def test_a_record(result):
    record = make_record(ROW, result, 1, TOKENIZER, toy_config())
    assert record == {
        "id": "a",
        "text": "w1 w2",
        "token_ids": [1, 2, EOS, 3, MASK],
        "num_forwards": 3,
        "num_full_forwards": 2,
        "useful_tokens": 2,
        "stop_reason": "step_limit",
        "block_stop": ["kl", None],
        "refine_steps": [1, 0],
        "kl": [None, 0.1, None],
        "phase": [0, 1, 2],
        "nucleus_size": [3.0, 2.5, None],
        "commit_step": [0, 1, 2, 2, None],
        "commit_prob": [0.1, 0.2, 0.3, 1.0, None],
        "commit_entropy": [1.0, 2.0, 3.0, 0.0, None],
    }
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_without_a_tokenizer_there_is_no_text(result):
    record = make_record(ROW, result, 1, None, toy_config())
    assert record["text"] is None
    assert shown(record, heading=False) == f"1 2 {EOS} 3 {MASK}"


def test_an_infilled_row_is_its_whole_text(result):
    row = Row(id=3, line=0, ids=[2, EOS, 3, MASK], open=[True] * 4)
    record = make_record(row, result, 1, TOKENIZER, toy_config())
    assert record["token_ids"] == [2, EOS, 3, MASK]
    assert record["text"] == "w2 w3"
    assert record["commit_step"] == [1, 2, 2, None]
    assert record["commit_prob"] == [0.2, 0.3, 1.0, None]
    assert record["commit_entropy"] == [2.0, 3.0, 0.0, None]


def test_what_the_terminal_shows():
    record = {"id": "a", "text": "some\ntext"}
    assert shown(record, heading=False) == "some\ntext"
    assert shown(record, heading=True) == "=== a ===\nsome\ntext"


def test_figures():
    totals = Totals()
    record = {"num_forwards": 10, "useful_tokens": 25, "stop_reason": "kl", "id": 0}
    record["num_full_forwards"] = 3
    totals.add([record])
    totals.add([record | {"stop_reason": "nonfinite", "id": "b"}])
    assert totals.nonfinite == ["b"]
    assert totals.figures(compile_seconds=1.25, run_seconds=0.5) == (
        "prompts 2 | forwards 20 (6 full) | useful tokens 50 | "
        "tokens per forward 2.50 | useful tokens/s 100.0 | compile 1.25 s | run 0.5 s"
    )
