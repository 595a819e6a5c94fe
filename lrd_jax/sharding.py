"""Many devices: the one place that makes meshes and says what is split over them.

A mesh has two axes. Over `data` each device has rows of its own and a decode loop of
its own, with no barrier between them. Over `model` one copy of the weights is split:
heads, the inner width of the MLP and the vocabulary. All of it runs in `jax.shard_map`,
manual on both axes, so that what crosses between devices is what the model and
`decode.vocabulary` write down, and nothing that a partitioner thinks of.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from lrd_jax.base import DATA, MODEL, REPLICATED, Params, check_arrays, row_keys
from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.mesh_shape import MeshShape as MeshShape
from lrd_jax.mesh_shape import parse_mesh as parse_mesh
from lrd_jax.model import backbone, int8

# What weights may take of a device's memory; the decode needs the rest.
WEIGHTS_SHARE = 0.8
GIB = 2**30

# Which axis of a leaf is split, and by what it has to divide. Norms are nowhere split.
_RULES = {
    "embed": (0, "vocab"),
    "head": (1, "vocab"),
    "q": (1, "heads"),
    "q_bias": (1, "heads"),
    "out": (1, "heads"),
    "k": (1, "kv_heads"),
    "k_bias": (1, "kv_heads"),
    "v": (1, "kv_heads"),
    "v_bias": (1, "kv_heads"),
    "gate": (2, "mlp"),
    "up": (2, "mlp"),
    "down": (1, "mlp"),
    "scale": (None, ""),
}


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `shape` over the first of `devices` (None for all there are).

    Raises:
        UserError: there are not as many devices, or `model` does not divide them where
            `data` is to be as large as they allow.
    """
    devices = jax.devices() if devices is None else devices
    data = shape.data
    if data is None:
        data = len(devices) // shape.model
        if data * shape.model != len(devices):
            raise UserError(
                f"`--mesh model={shape.model}` must divide the number of devices, "
                f"{len(devices)}; give `data=` too to use fewer."
            )
    if data * shape.model > len(devices):
        raise UserError(
            f"`--mesh {shape}` needs {data * shape.model} devices; there are "
            f"{len(devices)}."
        )
    return jax.make_mesh(
        (data, shape.model),
        (DATA, MODEL),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: data * shape.model],
    )


def specs(config: ModelConfig, model: int, quantization: str | None = None) -> Any:
    """How every parameter is split over an axis `model` of that many devices.

    Args:
        config: of the model.
        model: how many devices share a copy.
        quantization: what is in int8, as for `backbone.abstract_params`.

    Returns:
        A pytree of `PartitionSpec` like the parameters; `REPLICATED` for a leaf that
        every device has whole, see `whole_parts`.
    """
    split_by = divides(config, model)

    def spec(path: Any, leaf: Any) -> P:
        axis, by = _RULES[path[-1].key]
        if axis is None or not split_by[by]:
            return REPLICATED
        return P(*[None] * axis, MODEL)

    whole = jax.tree_util.tree_map_with_path(spec, backbone.abstract_params(config))
    return int8.quantise_specs(whole, quantization)


