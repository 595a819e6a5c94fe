"""The command line of `lrd_jax.evaluate`: arguments -> one checked `Request`.

Imports neither JAX nor a model, so that `--help` and mistakes are answered at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from lrd_jax import figure
from lrd_jax.errors import UserError
from lrd_jax.evaluation.methods import (
    ALL,
    Method,
    Sweep,
    choose,
    parse_sweep,
    read_entries,
    swept,
)
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
    read_names,
    shown,
)
from lrd_jax.mesh_shape import parse_mesh
from lrd_jax.processes import Meeting, parse_meeting
from lrd_jax.quantization import kind_of
from lrd_jax.settings import check_given_once
from lrd_jax.tasks import Task, named

DEFAULT_TASKS = "lists,code,sudoku,expressions,word_problems"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Measures decode methods on generated problems.

    Attributes:
        ckpt: checkpoint made by `python -m convert` or `python -m lrd_jax.train`, or
            the name of a built-in model; by default `tiny`.
        tasks: names of tasks or of families of tasks, with commas; each is reported
            apart, and all together.
        n: problems for each of --tasks; a family's are shared evenly by its tasks.
        split: train, validation or test.
        methods: entries of the method file, with commas, or `all`; by default all, and
            for a sweep `lrd`. The name of a decode method that the file lacks means
            that with its defaults.
        method_file: TOML file with a table for each method, or the name of one that
            comes with the package.
        baseline: the method that others are compared with; by default `baseline`, if
            it is one of --methods.
        sweep: a setting and its values; runs the methods, all but the baseline, with
            each. Values are written as in TOML.
        gen_length: positions to generate, for all methods.
        output: directory for the records of each method, report.json and table.md;
            started again, the same command goes on where it was.
        plot: image file: accuracy against forwards, or both against a sweep's values.
        batch_size: problems decoded together.
        seed: of the problems and of the random key.
        dtype: of the weights; by default as stored, and float32 on CPU.
        quantize: int8 rounds all weights but the embedding table to int8.
        quantize_embeddings: round the embedding table, too.
        mesh: devices to decode on, as `data=4,model=2`: rows are spread over the first,
            one copy of the weights is split over the second. By default all devices,
            with as small a `model` as the weights allow; `auto` also says why.
        coordinator: address of process 0, the same for all of several processes that
            share the problems; `auto` for what JAX finds on a TPU pod slice, under
            Slurm or Open MPI, which needs neither of the next two.
        num_processes: how many processes there are.
        process_id: which of them this is, from 0.
    """

    ckpt: Annotated[OptionalText, shown("DIR|NAME")] = None
    tasks: Annotated[str, shown("NAME,...")] = DEFAULT_TASKS
    n: Number = 1000
    split: Literal["train", "validation", "test"] = "test"
    methods: Annotated[OptionalText, shown("NAME,...|all")] = None
    method_file: Annotated[str, shown("FILE.toml|NAME")] = "methods"
    baseline: Annotated[OptionalText, shown("NAME")] = None
    sweep: Annotated[OptionalText, shown("SETTING=VALUE,...")] = None
    gen_length: Number = 64
    output: Annotated[OptionalText, shown("DIR")] = None
    plot: Annotated[OptionalText, shown("FILE.png")] = None
    batch_size: Number = 32
    seed: Number = 0
    dtype: DtypeFlag = None
    quantize: QuantizeFlag = None
    quantize_embeddings: Switch = False
    mesh: MeshFlag = None
    coordinator: CoordinatorFlag = None
    num_processes: OptionalNumber = None
    process_id: OptionalNumber = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for, checked as far as it goes without a model.

    Attributes:
        flags: as typed.
        members: the tasks of each name of `--tasks`.
        methods: in the order of the table, their names unique.
        baseline: name of the method to compare with; None for no comparison.
        sweep: the setting that differs between methods, or None.
        meeting: where several processes meet; None for one.
    """

    flags: Flags
    members: dict[str, list[Task]]
    methods: list[Method]
    baseline: str | None
    sweep: Sweep | None
    meeting: Meeting | None


def parse(argv: Sequence[str]) -> Request:
    """Reads the arguments.

    Raises:
        UserError: a mistake that tyro cannot see.
        SystemExit: after `--help` (0) and after tyro's own messages (2).
    """
    check_given_once(argv)
    flags = tyro.cli(
        Flags,
        prog="python -m lrd_jax.evaluate",
        description=Flags.__doc__ and Flags.__doc__.partition("\n")[0],
        args=list(argv),
    )
    check_counts(flags, "n", "batch_size", "gen_length")
    check_seed(flags.seed)
    kind_of(flags.quantize, flags.quantize_embeddings)  # Raises where they clash.
    if flags.mesh is not None:
        parse_mesh(flags.mesh)
    meeting = parse_meeting(
        flags.coordinator, flags.num_processes, flags.process_id, flags.output
    )
    members = find_members(read_names(flags.tasks, "--tasks"))
    sweep = None if flags.sweep is None else parse_sweep(flags.sweep)
    methods = _methods(flags, sweep)
    if flags.plot is not None:
        figure.check_path(flags.plot)
    return Request(
        flags=flags,
        members=members,
        methods=methods,
        baseline=_baseline(flags.baseline, methods),
        sweep=sweep,
        meeting=meeting,
    )


def find_members(names: Sequence[str]) -> dict[str, list[Task]]:
    """The tasks of each name of `--tasks`.

    Raises:
        UserError: no such task or family, or a task is named twice.
    """
    members: dict[str, list[Task]] = {}
    owner: dict[str, str] = {}
    for name in names:
        found = named(name)
        for task in found:
            if task.name in owner:
                raise UserError(
                    f"--tasks: task {task.name!r} is in {owner[task.name]!r} and in "
                    f"{name!r}; name it once."
                )
            owner[task.name] = name
        members[name] = found
    return members


def _methods(flags: Flags, sweep: Sweep | None) -> list[Method]:
    text = flags.methods
    if text is None:
        text = ALL if sweep is None else "lrd"
    entries = read_entries(flags.method_file)
    chosen = choose(read_names(text, "--methods"), entries, flags.gen_length)
    if sweep is None:
        return chosen
    fixed = flags.baseline or "baseline"
    if all(method.name == fixed for method in chosen):
        raise UserError(f"--sweep: nothing to sweep besides the baseline, {fixed}.")
    return [
        one
        for method in chosen
        for one in ([method] if method.name == fixed else swept(method, sweep))
    ]


def _baseline(name: str | None, methods: Sequence[Method]) -> str | None:
    names = [method.name for method in methods]
    if name is not None and name not in names:
        raise UserError(
            f"--baseline {name!r} is not among the methods: {', '.join(names)}."
        )
    return name or next((n for n in names if n == "baseline"), None)
