"""ModelConfig's ranges, and the configs that come with the package."""

import dataclasses
import importlib.util
import math
import sys
import tomllib

import pytest

from lrd_jax import config, settings
from lrd_jax.config import METHODS, DecodeConfig, ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.evaluation.methods import read_entries

MODEL = dict(
    family="llada",
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
    tie_embeddings=False,
    max_length=128,
    mask_id=60,
    eos_ids=(61, 62),
    pad_id=61,
)


def test_a_model_config_is_frozen_and_hashable():
    cfg = ModelConfig(**MODEL)
    assert hash(cfg) == hash(ModelConfig(**MODEL))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.d_model = 3


@pytest.mark.parametrize("name", sorted(MODEL))
def test_a_model_config_has_no_default_shape(name):
    with pytest.raises(TypeError, match=name):
        ModelConfig(**{k: v for k, v in MODEL.items() if k != name})


@pytest.fixture(scope="module")
def unchecked():
    """The same module without these tests' type checker, which would answer first."""
    spec = importlib.util.spec_from_file_location("unchecked_config", config.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


POSITIVE = (
    "vocab_size d_model num_layers num_heads num_kv_heads head_dim mlp_dim rope_theta "
    "norm_eps max_length"
).split()


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in POSITIVE for value in (0, -1)]
    + [(name, bad) for name in ("rope_theta", "norm_eps") for bad in (math.nan, 1e999)]
    + [(name, bad) for name in ("d_model", "mask_id") for bad in (True, 4.0, "4", None)]
    + [
        ("family", "llama"),
        ("chat", 1),
        ("qkv_bias", "no"),
        ("tie_embeddings", None),
        ("num_kv_heads", 3),
        ("num_kv_heads", 8),
        ("head_dim", 7),
        ("eos_ids", ()),
        ("eos_ids", [61]),
        ("eos_ids", (61, "62")),
        ("eos_ids", (61, 64)),
        ("eos_ids", (-1,)),
        ("eos_ids", (60,)),
        ("pad_id", 64),
        ("pad_id", 60),
        ("mask_id", 64),
        ("mask_id", 61),
        ("raw_bos_id", 64),
        ("raw_bos_id", -1),
    ],
)
def test_a_wrong_model_setting_is_one_line_that_names_it(unchecked, name, value):
    with pytest.raises(UserError) as error:
        unchecked.ModelConfig(**MODEL | {name: value})
    message = str(error.value)
    assert "\n" not in message
    # An end-of-text or pad id equal to the mask's is reported as the mask's.
    assert f"`{name}" in message or "`mask_id` must be an id of its own" in message


def test_whole_numbers_pass_for_floats(unchecked):
    cfg = unchecked.ModelConfig(**MODEL | {"rope_theta": 10000})
    assert cfg == unchecked.ModelConfig(**MODEL)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [True, "8", 8.0, None, [8]])
def test_gen_length_is_a_whole_number(unchecked, method, value):
    with pytest.raises(UserError) as error:
        settings.build(unchecked.METHODS[method], {"gen_length": value}, "x.toml")
    want = f"x.toml: `gen_length` must be a whole number, got {value!r}."
    assert str(error.value) == want


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, True, "hot"])
def test_temperature_is_finite(unchecked, method, value):
    with pytest.raises(UserError, match=r"`temperature` must be .* got ") as error:
        settings.build(unchecked.METHODS[method], {"temperature": value}, "x.toml")
    assert str(error.value).endswith(f"got {value!r}.")


def test_methods_are_listed_under_their_names():
    assert list(METHODS) == ["lrd", "baseline", "llada", "dream"]
    assert all(cls().method == name for name, cls in METHODS.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_a_method_can_be_built_from_its_default(method):
    cls = METHODS[method]
    defaults = {name: getattr(cls(), name) for name in settings.field_names(cls)}
    assert settings.build(cls, defaults, "x.toml") == cls()


@pytest.mark.parametrize("method", METHODS)
def test_a_misspelt_setting_is_answered_by_the_method(method):
    with pytest.raises(UserError, match="did you mean gen_length"):
        settings.build(METHODS[method], {"gen_lenght": 8}, "x.toml")


# Name -> block_length in the paper.
SHIPPED = {
    "dream_7b_base": None,
    "dream_7b_instruct": None,
    "llada_1_5": 32,
    "llada_8b_base": None,
    "llada_8b_instruct": 32,
}


def test_one_config_for_each_published_model_is_shipped():
    assert SHIPPED.keys() <= settings.shipped_configs().keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_has_the_papers_settings(name):
    table, where = settings.read_toml(name)
    assert set(table) == {"method", "decode"}
    cfg = settings.build(METHODS[table["method"]], table["decode"], where)
    # All else is as the defaults have it, when to stop included.
    assert cfg == DecodeConfig(
        gen_length=512,
        block_length=SHIPPED[name],
        r_f=0.15,
        top_p=0.9,
        max_refine_steps=20,
    )


def test_turbo_is_what_evaluate_measures_under_that_name():
    table, where = settings.read_toml("turbo")
    cfg = settings.build(METHODS[table["method"]], table["decode"], where)
    assert read_entries("methods").method("turbo", cfg.gen_length).cfg == cfg


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_opens_with_its_command(name):
    text = settings.shipped_configs()[name].read_text(encoding="utf-8")
    head = text.split("\n\n")[0]
    assert "python -m lrd_jax.generate --ckpt " in head
    assert f"--config {name} " in head
    assert "published ones; none\n# has been run again here" in head
    assert all(line.startswith("#") for line in head.splitlines())
    assert max(map(len, text.splitlines())) <= 88


@pytest.mark.parametrize("name", SHIPPED)
def test_the_papers_literal_rule_is_valid_once_uncommented(name):
    text = settings.shipped_configs()[name].read_text(encoding="utf-8")
    _, comment = text.split("literal rule is\n#\n")
    rule = tomllib.loads(comment.replace("#", ""))
    cfg = settings.build(DecodeConfig, rule, name)
    assert (cfg.kl_reduction, cfg.stop_entropy) == ("mean", math.inf)
    assert (cfg.tau_refine, cfg.tau_decode) == (0.1, 0.1)
