"""The published config.json of LLaDA and Dream <-> ModelConfig.

A field is either read, known to leave inference alone, or checked against the only
value that this package computes; anything else is refused by name, so that no
checkpoint is ever run with other mathematics than its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lrd_jax.base import UserError
from lrd_jax.config import ModelConfig

# Fields that transformers writes into any config and that do not change a forward pass.
_GENERIC = frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path architectures "
    "attention_dropout attn_implementation auto_map bos_token_id dtype eos_token_id "
    "gradient_checkpointing id2label initializer_range label2id model_type "
    "output_attentions output_hidden_states return_dict torch_dtype "
    "transformers_version use_cache".split()
)
_LLADA_IGNORED = _GENERIC | frozenset(
    "alibi_bias_max attention_layer_norm_with_affine embedding_dropout flash_attention "
    "init_cutoff_factor init_device init_fn init_std precision residual_dropout".split()
)
# The window fields only act together with use_sliding_window.
_DREAM_IGNORED = _GENERIC | frozenset("max_window_layers sliding_window".split())

# Field -> type; all must be there. Without the fixed ones among LLaDA's, its own code
# computes something else.
_LLADA_READ = {
    **dict.fromkeys("activation_type block_type layer_norm_type".split(), str),
    **dict.fromkeys("d_model n_heads n_layers vocab_size".split(), int),
    **dict.fromkeys("mask_token_id max_sequence_length pad_token_id".split(), int),
    **dict.fromkeys("rope weight_tying".split(), bool),
    "rms_norm_eps": float,
}
_LLADA_OPTIONAL = {
    **dict.fromkeys("embedding_size mlp_hidden_size mlp_ratio n_kv_heads".split(), int),
    **dict.fromkeys("include_qkv_bias multi_query_attention".split(), bool),
}
_DREAM_READ = {
    **dict.fromkeys("hidden_size intermediate_size num_attention_heads".split(), int),
    **dict.fromkeys("num_hidden_layers num_key_value_heads vocab_size".split(), int),
    **dict.fromkeys("mask_token_id max_position_embeddings pad_token_id".split(), int),
    "rms_norm_eps": float,
    "tie_word_embeddings": bool,
}
# Field -> the only value supported; null, or no such field, counts as off.
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
    "use_mrope": False,
    "use_sliding_window": False,
}
_ROPE = ("rope_parameters", "rope_scaling")
# Read or checked by functions of their own.
_SPECIAL = {*_ROPE, "rope_theta", "layer_types", "head_dim", "tie_word_embeddings"}
# End of text and end of turn in the published vocabularies.
_ENDS = {"llada": (126081, 126348), "dream": (151643, 151645)}
# What config.json cannot hold, or not all of: the tokenizer says it.
_NOT_PUBLISHED = ("chat", "raw_bos_id", "eos_ids")


def from_published(published: Mapping[str, Any]) -> ModelConfig:
    """Reads a published `config.json`.

    Args:
        published: the parsed file of a LLaDA or Dream checkpoint.

    Returns:
        The model's config; `chat` and `raw_bos_id` are not in the file and stay unset.

    Raises:
        UserError: another architecture, a missing field, or a field whose value would
            change the mathematics and is not supported; all of them at once.
    """
    model_type = published.get("model_type")
    readers = {"llada": _read_llada, "Dream": _read_dream}
    if not isinstance(model_type, str) or model_type not in readers:
        raise UserError(
            f"unknown architecture: model_type is {model_type!r}, "
            f"expected one of {', '.join(readers)}."
        )
    return readers[model_type](published)


def _read_llada(published: Mapping[str, Any]) -> ModelConfig:
    _check(published, _LLADA_READ, _LLADA_OPTIONAL, _LLADA_FIXED, _LLADA_IGNORED)
    width, heads = published["d_model"], published["n_heads"]
    tied = published["weight_tying"]
    _check_derived(published, width, heads, {"tie_word_embeddings": tied})
    mlp_dim = published.get("mlp_hidden_size")
    if mlp_dim is None:
        if published.get("mlp_ratio") is None:
            raise UserError("config.json lacks mlp_hidden_size.")
        mlp_dim = published["mlp_ratio"] * width
    return ModelConfig(
        family="llada",
        vocab_size=published.get("embedding_size") or published["vocab_size"],
        d_model=width,
        num_layers=published["n_layers"],
        num_heads=heads,
        num_kv_heads=_llada_kv_heads(published, heads),
        head_dim=width // heads,
        mlp_dim=mlp_dim,
        rope_theta=_rope_theta(published),
        norm_eps=published["rms_norm_eps"],
        qkv_bias=bool(published.get("include_qkv_bias")),
        tie_embeddings=tied,
        max_length=published["max_sequence_length"],
        mask_id=published["mask_token_id"],
        eos_ids=_eos_ids(published, "llada"),
        pad_id=published["pad_token_id"],
    )


def _llada_kv_heads(published: Mapping[str, Any], heads: int) -> int:
    kv_heads = published.get("n_kv_heads")
    multi_query = published.get("multi_query_attention")
    if multi_query is None:
        return heads if kv_heads is None else kv_heads
    said = 1 if multi_query else heads
    if kv_heads not in (None, said):
        raise UserError(
            f"config.json contradicts itself: n_kv_heads = {kv_heads}, but "
            f"multi_query_attention = {multi_query} means {said}."
        )
    return said


def _read_dream(published: Mapping[str, Any]) -> ModelConfig:
    _check(published, _DREAM_READ, {}, _DREAM_FIXED, _DREAM_IGNORED)
    width, heads = published["hidden_size"], published["num_attention_heads"]
    _check_derived(published, width, heads, {})
    return ModelConfig(
        family="dream",
        vocab_size=published["vocab_size"],
        d_model=width,
        num_layers=published["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=published["num_key_value_heads"],
        head_dim=width // heads,
        mlp_dim=published["intermediate_size"],
        rope_theta=_rope_theta(published),
        norm_eps=published["rms_norm_eps"],
        qkv_bias=True,
        tie_embeddings=published["tie_word_embeddings"],
        max_length=published["max_position_embeddings"],
        mask_id=published["mask_token_id"],
        eos_ids=_eos_ids(published, "dream"),
        pad_id=published["pad_token_id"],
    )


def _check(
    published: Mapping[str, Any],
    read: Mapping[str, type],
    optional: Mapping[str, type],
    fixed: Mapping[str, Any],
    ignored: frozenset[str],
) -> None:
    """Raises unless all fields are there, of their type, and supported."""
    missing = [name for name in read if published.get(name) is None]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}.")
    kinds = {**read, **optional}
    wrong = [
        f"{name} = {published[name]!r} (expected {kind.__name__})"
        for name, kind in kinds.items()
        if published.get(name) is not None and not _is_a(published[name], kind)
    ]
    if wrong:
        raise UserError(f"config.json has wrong types: {'; '.join(wrong)}.")
    bad = [
        f"{name} = {published[name]!r} (only {only!r} is supported)"
        for name, only in fixed.items()
        if name in published and (published[name] or False) != only
    ]
    bad += [
        f"{name} = {published[name]!r} (only the default kind is supported)"
        for name in _ROPE
        if not _is_plain_rope(published.get(name))
    ]
    layer_types = published.get("layer_types")
    if layer_types and not _is_full(layer_types):
        bad.append(f"layer_types = {layer_types!r} (only full_attention is supported)")
    bad += [
        f"{name} = {value!r} (unknown)"
        for name, value in published.items()
        # An unknown field that is off cannot change anything.
        if value and not any(name in k for k in (kinds, fixed, ignored, _SPECIAL))
    ]
    if bad:
        raise UserError(
            f"config.json asks for what is not supported: {'; '.join(bad)}."
        )


def _is_a(value: object, kind: type) -> bool:
    # JSON writes 1e6 as 1000000 at times; a bool is no number.
    return type(value) is kind or (kind is float and type(value) is int)


def _check_derived(
    published: Mapping[str, Any], width: int, heads: int, others: Mapping[str, Any]
) -> None:
    """Raises unless fields that only repeat others agree with them."""
    if heads < 1 or width % heads:
        raise UserError(
            f"config.json: width {width} is not a multiple of {heads} heads."
        )
    for name, said in {"head_dim": width // heads, **others}.items():
        if published.get(name) not in (None, said):
            raise UserError(
                f"config.json contradicts itself: {name} = {published[name]!r}, but "
                f"its other fields mean {said!r}."
            )


def _is_full(layer_types: object) -> bool:
    """Whether the field lists layers of ordinary attention."""
    return isinstance(layer_types, list) and all(
        kind == "full_attention" for kind in layer_types
    )


def _is_plain_rope(rope: object) -> bool:
    """Whether the field asks for no more than a base frequency."""
    if not rope:
        return True
    if not isinstance(rope, Mapping):
        return False
    plain = {
        "rope_type": "default",
        "type": "default",
        "partial_rotary_factor": 1.0,
        "rope_theta": rope.get("rope_theta"),
    }
    return all(name in plain and rope[name] == plain[name] for name in rope)


def _rope_theta(published: Mapping[str, Any]) -> float:
    """The base frequency; transformers 5 has moved it into `rope_parameters`."""
    places = [published, *(published.get(name) or {} for name in _ROPE)]
    said = [place["rope_theta"] for place in places if place.get("rope_theta")]
    if not said:
        raise UserError("config.json lacks rope_theta.")
    if not all(_is_a(theta, float) and theta == said[0] for theta in said):
        got = " and ".join(map(repr, said))
        raise UserError(f"config.json: rope_theta must be one number, got {got}.")
    return float(said[0])


def _eos_ids(published: Mapping[str, Any], family: str) -> tuple[int, ...]:
    """Ids that end a text: those of the file and their partner of the vocabulary."""
    given = published.get("eos_token_id")
    ids = tuple(given) if isinstance(given, list) else (given,)
    if not ids or not all(_is_a(token, int) for token in ids):
        raise UserError(f"config.json: eos_token_id must be an id, got {given!r}.")
    # A model tuned for chat may name the end of turn alone.
    ends = _ENDS[family] if set(ids) & set(_ENDS[family]) else ()
    return tuple(dict.fromkeys((*ends, *ids)))


def _published_eos(cfg: ModelConfig) -> int | list[int]:
    """One id, as published files have it, where the reader adds the others."""
    first = cfg.eos_ids[0]
    known = _eos_ids({"eos_token_id": first}, cfg.family)
    return first if set(cfg.eos_ids) <= {*known} else list(cfg.eos_ids)


def to_published(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` for the published PyTorch code; undoes `from_published`.

    Raises:
        UserError: that code has no way to compute this model.
    """
    published = {"llada": _write_llada, "dream": _write_dream}[cfg.family](cfg)
    read = from_published(published)
    lost = [
        f"{field.name} = {getattr(cfg, field.name)!r}"
        for field in dataclasses.fields(cfg)
        if field.name not in _NOT_PUBLISHED
        and getattr(cfg, field.name) != getattr(read, field.name)
    ]
    if lost:
        raise UserError(
            f"the published code of {cfg.family} cannot compute {', '.join(lost)}."
        )
    return published


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
        eos_token_id=_published_eos(cfg),
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
        eos_token_id=_published_eos(cfg),
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
        rope_scaling=None,
        rope_theta=cfg.rope_theta,
        sliding_window=None,
        tie_word_embeddings=cfg.tie_embeddings,
        use_cache=True,
        vocab_size=cfg.vocab_size,
    )
