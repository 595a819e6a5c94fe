"""The optimiser: Muon on the blocks' matrices and AdamW on the rest, or AdamW."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from lrd_jax.base import Params
from lrd_jax.training.settings import TrainConfig

# Scales a Muon update to the size of AdamW's, so that one learning rate suits both
# (arXiv 2502.16982).
UPDATE_RMS = 0.2


def learning_rate(cfg: TrainConfig, peak: float) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine down to `final_rate`, by step number."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if cfg.warmup_steps else peak,
        peak_value=peak,
        warmup_steps=cfg.warmup_steps,
        decay_steps=cfg.steps,
        end_value=peak * cfg.final_rate,
    )


def make_optimiser(cfg: TrainConfig) -> optax.GradientTransformation:
    """Clipping, then the configured optimiser with its schedule."""
    rate = learning_rate(cfg, cfg.learning_rate)
    if cfg.optimiser == "adamw":
        step = optax.adamw(
            rate, b2=cfg.adam_b2, weight_decay=cfg.weight_decay, mask=_is_matrix
        )
    else:
        adam_peak = cfg.adam_learning_rate or cfg.learning_rate
        step = optax.contrib.muon(
            rate,
            weight_decay=cfg.weight_decay,
            adam_b2=cfg.adam_b2,
            adam_learning_rate=learning_rate(cfg, adam_peak),
            muon_weight_dimension_numbers=matrix_axes,
            consistent_rms=UPDATE_RMS,
        )
    return _promoting(optax.chain(optax.clip_by_global_norm(cfg.clip_norm), step))


def _promoting(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Optax mixes dtypes (a whole step count, say), which strict promotion forbids."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params)

    def init(params: Params) -> optax.OptState:
        with jax.numpy_dtype_promotion("standard"):
            return inner.init(params)

    return optax.GradientTransformation(init, update)


def matrix_axes(params: Params) -> Any:
    """Which axes of a leaf are a matrix's (in, out); None where it is none.

    The layers of a stacked leaf are matrices of their own. The embedding table and the
    head are lists of vectors, which Muon does not suit.
    """

    def axes(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        if leaf.ndim != 3:
            return None
        # Query, key and value matrices are stored [L, out, in].
        if path[-1].key in ("q", "k", "v"):
            return MuonDimensionNumbers(reduction_axis=2, output_axis=1)
        return MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    return jax.tree_util.tree_map_with_path(axes, params)


def _is_matrix(params: Params) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim == 3, params)
