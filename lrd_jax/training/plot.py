"""The curve of a run, from its log."""

import pathlib

from lrd_jax.errors import UserError
from lrd_jax.figure import pyplot, save
from lrd_jax.training.rundir import read_log


def plot_log(log: pathlib.Path, path: str) -> None:
    """Draws the loss of each group of the log over the steps.

    Raises:
        UserError: no matplotlib, nothing in the log, or the file cannot be written.
    """
    lines = read_log(log)
    if not lines:
        raise UserError(f"{log}: nothing in it to plot.")
    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    groups = sorted({name for line in lines for name in line["losses"]})
    for name in groups if len(groups) > 1 else ():
        points = [(x["step"], x["losses"][name]) for x in lines if name in x["losses"]]
        axes.plot(*zip(*points, strict=True), linewidth=1, label=name)
    steps, losses = ([line[key] for line in lines] for key in ("step", "loss"))
    axes.plot(steps, losses, color="black", label="all")
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
