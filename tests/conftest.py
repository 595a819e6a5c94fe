"""Switches for the whole suite; no test sets them for itself."""

import jax

# A wrong dtype or shape must fail here rather than be promoted in silence.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
