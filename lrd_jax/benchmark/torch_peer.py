"""The peer: the same weights in transformers' PyTorch model, and decode loops on it.

The loops are written from their published formulas at temperature 0, one block. Like
the published code they hold float logits [B, T, V] of prompt and window.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from lrd_jax.base import Params
from lrd_jax.batches import Batch
from lrd_jax.benchmark.ours import Outcome, join
from lrd_jax.benchmark.subject import Subject
from lrd_jax.config import ModelConfig

# PyTorch is imported in the functions: only this benchmark ever needs it.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchModel:
    """A bidirectional transformer and its head.

    Attributes:
        backbone: transformers' `LlamaModel` or `Qwen2Model`.
        head: `[V, D]`.
        config: of our model.
    """

    backbone: Any
    head: Any
    config: ModelConfig

    def logits(self, ids: Any, real: Any, window: int | None = None) -> Any:
        """`[B, window, V]` what the last positions predict; all of them for None."""
        import torch

        padding = {}
        if not bool(real.all()):  # Else attention is spared the mask.
            positions = (real.cumsum(1) - 1).clamp(min=0)
            padding = {"attention_mask": real, "position_ids": positions}
        answer = self.backbone(input_ids=ids, use_cache=False, **padding)
        hidden = answer.last_hidden_state
        if self.config.family == "dream":  # It predicts position i at i - 1.
            hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        if window is not None:
            hidden = hidden[:, -window:]
        return hidden @ self.head.T


def build(cfg: ModelConfig, params: Params) -> TorchModel:
    """The model of `cfg` with these weights, float32."""
    import torch
    import transformers

    family = "Qwen2" if cfg.qkv_bias else "Llama"
    shape = getattr(transformers, f"{family}Config")(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.mlp_dim,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        max_position_embeddings=cfg.max_length,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    # A mask is made by what the config says; without one, attention asks its layer.
    shape.is_causal = False
    backbone = getattr(transformers, f"{family}Model")(shape).eval()
    for layer in backbone.layers:
        layer.self_attn.is_causal = False
    weights = {
        name: torch.from_numpy(np.array(leaf, np.float32))
        for name, leaf in published_names(cfg, params).items()
    }
    head = weights.pop("head")
    backbone.load_state_dict(weights)
    return TorchModel(backbone=backbone, head=head, config=cfg)


def published_names(cfg: ModelConfig, params: Params) -> dict[str, Any]:
    """Our weights by the names and in the layouts of transformers, and the head."""
    blocks = params["blocks"]
    head = params["embed"] if cfg.tie_embeddings else params["head"].T
    weights = {
        "head": head,
        "embed_tokens.weight": params["embed"],
        "norm.weight": params["norm"]["scale"],
    }
    for i in range(cfg.num_layers):
        at, attn, mlp = f"layers.{i}.", blocks["attn"], blocks["mlp"]
        norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
        for theirs, ours in norms.items():
            weights[f"{at}{theirs}.weight"] = blocks[ours]["scale"][i]
        for name in ("q", "k", "v"):
            weights[f"{at}self_attn.{name}_proj.weight"] = attn[name][i]
            if cfg.qkv_bias:
                weights[f"{at}self_attn.{name}_proj.bias"] = attn[f"{name}_bias"][i]
        weights[f"{at}self_attn.o_proj.weight"] = attn["out"][i].T
        for name in ("gate", "up", "down"):
            weights[f"{at}mlp.{name}_proj.weight"] = mlp[name][i].T
    return weights


def published_loop(model: TorchModel, ids: Any, real: Any, gen_length: int) -> Outcome:
    """LLaDA's sampler: one forward for each token, the most confident position first.

    Source: `generate.py` of the LLaDA repository (arXiv 2502.09992), low-confidence
    remasking; what is masked is told by its id, the mask token may be predicted.
    """
    import torch

    prompt_length = ids.shape[1]
    ids, real = _with_window(ids, real, gen_length, model.config.mask_id)
    for _ in range(gen_length):
        masked = ids == model.config.mask_id
        masked[:, :prompt_length] = False
        logits = model.logits(ids, real)
        best = logits.argmax(-1)
        probs = torch.softmax(logits, dim=-1)
        confidence = probs.gather(-1, best[..., None])[..., 0]
        confidence = torch.where(masked, confidence, -torch.inf)
        place = confidence.argmax(1, keepdim=True)
        ids.scatter_(1, place, best.gather(1, place))
    forwards = np.full(len(ids), gen_length)
    return _outcome(model.config, ids[:, prompt_length:], forwards)


def threshold_loop(
    model: TorchModel, ids: Any, real: Any, gen_length: int, threshold: float
) -> Outcome:
    """Commits every position surer than `threshold`, and the surest; stops at EOS.

    Source: the confidence rule of Fast-dLLM (arXiv 2505.22618); as in our methods the
    mask token is never predicted, and a row ends once its first end-of-text id and all
    before it are committed.
    """
    import torch

    cfg, start = model.config, ids.shape[1]
    ids, real = _with_window(ids, real, gen_length, cfg.mask_id)
    is_open = torch.ones((len(ids), gen_length), dtype=torch.bool)
    forwards = np.zeros(len(ids), int)
    while bool(is_open.any()):
        forwards += is_open.any(1).numpy()
        logits = model.logits(ids, real)[:, start:]
        logits[..., cfg.mask_id] = -torch.inf
        confidence, best = torch.softmax(logits, dim=-1).max(-1)
        confidence = torch.where(is_open, confidence, -torch.inf)
        chosen = confidence >= threshold
        chosen.scatter_(1, confidence.argmax(1, keepdim=True), True)
        chosen &= is_open
        window = ids[:, start:]
        window[chosen] = best[chosen]
        is_open &= ~chosen
        is_end = torch.isin(window, torch.tensor(cfg.eos_ids)) & ~is_open
        reached = (~is_open).cumprod(1).bool()
        behind = (is_end & reached).cumsum(1).bool() & is_open
        window[behind] = cfg.pad_id
        is_open &= ~behind
    return _outcome(cfg, ids[:, start:], forwards)


def forward_run(model: TorchModel, batch: Batch, gen_length: int) -> Callable[[], Any]:
    """One forward of the whole batch, its head over the window: no decode."""
    import torch

    ids = torch.from_numpy(batch.ids.astype(np.int64))
    real = torch.from_numpy(batch.mask.copy())
    ids, real = _with_window(ids, real, gen_length, model.config.mask_id)

    def run() -> Any:
        with torch.inference_mode():
            return model.logits(ids, real, gen_length)

    return run


def decode_all(
    subject: Subject,
    loop: Callable[[Any, Any], Outcome],
) -> Outcome:
    """Runs a loop over all prompts; each batch without the padding it does not need."""
    import torch

    outcomes = []
    with torch.inference_mode():
        for batch in subject.batches:
            outcomes.append(loop(*prompt_tensors(batch)))
    return join(outcomes)


def prompt_tensors(batch: Batch) -> tuple[Any, Any]:
    """`[B, P]` ids and which are real, P that of the longest prompt of the batch."""
    import torch

    first = int(batch.mask.any(axis=0).argmax())
    ids = torch.from_numpy(batch.ids[:, first:].astype(np.int64))
    return ids, torch.from_numpy(batch.mask[:, first:].copy())


def _with_window(ids: Any, real: Any, gen_length: int, mask_id: int) -> tuple[Any, Any]:
    import torch

    shape = (len(ids), gen_length)
    window = torch.full(shape, mask_id, dtype=ids.dtype)
    ones = torch.ones(shape, dtype=torch.bool)
    return torch.cat([ids, window], 1), torch.cat([real, ones], 1)


def _outcome(cfg: ModelConfig, tokens: Any, forwards: np.ndarray) -> Outcome:
    found = tokens.numpy().astype(np.int32)
    ended = np.cumsum(np.isin(found, cfg.eos_ids), axis=1) > 0
    useful = ~ended & (found != cfg.mask_id)
    return Outcome(
        tokens=found,
        num_forwards=forwards,
        useful_tokens=useful.sum(axis=1),
        turns=int(forwards.max()),
    )