def param_shardings(config: ModelConfig, mesh: Mesh) -> Any:
    """Where the parameters of `config` lie on `mesh`, for `checkpoint.restore`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(config, mesh.shape[MODEL]),
        is_leaf=lambda x: isinstance(x, P),
    )


def divides(config: ModelConfig, model: int) -> dict[str, bool]:
    """Which parts of the model are split over that many devices."""
    heads = config.num_heads % model == 0
    return {
        "vocab": config.vocab_size % model == 0,
        "heads": heads,
        # A device needs the keys of its own queries; whole ones serve any.
        "kv_heads": heads and config.num_kv_heads % model == 0,
        "mlp": config.mlp_dim % model == 0,
    }


def whole_parts(config: ModelConfig, model: int) -> list[str]:
    """What every device has whole as it does not divide: a line each, with the reason.

    Norms are always whole and not mentioned.
    """
    split_by = divides(config, model)
    kinds = {
        "vocab": (config.vocab_size, "ids", "embeddings and head"),
        "heads": (config.num_heads, "heads", "attention"),
        "kv_heads": (config.num_kv_heads, "key/value heads", "keys and values"),
        "mlp": (config.mlp_dim, "columns", "MLP"),
    }
    if not split_by["heads"]:
        del kinds["kv_heads"]  # Said already.
    return [
        f"{part}: {count} {unit} do not divide by model={model}"
        for kind, (count, unit, part) in kinds.items()
        if not split_by[kind]
    ]


def weight_bytes(
    config: ModelConfig, dtype: DTypeLike, model: int, quantization: str | None = None
) -> int:
    """Bytes of weights on each device where they are split over `model` devices."""

    def size(leaf: Any, spec: P) -> int:
        return leaf.size * leaf.dtype.itemsize // (model if MODEL in spec else 1)

    params = backbone.abstract_params(config, dtype, quantization)
    split = specs(config, model, quantization)
    return sum(jax.tree.leaves(jax.tree.map(size, params, split)))


def choose_mesh(
    config: ModelConfig,
    dtype: DTypeLike,
    devices: int,
    memory: int | None,
    quantization: str | None = None,
    processes: int = 1,
) -> tuple[MeshShape, str]:
    """All devices on `data` if the weights fit one, else the least `model` that fits.

    A `model` that heads divide by goes first: else every device computes all of the
    attention. Dream has 28 heads and 4 key/value heads. A process alone goes before
    several, which then share a copy and have all their devices on `model`.

    Args:
        config: of the model.
        dtype: of the weights.
        devices: how many a process has.
        memory: bytes of each; None where they share the host's, as on CPU.
        quantization: what is in int8, as for `specs`.
        processes: how many there are, with as many devices each.

    Returns:
        The shape, and why.

    Raises:
        UserError: the weights fit no split over these devices.
    """
    if memory is None:
        return MeshShape(devices, 1), "the devices share the memory of the host"
    room = WEIGHTS_SHARE * memory
    splits = [
        *(model for model in range(1, devices + 1) if devices % model == 0),
        *(devices * n for n in range(2, processes + 1) if processes % n == 0),
    ]
    sizes = {
        model: weight_bytes(config, dtype, model, quantization) for model in splits
    }
    fitting = [model for model in sizes if sizes[model] <= room]
    if not fitting:
        best = min(sizes, key=sizes.__getitem__)
        raise UserError(
            f"the weights take {sizes[best] / GIB:.1f} GiB a device even when split "
            f"over {best}, more than {WEIGHTS_SHARE:.0%} of its {memory / GIB:.1f} "
            "GiB: use more devices, `--dtype bfloat16` or `--quantize int8`, or force "
            "a split with `--mesh`."
        )
    model = min(
        fitting, key=lambda m: (m > devices, not divides(config, m)["heads"], m)
    )
    why = (
        f"weights take {sizes[model] / GIB:.1f} GiB of a device's {memory / GIB:.1f}"
        + (f", whole they would take {sizes[1] / GIB:.1f}" if model > 1 else "")
    )
    return MeshShape(max(1, devices // model), model), why


def open_mesh(
    shape: MeshShape | None,
    config: ModelConfig,
    dtype: DTypeLike,
    quantization: str | None = None,
) -> tuple[Mesh | None, str]:
    """The mesh that a command asks for, or the best one, over a process's own devices.

    Where `model` is more than they are, it is over those of several processes.

    Returns:
        The mesh, None where it is a single device and nothing is to be spread; and one
        line that says which mesh and why.

    Raises:
        UserError: as for `make_mesh`, `choose_mesh` and `_sharing_devices`.
    """
    devices, processes, why = jax.local_devices(), jax.process_count(), "as asked"
    if shape is None and len(devices) * processes == 1:
        shape, why = MeshShape(1, 1), "there is one device"
    elif shape is None:
        memory = (devices[0].memory_stats() or {}).get("bytes_limit")
        shape, why = choose_mesh(
            config, dtype, len(devices), memory, quantization, processes
        )
    if processes > 1:
        devices = _sharing_devices(shape)
    mesh = make_mesh(shape, devices)
    chosen = MeshShape(mesh.shape[DATA], mesh.shape[MODEL])
    line = f"mesh {chosen}: " + "; ".join([why, *whole_parts(config, chosen.model)])
    return (mesh if mesh.size > 1 else None), line


def _sharing_devices(shape: MeshShape) -> Sequence[jax.Device]:
    """The devices of this process, and of those that share a copy of the weights.

    These are as many processes in a row as `model` needs.

    Raises:
        UserError: processes cannot be grouped so, or have too few devices.
    """
    each, processes = jax.local_device_count(), jax.process_count()
    span = max(1, -(-shape.model // each))
    if processes % span or (span > 1 and shape.model != span * each):
        raise UserError(
            f"`--mesh model={shape.model}`: a copy of the weights over several "
            f"processes takes all {each} devices of each, and as many processes as "
            f"divide {processes}."
        )
    needed = (shape.data or 1) * shape.model
    if needed > span * each:
        raise UserError(
            f"`--mesh {shape}` is what {span} of the {processes} processes do, and "
            f"needs {needed} devices; they have {span * each}."
        )
    first = jax.process_index() // span * span
    return [d for d in jax.devices() if first <= d.process_index < first + span]


def batch_decode(
    decode_fn: Callable[..., Any], mesh: Mesh, param_specs: Any = REPLICATED
) -> Callable[..., Any]:
    """`decode_fn` with the rows of a batch spread over `data`.

    Each device, or group of devices on `model`, runs the loop over its own rows to its
    own end: nothing is waited for, and nothing crosses between groups.

    Args:
        decode_fn: from `make_decode_fn`.
        mesh: from `make_mesh`.
        param_specs: `specs(config, model, quantization)` where the parameters are
            split.

    Returns:
        A function like `decode_fn`, jitted, with the same result. Rows that do not
        divide evenly are made to by repeating the last one, and cut off again.

    Raises:
        ValueError: when called with parameters that lie on the mesh in another way:
            moving them in each call would be slow, and might not fit.
    """
    shards = mesh.shape[DATA]
    rows = P(DATA)
    is_spec = functools.partial(jax.tree.map, is_leaf=lambda x: isinstance(x, P))
    placed = is_spec(lambda spec: NamedSharding(mesh, spec), param_specs)

    def spread(params: Params, *arrays: Any) -> Any:
        # The loop's carry starts the same on all devices and ends differing, which the
        # check of varying axes refuses.
        return jax.shard_map(
            decode_fn,
            mesh=mesh,
            in_specs=(param_specs, *[rows] * len(arrays)),
            out_specs=rows,
            check_vma=False,
        )(params, *arrays)

    @functools.partial(jax.jit, in_shardings=(placed, None, None, None, None))
    def whole(params: Params, ids: Array, mask: Array, key: Array, opened: Any) -> Any:
        batch = ids.shape[0]
        padded = -(-batch // shards) * shards
        index = jnp.minimum(jnp.arange(padded), batch - 1)
        arrays = (ids, mask, row_keys(key, batch), opened)
        if padded > batch:
            arrays = jax.tree.map(lambda x: x[index], arrays)
        result = spread(params, *arrays)
        return jax.tree.map(lambda x: x[:batch], result)

    def decode(
        params: Params,
        prompt_ids: Array,
        prompt_mask: Array,
        key: Array,
        open_mask: Array | None = None,
    ) -> Any:
        # Here, where the rows have not been filled up, or dealt out.
        check_arrays(prompt_ids, prompt_mask, open_mask)
        # By position: `jax.jit` takes no keywords beside `in_shardings`.
        return whole(params, prompt_ids, prompt_mask, key, open_mask)

    return decode
