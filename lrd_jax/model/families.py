"""LLaDA and Dream: published config.json <-> ModelConfig, and ModelConfig -> Denoiser.

A config field is either read, known to leave inference alone, or checked against the
only value that this package computes; anything else is refused by name, so that no
checkpoint is ever run with other mathematics than its own.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lrd_jax.base import Denoiser, KVCache, Params, UserError
from lrd_jax.config import ModelConfig
from lrd_jax.model import backbone, layers

# Fields that transformers writes into any config and that do not change a forward pass.
_GENERIC = frozenset(
    "_name_or_path architectures auto_map bos_token_id dtype eos_token_id "
    "initializer_range mask_token_id model_type pad_token_id torch_dtype "
    "transformers_version use_cache".split()
)
_LLADA_IGNORED = _GENERIC | frozenset(
    "alibi_bias_max attention_dropout attention_layer_norm_with_affine "
    "embedding_dropout flash_attention init_cutoff_factor init_device init_fn "
    "init_std precision residual_dropout".split()
)
_DREAM_IGNORED = _GENERIC | frozenset(
    # The window fields only act together with use_sliding_window.
    "attention_dropout max_window_layers sliding_window".split()
)
# Field -> the only value supported; a field that is absent has that value.
_LLADA_FIXED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}
_DREAM_FIXED = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "use_mrope": False,
    "use_sliding_window": False,
}
# The published vocabularies: end of text -> all ids that end a text (SPEC's table).
_END_OF_TURN = {126081: 126348, 151643: 151645}


def from_published(published: Mapping[str, Any]) -> ModelConfig:
    """Reads a published `config.json`.

    Args:
        published: the parsed file of a LLaDA or Dream checkpoint.

    Returns:
        The model's config; `chat` and `raw_bos_id` are not in the file and stay unset.

    Raises:
        UserError: another architecture, a missing field, or a field whose value would
            change the mathematics and is not supported.
    """
    model_type = published.get("model_type")
    readers = {"llada": _read_llada, "Dream": _read_dream}
    if model_type not in readers:
        raise UserError(
            f"unknown architecture: model_type is {model_type!r}, "
            f"expected one of {', '.join(readers)}."
        )
    try:
        return readers[model_type](published)
    except KeyError as error:
        raise UserError(f"config.json lacks the field {error}.") from None


def _refuse_unsupported(
    published: Mapping[str, Any],
    fixed: Mapping[str, Any],
    known: frozenset[str],
) -> None:
    bad = [
        f"{name} = {published[name]!r} (only {only!r} is supported)"
        for name, only in fixed.items()
        if name in published and published[name] != only
    ]
    # An unknown field that is off cannot change anything.
    bad += [
        f"{name} = {value!r} (unknown)"
        for name, value in published.items()
        if value and name not in known and name not in fixed
    ]
    if bad:
        raise UserError("config.json asks for what is not supported: " + "; ".join(bad))


def _eos_ids(end_of_text: int) -> tuple[int, ...]:
    end_of_turn = _END_OF_TURN.get(end_of_text)
    return (end_of_text,) if end_of_turn is None else (end_of_text, end_of_turn)


def _read_llada(published: Mapping[str, Any]) -> ModelConfig:
    read = frozenset(
        "d_model embedding_size include_qkv_bias max_sequence_length mlp_hidden_size "
        "mlp_ratio multi_query_attention n_heads n_kv_heads n_layers rms_norm_eps "
        "rope_theta vocab_size weight_tying".split()
    )
    _refuse_unsupported(published, _LLADA_FIXED, read | _LLADA_IGNORED)
    width, heads = published["d_model"], published["n_heads"]
    kv_heads = published.get("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if published.get("multi_query_attention") else heads
    vocab_size = published.get("embedding_size") or published["vocab_size"]
    return ModelConfig(
        family="llada",
        vocab_size=vocab_size,
        d_model=width,
        num_layers=published["n_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(width, heads),
        mlp_dim=published.get("mlp_hidden_size") or published["mlp_ratio"] * width,
        rope_theta=published["rope_theta"],
        norm_eps=published["rms_norm_eps"],
        qkv_bias=bool(published.get("include_qkv_bias")),
        tie_embeddings=published["weight_tying"],
        max_length=published["max_sequence_length"],
        mask_id=published["mask_token_id"],
        eos_ids=_eos_ids(published["eos_token_id"]),
        pad_id=published["pad_token_id"],
    )


def _read_dream(published: Mapping[str, Any]) -> ModelConfig:
    read = frozenset(
        "hidden_size intermediate_size max_position_embeddings num_attention_heads "
        "num_hidden_layers num_key_value_heads rms_norm_eps rope_theta "
        "tie_word_embeddings vocab_size".split()
    )
    _refuse_unsupported(published, _DREAM_FIXED, read | _DREAM_IGNORED)
    width, heads = published["hidden_size"], published["num_attention_heads"]
    return ModelConfig(
        family="dream",
        vocab_size=published["vocab_size"],
        d_model=width,
        num_layers=published["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=published["num_key_value_heads"],
        head_dim=_head_dim(width, heads),
        mlp_dim=published["intermediate_size"],
        rope_theta=published["rope_theta"],
        norm_eps=published["rms_norm_eps"],
        qkv_bias=True,
        tie_embeddings=published["tie_word_embeddings"],
        max_length=published["max_position_embeddings"],
        mask_id=published["mask_token_id"],
        eos_ids=_eos_ids(published["eos_token_id"]),
        pad_id=published["pad_token_id"],
    )


def _head_dim(width: int, heads: int) -> int:
    if width % heads:
        raise UserError(
            f"config.json: width {width} is not a multiple of {heads} heads."
        )
    return width // heads


def to_published(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` for the published PyTorch code; undoes `from_published`."""
    writers = {"llada": _write_llada, "dream": _write_dream}
    return writers[cfg.family](cfg)


