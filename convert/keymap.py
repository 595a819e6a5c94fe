"""Which published tensor is which of our parameters, one table per family.

Each row of a table is read in both directions. A published name has `{}` where the
number of the layer stands; ours stacks the layers on a leading axis. Published
projections are torch's `[out, in]`; of ours, the MLP's, the attention's output and the
head are `[in, out]`, everything else is laid out as published.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lrd_jax.config import ModelConfig
from lrd_jax.model import backbone

LeafPath = tuple[str, ...]
Shape = tuple[int, ...]
Placed = tuple[tuple[int, ...], np.ndarray]  # Where its first element goes, and values.

# Constants that some exports store beside the weights; never parameters.
IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached|rotary_pos_(sin|cos))"
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table: a published tensor (of every layer) and our leaf.

    Attributes:
        published: name, with `{}` for the layer's number.
        path: of our leaf.
        transposed: whether ours is the transpose of the published tensor.
    """

    published: str
    path: LeafPath
    transposed: bool = False

    def published_shape(self, shape: Shape) -> Shape:
        """The published shape of a leaf (of one layer) that is `shape` here."""
        return shape[::-1] if self.transposed else shape

    def to_ours(self, rows: np.ndarray, first: int) -> Placed:
        """Lays consecutive published rows out as ours, without a copy.

        Args:
            rows: of the published tensor.
            first: the number of the first of them.

        Returns:
            Where in our leaf the first element goes, and the values.
        """
        start = (first, *(0 for _ in rows.shape[1:]))
        return (start[::-1], rows.T) if self.transposed else (start, rows)

    def to_published(self, ours: np.ndarray) -> np.ndarray:
        """Lays a leaf (of one layer) out as published; undoes `to_ours`."""
        return ours.T if self.transposed else ours


def _attn(name: str) -> LeafPath:
    return ("blocks", "attn", name)


_LLADA_BLOCK = "model.transformer.blocks.{}."
_LLADA = (
    Rule("model.transformer.wte.weight", ("embed",)),
    Rule("model.transformer.ff_out.weight", ("head",), transposed=True),
    Rule("model.transformer.ln_f.weight", ("norm", "scale")),
    Rule(_LLADA_BLOCK + "attn_norm.weight", ("blocks", "attn_norm", "scale")),
    Rule(_LLADA_BLOCK + "ff_norm.weight", ("blocks", "mlp_norm", "scale")),
    Rule(_LLADA_BLOCK + "q_proj.weight", _attn("q")),
    Rule(_LLADA_BLOCK + "k_proj.weight", _attn("k")),
    Rule(_LLADA_BLOCK + "v_proj.weight", _attn("v")),
    Rule(_LLADA_BLOCK + "q_proj.bias", _attn("q_bias")),
    Rule(_LLADA_BLOCK + "k_proj.bias", _attn("k_bias")),
    Rule(_LLADA_BLOCK + "v_proj.bias", _attn("v_bias")),
    Rule(_LLADA_BLOCK + "attn_out.weight", _attn("out"), transposed=True),
    Rule(_LLADA_BLOCK + "ff_proj.weight", ("blocks", "mlp", "gate"), transposed=True),
    Rule(_LLADA_BLOCK + "up_proj.weight", ("blocks", "mlp", "up"), transposed=True),
    Rule(_LLADA_BLOCK + "ff_out.weight", ("blocks", "mlp", "down"), transposed=True),
)
_DREAM_BLOCK = "model.layers.{}."
_DREAM_ATTN = _DREAM_BLOCK + "self_attn."
_DREAM = (
    Rule("model.embed_tokens.weight", ("embed",)),
    Rule("lm_head.weight", ("head",), transposed=True),
    Rule("model.norm.weight", ("norm", "scale")),
    Rule(
        _DREAM_BLOCK + "input_layernorm.weight",
        ("blocks", "attn_norm", "scale"),
    ),
    Rule(
        _DREAM_BLOCK + "post_attention_layernorm.weight",
        ("blocks", "mlp_norm", "scale"),
    ),
    Rule(_DREAM_ATTN + "q_proj.weight", _attn("q")),
    Rule(_DREAM_ATTN + "k_proj.weight", _attn("k")),
    Rule(_DREAM_ATTN + "v_proj.weight", _attn("v")),
    Rule(_DREAM_ATTN + "q_proj.bias", _attn("q_bias")),
    Rule(_DREAM_ATTN + "k_proj.bias", _attn("k_bias")),
    Rule(_DREAM_ATTN + "v_proj.bias", _attn("v_bias")),
    Rule(_DREAM_ATTN + "o_proj.weight", _attn("out"), transposed=True),
    Rule(
        _DREAM_BLOCK + "mlp.gate_proj.weight",
        ("blocks", "mlp", "gate"),
        transposed=True,
    ),
    Rule(_DREAM_BLOCK + "mlp.up_proj.weight", ("blocks", "mlp", "up"), transposed=True),
    Rule(
        _DREAM_BLOCK + "mlp.down_proj.weight",
        ("blocks", "mlp", "down"),
        transposed=True,
    ),
)
TABLES: Mapping[str, tuple[Rule, ...]] = {"llada": _LLADA, "dream": _DREAM}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our leaves and the published tensors that it is made of.

    Attributes:
        rule: the row of the table.
        shape: of the leaf, the axis of layers included.
        layers: number of layers; None for a leaf that is not of the blocks.
    """

    rule: Rule
    shape: Shape
    layers: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """The published names, by layer."""
        if self.layers is None:
            return (self.rule.published,)
        return tuple(self.rule.published.format(i) for i in range(self.layers))

    @property
    def layer_shape(self) -> Shape:
        """Of one published tensor's worth of the leaf."""
        return self.shape if self.layers is None else self.shape[1:]

    @property
    def published_shape(self) -> Shape:
        """Of each published tensor."""
        return self.rule.published_shape(self.layer_shape)


def entries(cfg: ModelConfig) -> tuple[Entry, ...]:
    """What a checkpoint of this config consists of, in the order of the table.

    Raises:
        ValueError: table and parameter tree disagree.
    """
    leaves = _leaf_shapes(backbone.abstract_params(cfg))
    table = [rule for rule in TABLES[cfg.family] if rule.path in leaves]
    if len(table) != len(leaves):
        lost = sorted(leaves.keys() - {rule.path for rule in table})
        raise ValueError(f"the {cfg.family} table has no row for {lost}.")
    return tuple(
        Entry(
            rule,
            leaves[rule.path],
            cfg.num_layers if rule.path[0] == "blocks" else None,
        )
        for rule in table
    )


def tied_head(cfg: ModelConfig) -> str | None:
    """The name of the output head where it is the embedding table, else None."""
    if not cfg.tie_embeddings:
        return None
    return next(r.published for r in TABLES[cfg.family] if r.path == ("head",))


def embed_name(cfg: ModelConfig) -> str:
    """The name of the embedding table."""
    return next(r.published for r in TABLES[cfg.family] if r.path == ("embed",))


def _leaf_shapes(tree: Any, path: LeafPath = ()) -> dict[LeafPath, Shape]:
    if not isinstance(tree, dict):
        return {path: tuple(tree.shape)}
    shapes: dict[LeafPath, Shape] = {}
    for name, child in tree.items():
        shapes |= _leaf_shapes(child, (*path, name))
    return shapes
