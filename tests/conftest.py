"""Switches for the whole suite; no test sets them for itself."""

import importlib.util
import pkgutil
from collections.abc import Iterator

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes are checked at each call; not of the tasks, which have no arrays and
# are drawn by the thousand.
_package = importlib.util.find_spec("lrd_jax")
assert _package is not None
install_import_hook(
    [
        f"lrd_jax.{module.name}"
        for module in pkgutil.iter_modules(_package.submodule_search_locations)
        if module.name != "tasks"
    ],
    "beartype.beartype",
)

# A wrong dtype or shape must fail here rather than be promoted in silence.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs() -> Iterator[None]:
    """Each takes hundreds of memory maps, of which Linux allows a process 65,530."""
    yield
    jax.clear_caches()
