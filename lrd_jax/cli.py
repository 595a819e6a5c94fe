"""The command line of `lrd_jax.generate`: arguments -> one checked `Request`.

Imports neither JAX nor a model, so that `--help` and mistakes are answered at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

from lrd_jax import builtin
from lrd_jax.config import METHODS, MethodConfig
from lrd_jax.errors import UserError
from lrd_jax.flags import (
    CoordinatorFlag,
    DtypeFlag,
    MeshFlag,
    Number,
    OptionalNumber,
    OptionalText,
    QuantizeFlag,
    Switch,
    check_counts,
    check_seed,
    last_value,
    shown,
    with_defaults,
)
from lrd_jax.mesh_shape import parse_mesh
from lrd_jax.processes import Meeting, parse_meeting
from lrd_jax.quantization import kind_of
from lrd_jax.settings import (
    build,
    check_given_once,
    field_names,
    read_toml,
    unknown_name,
)

PROG = "python -m lrd_jax.generate"
INFILL_METHODS = ("lrd", "baseline")
FieldsT = TypeVar("FieldsT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(Generic[FieldsT]):
    """The flags as typed, for tyro; `Request` is what they mean.

    Attributes:
        ckpt: directory of a checkpoint made by `python -m convert`, or the name of a
            built-in one; by default the built-in `tiny`.
        prompt: text to continue; several texts, or the flag again, for several prompts.
        input: JSONL file of prompts instead: one {"prompt": text}, {"messages": [...]}
            or {"prompt_ids": [...]} a line, with an optional "id".
        output: JSONL file for the results; started again, the same command goes on
            where it was.
        config: TOML file of settings, or the name of one that comes with the package;
            by default, for a built-in model, the one of its name.
        method: how to decode; by default the config's method, or lrd.
        batch_size: prompts decoded together; one that is done makes room for the next.
        seed: seed of the random key; a row's sample depends on it and on the row's line
            number only.
        raw: take prompts as they are, without the chat template.
        infill: fill the mask markers inside the prompt instead of continuing it.
        dtype: of the weights; by default as stored, and float32 on CPU.
        quantize: int8 rounds all weights but the embedding table to int8.
        quantize_embeddings: round the embedding table, too.
        mesh: devices to decode on, as `data=4,model=2`: rows are spread over the first,
            one copy of the weights is split over the second. By default all devices,
            with as small a `model` as the weights allow; `auto` also says why.
        coordinator: address of process 0, the same for all of several processes that
            share the prompts; `auto` for what JAX finds on a TPU pod slice, under Slurm
            or Open MPI, which needs neither of the next two.
        num_processes: how many processes there are.
        process_id: which of them this is, from 0.
        timings: say on stderr how long starting, importing, loading, compiling and
            running took.
        decode: settings of the method.
    """

    ckpt: Annotated[OptionalText, shown("DIR|NAME")] = None
    prompt: Annotated[
        tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, shown("TEXT ...")
    ] = ()
    input: Annotated[OptionalText, shown("FILE.jsonl")] = None
    output: Annotated[OptionalText, shown("FILE.jsonl")] = None
    config: Annotated[OptionalText, shown("FILE.toml|NAME")] = None
    method: Annotated[
        Literal["lrd", "baseline", "llada", "dream"] | None, tyro.conf.DisallowNone
    ] = None
    batch_size: Number = 8
    seed: Number = 0
    raw: Switch = False
    infill: Switch = False
    dtype: DtypeFlag = None
    quantize: QuantizeFlag = None
    quantize_embeddings: Switch = False
    mesh: MeshFlag = None
    coordinator: CoordinatorFlag = None
    num_processes: OptionalNumber = None
    process_id: OptionalNumber = None
    timings: Switch = False
    decode: FieldsT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for, checked as far as it goes without a model.

    Attributes:
        ckpt: a directory or a name, as for `builtin.find`; None for the built-in model.
        prompts: the texts given by `--prompt`; empty if there is an input file.
        input: path of the JSONL input, or None.
        output: path of the JSONL output, or None for the terminal.
        decode: the method's settings.
        batch_size: rows decoded together, at most.
        seed: of the random key.
        raw: whether the chat template is left out.
        infill: whether mask markers in the prompt are filled.
        dtype: of the weights, or None for the default.
        quantization: what to round to int8, one of `quantization.KINDS`, or None.
        mesh: as typed, and well-formed; None for the default.
        meeting: where several processes meet; None for one.
        timings: whether to tell where the time went.
    """

    ckpt: str | None
    prompts: tuple[str, ...]
    input: str | None
    output: str | None
    decode: MethodConfig
    batch_size: int
    seed: int
    raw: bool
    infill: bool
    dtype: str | None
    quantization: str | None
    mesh: str | None
    meeting: Meeting | None
    timings: bool


