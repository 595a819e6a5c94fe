"""Published config.json files: read, written back, and refused field by field."""

import dataclasses
import json
import pathlib

import pytest
import standin

from lrd_jax.errors import UserError
from lrd_jax.model.published import from_published, to_published

PUBLISHED = pathlib.Path(__file__).parent / "golden" / "published"
MODELS = (
    "LLaDA-8B-Base",
    "LLaDA-8B-Instruct",
    "Dream-v0-Base-7B",
    "Dream-v0-Instruct-7B",
)
# Fields that name a file or its making.
NOT_OURS = {"_name_or_path", "transformers_version", "torch_dtype"}


def published(model):
    return json.loads((PUBLISHED / f"{model}.config.json").read_text())


LLADA, DREAM = published("LLaDA-8B-Base"), published("Dream-v0-Base-7B")
# The same model, as a newer transformers writes it.
RESAVED = {
    name: value
    for name, value in DREAM.items()
    if name not in ("torch_dtype", "rope_scaling")
} | {
    "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "transformers_version": "5.23.0",
}
shared_configs = sorted(standin.shared("data", "hf_configs").glob("*/config*.json"))


def refusal(config):
    with pytest.raises(UserError) as error:
        from_published(config)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_llada_is_read():
    cfg = from_published(LLADA)
    shape = (cfg.d_model, cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)
    assert shape == (4096, 32, 32, 32)
    assert (cfg.head_dim, cfg.mlp_dim, cfg.vocab_size) == (128, 12288, 126464)
    assert (cfg.rope_theta, cfg.norm_eps, cfg.max_length) == (5e5, 1e-5, 4096)
    assert not cfg.qkv_bias
    assert not cfg.tie_embeddings
    ids = (cfg.mask_id, cfg.eos_ids, cfg.pad_id)
    assert ids == (126336, (126081, 126348), 126081)
    assert (cfg.family, cfg.chat, cfg.raw_bos_id) == ("llada", False, None)


def test_dream_is_read():
    cfg = from_published(DREAM)
    shape = (cfg.d_model, cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)
    assert shape == (3584, 28, 28, 4)
    assert (cfg.head_dim, cfg.mlp_dim, cfg.vocab_size) == (128, 18944, 152064)
    assert (cfg.rope_theta, cfg.norm_eps, cfg.max_length) == (1e6, 1e-6, 131072)
    assert cfg.qkv_bias
    assert not cfg.tie_embeddings
    ids = (cfg.mask_id, cfg.eos_ids, cfg.pad_id)
    assert ids == (151666, (151643, 151645), 151643)
    assert (cfg.family, cfg.chat, cfg.raw_bos_id) == ("dream", False, None)


@pytest.mark.parametrize("model", MODELS)
def test_a_published_config_comes_back_whole(model):
    config = {k: v for k, v in published(model).items() if k not in NOT_OURS}
    assert to_published(from_published(published(model))) == config


@pytest.mark.skipif(not shared_configs, reason="published files not at hand")
def test_all_five_published_files_are_these():
    # LLaDA-1.5 is one of them, with LLaDA-Instruct's config.
    assert len(shared_configs) == 5
    for path in shared_configs:
        config = json.loads(path.read_text())
        copy = "LLaDA-8B-Instruct" if "1.5" in path.parent.name else path.parent.name
        assert config == published(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"n_kv_heads": 8},
        {"n_kv_heads": None, "multi_query_attention": True},
        {"include_qkv_bias": True},
        {"weight_tying": True},
        {"rope_theta": 1e4},
        {"mlp_hidden_size": None, "mlp_ratio": 2},
        {"embedding_size": None, "vocab_size": 126400},
    ],
)
def test_llada_variants_survive_the_way_back(change):
    cfg = from_published(LLADA | change)
    assert cfg != from_published(LLADA)
    assert from_published(to_published(cfg)) == cfg


@pytest.mark.parametrize(
    "change", [{"tie_word_embeddings": True}, {"num_key_value_heads": 28}]
)
def test_dream_variants_survive_the_way_back(change):
    cfg = from_published(DREAM | change)
    assert cfg != from_published(DREAM)
    assert from_published(to_published(cfg)) == cfg


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (DREAM, {"qkv_bias": False}, "qkv_bias = False"),
        (DREAM, {"head_dim": 64}, "head_dim = 64"),
        (LLADA, {"head_dim": 64}, "head_dim = 64"),
    ],
)
def test_what_the_published_code_cannot_compute_is_not_written(config, change, named):
    cfg = dataclasses.replace(from_published(config), **change)
    with pytest.raises(UserError, match=named):
        to_published(cfg)


