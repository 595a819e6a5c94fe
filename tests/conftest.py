"""Switches for the whole suite; no test sets them for itself."""

from collections.abc import Iterator

import jax
import pytest

# A wrong dtype or shape must fail here rather than be promoted in silence.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs() -> Iterator[None]:
    """Each takes hundreds of memory maps, of which Linux allows a process 65,530."""
    yield
    jax.clear_caches()
