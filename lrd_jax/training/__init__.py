"""Training a masked diffusion LM; `lrd_jax.train` is the command."""
