"""The curve of a run, from its log."""

import pathlib
from typing import Any

from lrd_jax.errors import UserError
from lrd_jax.training.rundir import read_log


def check_plot(path: str) -> None:
    """Raises a `UserError` if a plot cannot be drawn there, before hours are spent."""
    formats = _pyplot().figure().canvas.get_supported_filetypes()
    _pyplot().close("all")
    if pathlib.Path(path).suffix.removeprefix(".") not in formats:
        known = ", ".join(sorted(formats))
        raise UserError(f"--plot {path}: the name must end in one of: {known}.")
    if not pathlib.Path(path).absolute().parent.is_dir():
        raise UserError(f"--plot {path}: no such directory.")


def plot_log(log: pathlib.Path, path: str) -> None:
    """Draws the loss of each group of the log over the steps.

    Raises:
        UserError: no matplotlib, nothing in the log, or the file cannot be written.
    """
    lines = read_log(log)
    if not lines:
        raise UserError(f"{log}: nothing in it to plot.")
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    groups = sorted({name for line in lines for name in line["losses"]})
    for name in groups if len(groups) > 1 else ():
        points = [(x["step"], x["losses"][name]) for x in lines if name in x["losses"]]
        axes.plot(*zip(*points, strict=True), linewidth=1, label=name)
    steps, losses = ([line[key] for line in lines] for key in ("step", "loss"))
    axes.plot(steps, losses, color="black", label="all")
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}.") from None
    finally:
        pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "--plot needs matplotlib: pip install 'lrd_jax[plot]'"
        ) from None
    matplotlib.use("Agg")  # Draws without a screen.
    from matplotlib import pyplot

    return pyplot
