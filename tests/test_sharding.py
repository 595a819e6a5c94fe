"""Meshes, what is split over them, and decodes on eight simulated devices."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from eight_devices import CHECKS

from lrd_jax import pretrained, sharding
from lrd_jax.base import MODEL, REPLICATED
from lrd_jax.errors import UserError
from lrd_jax.mesh_shape import MeshShape, parse_mesh
from lrd_jax.model import backbone
from lrd_jax.scheduler import enough_done
from lrd_jax.shapes import SHAPES

LLADA, DREAM = SHAPES["llada-8b"], SHAPES["dream-7b"]
WIDE = dataclasses.replace(LLADA, mlp_dim=4 * LLADA.mlp_dim)
GIB = 2**30


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=4,model=2", MeshShape(4, 2)),
        ("model=2, data=4", MeshShape(4, 2)),
        ("data=8", MeshShape(8, 1)),
        ("model=8", MeshShape(None, 8)),
        ("auto", None),
    ],
)
def test_a_mesh_is_read(text, shape):
    assert parse_mesh(text) == shape


@pytest.mark.parametrize(
    "text", ["", "4,2", "data=0", "data=-1", "data=2,data=4", "date=2", "data=4,", "2"]
)
def test_a_mesh_that_is_none_gets_one_line(text):
    with pytest.raises(UserError, match=r"`--mesh` must be .*data=4,model=2") as caught:
        parse_mesh(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MeshShape(4, 2), r"data=4,model=2` needs 8 devices; there are 1\."),
        (MeshShape(None, 3), "model=3` must divide the number of devices, 1;"),
    ],
)
def test_a_mesh_needs_its_devices(shape, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(shape)


def test_one_device_needs_no_mesh():
    mesh, line = sharding.open_mesh(None, LLADA, "bfloat16")
    assert mesh is None
    assert line == "mesh data=1,model=1: there is one device"


@pytest.mark.parametrize(
    ("config", "dtype", "devices", "gib", "want"),
    [
        (LLADA, "bfloat16", 8, None, MeshShape(8, 1)),  # On CPU.
        (LLADA, "bfloat16", 8, 80, MeshShape(8, 1)),
        (LLADA, "bfloat16", 8, 16, MeshShape(4, 2)),
        (LLADA, "float32", 8, 16, MeshShape(2, 4)),
        (DREAM, "bfloat16", 8, 16, MeshShape(4, 2)),
        (DREAM, "float32", 8, 16, MeshShape(2, 4)),
        (DREAM, "float32", 12, 16, MeshShape(3, 4)),
        # Over 3 devices it would fit, but each would compute all of the attention.
        (WIDE, "bfloat16", 12, 24, MeshShape(3, 4)),
    ],
)
def test_the_least_split_that_fits(config, dtype, devices, gib, want):
    memory = None if gib is None else gib * GIB
    shape, why = sharding.choose_mesh(config, dtype, devices, memory)
    assert shape == want
    if gib is not None:
        each = sharding.weight_bytes(config, dtype, shape.model) / GIB
        assert f"{each:.1f} GiB of a device's {gib:.1f}" in why


@pytest.mark.parametrize(
    ("dtype", "devices", "processes", "want"),
    [
        ("bfloat16", 4, 4, MeshShape(2, 2)),  # No need to share.
        ("bfloat16", 1, 4, MeshShape(1, 2)),
        ("float32", 1, 4, MeshShape(1, 4)),
        ("float32", 2, 4, MeshShape(1, 4)),
    ],
)
def test_processes_share_a_copy_that_none_can_hold(dtype, devices, processes, want):
    chosen = sharding.choose_mesh(LLADA, dtype, devices, 16 * GIB, None, processes)
    assert chosen[0] == want


def test_weights_that_fit_nowhere_get_one_line():
    with pytest.raises(UserError, match="even when split over 2, more than 80% of its"):
        sharding.choose_mesh(LLADA, "float32", 2, 16 * GIB)


@pytest.mark.parametrize("config", [LLADA, DREAM])
def test_a_split_leaves_each_device_its_share(config):
    whole = sharding.weight_bytes(config, "bfloat16", 1)
    params = backbone.abstract_params(config, "bfloat16")
    assert whole == sum(leaf.size * 2 for leaf in jax.tree.leaves(params))
    # Norms are all that is whole on each of two.
    half = sharding.weight_bytes(config, "bfloat16", 2)
    assert whole / 2 < half < whole / 2 * 1.001
    for leaf in ("embed", "head"):
        assert MODEL in sharding.specs(config, 2)[leaf]


def test_what_does_not_divide_is_whole_and_said_to_be():
    assert sharding.whole_parts(DREAM, 4) == []
    assert sharding.whole_parts(DREAM, 8) == [
        "attention: 28 heads do not divide by model=8"
    ]
    seven = sharding.whole_parts(DREAM, 7)
    assert "keys and values: 4 key/value heads do not divide by model=7" in seven
    assert [line.split(":")[0] for line in seven] == [
        "embeddings and head",
        "keys and values",
        "MLP",
    ]
    split = sharding.specs(DREAM, 8)["blocks"]
    assert all(spec == REPLICATED for spec in split["attn"].values())
    assert MODEL in split["mlp"]["down"]
    split = sharding.specs(DREAM, 7)["blocks"]
    assert MODEL in split["attn"]["q"]
    assert split["attn"]["k"] == split["mlp"]["gate"] == REPLICATED


def test_each_group_of_slots_stops_for_its_own():
    rows = [0, None, None, None, *range(1, 5)]
    assert enough_done(rows, 1) == 4
    assert enough_done(rows, 2).tolist() == [4, 1]
    assert enough_done([0] * 32, 2).tolist() == [2, 2]


def test_a_checkpoint_goes_to_shardings_or_to_a_mesh():
    mesh = sharding.make_mesh(MeshShape(1, 1))
    with pytest.raises(ValueError, match="not both"):
        pretrained.load(shardings=REPLICATED, mesh=mesh)


@pytest.fixture(scope="module")
def outcome():
    """What `eight_devices.py` found; compiled fast rather than well."""
    flags = "--xla_force_host_platform_device_count=8"
    flags += " --xla_backend_optimization_level=0"
    script = pathlib.Path(__file__).with_name("eight_devices.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(name, outcome):
    assert outcome[name] is None, outcome[name]


def test_keys_that_do_not_divide_are_whole_beside_split_queries():
    odd = dataclasses.replace(LLADA, num_heads=30, num_kv_heads=15)
    assert MODEL in sharding.specs(odd, 2)["blocks"]["attn"]["q"]
    assert sharding.specs(odd, 2)["blocks"]["attn"]["v"] == REPLICATED
