"""What `python -m lrd_jax.bench` measures, and what it measures it with."""
