"""Method files and sweeps."""

import math

import pytest

from lrd_jax.config import BaselineConfig, DecodeConfig, DreamConfig, LladaConfig
from lrd_jax.errors import UserError
from lrd_jax.evaluation.methods import choose, parse_sweep, read_entries, swept


def entries(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return read_entries(str(path))


def error(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_shipped_methods_are_those_of_the_table():
    methods = {m.name: m.cfg for m in choose(["all"], read_entries("methods"), 64)}
    window = {"gen_length": 64}
    soft = DecodeConfig(threshold=0.9, commit_order="confidence", **window)
    hard = BaselineConfig(threshold=0.9, commit_order="confidence", **window)
    assert methods == {
        "baseline": BaselineConfig(stop_at_eos=False, **window),
        "baseline_eos": BaselineConfig(**window),
        "llada_half": LladaConfig(steps=32, **window),
        "threshold": hard,
        "lrd_paper": DecodeConfig(stop_entropy=math.inf, stop_at_eos=False, **window),
        "lrd": DecodeConfig(**window),
        "no_refinement": DecodeConfig(max_refine_steps=0, **window),
        "no_mixing": DecodeConfig(r_f_decode=0.0, **window),
        "no_early_stop": DecodeConfig(tau_decode=0.0, **window),
        "threshold_soft": soft,
        "entropy_bound_soft": DecodeConfig(entropy_bound=0.1, **window),
        "klass_soft": DecodeConfig(klass_conf=0.9, **window),
        "turbo": BaselineConfig(
            threshold=0.99, commit_order="confidence", trim_tail=True, **window
        ),
    }


def test_an_entry_beats_a_decode_method_and_both_can_be_named(tmp_path):
    mine = entries(tmp_path, '[lrd]\nmethod = "lrd"\nr_f = 0.5\n')
    chosen = choose(["dream", "lrd"], mine, 8)
    assert [method.cfg for method in chosen] == [
        DreamConfig(gen_length=8),
        DecodeConfig(gen_length=8, r_f=0.5),
    ]
    assert [method.name for method in choose(["all"], mine, 8)] == ["lrd"]


def test_a_share_of_the_window(tmp_path):
    mine = entries(tmp_path, '[a]\nmethod = "lrd"\nblock_length = "gen_length / 4"\n')
    assert choose(["a"], mine, 32)[0].cfg.block_length == 8
    message = error(choose, ["a"], mine, 30)
    assert "[a] block_length = 'gen_length / 4'" in message
    assert "30 is not a multiple of 4" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no methods"),
        ("r_f = 1", "`r_f` must be a table, [r_f]"),
        ("[a]\nr_f = 0.1", "[a] `method` must be one of lrd, baseline, llada, dream"),
        ('[a]\nmethod = "lrt"', "got 'lrt'"),
        ('["a/b"]\nmethod = "lrd"', "[a/b] cannot be a method's name"),
        ('[all]\nmethod = "lrd"', "not 'all'"),
        (
            '[a]\nmethod = "lrd"\nr_g = 1',
            "[a]: unknown setting 'r_g'; did you mean r_f",
        ),
        ('[a]\nmethod = "lrd"\nr_f = 2.0', "[a]: `r_f` must be in [0, 1], got 2.0"),
        ('[a]\nmethod = "baseline"\nr_f = 0', "unknown setting 'r_f'"),
        ('[a]\nmethod = "lrd"\ngen_length = 8', "give `--gen-length`"),
        ("[a", "not valid TOML"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    def read():
        choose(["all"], entries(tmp_path, text), 8)

    found = error(read)
    assert message in found
    assert "mine.toml" in found


def test_mistakes_in_names():
    shipped = read_entries("methods")
    assert "no method 'lrt'" in error(choose, ["lrd", "lrt"], shipped, 8)
    assert "'lrd' is given twice" in error(choose, ["all", "lrd"], shipped, 8)


def test_a_sweep_changes_one_setting():
    (method,) = choose(["no_mixing"], read_entries("methods"), 8)
    made = swept(method, parse_sweep("top-p=0.1, 1.0"))
    assert [m.name for m in made] == ["no_mixing top_p=0.1", "no_mixing top_p=1.0"]
    assert [m.cfg for m in made] == [
        DecodeConfig(gen_length=8, r_f_decode=0.0, top_p=0.1),
        DecodeConfig(gen_length=8, r_f_decode=0.0, top_p=1.0),
    ]
    assert {m.entry for m in made} == {"no_mixing"}


def test_a_sweep_over_words_switches_and_infinity():
    assert parse_sweep("kl_reduction=mean,sum").values == ("mean", "sum")
    assert parse_sweep("stop_at_eos=true,false").values == (True, False)
    assert parse_sweep("stop_entropy=0.1,inf").values == (0.1, math.inf)


@pytest.mark.parametrize("text", ["r_f", "r_f=", "=1", "r_f=1,,2", ""])
def test_sweeps_that_are_none(text):
    assert "SETTING=VALUE" in error(parse_sweep, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r_g=1", "method lrd: unknown setting 'r_g'; did you mean r_f"),
        ("r_f=0.0,2.0", "`r_f` must be in [0, 1], got 2.0"),
        ("gen_length=8", "gen_length is the same for all"),
    ],
)
def test_sweeps_that_cannot_be(text, message):
    (method,) = choose(["lrd"], read_entries("methods"), 8)
    assert message in error(swept, method, parse_sweep(text))


def test_a_value_twice():
    assert "0.1 is given twice" in error(parse_sweep, "r_f=0.1,0.10")
