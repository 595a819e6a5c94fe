"""Says what a decode takes of devices that need not be here.

    python -m lrd_jax.plan --help

No weights and no accelerator are needed. Every line says where its figure comes from.
Exit codes: 0 it fits; 1 it does not; 2 a mistake in what was given.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import tyro

from lrd_jax import builtin, model_file
from lrd_jax.config import DecodeConfig, ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.flags import Number, OptionalNumber, QuantizeFlag, Switch, shown
from lrd_jax.hardware import DEVICES, GIB, USABLE
from lrd_jax.mesh_shape import MeshShape, parse_mesh
from lrd_jax.process import exit_code
from lrd_jax.quantization import join, kind_of
from lrd_jax.settings import check, check_given_once, check_rows
from lrd_jax.shapes import SHAPES

# Modules that import JAX are imported in the functions that use them.

NAMES = {
    "llada-8b-base": "llada-8b",
    "llada-8b-instruct": "llada-8b",
    "llada-1.5": "llada-8b",
    "dream-7b-base": "dream-7b",
    "dream-7b-instruct": "dream-7b",
}
SPLITS = (1, 2, 4, 7, 8, 14, 16)  # 7 and 14 are for Dream's 28 heads.
NOT_FITTING = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Plans a decode of LRD: memory, FLOPs, traffic and the time they allow.

    Attributes:
        model: a published model by name, or the directory of a checkpoint.
        device: what each device is.
        mesh: `data=4,model=2`: rows are spread over the first, weights split over the
            second; `auto` takes the smallest split that fits.
        batch_size: rows decoded together, over all devices.
        prompt: positions of the prompt.
        gen_length: positions to generate.
        block_length: positions decoded at a time; by default all.
        cache: which keys and values are kept.
        quantize: int8 holds all weights but the embedding table in int8.
        quantize_embeddings: hold the embedding table in int8, too.
        tokens_per_forward: useful tokens that each row gains by a forward; measure it
            with `python -m lrd_jax.evaluate`.
        formula: do not compile, even where libtpu is installed.
    """

    model: Annotated[str, shown("NAME|DIR")]
    device: Literal["v5e", "v5p", "v6e", "a100", "h100", "h200"]
    mesh: str = "model=1"
    batch_size: Number = 1
    prompt: Number = 512
    gen_length: Number = 256
    block_length: OptionalNumber = None
    cache: Literal["none", "prefix", "dual"] = "none"
    quantize: QuantizeFlag = None
    quantize_embeddings: Switch = False
    tokens_per_forward: float = 1.0
    formula: Switch = False


@dataclasses.dataclass(frozen=True)
class Request:
    """The flags, checked.

    Attributes:
        flags: as typed.
        model: its shape.
        mesh: None for `auto`.
        cfg: of the decode.
        quantization: one of `quantization.KINDS`, or None; what the checkpoint has in
            int8 and what the flags ask for.
    """

    flags: Flags
    model: ModelConfig
    mesh: MeshShape | None
    cfg: DecodeConfig
    quantization: str | None


def parse(argv: Sequence[str]) -> Request:
    """Reads the arguments.

    Raises:
        UserError: a mistake that tyro cannot see.
        SystemExit: after `--help` (0) and after tyro's own messages (2).
    """
    check_given_once(argv)
    flags = tyro.cli(Flags, prog="python -m lrd_jax.plan", args=list(argv))
    model, stored = find_model(flags.model)
    cfg = DecodeConfig(
        gen_length=flags.gen_length,
        block_length=flags.block_length,
        cache=flags.cache,
    )
    tokens = flags.tokens_per_forward
    check(0 < tokens < float("inf"), "--tokens-per-forward", tokens, "above 0")
    kind = join(stored, kind_of(flags.quantize, flags.quantize_embeddings))
    mesh = parse_mesh(flags.mesh)
    context = f"the context of {flags.model}"
    below = f"below {model.max_length}, {context}"
    check(flags.gen_length < model.max_length, "--gen-length", flags.gen_length, below)
    longest = model.max_length - flags.gen_length
    expected = f"1 to {longest}, {context} less `--gen-length`"
    check(1 <= flags.prompt <= longest, "--prompt", flags.prompt, expected)
    check_rows(flags.batch_size, flags.prompt + flags.gen_length)
    return Request(flags, model, mesh, cfg, kind)


def find_model(name: str) -> tuple[ModelConfig, str | None]:
    """The shape of a published model, or of a checkpoint, and what it has in int8.

    Raises:
        UserError: neither, or a checkpoint in float32.
    """
    published = NAMES.get(name, name)
    if published in SHAPES:
        return SHAPES[published], None
    if name in builtin.names() or pathlib.Path(name).is_dir():
        file = model_file.read(builtin.find(name))
        if file.dtype != "bfloat16":
            raise UserError(
                f"`--model {name}`: its weights are in {file.dtype}, and a plan is for "
                "bfloat16: convert what it was made of with `--dtype bfloat16`."
            )
        return file.config, file.quantization
    known = ", ".join([*NAMES, *builtin.names()])
    raise UserError(f"`--model` must be a checkpoint or one of {known}, got {name!r}.")


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""

    def run() -> int:
        request = parse(argv)
        job, data = make_job(request)
        fits = True
        for line in report(request, job, data):
            if line is None:
                fits = False
            else:
                print(line, flush=True)
        return 0 if fits else NOT_FITTING

    return exit_code(run, lambda: "nothing is lost")


