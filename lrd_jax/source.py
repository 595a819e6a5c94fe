"""The checkpoint that a command is to use, opened before its weights are read."""

import dataclasses
from collections.abc import Callable
from typing import Any

# JAX is imported in the function: commands import this module before they need it.


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose weights are not yet read.

    Attributes:
        config: `ModelConfig`.
        tokenizer: `Tokenizer`, or None.
        fingerprint: of the weights.
        dtype: that the weights will have.
        quantization: which of them will be in int8, one of `quantization.KINDS`.
        load: reads the weights: `(mesh=None)` -> (denoiser, params).
    """

    config: Any
    tokenizer: Any
    fingerprint: str
    dtype: str
    load: Callable[..., tuple[Any, Any]]
    quantization: str | None = None


def open_checkpoint(
    path: str | None, dtype: str | None, quantization: str | None = None
) -> Source:
    """The source that the flags name.

    Args:
        path: directory of the checkpoint, or a built-in model's name; None for the
            default one.
        dtype: of the weights; None for `pretrained.default_dtype`.
        quantization: what to round to int8, one of `quantization.KINDS`, or None.

    Raises:
        UserError: not a checkpoint.
    """
    from lrd_jax import builtin, checkpoint, pretrained
    from lrd_jax.quantization import KINDS, join
    from lrd_jax.tokenizer import Tokenizer

    folder = builtin.find(path)
    config = checkpoint.read_config(folder)
    dtype = dtype or pretrained.default_dtype(folder)

    def load(mesh: Any = None) -> tuple[Any, Any]:
        model = pretrained.load(
            folder,
            dtype=dtype,
            mesh=mesh,
            quantize=None if quantization is None else "int8",
            quantize_embeddings=quantization == KINDS[1],
        )
        return model.denoiser, model.params

    return Source(
        config=config,
        tokenizer=Tokenizer.load(folder),
        fingerprint=checkpoint.read_fingerprint(folder),
        dtype=dtype,
        load=load,
        quantization=join(checkpoint.read_quantization(folder), quantization),
    )
