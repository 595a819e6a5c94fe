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
from jaxtyping import Array, Bool, Float, Int

from lrd_jax.errors import UserError as UserError

Params = Any  # A pytree of arrays; its structure is the model's own business.


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
ExpectFn = Callable[[Params, Float[Array, "R V"]], Float[Array, "R D"]]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A masked diffusion LM as the decoder sees it: pure functions, params first.

    Which position predicts which, weight tying and quantisation stay behind these
    functions: the decoder reads the prediction for position i in row i.

    Attributes:
        embed: ids `[...]` -> embeddings `[..., D]`.
        hidden: embeddings -> hidden rows, see `HiddenFn`.
        logits: hidden rows `[R, D]` -> float32 logits `[R, V]`; linear, which
            classifier-free guidance relies on.
        expect: probabilities `[R, V]` -> mean embeddings `[R, D]`, float32.
        init_cache: `(batch, length, dtype)` -> an empty `KVCache`.
        mask_id: the mask token; never predicted by LRD.
        eos_ids: ids that end a text; the first is end of text, others end of turn.
        pad_id: what fills the window behind the end of the text.
        vocab_size: V.
        lead: rows that a window call passes ahead of its window (1 for Dream).
        max_length: longest prompt + window, in real tokens.
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
