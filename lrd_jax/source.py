"""The checkpoint that a command is to use, opened before its weights are read."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lrd_jax.errors import UserError

# JAX is imported in the function: commands import this module before they need it.


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose weights are not yet read.

    Attributes:
        config: `ModelConfig`.
        tokenizer: `Tokenizer`, or None.
        fingerprint: of the weights.
        dtype: that the weights will have, or "stored".
        load: reads the weights: `()` -> (denoiser, params).
    """

    config: Any
    tokenizer: Any
    fingerprint: str
    dtype: str
    load: Callable[[], tuple[Any, Any]]


def open_checkpoint(path: str | None, dtype: str | None) -> Source:
    """The source that the flags name.

    Args:
        path: of the checkpoint, or None if none is named.
        dtype: of the weights; None for `pretrained.load`'s choice.

    Raises:
        UserError: none named, or not a checkpoint.
    """
    # A built-in model is to be what no `--ckpt` means.
    if path is None:
        raise UserError(
            "no model: give `--ckpt DIR`, a checkpoint made by "
            "`python -m convert --src HF_DIR --dst DIR`."
        )
    import jax

    from lrd_jax import checkpoint, pretrained
    from lrd_jax.tokenizer import Tokenizer

    config = checkpoint.read_config(path)
    # What `pretrained.load` makes of None.
    platform = "float32" if jax.default_backend() == "cpu" else "stored"

    def load() -> tuple[Any, Any]:
        model = pretrained.load(path, dtype=dtype)
        return model.denoiser, model.params

    return Source(
        config=config,
        tokenizer=Tokenizer.load(path),
        fingerprint=checkpoint.read_fingerprint(path),
        dtype=dtype or platform,
        load=load,
    )
