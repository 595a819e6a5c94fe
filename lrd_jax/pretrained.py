"""A converted checkpoint as one object: weights, functions, config and tokenizer."""

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lrd_jax import builtin, checkpoint, sharding
from lrd_jax.base import Denoiser, Params
from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.model import families
from lrd_jax.quantization import join, kind_of
from lrd_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What `load` gives.

    Attributes:
        params: the weights.
        denoiser: the model as the decoder sees it; give it to `make_decode_fn`.
        config: shape and special ids.
        tokenizer: None if the checkpoint has none; it then takes and gives ids.
        quantization: which matrices are in int8, as for `sharding.specs`, or None.
    """

    params: Params
    denoiser: Denoiser
    config: ModelConfig
    tokenizer: Tokenizer | None
    quantization: str | None = None

    def logits(
        self,
        params: Params,
        input_ids: ArrayLike,
        prompt_mask: ArrayLike | None = None,
    ) -> Float[Array, "B T V"]:
        """One forward pass over whole rows, jitted for each shape.

        Args:
            params: the weights, `self.params` or others of the same shapes: gradients
                and swapped weights pass through.
            input_ids: `[B, T]` ids in `[0, V)`, mask tokens where something is open.
            prompt_mask: `[B, T]` True at real tokens; padding may stand before or
                behind them and is never attended to. None if all are real.

        Returns:
            `[B, T, V]` float32; row i predicts token i, for Dream too. Rows at padding
            mean nothing.

        Raises:
            ValueError: a shape or dtype is wrong.
            UserError: an id outside the vocabulary, or a row longer than the model's
                context.
        """
        ids = jnp.asarray(input_ids)
        mask = jnp.ones(ids.shape, bool) if prompt_mask is None else prompt_mask
        mask = jnp.asarray(mask)
        _check_input(ids, mask, self.config)
        return _logits(self.denoiser, params, ids, mask)


def load(
    path_or_name: str | pathlib.Path | None = None,
    *,
    dtype: DTypeLike | None = None,
    shardings: Any = None,
    quantize: Literal["int8"] | None = None,
    quantize_embeddings: bool = False,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a checkpoint that `python -m convert` made, or a built-in one.

    Args:
        path_or_name: the checkpoint's directory, or the name of a model that comes with
            the package; if there is a directory of that name, it is meant. None for
            the built-in model `tiny`.
        dtype: of the weights, bfloat16 or float32; None for `default_dtype`.
        shardings: where the weights go, see `checkpoint.restore`; None for the default
            device.
        quantize: "int8" rounds all matrices but the embedding table to int8, see
            `model.int8`; None keeps them as they are stored.
        quantize_embeddings: whether the embedding table is rounded, too.
        mesh: devices to split the weights over instead, by `sharding.specs`.

    Raises:
        ValueError: both `shardings` and `mesh` are given.
        UserError: no such checkpoint, a damaged one, a Hugging Face directory (the
            message gives the command that converts it), or another dtype.
    """
    kind = kind_of(quantize, quantize_embeddings)
    if shardings is not None and mesh is not None:
        raise ValueError("give `shardings` or `mesh`, not both.")
    path = builtin.find(path_or_name)
    config = checkpoint.read_config(path)
    # Before the weights, which take their time.
    tokenizer = Tokenizer.load(path)
    if dtype is None:
        dtype = default_dtype(path)
    if mesh is not None:
        shardings = sharding.param_shardings(config, mesh)
    params = checkpoint.restore(
        path, dtype=dtype, shardings=shardings, quantization=kind
    )
    return Model(
        params,
        families.make_denoiser(config),
        config,
        tokenizer,
        join(checkpoint.read_quantization(path), kind),
    )


def default_dtype(path: pathlib.Path) -> str:
    """The stored dtype; float32 on CPU, where bfloat16 is slower and less exact.

    Raises:
        UserError: not a checkpoint.
    """
    return "float32" if jax.default_backend() == "cpu" else checkpoint.read_dtype(path)


def _check_input(ids: Array, mask: Array, config: ModelConfig) -> None:
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"`input_ids` must be whole numbers [B, T], got {ids.dtype} "
            f"{list(ids.shape)}."
        )
    if mask.shape != ids.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"`prompt_mask` must be bool {list(ids.shape)} like `input_ids`, got "
            f"{mask.dtype} {list(mask.shape)}."
        )
    # Inside another jit there are no values to look at.
    if isinstance(ids, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return
    # By NumPy, as a surrounding jit stages what JAX does with arrays at hand, too.
    values, real = np.asarray(ids), np.asarray(mask)
    outside = values[(values < 0) | (values >= config.vocab_size)]
    if outside.size:
        raise UserError(
            f"id {outside[0]} is outside the vocabulary, [0, {config.vocab_size})."
        )
    longest = int(real.sum(1).max(initial=0))
    if longest > config.max_length:
        raise UserError(
            f"a row has {longest} tokens; the model's context is {config.max_length}."
        )


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    denoiser: Denoiser,
    params: Params,
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T V"]:
    rows, length = ids.shape
    first = jnp.argmax(mask, axis=1, keepdims=True)
    positions = jnp.maximum(jnp.arange(length)[None] - first, 0)
    hidden, _ = denoiser.hidden(params, denoiser.embed(params, ids), positions, mask)
    flat = hidden.reshape(rows * length, hidden.shape[-1])
    return denoiser.logits(params, flat).reshape(rows, length, denoiser.vocab_size)
