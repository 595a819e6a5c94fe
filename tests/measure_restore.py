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
CFG = ModelConfig(
    family="llada",
    vocab_size=16000,
    d_model=2048,
    num_layers=LAYERS,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    mlp_dim=8192,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
    tie_embeddings=False,
    max_length=4096,
    mask_id=15999,
    eos_ids=(15998,),
    pad_id=15998,
)
DTYPE = jnp.dtype(jnp.bfloat16)


@functools.cache
def wanted():
    """Shape and dtype of each leaf; not before the number of devices is set."""
    return checkpoint.flat(backbone.abstract_params(CFG, DTYPE))


def values(name, layer):
    """One layer of a leaf, or all of a leaf without layers: random, but the same."""
    seed = [sorted(wanted()).index(name), layer]
    shape = wanted()[name].shape[name[0] == "blocks" :]
    # The exponents of numbers around one, so that all are finite.
    bits = np.random.default_rng(seed).integers(0x3E00, 0x4000, shape, np.uint16)
    return bits.view(DTYPE)


def pieces(name):
    if name[0] != "blocks":
        yield (0,) * len(wanted()[name].shape), values(name, 0)
        return
    for layer in range(LAYERS):
        start = (layer, *[0] * (len(wanted()[name].shape) - 1))
        yield start, values(name, layer)[None]


def make(folder):
    """As `convert` does, with as many devices as a leaf may have chunks."""
    jax.config.update("jax_num_cpu_devices", GRID_DEVICES)
    leaves = [(name, lambda name=name: pieces(name)) for name in wanted()]
    checkpoint.save(folder, CFG, leaves, DTYPE)


def memory(field):
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(field + r":\s+(\d+)", status.read())[1])


def check(params):
    """The last layer of every leaf, as far as it lies here."""
    for name, leaf in checkpoint.flat(params).items():
        assert len(leaf.addressable_shards) == DEVICES_EACH, name
        stacked = name[0] == "blocks"
        want = values(name, LAYERS - 1 if stacked else 0)
        for shard in leaf.addressable_shards:
            got = np.asarray(shard.data[-1] if stacked else shard.data)
            np.testing.assert_array_equal(got, want[shard.index[stacked:]], str(name))


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
        told = [child.communicate()[0] for child in children]
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
    with tempfile.TemporaryDirectory() as folder:
        make(pathlib.Path(folder))
        peaks = measure(folder)
    sizes = [leaf.size * DTYPE.itemsize for leaf in wanted().values()]
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