def make_job(request: Request) -> tuple[Any, int]:
    """What one group of devices is to do, and how many groups there are."""
    from lrd_jax.costs import Job, memory

    flags, mesh = request.flags, request.mesh
    data = 1 if mesh is None else mesh.data or 1

    def job(split: int) -> Any:
        return Job(
            model=request.model,
            cfg=request.cfg,
            batch=-(-flags.batch_size // data),
            prompt=flags.prompt,
            split=split,
            quantization=request.quantization,
        )

    if mesh is not None:
        return job(mesh.model), data
    device = DEVICES[flags.device]
    jobs = [job(split) for split in SPLITS]
    fitting = [one for one in jobs if memory(one).fits(device)]
    return (fitting or jobs[-1:])[0], data


def report(request: Request, job: Any, data: int) -> Iterator[str | None]:
    """The lines to print; None for the verdict that it does not fit."""
    from lrd_jax import sharding
    from lrd_jax.costs import costs

    flags, device = request.flags, DEVICES[request.flags.device]
    held = "bfloat16" + (f" and {job.quantization}" if job.quantization else "")
    yield (
        f"{flags.model} on {flags.device}, mesh data={data},model={job.split}: "
        f"{flags.batch_size} rows ({job.batch} on each device or group), prompt "
        f"{job.prompt}, window {job.cfg.gen_length} in blocks of {job.window}, cache "
        f"{job.cfg.cache}, {held}"
    )
    for line in sharding.whole_parts(job.model, job.split):
        yield f"  whole on every device: {line}"
    found, how = costs(job), "formula"
    compiled = _compiled(request, job)
    if isinstance(compiled, str):
        yield compiled
    elif compiled is not None:
        # XLA counts the cache among what the loop carries.
        temporaries = max(0, compiled.temporaries - found.cache)
        found = dataclasses.replace(found, temporaries=temporaries)
        how = "compiled by libtpu"
    shapes = "sum over shapes"
    yield _line("weights", f"{found.weights / GIB:.2f} GiB a device", shapes)
    yield _line("cache", f"{found.cache / GIB:.2f} GiB a device", shapes)
    yield _line("temporaries", f"{found.temporaries / GIB:.2f} GiB a device", how)
    fits = found.fits(device) and not isinstance(compiled, str)
    yield _line(
        "memory",
        f"{found.memory() / GIB:.2f} of {device.memory / GIB:.1f} GiB: "
        f"{'fits' if fits else 'DOES NOT FIT'}",
        f"{USABLE:.0%} of it are taken as usable",
    )
    yield from _speed(request, job, found, data)
    if not fits:
        yield None
        yield from advice(request, job, data)


def _line(name: str, value: str, source: str) -> str:
    return f"{name:12} {value:42} [{source}]"


def _speed(request: Request, job: Any, found: Any, data: int) -> Iterator[str]:
    """FLOPs, traffic and collectives of a forward, and the time they allow."""
    flags, device = request.flags, DEVICES[request.flags.device]
    crossing = found.collectives
    size = (crossing.reduced + crossing.gathered) / 2**20
    seconds = found.seconds(device, job.split)
    bound = {
        "compute": found.flops / device.flops,
        "memory": found.traffic / device.bandwidth,
    }
    slower = max(bound, key=bound.__getitem__)
    rate = flags.batch_size * flags.tokens_per_forward / seconds
    counted = "counted on jaxpr"
    if job.cfg.cache != "none":
        counted += ": a turn in which some rows run in full and others their window"
    yield _line("FLOPs", f"{found.flops / 1e12:.2f} T a forward and device", counted)
    yield _line(
        "traffic", f"{found.traffic / GIB:.2f} GiB a forward and device", "formula"
    )
    yield _line(
        "collectives",
        f"{crossing.number} a forward, {size:.1f} MiB of results",
        counted,
    )
    yield _line(
        "roofline",
        f"{seconds * 1e3:.2f} ms a forward, bound by {slower}",
        f"vendor's peaks, {device.source}; no run is faster",
    )
    yield _line(
        "useful",
        f"{rate:.1f} tokens/s at {flags.tokens_per_forward:g} a forward and row",
        "at most, by the roofline",
    )


def _compiled(request: Request, job: Any) -> Any:
    """What libtpu says of the memory; None where it cannot be asked.

    A line of text instead if it refuses to compile, as it does what does not fit.
    """
    flags = request.flags
    if flags.formula or DEVICES[flags.device].kind != "tpu":
        return None
    import jax

    from lrd_jax import aot
    from lrd_jax.staging import first_line

    try:
        return aot.group_memory(job, flags.device)
    except ImportError:
        return None
    except jax.errors.JaxRuntimeError as error:
        return f"libtpu does not compile it: {first_line(error)}"


def advice(request: Request, job: Any, data: int) -> Iterator[str]:
    """What would fit, one change at a time; each is checked by the formula."""
    from lrd_jax.costs import memory

    device = DEVICES[request.flags.device]

    def fits(**changes: Any) -> bool:
        return memory(dataclasses.replace(job, **changes)).fits(device)

    found = False
    for split in SPLITS:
        if split > job.split and fits(split=split):
            yield f"would fit: --mesh data={data},model={split}"
            found = True
            break
    if job.quantization is None and fits(quantization="int8"):
        yield "would fit: --quantize int8"
        found = True
    batches = [b for b in (2**i for i in range(20)) if b < job.batch and fits(batch=b)]
    if batches:
        yield f"would fit: --batch-size {batches[-1] * data}"
        found = True
    if not found:
        both = [s for s in SPLITS if fits(split=s, quantization="int8", batch=1)]
        yield (
            f"would fit: --mesh data={data},model={both[0]} --quantize int8 "
            f"--batch-size {data}"
            if both
            else "nothing here fits: shorten --prompt or --gen-length, or take a "
            "larger device"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
