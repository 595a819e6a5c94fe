"""Image files of figures; matplotlib is the extra `plot`."""

import pathlib
from typing import Any

from lrd_jax.errors import UserError
from lrd_jax.staging import check_new_file

FORMATS = ("pdf", "png", "svg")  # Of matplotlib's those that need nothing else.


def check_path(path: str) -> None:
    """Raises a `UserError` if no figure can be put there, before hours are spent."""
    pyplot()
    if pathlib.Path(path).suffix.removeprefix(".") not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"--plot {path}: the name must end in one of: {known}.")
    check_new_file(path, "--plot")


def pyplot() -> Any:
    """matplotlib's pyplot, drawing without a screen.

    Raises:
        UserError: not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "--plot needs matplotlib: pip install 'lrd_jax[plot]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: str) -> None:
    """Writes a figure and frees it.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}.") from None
    finally:
        pyplot().close(figure)
