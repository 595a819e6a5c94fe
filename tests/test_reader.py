"""Shards and indexes, good and bad."""

import importlib.util
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import reader
from lrd_jax.errors import UserError

A = np.arange(12, dtype=np.float32).reshape(6, 2)
B = np.arange(5, dtype=np.float32).astype(ml_dtypes.bfloat16)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_index(folder, weight_map):
    content = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(content)


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": A}, tmp_path / SHARDS[0])
    save_file({"b": B}, tmp_path / SHARDS[1])
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    return tmp_path


def test_reads_shards_by_index(sharded):
    source = reader.Source(sharded)
    assert source.problems == []
    assert source.tensors["a"].shape == (6, 2)
    assert source.tensors["a"].dtype == "F32"
    assert source.tensors["b"].dtype == "BF16"
    [(first, rows)] = source.blocks("b")
    assert first == 0
    assert rows.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(rows, B)


def test_reads_a_single_file(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    assert set(reader.Source(tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_blocks_cover_the_rows(sharded, monkeypatch, rows):
    monkeypatch.setattr(reader, "BLOCK_BYTES", rows * A[0].nbytes)
    blocks = list(reader.Source(sharded).blocks("a"))
    assert [first for first, _ in blocks] == list(range(0, 6, rows))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), A)


def test_notes_a_tensor_in_two_shards(sharded):
    save_file({"a": A, "b": B}, sharded / SHARDS[1])
    [both, *_] = reader.Source(sharded).problems
    assert both == f"a is in both {SHARDS[0]} and {SHARDS[1]}"


def test_notes_a_tensor_twice_in_the_index(sharded):
    twice = f'{{"weight_map": {{"a": "{SHARDS[0]}", "a": "{SHARDS[1]}"}}}}'
    (sharded / "model.safetensors.index.json").write_text(twice)
    assert any("by the index" in problem for problem in reader.Source(sharded).problems)


def test_notes_where_index_and_shards_disagree(sharded):
    write_index(sharded, {"a": SHARDS[1], "c": SHARDS[0]})
    assert sorted(reader.Source(sharded).problems) == [
        f"a is not in {SHARDS[1]} as the index says",
        f"b of {SHARDS[1]} is not indexed",
        f"c is not in {SHARDS[0]} as the index says",
    ]


def test_notes_an_absent_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    assert reader.Source(sharded).problems == [
        f"shard {SHARDS[1]} of the index is absent"
    ]


@pytest.mark.parametrize(
    "path", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", ""]
)
def test_refuses_an_unsafe_shard(sharded, path):
    write_index(sharded, {"a": path})
    with pytest.raises(UserError, match="unsafe or unknown kind of shard"):
        reader.Source(sharded)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}']
)
def test_refuses_a_damaged_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        reader.Source(sharded)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_names_a_truncated_shard(sharded, keep):
    data = (sharded / SHARDS[0]).read_bytes()
    (sharded / SHARDS[0]).write_bytes(data[:keep])
    with pytest.raises(UserError, match=f"{SHARDS[0]}: truncated or corrupt: "):
        reader.Source(sharded)


def test_refuses_a_directory_without_weights(tmp_path):
    with pytest.raises(UserError, match="has no weights"):
        reader.Source(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("torch"), reason="torch is installed")
def test_pickles_need_torch(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="install torch, or get the safetensors"):
        reader.Source(tmp_path)


def test_reads_pickles_with_torch(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"a": torch.arange(12.0).reshape(6, 2), "b": torch.arange(5).bfloat16()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    source = reader.Source(tmp_path)
    assert (source.tensors["a"].dtype, source.tensors["b"].dtype) == ("F32", "BF16")
    np.testing.assert_array_equal(next(source.blocks("a"))[1], A)
    np.testing.assert_array_equal(next(source.blocks("b"))[1], B)


def test_never_unpickles_objects(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": tmp_path}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="truncated or corrupt"):
        reader.Source(tmp_path)