def test_derived_fields_of_llada():
    by_ratio = LLADA | {"mlp_hidden_size": None, "mlp_ratio": 2}
    assert from_published(by_ratio).mlp_dim == 2 * 4096
    assert from_published(LLADA | {"embedding_size": 126500}).vocab_size == 126500
    assert from_published(LLADA | {"n_kv_heads": None}).num_kv_heads == 32
    multi = {"n_kv_heads": None, "multi_query_attention": True}
    assert from_published(LLADA | multi).num_kv_heads == 1
    multi = {"n_kv_heads": None, "multi_query_attention": False}
    assert from_published(LLADA | multi).num_kv_heads == 32


# Every field with one supported value: some other value that a model might have.
LLADA_REFUSED = {
    "activation_type": "swiglu",
    "alibi": True,
    "attention_layer_norm": True,
    "bias_for_layer_norm": True,
    "block_group_size": 2,
    "block_type": "sequential",
    "include_bias": True,
    "input_emb_norm": True,
    "layer_norm_type": "default",
    "layer_norm_with_affine": False,
    "rope": False,
    "rope_full_precision": False,
    "scale_logits": True,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0},
    "clip_qkv": 8.0,
    "quantization_config": {"bits": 4},
}
DREAM_REFUSED = {
    "hidden_act": "gelu",
    "use_mrope": True,
    "use_sliding_window": True,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
    "layer_types": ["full_attention"] * 27 + ["sliding_attention"],
    "qk_norm": True,
    "quantization_config": {"bits": 4},
}
REFUSED = [(LLADA, *item) for item in LLADA_REFUSED.items()]
REFUSED += [(DREAM, *item) for item in DREAM_REFUSED.items()]
REFUSED += [(DREAM, "layer_types", value) for value in (5, [{}])]


@pytest.mark.parametrize(("config", "name", "value"), REFUSED)
def test_an_unsupported_field_is_refused_by_name(config, name, value):
    assert f"{name} = {value!r}" in refusal(config | {name: value})


@pytest.mark.parametrize(
    ("config", "changes"), [(LLADA, LLADA_REFUSED), (DREAM, DREAM_REFUSED)]
)
def test_all_unsupported_fields_are_listed_at_once(config, changes):
    message = refusal(config | changes)
    assert all(f"{name} = {value!r}" in message for name, value in changes.items())


@pytest.mark.parametrize("config", [LLADA, DREAM])
@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_field_that_is_off_is_let_through(config, value):
    assert from_published(config | {"some_feature": value}) == from_published(config)


@pytest.mark.parametrize("config", [LLADA, DREAM])
@pytest.mark.parametrize("value", [True, 0.5, "on", [1]])
def test_an_unknown_field_that_is_on_is_refused(config, value):
    assert f"some_feature = {value!r} (unknown)" in refusal(
        config | {"some_feature": value}
    )


@pytest.mark.parametrize("name", ["alibi", "include_bias", "bias_for_layer_norm"])
def test_null_is_off(name):
    assert from_published(LLADA | {name: None}) == from_published(LLADA)


REQUIRED = [
    (config, name)
    for config, names in [
        (
            LLADA,
            "d_model n_heads n_layers rope_theta rms_norm_eps weight_tying vocab_size "
            "max_sequence_length mask_token_id pad_token_id activation_type "
            "block_type layer_norm_type rope",
        ),
        (
            DREAM,
            "hidden_size num_attention_heads num_key_value_heads num_hidden_layers "
            "intermediate_size rope_theta rms_norm_eps tie_word_embeddings vocab_size "
            "max_position_embeddings mask_token_id pad_token_id",
        ),
    ]
    for name in names.split()
]


@pytest.mark.parametrize(("config", "name"), REQUIRED)
def test_a_missing_field_is_named(config, name):
    without = {k: v for k, v in config.items() if k != name}
    for broken in (without, config | {name: None}):
        assert refusal(broken) == f"config.json lacks {name}."


def test_missing_fields_are_named_together():
    message = refusal({"model_type": "llada"})
    assert all(name in message for name in ("d_model", "n_heads", "rope"))


def test_llada_needs_the_width_of_its_mlp():
    message = refusal(LLADA | {"mlp_hidden_size": None, "mlp_ratio": None})
    assert "mlp_hidden_size" in message


