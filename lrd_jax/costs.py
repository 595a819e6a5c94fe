"""What one turn of a decode takes of each device, without weights or devices.

FLOPs and collectives are counted on the jaxpr of the very turn that runs, sharded as
`lrd_jax.sharding` does it; weights and cache are summed over their shapes. Temporaries
are a formula, `temporary_bytes`, checked in tests against compiled programs.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from lrd_jax import sharding
from lrd_jax.base import DATA, MODEL
from lrd_jax.collectives import Collectives, count_collectives
from lrd_jax.config import DecodeConfig, ModelConfig
from lrd_jax.decode.belief import tile_rows
from lrd_jax.decode.loop import make_stepper
from lrd_jax.flops import count_flops
from lrd_jax.hardware import USABLE, Device
from lrd_jax.model import backbone, families

# Float32 arrays `[2 R, V]` that a tile of the belief holds at a time.
TILE_ARRAYS = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be planned.

    Attributes:
        model: its shape.
        cfg: how it is decoded.
        batch: rows on each group of `split` devices.
        prompt: positions of the prompt.
        split: devices that share a copy of the weights, the axis `model`.
        quantization: one of `quantization.KINDS`, or None; weights are else bfloat16.
    """

    model: ModelConfig
    cfg: DecodeConfig
    batch: int
    prompt: int
    split: int = 1
    quantization: str | None = None

    @property
    def length(self) -> int:
        return self.prompt + self.cfg.gen_length

    @property
    def window(self) -> int:
        return self.cfg.block_length or self.cfg.gen_length

    @property
    def part(self) -> dict[str, int]:
        """What one device has of the heads, the MLP and the vocabulary."""
        m, divides = self.model, sharding.divides(self.model, self.split)
        sizes = {
            "heads": m.num_heads,
            "kv_heads": m.num_kv_heads,
            "mlp": m.mlp_dim,
            "vocab": m.vocab_size,
        }
        return {k: n // self.split if divides[k] else n for k, n in sizes.items()}


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one turn, on each device.

    Attributes:
        weights: bytes.
        cache: bytes of keys and values.
        temporaries: bytes of the decode's state and of what a turn needs beside it.
        flops: of the turn: act, forward, measure. With a cache, of one in which some
            rows need a full forward and others a window.
        traffic: bytes read and written, at the least.
        collectives: of the turn.
    """

    weights: int
    cache: int
    temporaries: int
    flops: int
    traffic: int
    collectives: Collectives

    def memory(self) -> int:
        return self.weights + self.cache + self.temporaries

    def fits(self, device: Device) -> bool:
        return self.memory() <= USABLE * device.memory

    def seconds(self, device: Device, split: int) -> float:
        """The roofline: no turn is faster, real ones are slower."""
        compute = max(self.flops / device.flops, self.traffic / device.bandwidth)
        return compute + self.collectives.seconds(split, device.link)


def memory(job: Job) -> Costs:
    """Bytes alone: quick, as nothing is traced but shapes."""
    return Costs(
        weights=sharding.weight_bytes(
            job.model, jnp.bfloat16, job.split, job.quantization
        ),
        cache=cache_bytes(job),
        temporaries=temporary_bytes(job),
        flops=0,
        traffic=traffic_bytes(job),
        collectives=Collectives(),
    )


def costs(job: Job) -> Costs:
    """All of it; traces the turn, some seconds for the published models."""
    init, turn, args = _sharded_turn(job)
    # The trace of a turn includes the making of its state, which is no part of it.
    before, after = count_collectives(init, *args), count_collectives(turn, *args)
    collectives = (b - a for a, b in zip(before, after, strict=True))
    return dataclasses.replace(
        memory(job),
        # Of all devices of the group together.
        flops=count_flops(turn, *args) // job.split,
        collectives=Collectives(*collectives),
    )


def _sharded_turn(job: Job) -> tuple[Any, Any, Any]:
    stepper = make_stepper(families.make_denoiser(job.model), job.cfg)
    params = backbone.abstract_params(job.model, jnp.bfloat16, job.quantization)
    args = (
        params,
        jax.ShapeDtypeStruct((job.batch, job.prompt), jnp.int32),
        jax.ShapeDtypeStruct((job.batch, job.prompt), jnp.bool_),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    over_model = functools.partial(
        jax.shard_map,
        mesh=AbstractMesh((1, job.split), (DATA, MODEL), (AxisType.Auto,) * 2),
        in_specs=(
            sharding.specs(job.model, job.split, job.quantization),
            *[P()] * 3,
        ),
        out_specs=P(),
        check_vma=False,
    )

    def init(params: Any, *inputs: Any) -> Any:
        return stepper.init(params, *inputs).tokens

    def turn(params: Any, *inputs: Any) -> Any:
        return stepper.step(params, stepper.init(params, *inputs)).tokens

    return over_model(init), over_model(turn), args


def cache_bytes(job: Job) -> int:
    """Keys and values of all positions, in bfloat16."""
    if job.cfg.cache == "none":
        return 0
    rows = job.batch * job.length
    heads = job.part["kv_heads"] * job.model.head_dim
    return 2 * 2 * job.model.num_layers * rows * heads


def temporary_bytes(job: Job) -> int:
    """State, and the larger of a layer's and of a tile's arrays.

    A layer: queries, keys, values and the float32 scores of all pairs of positions; or
    the inner arrays of the MLP. A tile: `TILE_ARRAYS` of `[2 R, V]`. A cached decode
    runs a full forward for its lane only, into a cache of the lane's own.
    """
    m, part, cfg = job.model, job.part, job.cfg
    full = job.batch if cfg.cache == "none" else min(job.batch, cfg.cache_lane)
    state = job.batch * (2 * job.length + 8 * job.window) * m.d_model
    lane = cache_bytes(job) * full // job.batch
    rows = max(full * job.length, job.batch * _window_rows(job))
    pairs = max(full * job.length**2, job.batch * _window_rows(job) * job.length)
    qkv = 2 * rows * (part["heads"] + 2 * part["kv_heads"]) * m.head_dim
    attention = qkv + 4 * part["heads"] * pairs
    layer = 2 * rows * m.d_model + max(attention, 2 * 2 * rows * part["mlp"])
    tile = min(job.batch * job.window, tile_rows(m.vocab_size))
    belief = TILE_ARRAYS * 2 * tile * part["vocab"] * 4
    return state + lane + max(layer, belief)


def _window_rows(job: Job) -> int:
    """Positions that a row of a cached decode runs in most of its forwards."""
    lead = 1 if job.model.family == "dream" else 0
    if job.cfg.cache == "none":
        return job.length
    window = job.cfg.gen_length if job.cfg.cache == "prefix" else job.window
    return window + lead


def traffic_bytes(job: Job) -> int:
    """Weights once, the head once a tile; scores, logits and cache as they must.

    The table is not read whole. What a fused kernel would keep on the chip is counted
    for the scores and the logits only, which XLA writes and reads once each.
    """
    m, part = job.model, job.part
    kind = job.quantization
    all_weights = sharding.weight_bytes(m, jnp.bfloat16, job.split, kind)
    params = backbone.abstract_params(m, jnp.bfloat16, kind)
    split = m.vocab_size // part["vocab"]

    def size(name: str) -> int:
        leaves = jax.tree.leaves(params[name])
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) // split

    head = size("embed" if m.tie_embeddings else "head")
    table = 0 if m.tie_embeddings else size("embed")
    rows = job.batch * job.window
    tiles = math.ceil(rows / tile_rows(m.vocab_size))
    pairs = job.batch * _window_rows(job) * job.length
    scores = 2 * 4 * m.num_layers * part["heads"] * pairs
    logits = 2 * 4 * 2 * rows * part["vocab"]
    weights = all_weights - table + (tiles - 1) * head
    return weights + scores + logits + cache_bytes(job)
