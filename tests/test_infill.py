"""Infilling, and the arguments that a decode refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from reference import lrd
from reference.compare import TOO_CLOSE, assert_same_decode, row_of
from toy import PLAIN, RICH, SOFT, config

from lrd_jax.config import DreamConfig, LladaConfig
from lrd_jax.decode.state import StopReason

INFILLS = {
    "soft": SOFT,
    "kl_stop": dict(tau_decode=0.3),
    "threshold": dict(
        threshold=0.6, commit_order="confidence", kl_reduction="mean_open"
    ),
}


def infill(cfg, texts, open_positions, seed, width=None):
    ids, mask = toy.left_pad(texts, width)
    open_mask = np.zeros(ids.shape, bool)
    for r, (row, positions) in enumerate(zip(texts, open_positions, strict=True)):
        for i in positions:
            open_mask[r, ids.shape[1] - len(row) + i] = True
    key, open_mask = jax.random.key(0), jnp.asarray(open_mask)
    return toy.run(cfg, toy.params(seed), ids, mask, key, open_mask=open_mask)


@pytest.mark.parametrize("name", INFILLS)
def test_infilling_is_that_of_the_reference(name):
    cfg = config(**INFILLS[name])
    kept = rows = 0
    for seed in range(4):
        texts = toy.prompts(seed, lengths=(9, 7, 8))
        texts[1][2] = toy.MASK  # Given, and so not to be generated over.
        where = [[1, 2, 5, 8], [0, 3, 4], [2, 3, 4, 5, 6]]
        result = infill(cfg, texts, where, seed)
        model = toy.NumpyModel(toy.weights(seed))
        for r, row in enumerate(texts):
            want = lrd.infill(model, row, where[r], **(PLAIN | INFILLS[name]))
            rows += 1
            if want.margin > TOO_CLOSE:
                kept += 1
                unpad = slice(9 - len(row), None)
                padded = row_of(result, r)
                assert_same_decode(
                    dataclasses.replace(
                        padded,
                        tokens=padded.tokens[unpad],
                        committed=padded.committed[unpad],
                        commit_step=padded.commit_step[unpad],
                        commit_prob=padded.commit_prob[unpad],
                        commit_entropy=padded.commit_entropy[unpad],
                    ),
                    want,
                )
    assert kept > 0.7 * rows


def test_infilling_changes_only_open_positions_and_may_have_none():
    texts = toy.prompts(1, lengths=(6, 6))
    texts[0][:3] = [toy.MASK, toy.EOS, toy.PAD]
    result = infill(config(**SOFT), texts, [[3, 5], []], seed=1)
    np.testing.assert_array_equal(
        result.tokens[0, [0, 1, 2, 4]], np.delete(texts[0], [3, 5])
    )
    assert result.committed[0].tolist() == [False, False, False, True, False, True]
    assert (result.tokens[0, [3, 5]] != toy.MASK).all()
    np.testing.assert_array_equal(result.tokens[1], texts[1])
    assert result.num_forwards[1] == 0
    assert result.stop_reason.tolist() == [StopReason.COMMITTED] * 2
    assert result.useful_tokens.tolist() == [2, 0]


def test_a_sample_does_not_depend_on_the_padding():
    texts, where = toy.prompts(2, lengths=(6, 4)), [[1, 3, 4], [0, 2]]
    cfg = config(temperature=3.0, **SOFT)
    narrow, wide = (infill(cfg, texts, where, 2, width) for width in (6, 11))
    np.testing.assert_array_equal(wide.tokens[:, 5:], narrow.tokens)
    np.testing.assert_array_equal(wide.commit_step[:, 5:], narrow.commit_step)
    greedy = infill(config(**SOFT), texts, where, 2)
    assert (greedy.tokens != narrow.tokens).any()


def test_a_literal_mask_token_in_the_prompt_is_not_generated_over():
    rows = toy.prompts(0)
    rows[0][2] = toy.MASK
    want = lrd.decode(toy.NumpyModel(toy.weights(0)), rows[0], **PLAIN)
    assert want.margin > TOO_CLOSE
    assert_same_decode(row_of(toy.decode(config(), rows), 0), want)


def arguments(**changes):
    ids, mask = toy.left_pad(toy.prompts(0))
    given = dict(prompt_ids=ids, prompt_mask=mask, key=jax.random.key(0))
    return given | changes


IDS, REAL = toy.left_pad(toy.prompts(0))
LONG = jnp.zeros((1, 60), jnp.int32)


@pytest.mark.parametrize(
    ("cfg", "changes", "message"),
    [
        (RICH, dict(prompt_ids=IDS[0]), r"prompt_ids.*\[B, P\].*\(6,\)"),
        (RICH, dict(prompt_ids=REAL), "prompt_ids.*integers.*bool"),
        (RICH, dict(prompt_ids=IDS[:, :0], prompt_mask=REAL[:, :0]), "not be empty"),
        (RICH, dict(prompt_mask=REAL[:, 1:]), r"prompt_mask.*\(4, 6\).*\(4, 5\)"),
        (RICH, dict(prompt_mask=IDS), "prompt_mask.*booleans.*int32"),
        (RICH, dict(open_mask=REAL[:2]), r"open_mask.*\(4, 6\).*\(2, 6\)"),
        (RICH, dict(open_mask=IDS), "open_mask.*booleans.*int32"),
        (config(stop_at_eos=True), dict(open_mask=REAL), "stop_at_eos=False"),
        (LladaConfig(gen_length=8), dict(open_mask=REAL), "lrd and baseline.*llada"),
        (DreamConfig(gen_length=8), dict(open_mask=REAL), "lrd and baseline.*dream"),
        (RICH, dict(prompt_ids=LONG, prompt_mask=LONG == 0), "68 .*context of 64"),
        (RICH, dict(key=jax.random.split(jax.random.key(0), 3)), r"\(4\).*\(3,\)"),
    ],
)
def test_arguments_of_a_wrong_shape_or_kind_are_refused(cfg, changes, message):
    run, params = toy.decode_fn(cfg), toy.params(0)
    with pytest.raises(ValueError, match=message):
        run(params, **arguments(**changes))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(toy.stepper(cfg).init.fn, params, **arguments(**changes))
