"""What two processes take of memory to read one checkpoint onto a mesh over both.

    python tests/measure_restore.py

Not a test: it makes a random checkpoint of 1.1 GB, of which two processes with four
simulated CPU devices each then read their half (`model=8`), and prints for each its
peak above the interpreter's own, and the bound: half of the weights and the largest
leaf. The exit code is 1 if a process takes more. Linux only.
"""

import argparse
import functools
import pathlib
import re
import socket
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1  # noqa: F401, so that it is not counted as weights

import lrd_jax
from lrd_jax import checkpoint, processes, sharding
from lrd_jax.config import ModelConfig
from lrd_jax.leaf_buffer import GRID_DEVICES
from lrd_jax.mesh_shape import MeshShape
from lrd_jax.model import backbone

PROCESSES, DEVICES_EACH = 2, 4
LAYERS = 7
DTYPE = jnp.dtype(jnp.bfloat16)


def config(scale=1):
    """A model of 1.1 GB, or one that is narrower by a factor that divides 16."""
    return ModelConfig(
        family="llada",
        vocab_size=16000 // scale,
        d_model=2048 // scale,
        num_layers=LAYERS,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128 // scale,
        mlp_dim=8192 // scale,
        rope_theta=1e4,
        norm_eps=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
        max_length=4096,
        mask_id=2,
        eos_ids=(1,),
        pad_id=1,
    )


def leaves(cfg):
    return checkpoint.flat(backbone.abstract_params(cfg, DTYPE))


def values(number, shape, layer):
    """One layer of the leaf of that number, or one without layers: always the same."""
    # The exponents of numbers around one, so that all are finite.
    rng = np.random.default_rng([number, layer])
    return rng.integers(0x3E00, 0x4000, shape, np.uint16).view(DTYPE)


def pieces(number, name, shape):
    if name[0] != "blocks":
        yield (0,) * len(shape), values(number, shape, 0)
        return
    for layer in range(LAYERS):
        yield (layer, *[0] * len(shape[1:])), values(number, shape[1:], layer)[None]


def make(folder, cfg):
    """Writes the checkpoint leaf by leaf, as `convert` does."""
    lazy = [
        (name, functools.partial(pieces, number, name, leaf.shape))
        for number, (name, leaf) in enumerate(leaves(cfg).items())
    ]
    checkpoint.save(folder, cfg, lazy, DTYPE)


def memory(field):
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(field + r":\s+(\d+)", status.read())[1])


def check(params):
    """The last layer of every leaf, as far as it lies here."""
    for number, (name, leaf) in enumerate(checkpoint.flat(params).items()):
        assert len(leaf.addressable_shards) == DEVICES_EACH, name
        stacked = name[0] == "blocks"
        want = values(number, leaf.shape[stacked:], LAYERS - 1 if stacked else 0)
        for shard in leaf.addressable_shards:
            got = np.asarray(shard.data[-1] if stacked else shard.data)
            np.testing.assert_array_equal(got, want[shard.index[stacked:]], str(name))
    for name in (("embed",), ("head",), ("blocks", "mlp", "down")):
        leaf = checkpoint.flat(params)[name]
        part = leaf.size // (PROCESSES * DEVICES_EACH)
        assert {shard.data.size for shard in leaf.addressable_shards} == {part}, name


def read(folder, coordinator, process_id):
    """One of the processes: reads, prints its peak in bytes, then checks."""
    jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    team = processes.join(processes.Meeting(coordinator, PROCESSES, process_id))
    mesh = sharding.make_mesh(MeshShape(model=PROCESSES * DEVICES_EACH))
    jax.block_until_ready(jnp.zeros(()))
    before = memory("VmRSS")
    # On accelerators the stored dtype is the default.
    model = lrd_jax.load(folder, dtype=DTYPE, mesh=mesh)
    print(memory("VmHWM") - before, flush=True)
    check(model.params)
    team.exchange()
    jax.distributed.shutdown()


def measure(folder):
    """The peak of each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--folder", folder, "--coordinator", address]
    children = [
        subprocess.Popen(
            [*command, "--process-id", str(i)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(PROCESSES)
    ]
    try:
        told = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert not any(child.returncode for child in children), "a process failed"
    return [int(text) for text in told]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--folder", "--coordinator"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        read(args.folder, args.coordinator, args.process_id)
        return 0
    # As many as a leaf may have chunks.
    jax.config.update("jax_num_cpu_devices", GRID_DEVICES)
    with tempfile.TemporaryDirectory() as folder:
        make(pathlib.Path(folder), config())
        peaks = measure(folder)
    sizes = [leaf.size * DTYPE.itemsize for leaf in leaves(config()).values()]
    half, largest = sum(sizes) / PROCESSES, max(sizes)
    print(f"half of the weights {half / 2**20:.0f} MiB", end=", ")
    print(f"largest leaf {largest / 2**20:.0f} MiB")
    for i, peak in enumerate(peaks):
        print(
            f"process {i}: peak {peak / 2**20:.0f} MiB above the interpreter's own, "
            f"{'within' if peak <= half + largest else 'OVER'} "
            f"{(half + largest) / 2**20:.0f} MiB"
        )
    return int(max(peaks) > half + largest)


if __name__ == "__main__":
    sys.exit(main())
