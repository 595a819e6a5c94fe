"""What the decoder asks of a model, and the letters used for array axes.

Axis letters, used in every shape in this package:

    B  rows of the batch               T  positions of prompt and window, P + G
    P  prompt positions                W  positions of the active block
    G  generated positions             N  blocks, G / W
    V  rows of the output head         S  forward passes a row may take
    D  width of the model              R  rows of a tile, or B x W flattened
    L  layers                          H  channels of one attention head
    A  attention (query) heads         K  key/value heads
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from lrd_jax.errors import UserError as UserError

Params = Any  # A pytree of arrays; its structure is the model's own business.

# Axes of a mesh: rows of a batch, and parts of one copy of the weights.
DATA, MODEL = "data", "model"
REPLICATED = PartitionSpec()  # Each device has all of it.


@typing.no_type_check  # Else the test-time shape checker also stops `jax.eval_shape`.
@flax.struct.dataclass
class KVCache:
    """Keys and values of every position, one fixed-size slot per position.

    Attributes:
        keys: `[L, B, T, K, H]`, rotary embedding already applied.
        values: `[L, B, T, K, H]`.
    """

    keys: Float[Array, "L B T K H"]
    values: Float[Array, "L B T K H"]


@typing.runtime_checkable
class HiddenFn(Protocol):
    def __call__(
        self,
        params: Params,
        embeds: Float[Array, "B n D"],
        positions: Int[Array, "B n"],
        key_mask: Bool[Array, "B T"],
        cache: KVCache | None = None,
        start: Int[Array, " B"] | None = None,
        write: Bool[Array, "B n"] | None = None,
    ) -> tuple[Float[Array, "B m D"], KVCache | None]:
        """Runs the transformer; row i of the answer predicts the token at position i.

        Full call, `start=None`: `embeds` holds all T positions and so does the answer;
        a cache that is passed in is filled from slot 0.

        Window call: row b holds the positions `[start[b] - lead, start[b] + W)`, the
        answer only the last W of them; keys and values of the n = W + lead rows are
        written to the cache, whose other slots are read as they stand.

        Args:
            params: the model's weights.
            embeds: `[B, n, D]` what the model reads, in its own dtype.
            positions: `[B, n]` rotary positions; 0 is a row's first real token.
            key_mask: `[B, T]` True where a position may be attended to.
            cache: keys and values of all T positions, or None.
            start: `[B]` first position of a window call, at least `lead`.
            write: `[B, n]` True at the rows of a window call whose keys and values are
                written; None for all.

        Returns:
            `[B, m, D]` hidden rows after the last norm, and the cache as written.
        """
        ...


EmbedFn = Callable[[Params, Int[Array, "..."]], Float[Array, "... D"]]
LogitsFn = Callable[[Params, Float[Array, "R D"]], Float[Array, "R V"]]


@typing.runtime_checkable
class ExpectFn(Protocol):
    def __call__(
        self,
        params: Params,
        probs: Float[Array, "R n"],
        ids: Int[Array, "R n"] | None = None,
    ) -> Float[Array, "R D"]:
        """Mean embeddings, float32.

        Args:
            params: the model's weights.
            probs: `[R, V]` of all tokens, or `[R, n]` of the tokens `ids`.
            ids: `[R, n]`, or None.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A masked diffusion LM as the decoder sees it: pure functions, params first.

    Which position predicts which, weight tying and quantisation stay behind these
    functions: the decoder reads the prediction for position i in row i.

    So does a split of the weights over the axis `model` of a mesh, which a function
    sees by the shapes of its parameters. Then the V of `logits` and `expect` are this
    device's part of the vocabulary, the ids of `expect` count from its first, and all
    else is whole and the same on all devices that share a copy.

    Attributes:
        embed: ids `[...]` -> embeddings `[..., D]`.
        hidden: embeddings -> hidden rows, see `HiddenFn`.
        logits: hidden rows `[R, D]` -> float32 logits `[R, V]`; linear, which
            classifier-free guidance relies on.
        expect: probabilities `[R, V]` -> mean embeddings `[R, D]`, see `ExpectFn`.
        init_cache: `(params, batch, length, dtype)` -> an empty `KVCache`.
        mask_id: the mask token; never predicted by LRD.
        eos_ids: ids that end a text; the first is end of text, others end of turn.
        pad_id: what fills the window behind the end of the text.
        vocab_size: V.
        lead: rows that a window call passes ahead of its window (1 for Dream).
        max_length: longest prompt + window, of which the padding of a prompt counts.
    """

    embed: EmbedFn
    hidden: HiddenFn
    logits: LogitsFn
    expect: ExpectFn
    init_cache: Callable[..., KVCache]
    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int
    lead: int
    max_length: int


def check_arrays(prompt_ids: Any, prompt_mask: Any, open_mask: Any = None) -> None:
    """Raises `ValueError` unless they are ids and masks of one shape; works traced."""
    masks = {"prompt_mask": prompt_mask}
    if open_mask is not None:
        masks["open_mask"] = open_mask
    for name, array in {"prompt_ids": prompt_ids, **masks}.items():
        if not hasattr(array, "shape"):
            raise ValueError(f"`{name}` must be an array, got {type(array).__name__}.")
    shape = prompt_ids.shape
    if len(shape) != 2 or not jnp.issubdtype(prompt_ids.dtype, jnp.integer):
        raise ValueError(
            f"`prompt_ids` must be integers [B, P], got {prompt_ids.dtype} {shape}."
        )
    if 0 in shape:
        raise ValueError(f"`prompt_ids` must not be empty, got shape {shape}.")
    for name, mask in masks.items():
        if mask.shape != shape or mask.dtype != jnp.bool_:
            raise ValueError(
                f"`{name}` must be booleans of shape {shape} like `prompt_ids`, got "
                f"{mask.dtype} {mask.shape}."
            )


def row_keys(key: ArrayLike, batch: int) -> Key[Array, " B"]:
    """One key a row, from one key (row r folds in r) or from one key per row.

    Accepts new-style keys and raw uint32 ones.

    Raises:
        ValueError: neither a scalar key nor `batch` keys.
    """
    keys = jnp.asarray(key)
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        if keys.dtype != jnp.uint32 or keys.ndim == 0:
            raise ValueError(
                "`key` must be a key, as of `jax.random.key(0)`, got "
                f"{keys.dtype} {keys.shape}."
            )
        keys = jax.random.wrap_key_data(keys)
    if keys.shape == ():
        rows = jnp.arange(batch, dtype=jnp.uint32)
        return jax.vmap(lambda r: jax.random.fold_in(keys, r))(rows)
    if keys.shape != (batch,):
        raise ValueError(
            f"`key` must be one key or one per row ({batch}), got shape {keys.shape}."
        )
    return keys