def parse(argv: Sequence[str]) -> Request:
    """Reads the arguments.

    Raises:
        UserError: a mistake that tyro cannot see.
        SystemExit: after `--help` (0) and after tyro's own messages (2).
    """
    check_given_once(argv, repeatable=("--prompt",))
    config = last_value(argv, "--config")
    if config is None:
        config = builtin.config_of(last_value(argv, "--ckpt"))
    values, method, where = (
        _read_config(config) if config is not None else ({}, None, "")
    )
    method = last_value(argv, "--method") or method or "lrd"
    cls = _method_class(method)
    for name in values:
        _check_field(name, method, where)
    build(cls, values, where)
    typed = _decode_flags(argv, cls)
    for name in typed:
        _check_field(name, method, "--decode")

    kind: Any = Flags
    flags = tyro.cli(
        kind[with_defaults(cls, values)],
        prog=PROG,
        description=f"Decode with LLaDA or Dream. Below are the settings of method "
        f"{method}; `--method NAME --help` shows another's ({', '.join(METHODS)}).",
        args=list(argv),
    )
    chosen = {name: getattr(flags.decode, name) for name in field_names(cls)}
    if flags.infill:
        chosen |= _infill_settings(cls, chosen, typed)
    request = Request(
        ckpt=flags.ckpt,
        prompts=tuple(text for texts in flags.prompt for text in texts),
        input=flags.input,
        output=flags.output,
        decode=build(cls, chosen, "--decode"),
        batch_size=flags.batch_size,
        seed=flags.seed,
        raw=flags.raw,
        infill=flags.infill,
        dtype=flags.dtype,
        quantization=kind_of(flags.quantize, flags.quantize_embeddings),
        mesh=flags.mesh,
        meeting=parse_meeting(
            flags.coordinator, flags.num_processes, flags.process_id, flags.output
        ),
        timings=flags.timings,
    )
    _check_request(request)
    return request


def _check_request(request: Request) -> None:
    if not request.prompts and request.input is None:
        raise UserError("nothing to decode: give `--prompt TEXT` or `--input FILE`.")
    if request.prompts and request.input is not None:
        raise UserError("give either `--prompt` or `--input`, not both.")
    check_counts(request, "batch_size")
    check_seed(request.seed)
    if request.mesh is not None:
        parse_mesh(request.mesh)


def _method_class(method: object) -> type[MethodConfig]:
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(f"`method` must be one of {known}, got {method!r}.")
    return METHODS[method]


def _read_config(path_or_name: str) -> tuple[dict[str, Any], str | None, str]:
    """The settings, the method and the path of a config file."""
    table, where = read_toml(path_or_name)
    for name in table:
        if name not in ("method", "decode"):
            raise unknown_name(name, ["method", "decode"], where)
    values = table.get("decode", {})
    if not isinstance(values, dict):
        raise UserError(f"{where}: `decode` must be a table, [decode].")
    if "method" in table:
        _method_class(table["method"])
    return values, table.get("method"), where


def _check_field(name: str, method: str, where: str) -> None:
    """Raises unless `name` is a setting of `method`, saying whose setting it is."""
    cls = METHODS[method]
    if name in field_names(cls):
        return
    if any(field.name == name for field in dataclasses.fields(cls)):
        raise UserError(
            f"{where}: {name!r} is fixed by method {method}; leave it out, or use "
            "method lrd."
        )
    owners = [m for m, other in METHODS.items() if name in field_names(other)]
    if owners:
        raise UserError(
            f"{where}: {name!r} is a setting of method {' and '.join(owners)}, not of "
            f"{method}."
        )
    raise unknown_name(name, field_names(cls), where)


def _decode_flags(argv: Sequence[str], cls: type[MethodConfig]) -> list[str]:
    """Names of the settings given as `--decode.NAME` or `--decode.no-NAME`."""
    names = []
    for word in argv:
        if word.startswith("--decode."):
            name = word.split("=")[0].removeprefix("--decode.").replace("-", "_")
            switched_off = name.removeprefix("no_")
            known = switched_off in field_names(cls)
            names.append(switched_off if known else name)
    return names


def _infill_settings(
    cls: type[MethodConfig], chosen: dict[str, Any], typed: list[str]
) -> dict[str, Any]:
    """Settings that infilling fixes: the window is the text, as one block."""
    if cls.method not in INFILL_METHODS:
        raise UserError(
            f"`--infill` works with method {' and '.join(INFILL_METHODS)}, not "
            f"{cls.method}."
        )
    for name in ("gen_length", "block_length"):
        if name in typed:
            raise UserError(
                f"`--infill` fills the markers in the text itself, as one block: leave "
                f"out `--decode.{name.replace('_', '-')}`."
            )
    if "stop_at_eos" in typed and chosen["stop_at_eos"]:
        raise UserError(
            "`--infill` fills every marker, whatever comes before it: leave out "
            "`--decode.stop-at-eos`."
        )
    if "cache" in typed and chosen["cache"] != "none":
        raise UserError(
            "`--infill` decodes the text as one block, and nothing is outside of it to "
            "be cached: leave out `--decode.cache`."
        )
    if "trim_tail" in typed and chosen["trim_tail"]:
        raise UserError(
            "`--infill` fills every marker: leave out `--decode.trim-tail`."
        )
    no_cache = {
        f.name: f.default for f in dataclasses.fields(cls) if f.name.startswith("cache")
    }
    fixed = {"stop_at_eos": False, "trim_tail": False, "block_length": None}
    return fixed | no_cache
