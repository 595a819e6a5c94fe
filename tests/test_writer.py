"""Shards and their index, as the safetensors package reads them."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from convert import writer

BF16 = np.dtype(ml_dtypes.bfloat16)


def sizes(shards):
    return [[name for name, _ in shard] for shard in shards]


def test_shards_are_filled_up_to_the_limit():
    looks = [("a", (4,)), ("b", (2, 3)), ("c", (5,)), ("d", (30,)), ("e", (1,))]
    assert sizes(writer.plan_shards(looks, 2, limit=20)) == [
        ["a", "b"],
        ["c"],
        ["d"],  # Larger than the limit: by itself.
        ["e"],
    ]
    assert sizes(writer.plan_shards(looks, 2)) == [["a", "b", "c", "d", "e"]]


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)])
def test_the_safetensors_package_reads_what_is_written(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tensors = {
        "rows": rng.normal(size=(7, 3)).astype(dtype),
        "columns": rng.normal(size=(3, 5)).astype(dtype).T,
        "vector": rng.normal(size=9).astype(dtype),
    }
    looks = [(name, tensor.shape) for name, tensor in tensors.items()]
    shards = writer.plan_shards(looks, dtype.itemsize, limit=40 * dtype.itemsize)
    writer.write_shards(tmp_path, shards, iter(tensors.values()), dtype)
    index = json.loads((tmp_path / writer.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == (21 + 15 + 9) * dtype.itemsize
    assert index["weight_map"] == {
        "rows": "model-00001-of-00002.safetensors",
        "columns": "model-00001-of-00002.safetensors",
        "vector": "model-00002-of-00002.safetensors",
    }
    for name, tensor in tensors.items():
        with safe_open(tmp_path / index["weight_map"][name], "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            np.testing.assert_array_equal(file.get_tensor(name), tensor)
    assert writer.is_export(tmp_path)


@pytest.mark.parametrize("tensors", [[], [np.zeros(3)], [np.zeros(2)] * 2])
def test_tensors_must_be_as_planned(tmp_path, tensors):
    shards = [[("a", (2,))]]
    single = (tensor.astype(np.float32) for tensor in tensors)
    with pytest.raises((ValueError, StopIteration)):
        writer.write_shards(tmp_path, shards, single, np.dtype(np.float32))


@pytest.mark.parametrize("content", [None, "", "[]", '{"metadata": {}}'])
def test_what_others_made_is_no_export(tmp_path, content):
    if content is not None:
        (tmp_path / writer.INDEX_FILE).write_text(content)
    assert not writer.is_export(tmp_path)
