"""The models that come with the package: what a name means, and what no name means.

Imports no JAX, so that command lines can look a name up at once.
"""

import os
import pathlib

from lrd_jax.settings import shipped_configs

DEFAULT = "tiny"
ASSETS = pathlib.Path(__file__).parent / "assets"


def names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.name for path in ASSETS.iterdir() if path.is_dir())


def find(path_or_name: str | os.PathLike[str] | None) -> pathlib.Path:
    """The directory of a checkpoint.

    Args:
        path_or_name: a directory, or the name of a model that comes with the package;
            if there is a directory of that name, it is meant. None for the default
            model, whatever directories there are.

    Returns:
        The directory. One that does not exist is returned as given: who reads it says
        so.
    """
    if path_or_name is None:
        return ASSETS / DEFAULT
    given = os.fspath(path_or_name)
    if not os.path.exists(given) and given in names():
        return ASSETS / given
    return pathlib.Path(given)


def config_of(path_or_name: str | None) -> str | None:
    """Path of the settings that a built-in model is decoded with unless told otherwise.

    They are the shipped config of the model's name.

    Args:
        path_or_name: as for `find`.

    Returns:
        None for a checkpoint of the user's own.
    """
    folder = find(path_or_name)
    if folder.parent != ASSETS or folder.name not in names():
        return None
    return str(shipped_configs()[folder.name])
