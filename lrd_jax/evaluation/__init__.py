"""Measures decode methods on tasks; `python -m lrd_jax.evaluate` is the command."""
