"""The one exception for mistakes of the user, importable without importing JAX."""


class UserError(ValueError):
    """A mistake in what the user gave; the message is one line they can act on."""