@pytest.mark.parametrize("model_type", [None, "llama", "dream", "LLaDA", ["llada"], 3])
def test_another_architecture_is_named(model_type):
    message = refusal(LLADA | {"model_type": model_type})
    assert repr(model_type) in message
    assert "llada, Dream" in message


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (LLADA, {"n_heads": "32"}),
        (LLADA, {"n_heads": True}),
        (LLADA, {"d_model": 4096.0}),
        (LLADA, {"weight_tying": "no"}),
        (LLADA, {"n_kv_heads": [8]}),
        (DREAM, {"vocab_size": "many"}),
        (DREAM, {"rms_norm_eps": "1e-6"}),
        (DREAM, {"rope_theta": "1e6"}),
        (DREAM, {"rope_theta": [1e6]}),
        (DREAM, {"eos_token_id": "<|endoftext|>"}),
        (DREAM, {"eos_token_id": None}),
        (DREAM, {"eos_token_id": []}),
        (DREAM, {"rope_scaling": "yarn"}),
    ],
)
def test_a_field_of_another_type_is_named(config, change):
    ((name, value),) = change.items()
    message = refusal(config | change)
    assert name in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (LLADA, {"d_model": 4097}),
        (LLADA, {"n_heads": 0}),
        (LLADA, {"n_kv_heads": 5}),
        (LLADA, {"n_kv_heads": 4, "multi_query_attention": True}),
        (LLADA, {"n_kv_heads": 4, "multi_query_attention": False}),
        (LLADA, {"head_dim": 64}),
        (LLADA, {"tie_word_embeddings": True}),
        (LLADA, {"mask_token_id": 126464}),
        (DREAM, {"hidden_size": 3585}),
        (DREAM, {"num_hidden_layers": 0}),
        (DREAM, {"num_key_value_heads": 3}),
        (DREAM, {"head_dim": 64}),
        (DREAM, {"mask_token_id": 151643}),
        (DREAM, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
    ],
)
def test_fields_that_cannot_be_are_refused_in_one_line(config, change):
    refusal(config | change)


def test_integers_pass_for_floats():
    config = DREAM | {"rope_theta": 1000000}
    assert from_published(config) == from_published(DREAM)
    assert isinstance(from_published(config).rope_theta, float)


def test_a_dream_saved_again_by_transformers_5_is_the_same():
    assert from_published(RESAVED) == from_published(DREAM)
    moved = {k: v for k, v in RESAVED.items() if k != "rope_theta"}
    assert from_published(moved) == from_published(DREAM)


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["full_attention"] * 28},
        {"head_dim": 128},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default", "rope_type": "default"}},
        {"sliding_window": 4096, "max_window_layers": 14},
        {"_attn_implementation_autoset": True, "return_dict": True},
        {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
        {"use_cache": False, "bos_token_id": 151665},
    ],
)
def test_fields_that_change_nothing_are_let_through(change):
    assert from_published(RESAVED | change) == from_published(DREAM)


def test_rope_parameters_give_the_base_frequency():
    moved = {k: v for k, v in RESAVED.items() if k != "rope_theta"}
    moved["rope_parameters"] = {"rope_theta": 5e4, "rope_type": "default"}
    assert from_published(moved).rope_theta == 5e4


@pytest.mark.parametrize(
    ("given", "eos_ids"),
    [
        (151645, (151643, 151645)),
        ([151645, 151643], (151643, 151645)),
        ([151643, 7], (151643, 151645, 7)),
        (7, (7,)),
    ],
)
def test_eos_ids_of_tuned_models(given, eos_ids):
    assert from_published(DREAM | {"eos_token_id": given}).eos_ids == eos_ids


@pytest.mark.parametrize(
    ("eos_ids", "published"),
    [
        ((151643, 151645), 151643),
        ((151643, 151645, 151662), [151643, 151645, 151662]),
        ((41, 43), [41, 43]),
        ((7,), 7),
    ],
)
def test_all_eos_ids_go_back(eos_ids, published):
    cfg = dataclasses.replace(from_published(DREAM), eos_ids=eos_ids)
    back = to_published(cfg)
    assert back["eos_token_id"] == published
    assert from_published(back).eos_ids == eos_ids


def test_the_transformers_installed_saves_what_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "Dream"

    Config(**RESAVED).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert from_published(saved) == from_published(DREAM)
