"""Published Hugging Face checkpoints to `lrd_jax` checkpoints, and back."""
