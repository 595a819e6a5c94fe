"""Trains or fine-tunes from the command line: `python -m lrd_jax.train --help`.

Exit codes: 0 fine; 2 a mistake in what was given, or training that failed; 130
interrupted; 141 the reader of the output went away.
"""

import dataclasses
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar

import tyro

from lrd_jax.errors import UserError
from lrd_jax.flags import OptionalText, Switch, last_value, shown, with_defaults
from lrd_jax.process import exit_code, memory_errors, say, use_compilation_cache
from lrd_jax.settings import (
    build,
    check_given_once,
    field_names,
    plain,
    unknown_name,
)
from lrd_jax.training.mixture import task_weights
from lrd_jax.training.settings import (
    Recipe,
    TrainConfig,
    VocabularyConfig,
    read_recipe,
)

# Modules that import JAX are imported in the functions that use them.

FieldsT = TypeVar("FieldsT")
_LEFT_TO_FLAGS = {"steps": 10**9, "batch_size": 1, "windows": (1,)}
NO_RECIPE = Recipe({}, {}, VocabularyConfig(), (), "no --config")
# Huge pages, and one heap that takes arrays of up to 1 GiB and keeps what they free.
MALLOC = ":".join(
    f"glibc.malloc.{name}"
    for name in (
        "hugetlb=1",
        "arena_max=1",
        f"mmap_threshold={2**30}",
        f"trim_threshold={2**34}",
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(Generic[FieldsT]):
    """Trains a masked diffusion LM on the tasks, or fine-tunes one on a JSONL file.

    A run that is killed goes on where it was when the same command is given again.

    Attributes:
        config: TOML file, or the name of one that comes with the package, with the
            tables [train], [model], [vocabulary] and [[phase]].
        out: directory for log, checkpoints and, as `export`, the result.
        init: directory of a checkpoint to start from, or the name of a built-in one;
            [model] and [vocabulary] are then not used.
        data: JSONL file to fine-tune on, one {"prompt", "messages" or "prompt_ids":
            ..., "response" or "response_ids": ...} a line; [[phase]] is then not used.
        plot: image file for the loss curve.
        export: writes `export` from the newest checkpoint and does not train.
        train: settings.
    """

    config: Annotated[OptionalText, shown("FILE.toml|NAME")] = None
    out: Annotated[str, shown("DIR")]
    init: Annotated[OptionalText, shown("DIR|NAME")] = None
    data: Annotated[OptionalText, shown("FILE.jsonl")] = None
    plot: Annotated[OptionalText, shown("FILE.png")] = None
    export: Switch = False
    train: FieldsT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for, checked as far as it goes without JAX.

    Attributes:
        recipe: the config file.
        cfg: how to train, flags included.
        out, init, data, plot, export: see `Flags`.
    """

    recipe: Recipe
    cfg: TrainConfig
    out: str
    init: str | None
    data: str | None
    plot: str | None
    export: bool


def parse(argv: Sequence[str]) -> Request:
    """Reads the arguments.

    Raises:
        UserError: a mistake that tyro cannot see.
        SystemExit: after `--help` (0) and after tyro's own messages (2).
    """
    check_given_once(argv)
    config = last_value(argv, "--config")
    recipe = NO_RECIPE if config is None else read_recipe(config)
    known = field_names(TrainConfig)
    for name in recipe.train:
        if name not in known:
            raise unknown_name(name, known, f"{recipe.where}: [train]")
    # Its own mistakes are told first; what it leaves to flags is filled in.
    build(TrainConfig, _LEFT_TO_FLAGS | recipe.train, f"{recipe.where}: [train]")
    for phase in recipe.phases:
        task_weights(phase.weights, f"{recipe.where}: [[phase]]")
    about, _, _ = inspect.cleandoc(Flags.__doc__ or "").partition("\n\nAttributes:")
    kind: Any = Flags
    flags = tyro.cli(
        kind[with_defaults(TrainConfig, recipe.train)],
        prog="python -m lrd_jax.train",
        description=about,
        args=list(argv),
    )
    if flags.data is not None and flags.init is None:
        raise UserError("`--data` fine-tunes: give `--init DIR`, a checkpoint, too.")
    if flags.data is None and not recipe.phases:
        raise UserError(
            f"nothing to train on: {recipe.where} has no [[phase]]; give a config that "
            "has, or `--data FILE.jsonl` with `--init DIR`."
        )
    if flags.init is None and not recipe.model:
        raise UserError(
            f"no model: {recipe.where} has no [model]; give it, or `--init DIR`."
        )
    return Request(
        recipe=recipe,
        cfg=build(
            TrainConfig, {name: getattr(flags.train, name) for name in known}, "--train"
        ),
        out=flags.out,
        init=flags.init,
        data=flags.data,
        plot=flags.plot,
        export=flags.export,
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(
        lambda: _run(parse(argv)),
        lambda: "the same command goes on from the last checkpoint",
    )


def _run(request: Request) -> int:
    from lrd_jax import figure
    from lrd_jax.training import start
    from lrd_jax.training.data import data_from_examples, data_from_tasks
    from lrd_jax.training.examples import read_examples
    from lrd_jax.training.export import export
    from lrd_jax.training.loop import Run, restore, train
    from lrd_jax.training.plot import plot_log
    from lrd_jax.training.rundir import RunDir

    cfg, recipe = request.cfg, request.recipe
    if request.plot is not None:
        figure.check_path(request.plot)
    folder = RunDir(request.out)
    if request.export and not folder.saved_steps():
        raise UserError(f"{folder.path} has no checkpoints to export.")
    if request.init is not None:
        model = start.from_checkpoint(request.init)
    else:
        model = start.from_recipe(recipe, cfg.seed, folder.tokenizer)
    data_hash = None
    if request.data is not None:
        examples, data_hash = read_examples(
            request.data, model.tokenizer, model.config, cfg.windows
        )
        data = data_from_examples(cfg, examples, model.config)
    else:
        data = data_from_tasks(
            cfg, recipe.phases, model.config, model.tokenizer, recipe.where
        )
    data.batch(0)  # Mistakes in the data are found before anything is written.
    run = Run(folder, cfg, model.denoiser, data)
    settings = _settings(request, model.fingerprint, data_hash)
    folder.check_settings(settings)
    begun = bool(folder.saved_steps())
    # So are mistakes in the weights.
    too_large = "for the weights, their average and moments: train a smaller model"
    with memory_errors(too_large):
        params = model.abstract_params() if begun else model.params()
    with folder.locked():
        folder.keep_settings(settings)
        model.save_tokenizer(folder.tokenizer)
        with memory_errors(too_large):
            state, seconds = restore(run, params)
        done = int(state.step)
        if begun:
            say(f"{folder.path}: {done} of {cfg.steps} steps are done already.")
        if not request.export and done < cfg.steps:
            state = train(run, state, seconds)
        export(folder.export, model.config, state.average, folder.tokenizer)
        if request.plot is not None:
            plot_log(folder.log, request.plot)
    say(f"{folder.export}: the model after {int(state.step)} steps.")
    return 0


def _settings(
    request: Request, fingerprint: str | None, data_hash: str | None
) -> dict[str, Any]:
    """What the result depends on, flat, for the file in the run's directory."""
    import importlib.metadata

    settings: dict[str, Any] = {
        "lrd_jax": importlib.metadata.version("lrd_jax"),
        "init": fingerprint,
        "data_sha256": data_hash,
    }
    if request.init is None:
        settings["model"] = request.recipe.model
        settings["vocabulary"] = dataclasses.asdict(request.recipe.vocabulary)
    if request.data is None:
        settings["phases"] = [dataclasses.asdict(p) for p in request.recipe.phases]
    train = plain(request.cfg, "train.")
    del train["train.save_seconds"]  # Changes nothing.
    return settings | train


def prepare_process() -> None:
    """Keeps compiled programs, and restarts the process with `MALLOC` on Linux.

    A step on CPU allocates and frees hundreds of megabytes. In pages of 4 kB that takes
    a quarter of its time, and a sixth goes if freed memory is returned to the system,
    which clears it again. The allocator reads its settings when a process begins.
    """
    use_compilation_cache()
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = MALLOC
        os.execv(sys.executable, sys.orig_argv)


if __name__ == "__main__":
    prepare_process()
    sys.exit(main(sys.argv[1:]))