def _write_llada(cfg: ModelConfig) -> dict[str, Any]:
    return dict(
        _LLADA_FIXED,
        alibi_bias_max=8.0,
        architectures=["LLaDAModelLM"],
        attention_dropout=0.0,
        attention_layer_norm_with_affine=True,
        auto_map={
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            "AutoModel": "modeling_llada.LLaDAModelLM",
        },
        d_model=cfg.d_model,
        embedding_dropout=0.0,
        embedding_size=cfg.vocab_size,
        eos_token_id=cfg.eos_ids[0],
        flash_attention=False,
        include_qkv_bias=cfg.qkv_bias,
        init_cutoff_factor=None,
        init_device="meta",
        init_fn="mitchell",
        init_std=0.02,
        mask_token_id=cfg.mask_id,
        max_sequence_length=cfg.max_length,
        mlp_hidden_size=cfg.mlp_dim,
        mlp_ratio=4,
        model_type="llada",
        multi_query_attention=None,
        n_heads=cfg.num_heads,
        n_kv_heads=cfg.num_kv_heads,
        n_layers=cfg.num_layers,
        pad_token_id=cfg.pad_id,
        precision="amp_bf16",
        residual_dropout=0.0,
        rms_norm_eps=cfg.norm_eps,
        rope_theta=cfg.rope_theta,
        use_cache=False,
        vocab_size=cfg.vocab_size,
        weight_tying=cfg.tie_embeddings,
    )


def _write_dream(cfg: ModelConfig) -> dict[str, Any]:
    return dict(
        _DREAM_FIXED,
        architectures=["DreamModel"],
        attention_dropout=0.0,
        auto_map={
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        bos_token_id=cfg.eos_ids[0],
        eos_token_id=cfg.eos_ids[0],
        hidden_size=cfg.d_model,
        initializer_range=0.02,
        intermediate_size=cfg.mlp_dim,
        mask_token_id=cfg.mask_id,
        max_position_embeddings=cfg.max_length,
        max_window_layers=cfg.num_layers,
        model_type="Dream",
        num_attention_heads=cfg.num_heads,
        num_hidden_layers=cfg.num_layers,
        num_key_value_heads=cfg.num_kv_heads,
        pad_token_id=cfg.pad_id,
        rms_norm_eps=cfg.norm_eps,
        rope_theta=cfg.rope_theta,
        sliding_window=None,
        tie_word_embeddings=cfg.tie_embeddings,
        use_cache=True,
        vocab_size=cfg.vocab_size,
    )


def make_denoiser(cfg: ModelConfig) -> Denoiser:
    """The model of `cfg` as pure functions over its parameters."""
    lead = 1 if cfg.family == "dream" else 0
    return Denoiser(
        embed=_embed,
        hidden=functools.partial(_hidden, cfg, lead),
        logits=functools.partial(_logits, cfg.tie_embeddings),
        expect=_expect,
        init_cache=functools.partial(backbone.init_cache, cfg),
        mask_id=cfg.mask_id,
        eos_ids=cfg.eos_ids,
        pad_id=cfg.pad_id,
        vocab_size=cfg.vocab_size,
        lead=lead,
        max_length=cfg.max_length,
    )


def _embed(params: Params, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    return params["embed"][ids]


def _hidden(
    cfg: ModelConfig,
    lead: int,
    params: Params,
    embeds: Float[Array, "B n D"],
    positions: Int[Array, "B n"],
    key_mask: Bool[Array, "B T"],
    cache: KVCache | None = None,
    start: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B m D"], KVCache | None]:
    slot = None if start is None else start - lead
    hidden, cache = backbone.run_blocks(
        cfg, params, embeds, positions, key_mask, cache, slot
    )
    if not lead:
        return hidden, cache
    if start is not None:
        return hidden[:, :-lead], cache
    # Dream predicts i at i - 1; a row's first real token has only itself to read.
    shifted = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
    return jnp.where(positions[..., None] == 0, hidden, shifted), cache


def _logits(
    tied: bool, params: Params, hidden: Float[Array, "R D"]
) -> Float[Array, "R V"]:
    head = params["embed"] if tied else params["head"]
    spec = "rd,vd->rv" if tied else "rd,dv->rv"
    wide = layers.at_least_float32(head.dtype)
    return jnp.einsum(
        spec,
        hidden.astype(head.dtype),
        head,
        precision=layers.precision_for(head.dtype),
        preferred_element_type=wide,
    ).astype(jnp.float32)


def _expect(params: Params, probs: Float[Array, "R V"]) -> Float[Array, "R D"]:
    table = params["embed"]
    # Probabilities rounded to bfloat16 err by at most 2^-9 of the mean's magnitude, as
    # much as the rounding of the result to the model's own dtype.
    return jnp.einsum(
        "rv,vd->rd",
        probs.astype(table.dtype),
        table,
        precision=layers.precision_for(table.dtype),
        preferred_element_type=layers.at_least_float32(table.dtype),
    ).astype(jnp.float32)
