"""Compiles a decode for a TPU that is not here, and says what memory it takes.

    python -m lrd_jax.aot --help

Needs libtpu (`pip install "lrd_jax[tpu-aot]"`), but no TPU and no weights. Exit codes:
0; 2 for a mistake in what was given; 3 where libtpu is not installed: nothing was done.
"""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from lrd_jax.config import DecodeConfig, ModelConfig
from lrd_jax.flags import Number, shown
from lrd_jax.process import exit_code, memory_errors, say
from lrd_jax.settings import check, check_given_once, check_rows
from lrd_jax.shapes import SHAPES

# Modules that import JAX are imported in the functions that use them.

NO_LIBTPU = 3
GIB = 2**30
# The smallest slices whose description libtpu knows; one chip of them is compiled for.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
EIGHT = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Compiles LRD for one TPU chip and prints the memory that a decode takes there.

    For each model once with one block, once with blocks of `block_length`.

    Attributes:
        models: which published models, by shape: llada-8b, dream-7b.
        chip: TPU generation.
        batch_size: prompts decoded together.
        prompt: positions of the prompt.
        gen_length: positions to generate.
        block_length: of the second figure.
    """

    models: Annotated[tuple[str, ...], shown("NAME ...")] = tuple(SHAPES)
    chip: Literal["v5e", "v5p", "v6e"] = "v5p"
    batch_size: Number = 1
    prompt: Number = 512
    gen_length: Number = 1024
    block_length: Number = 32


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one chip holds during a decode, in bytes.

    Attributes:
        weights: the arguments, nearly all of them weights.
        temporaries: the state of the decode and what one turn needs beside it.
    """

    weights: int
    temporaries: int


def parse(argv: Sequence[str]) -> Flags:
    """Reads the arguments.

    Raises:
        UserError: a mistake that tyro cannot see.
        SystemExit: after `--help` (0) and after tyro's own messages (2).
    """
    check_given_once(argv)
    flags = tyro.cli(Flags, prog="python -m lrd_jax.aot", args=list(argv))
    check(len(flags.models) > 0, "--models", flags.models, "at least one name")
    for name in flags.models:
        check(name in SHAPES, "--models", name, f"among {', '.join(SHAPES)}")
        longest = SHAPES[name].max_length - flags.gen_length
        check(
            1 <= flags.prompt <= longest,
            "--prompt",
            flags.prompt,
            f"1 to {longest}, the context of {name} less `--gen-length`",
        )
    check_rows(flags.batch_size, flags.prompt + flags.gen_length)
    _decode_configs(flags)
    return flags


def _decode_configs(flags: Flags) -> list[DecodeConfig]:
    window = DecodeConfig(gen_length=flags.gen_length)
    blocks = dataclasses.replace(window, block_length=flags.block_length)
    return [window, blocks]


def tpu_chip(name: str) -> Any:
    """A device to compile for: one chip of the TPU generation `name`.

    Raises:
        ImportError: libtpu is not installed.
    """
    return _topology(TOPOLOGIES[name]).devices[0]


def _topology(name: str) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("libtpu is not installed")
    # Without a TPU, libtpu would first ask the cloud's metadata server for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    return topologies.get_topology_desc(name, "tpu")


def decode_memory(
    model: ModelConfig, cfg: DecodeConfig, device: Any, batch_size: int, prompt: int
) -> Memory:
    """Compiles the whole decode of a bfloat16 model for `device`, and asks XLA."""
    import jax
    import jax.numpy as jnp

    from lrd_jax.decode.loop import make_decode_fn
    from lrd_jax.model import backbone, families

    args = (
        backbone.abstract_params(model, jnp.bfloat16),
        jax.ShapeDtypeStruct((batch_size, prompt), jnp.int32),
        jax.ShapeDtypeStruct((batch_size, prompt), jnp.bool_),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    place = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args
    )
    decode_fn = make_decode_fn(families.make_denoiser(model), cfg)
    memory: Any = jax.jit(decode_fn).lower(*placed).compile().memory_analysis()
    return Memory(memory.argument_size_in_bytes, memory.temp_size_in_bytes)


def group_memory(job: Any, chip: str) -> Memory | None:
    """The same for each chip of a group that shares a copy of the weights.

    Args:
        job: `lrd_jax.costs.Job`.
        chip: TPU generation.

    Returns:
        None where no slice is known that holds such a group.

    Raises:
        ImportError: libtpu is not installed.
        jax.errors.JaxRuntimeError: it does not fit, or does not compile.
    """
    topology = TOPOLOGIES[chip] if job.split in (1, 2, 4) else EIGHT[chip]
    if job.split not in (1, 2, 4, 8):
        return None
    devices = _topology(topology).devices
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from lrd_jax import sharding
    from lrd_jax.decode.loop import make_decode_fn
    from lrd_jax.mesh_shape import MeshShape
    from lrd_jax.model import backbone, families

    mesh = sharding.make_mesh(MeshShape(1, job.split), devices)
    specs = sharding.specs(job.model, job.split, job.quantization)
    params = backbone.abstract_params(job.model, jnp.bfloat16, job.quantization)
    place = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        ),
        params,
        specs,
    )
    ids = jax.ShapeDtypeStruct((job.batch, job.prompt), jnp.int32)
    mask = jax.ShapeDtypeStruct((job.batch, job.prompt), jnp.bool_)
    key = jax.eval_shape(lambda: jax.random.key(0))
    whole = NamedSharding(mesh, P())
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        (ids, mask, key),
    )
    decode_fn = make_decode_fn(families.make_denoiser(job.model), job.cfg)
    spread = sharding.batch_decode(decode_fn, mesh, specs)
    memory: Any = jax.jit(spread).lower(place, *inputs).compile().memory_analysis()
    return Memory(memory.argument_size_in_bytes, memory.temp_size_in_bytes)


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _run(parse(argv)), lambda: "nothing is lost")


def _run(flags: Flags) -> int:
    try:
        device = tpu_chip(flags.chip)
    except ImportError:
        say(
            "skipped: compiling for a TPU needs libtpu; "
            'pip install "lrd_jax[tpu-aot]" and try again.'
        )
        return NO_LIBTPU
    print(
        f"{flags.chip}, bfloat16, batch {flags.batch_size}, prompt {flags.prompt}, "
        f"window {flags.gen_length}; GiB of one chip"
    )
    print(f"{'model':10} {'block':>6} {'weights':>8} {'temporaries':>12}", flush=True)
    for name in flags.models:
        for cfg in _decode_configs(flags):
            block = cfg.block_length or cfg.gen_length
            with memory_errors(f"for {name} with blocks of {block}: give less"):
                memory = decode_memory(
                    SHAPES[name], cfg, device, flags.batch_size, flags.prompt
                )
            print(
                f"{name:10} {block:6} "
                f"{memory.weights / GIB:8.2f} {memory.temporaries / GIB:12.3f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
