"""The command line of `lrd_jax.bench`: arguments -> one checked `Request`.

Imports neither JAX nor a model, so that `--help` and mistakes are answered at once.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro

from lrd_jax import builtin, model_file
from lrd_jax.benchmark.axes import Point, check_context, method_at, read_sweep
from lrd_jax.config import BaselineConfig, LladaConfig, ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.evaluation.methods import Entries, Method, choose, read_entries
from lrd_jax.evaluation.request import DEFAULT_TASKS, find_members
from lrd_jax.flags import (
    Number,
    OptionalNumber,
    OptionalText,
    check_counts,
    check_seed,
    read_names,
    shown,
)
from lrd_jax.settings import (
    build,
    check,
    check_given_once,
    check_rows,
    read_toml,
)
from lrd_jax.shapes import BENCHMARK_SHAPES
from lrd_jax.staging import check_new_file
from lrd_jax.tasks import Task

PROG = "python -m lrd_jax.bench"
TORCH = "torch==2.13.0"
DEFAULT_METHODS = "baseline,baseline_eos,threshold,lrd"
# What the peer's two loops decode, in our own settings.
PUBLISHED, THRESHOLD = "llada", "threshold"
PEER_THRESHOLD = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Measures what a decode costs, and where its time goes.

    Attributes:
        model: a checkpoint (its directory or a built-in one's name), or a shape with
            random weights: `llada-100m`, a published model's (`llada-8b`, `dream-7b`),
            or a TOML file with the fields of `lrd_jax.ModelConfig`.
        methods: entries of the method file, with commas, or `all`; by default four of
            the shipped ones, and `lrd` for a sweep.
        method_file: TOML file with a table for each method, or the name of one that
            comes with the package.
        peer: decodes with another library's model of the same weights as well.
        sweep: axes and their values, as in `B=1,2,4 G=64,128`: how the parts of one
            forward grow along each axis, one at a time.
        decode: whether whole decodes are run, or only the parts of a forward measured.
        batch_size: prompts decoded together.
        n: prompts in all, a multiple of --batch-size; by default one batch.
        tasks: of a checkpoint's prompts: names of tasks or families, with commas.
        prompt: for random weights, the length of the prompts.
        gen_length: positions to generate.
        sharpness: for random weights, multiplies all logits: at 1 predictions are
            almost flat, while a trained model's are peaked.
        repeats: rounds; in each, all that is compared is run once.
        seed: of random weights and prompts, and of the decode.
        output: JSON file for all figures.
    """

    model: Annotated[str, shown("NAME|DIR|FILE.toml")] = builtin.DEFAULT
    methods: Annotated[OptionalText, shown("NAME,...|all")] = None
    method_file: Annotated[str, shown("FILE.toml|NAME")] = "methods"
    peer: Annotated[Literal["torch"] | None, tyro.conf.DisallowNone] = None
    sweep: Annotated[
        tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, shown("AXIS=N,...")
    ] = ()
    decode: bool = True
    batch_size: Number = 1
    n: OptionalNumber = None
    tasks: Annotated[str, shown("NAME,...")] = DEFAULT_TASKS
    prompt: Number = 128
    gen_length: Number = 64
    sharpness: Annotated[float, shown("X")] = 1.0
    repeats: Number = 5
    seed: Number = 0
    output: Annotated[OptionalText, shown("FILE.json")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for, checked as far as it goes without a model.

    Attributes:
        flags: as typed.
        shape: of random weights; None for a checkpoint.
        entries: the methods of the method file.
        methods: to measure; with a peer, among them those it is compared with.
        twins: the peer's loops, each with the name of our method that must give the
            same tokens.
        tasks: where a checkpoint's prompts come from.
        sweep: the points of each axis of the sweep.
    """

    flags: Flags
    shape: ModelConfig | None
    entries: Entries
    methods: list[Method]
    twins: dict[str, str]
    tasks: list[Task]
    sweep: dict[str, list[Point]]

    @property
    def num_prompts(self) -> int:
        return self.flags.n or self.flags.batch_size


def parse(argv: Sequence[str]) -> Request:
    """Reads the arguments.

    Raises:
        UserError: a mistake that tyro cannot see.
        SystemExit: after `--help` (0) and after tyro's own messages (2).
    """
    check_given_once(argv, repeatable=("--sweep",))
    flags = tyro.cli(
        Flags,
        prog=PROG,
        description=Flags.__doc__ and Flags.__doc__.partition("\n")[0],
        args=list(argv),
    )
    _check_numbers(flags)
    words = [word for group in flags.sweep for word in group]
    check(not flags.sweep or len(words) > 0, "--sweep", "nothing", "AXIS=N,...")
    shape = find_shape(flags.model)
    _check_unused(flags, is_random=shape is not None)
    if flags.peer is not None:
        _check_peer(flags, is_random=shape is not None)
    if flags.output is not None:
        check_new_file(flags.output, "--output")
    entries = read_entries(flags.method_file)
    names = flags.methods or ("lrd" if flags.sweep else DEFAULT_METHODS)
    methods = choose(read_names(names, "--methods"), entries, flags.gen_length)
    if flags.sweep and len(methods) > 1:
        raise UserError(f"`--sweep` measures one method, got `--methods` {names}.")
    sweep = _read_sweep(flags, words, shape, entries, methods[0].name)
    methods, twins = _with_twins(methods, flags)
    found = find_members(read_names(flags.tasks, "--tasks"))
    return Request(
        flags=flags,
        shape=shape,
        entries=entries,
        methods=methods,
        twins=twins,
        tasks=[task for members in found.values() for task in members],
        sweep=sweep,
    )


def _check_numbers(flags: Flags) -> None:
    check_counts(flags, "batch_size", "prompt", "gen_length", "repeats")
    check_seed(flags.seed)
    check_rows(flags.batch_size, flags.prompt + flags.gen_length)
    if flags.n is not None:
        even = flags.n >= 1 and flags.n % flags.batch_size == 0
        multiple = f"a multiple of `--batch-size` {flags.batch_size}"
        check(even, "--n", flags.n, multiple)
    positive = 0 < flags.sharpness < float("inf")
    check(positive, "--sharpness", flags.sharpness, "a finite number above 0")


def _check_unused(flags: Flags, is_random: bool) -> None:
    """Raises for a flag that would change nothing."""
    unused = {"tasks": "random weights"} if is_random else {"sharpness": "a checkpoint"}
    if flags.sweep:
        unused |= dict.fromkeys(("n", "tasks", "decode"), "`--sweep`")
    elif not is_random:
        unused["prompt"] = "a checkpoint, whose prompts come from `--tasks`"
    for name, why in unused.items():
        if getattr(flags, name) != getattr(Flags, name):
            flag = "no-decode" if name == "decode" else name
            raise UserError(f"`--{flag}` changes nothing for {why}: leave it out.")


def _check_peer(flags: Flags, is_random: bool) -> None:
    if flags.sweep:
        raise UserError("give either `--peer` or `--sweep`: a sweep has no peer.")
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"`--peer torch` needs PyTorch: pip install {TORCH}")
    if not is_random and model_file.read(builtin.find(flags.model)).quantization:
        raise UserError(
            f"`--peer torch` takes no weights in int8, as those of `--model "
            f"{flags.model}` are: give the checkpoint that it was made of."
        )


def find_shape(name: str) -> ModelConfig | None:
    """The shape of a model with random weights; None if `name` is a checkpoint.

    Raises:
        UserError: a TOML file that cannot be read or describes no model.
    """
    if name in BENCHMARK_SHAPES and not pathlib.Path(name).exists():
        return BENCHMARK_SHAPES[name]
    if not name.endswith(".toml"):
        folder = builtin.find(name)
        if not folder.is_dir():
            known = ", ".join([*builtin.names(), *BENCHMARK_SHAPES])
            raise UserError(
                f"no model {name!r}; give a checkpoint's directory, a TOML file or one "
                f"of {known}."
            )
        return None
    table, where = read_toml(name)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    required = [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.default is dataclasses.MISSING
    ]
    missing = [field for field in required if field not in values]
    if missing:
        raise UserError(f"{where}: a model needs {', '.join(missing)} as well.")
    return build(ModelConfig, values, where)


def _read_sweep(
    flags: Flags,
    words: Sequence[str],
    shape: ModelConfig | None,
    entries: Entries,
    method: str,
) -> dict[str, list[Point]]:
    """The sweep, all of whose points are sure to run."""
    known = shape or (model_file.read(builtin.find(flags.model)).config)
    base = Point(
        B=flags.batch_size, P=flags.prompt, G=flags.gen_length, V=known.vocab_size
    )
    sweep = read_sweep(words, base, fixed_vocabulary=shape is None)
    points = [point for points in sweep.values() for point in points]
    for point in points if shape is None else [base, *points]:
        check_context(point, known.max_length)
        method_at(entries, method, point)
    return sweep


def _with_twins(
    methods: list[Method], flags: Flags
) -> tuple[list[Method], dict[str, str]]:
    """Adds what the peer's loops are compared with, unless it is there already."""
    if flags.peer is None or not flags.decode:
        return methods, {}
    length = flags.gen_length
    wanted: Mapping[str, Any] = {
        PUBLISHED: LladaConfig(gen_length=length, stop_at_eos=False),
        THRESHOLD: BaselineConfig(
            gen_length=length, threshold=PEER_THRESHOLD, commit_order="confidence"
        ),
    }
    methods, twins = list(methods), {}
    for loop, cfg in wanted.items():
        same = [method.name for method in methods if method.cfg == cfg]
        taken = any(method.name == loop for method in methods)
        name = same[0] if same else f"{loop}_of_peer" if taken else loop
        if not same:
            methods.append(Method(name=name, cfg=cfg, entry=name))
        twins[loop] = name
    return methods, twins
