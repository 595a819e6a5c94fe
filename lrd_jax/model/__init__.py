"""LLaDA and Dream as one bidirectional transformer with per-family settings."""
