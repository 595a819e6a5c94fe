"""The tables against the published files, and each layout against its inverse."""

import json
import math
import pathlib

import numpy as np
import pytest

from convert import keymap
from lrd_jax.model import families

PUBLISHED = pathlib.Path(__file__).parent / "golden" / "published"
# Base and Instruct have the same index. LLaDA-1.5 has LLaDA-Instruct's config.
MODELS = {
    "LLaDA-8B-Base": "llada",
    "LLaDA-8B-Instruct": "llada",
    "Dream-v0-Base-7B": "dream",
    "Dream-v0-Instruct-7B": "dream",
}
TINY = json.loads((PUBLISHED / "LLaDA-8B-Base.config.json").read_text()) | dict(
    d_model=16, n_heads=4, n_kv_heads=2, n_layers=3, mlp_hidden_size=24
)


def published_config(model):
    return json.loads((PUBLISHED / f"{model}.config.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_the_table_expects_exactly_the_published_tensors(model):
    table = keymap.entries(families.from_published(published_config(model)))
    index = json.loads((PUBLISHED / f"{MODELS[model]}.index.json").read_text())
    names = [name for entry in table for name in entry.names]
    assert sorted(names) == sorted(index["weight_map"])
    assert len(names) == {"llada": 291, "dream": 339}[MODELS[model]]
    sizes = [math.prod(entry.published_shape) * len(entry.names) for entry in table]
    assert 2 * sum(sizes) == index["metadata"]["total_size"]


def test_published_shapes_of_grouped_query_attention():
    cfg = families.from_published(published_config("Dream-v0-Base-7B"))
    shapes = {e.rule.path[-1]: e.published_shape for e in keymap.entries(cfg)}
    assert shapes["q"] == (3584, 3584)
    assert shapes["k"] == (512, 3584)
    assert shapes["v_bias"] == (512,)
    assert shapes["out"] == (3584, 3584)
    assert shapes["down"] == (3584, 18944)
    assert shapes["head"] == (152064, 3584)


@pytest.mark.parametrize("options", [{}, {"weight_tying": True}])
@pytest.mark.parametrize("bias", [False, True])
def test_laying_out_ours_and_back_is_the_identity(options, bias):
    published = TINY | options | {"include_qkv_bias": bias}
    table = keymap.entries(families.from_published(published))
    assert any(e.rule.path == ("head",) for e in table) != bool(options)
    assert any(e.rule.path[-1] == "q_bias" for e in table) == bias
    rng = np.random.default_rng(0)
    for entry in table:
        tensor = rng.normal(size=entry.published_shape)
        start, ours = entry.rule.to_ours(tensor, 0)
        assert start == (0,) * len(entry.layer_shape)
        assert ours.shape == entry.layer_shape
        np.testing.assert_array_equal(entry.rule.to_published(ours), tensor)


def test_laying_out_by_blocks_of_rows_is_laying_out_the_whole():
    rng = np.random.default_rng(1)
    for entry in keymap.entries(families.from_published(TINY)):
        tensor = rng.normal(size=entry.published_shape)
        ours = np.full(entry.layer_shape, np.nan)
        for first in range(0, len(tensor), 3):
            start, values = entry.rule.to_ours(tensor[first : first + 3], first)
            ends = (at + n for at, n in zip(start, values.shape, strict=True))
            ours[tuple(map(slice, start, ends))] = values
        np.testing.assert_array_equal(ours, entry.rule.to_ours(tensor, 0)[1])


def test_a_leaf_without_a_row_is_an_error(monkeypatch):
    monkeypatch.setitem(keymap.TABLES, "llada", keymap.TABLES["llada"][:-1])
    with pytest.raises(ValueError, match=r"no row for .*'down'"):
        keymap.entries(families.from_published(TINY))


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("rotary_emb.inv_freq", True),
        ("model.transformer.blocks.3.rotary_emb.rotary_pos_sin", True),
        ("model.layers.0.self_attn.q_proj.weight", False),
        ("model.rotary_emb.inv_freq.extra", False),
    ],
)
def test_only_constants_are_ignored(name, ignored):
    assert bool(keymap.IGNORED.fullmatch(name)) == ignored
