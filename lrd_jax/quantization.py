"""Names of the ways to hold weights in int8; `lrd_jax.model.int8` does it."""

from lrd_jax.errors import UserError

# As in checkpoints: all matrices but the embedding table, or that one, too.
KINDS = ("int8", "int8+embed")


def kind_of(quantize: str | None, embeddings: bool) -> str | None:
    """What `--quantize` and `--quantize-embeddings` mean together; None for neither.

    Raises:
        UserError: no such way, or embeddings alone.
    """
    if quantize not in (None, "int8"):
        raise UserError(f"`quantize` must be int8 or nothing, got {quantize!r}.")
    if quantize is None and embeddings:
        raise UserError("`--quantize-embeddings` adds to `--quantize int8`; give both.")
    return KINDS[1] if embeddings else quantize


def join(*kinds: str | None) -> str | None:
    """The kind that has in int8 what any of `kinds` has."""
    known = [kind for kind in kinds if kind is not None]
    return max(known, key=KINDS.index, default=None)
