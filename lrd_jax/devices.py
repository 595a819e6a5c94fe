"""The devices that a command decodes on: one, or a mesh of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from lrd_jax import sharding
from lrd_jax.base import MODEL, Params
from lrd_jax.decode import slots
from lrd_jax.decode.slots import Slots
from lrd_jax.mesh_shape import AUTO, parse_mesh
from lrd_jax.process import memory_errors, say
from lrd_jax.source import Source


class Placed(NamedTuple):
    """A model whose weights are on their devices.

    Attributes:
        params: the weights.
        make_slots: slots of a method's config, on the same devices.
    """

    params: Params
    make_slots: Callable[[Any], Slots]


def open_mesh(flag: str | None, source: Source) -> Mesh | None:
    """The mesh that `--mesh` asks for; None where all is done by one device.

    `auto` is the default, and if given says which mesh it chose and why.

    Raises:
        UserError: there are too few devices, or the weights do not fit them.
    """
    shape = None if flag is None else parse_mesh(flag)
    mesh, line = sharding.open_mesh(
        shape, source.config, source.dtype, source.quantization
    )
    if flag == AUTO:
        say(line)
    return mesh


def span(mesh: Mesh | None) -> int:
    """How many processes' devices a mesh is over."""
    if mesh is None:
        return 1
    return len({device.process_index for device in mesh.devices.flat})


def place(
    source: Source, mesh: Mesh | None, make_slots: Callable[..., Slots] | None = None
) -> Placed:
    """Reads the weights, each device's part straight onto it.

    Args:
        source: the checkpoint.
        mesh: from `open_mesh`.
        make_slots: `slots.make_slots`, or a test's own.

    Raises:
        UserError: the weights do not fit.
    """
    make_slots = make_slots or slots.make_slots
    hint = (
        f"for the weights in {source.dtype}: give `--quantize int8`, a smaller "
        "`--dtype`, or a `--mesh` with a larger `model`"
    )
    with memory_errors(hint):
        denoiser, params = source.load(mesh)
    if mesh is None:
        return Placed(params, functools.partial(make_slots, denoiser))
    specs = sharding.specs(source.config, mesh.shape[MODEL], source.quantization)
    return Placed(
        params,
        functools.partial(make_slots, denoiser, mesh=mesh, param_specs=specs),
    )
