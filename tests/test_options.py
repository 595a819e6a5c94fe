"""Every setting of every decode method does something and refuses nonsense."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import toy
from toy import INF, LIKES_EOS, PLAIN, SOFT

from lrd_jax import config, settings
from lrd_jax.config import (
    METHODS,
    BaselineConfig,
    DecodeConfig,
    DreamConfig,
    LladaConfig,
)
from lrd_jax.decode.state import Phase, StopReason
from lrd_jax.errors import UserError

NAN = float("nan")


class Effect(NamedTuple):
    """Changing `change` turns a result `a` into `b`, and `shows(a, b)` is True.

    `base` is in force before and after, `liked` goes to the toy's weights.
    """

    change: dict
    shows: Callable
    base: dict | None = None
    liked: dict | None = None


def fewer_forwards(a, b):
    return b.num_forwards.sum() < a.num_forwards.sum()


def more_forwards(a, b):
    return fewer_forwards(b, a)


def more_full_forwards(a, b):
    return (b.num_full_forwards > a.num_full_forwards).all()


def block_by_block(a, b):
    def in_order(x):
        return (x.commit_step[:, :4].max(1) < x.commit_step[:, 4:].min(1)).all()

    return in_order(b) and not in_order(a)


def less_likely_tokens(a, b):
    return b.commit_prob.mean() < 0.9 * a.commit_prob.mean()


def likelier_tokens(a, b):
    return less_likely_tokens(b, a)


def first_commit(values, result):
    """`values` at each row's first committed position."""
    return np.take_along_axis(values, result.commit_step.argmin(1)[:, None], axis=1)


def surer_first(a, b):
    """By probability instead of entropy."""
    prob = [first_commit(x.commit_prob, x) for x in (a, b)]
    entropy = [first_commit(x.commit_entropy, x) for x in (a, b)]
    # Where both begin with the same position, two programs differ by rounding.
    surer = (prob[1] >= prob[0] - 1e-6).all()
    likelier = (entropy[1] >= entropy[0] - 1e-6).all()
    return surer and likelier and other_order(a, b)


def kl_of(result, phase):
    return result.kl[result.phase == phase]


def other_order(a, b):
    return (a.commit_step != b.commit_step).any()


def ends_committed_later(a, b):
    def share(x):
        """How many positions that end the text are in the first half."""
        is_end = np.isin(x.tokens, (toy.EOS, toy.TURN))
        assert is_end.any()
        return (x.commit_step[is_end] < 4).mean()

    return share(b) < share(a)


WINDOW = dict(
    gen_length=Effect(
        dict(gen_length=6),
        lambda a, b: (a.tokens.shape[1], b.tokens.shape[1]) == (8, 6),
    ),
    temperature=Effect(dict(temperature=3.0), less_likely_tokens),
    stop_at_eos=Effect(dict(stop_at_eos=True), fewer_forwards, liked=LIKES_EOS),
)
HOT = dict(temperature=3.0)
COMMITS = dict(
    block_length=Effect(dict(block_length=4), block_by_block),
    kl_reduction=Effect(
        dict(kl_reduction="sum"),
        lambda a, b: np.allclose(b.kl, 8 * a.kl, rtol=1e-4, equal_nan=True),
    ),
    commit_order=Effect(dict(commit_order="confidence"), surer_first),
    tokens_per_step=Effect(
        dict(tokens_per_step=2),
        lambda a, b: (b.num_forwards == a.num_forwards - 4).all(),
    ),
    threshold=Effect(dict(threshold=0.5), fewer_forwards),
    entropy_bound=Effect(dict(entropy_bound=2.0), fewer_forwards),
    klass_conf=Effect(
        dict(klass_conf=0.3),
        fewer_forwards,
        base=dict(klass_conf=0.99, klass_kl=0.5, klass_steps=1),
    ),
    klass_kl=Effect(
        dict(klass_kl=1e-6),
        more_forwards,
        base=dict(klass_conf=0.3, klass_kl=0.5, klass_steps=1),
    ),
    klass_steps=Effect(
        dict(klass_steps=4),
        more_forwards,
        base=dict(klass_conf=0.3, klass_kl=0.5, klass_steps=1),
    ),
    sample_top_p=Effect(dict(sample_top_p=0.2), likelier_tokens, base=HOT),
    sample_top_k=Effect(dict(sample_top_k=1), likelier_tokens, base=HOT),
    max_steps=Effect(
        dict(max_steps=3),
        lambda a, b: (b.num_forwards == 3).all() and (a.num_forwards > 3).all(),
    ),
    trim_tail=Effect(
        dict(trim_tail=True),
        fewer_forwards,
        base=dict(stop_at_eos=True),
        liked=LIKES_EOS,
    ),
)
CACHED = dict(
    cache=Effect(
        dict(cache="dual"),
        lambda a, b: (
            (a.num_full_forwards == a.num_forwards).all()
            and (b.num_full_forwards == 1).all()
        ),
    ),
    cache_refresh_steps=Effect(
        dict(cache_refresh_steps=3),
        lambda a, b: (b.num_full_forwards == (b.num_forwards + 2) // 3).all(),
        base=dict(cache="prefix"),
    ),
    cache_refresh_kl=Effect(
        dict(cache_refresh_kl=0.5), more_full_forwards, base=dict(cache="dual")
    ),
)
# What it changes is not in a result: tests/test_cache.py.
SHOWN_ELSEWHERE = {"cache_lane"}
# Every D is below it: phase 2 stops as soon as the other conditions let it.
ALWAYS_CALM = dict(tau_decode=99.0)
REFINING = dict(
    r_f=Effect(
        dict(r_f=0.0),
        lambda a, b: (
            (kl_of(a, Phase.REFINE) > 1e-4).all()
            and (kl_of(b, Phase.REFINE) == 0).all()
        ),
        base=SOFT,
    ),
    r_f_decode=Effect(
        dict(r_f_decode=0.0),
        lambda a, b: (
            np.allclose(kl_of(a, Phase.REFINE), kl_of(b, Phase.REFINE), 1e-3)
            and not np.allclose(kl_of(a, Phase.COMMIT), kl_of(b, Phase.COMMIT), 1e-3)
        ),
        base=SOFT,
    ),
    top_p=Effect(
        dict(top_p=0.3),
        lambda a, b: (b.nucleus_size[:, :2] < a.nucleus_size[:, :2]).all(),
    ),
    tau_refine=Effect(dict(tau_refine=2.0), fewer_forwards, base=SOFT),
    tau_decode=Effect(dict(tau_decode=0.3), fewer_forwards),
    max_refine_steps=Effect(
        dict(max_refine_steps=2),
        lambda a, b: (a.refine_steps == 5).all() and (b.refine_steps == 2).all(),
        base=dict(tau_refine=0.0),
    ),
    refine_per_commit=Effect(
        dict(refine_per_commit=2), lambda a, b: (b.refine_steps == 2 * 8).all()
    ),
    # The first D has no change: two refinements at least.
    kl_criterion=Effect(
        dict(kl_criterion="delta"),
        lambda a, b: (a.refine_steps == 1).all() and (b.refine_steps >= 2).all(),
        base=dict(tau_refine=2.0),
    ),
    kl_patience=Effect(
        dict(kl_patience=3),
        lambda a, b: (b.num_forwards == a.num_forwards + 2).all(),
        base=ALWAYS_CALM,
    ),
    stop_entropy=Effect(
        dict(stop_entropy=0.0),
        lambda a, b: (
            (a.stop_reason == StopReason.KL).all()
            and (b.stop_reason == StopReason.COMMITTED).all()
        ),
        base=ALWAYS_CALM,
    ),
)
LLADA = dict(
    steps=Effect(dict(steps=4), lambda a, b: (b.num_forwards == 4).all()),
    block_length=COMMITS["block_length"],
    cfg_scale=Effect(dict(cfg_scale=3.0), lambda a, b: (a.tokens != b.tokens).any()),
    remasking=Effect(dict(remasking="random"), other_order),
    logits_eos_inf=Effect(
        dict(logits_eos_inf=True),
        lambda a, b: toy.EOS in a.tokens and toy.EOS not in b.tokens,
        liked=LIKES_EOS,
    ),
    confidence_eos_eot_inf=Effect(
        dict(confidence_eos_eot_inf=True), ends_committed_later, liked=LIKES_EOS
    ),
)
RANDOM_ORDER = HOT | dict(alg="origin")
DREAM = dict(
    steps=Effect(dict(steps=4), lambda a, b: (b.num_forwards == 4).all()),
    alg=Effect(dict(alg="maskgit_plus"), surer_first),
    alg_temp=Effect(dict(alg_temp=1.0), other_order),
    # Timesteps that hardly move commit nothing before the last step.
    eps=Effect(
        dict(eps=0.9),
        lambda a, b: (b.commit_step == 3).all() and (a.commit_step < 3).any(),
        base=dict(steps=4),
    ),
    sample_top_p=Effect(dict(sample_top_p=0.2), likelier_tokens, base=RANDOM_ORDER),
    sample_top_k=Effect(dict(sample_top_k=1), likelier_tokens, base=RANDOM_ORDER),
)
EFFECTS = {
    DecodeConfig: WINDOW | COMMITS | CACHED | REFINING,
    BaselineConfig: WINDOW | COMMITS | CACHED,
    LladaConfig: WINDOW | LLADA,
    DreamConfig: WINDOW | DREAM,
}
# The first three make the baseline; the others have nothing to act on there.
FIXED_IN_BASELINE = dict(
    r_f=0,
    max_refine_steps=0,
    tau_decode=0,
    r_f_decode=None,
    refine_per_commit=0,
    top_p=DecodeConfig.top_p,
    tau_refine=DecodeConfig.tau_refine,
    kl_criterion=DecodeConfig.kl_criterion,
    kl_patience=DecodeConfig.kl_patience,
    stop_entropy=DecodeConfig.stop_entropy,
)


def base_of(cls):
    return PLAIN if cls is DecodeConfig else dict(gen_length=8, stop_at_eos=False)


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls, table in EFFECTS.items() for name in table]
)
def test_changing_a_setting_changes_the_decode_as_it_says(cls, name):
    effect = EFFECTS[cls][name]
    assert name in effect.change
    base = base_of(cls) | (effect.base or {})
    # LLaDA's and Dream's samplers could leave positions open by choosing the mask.
    liked = {"mask": -20.0} | (effect.liked or {})
    before, after = (
        toy.decode(cls(**changed), toy.prompts(0), **liked)
        for changed in (base, base | effect.change)
    )
    assert effect.shows(before, after)


def fields_of(cls):
    return {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("cls", METHODS.values())
def test_no_setting_is_forgotten(cls):
    covered = set(EFFECTS[cls]) | (SHOWN_ELSEWHERE & fields_of(cls))
    if cls is BaselineConfig:
        covered |= set(FIXED_IN_BASELINE)
    assert covered == fields_of(cls)
    refused = set(BAD[cls]) | set(FIXED_IN_BASELINE if cls is BaselineConfig else ())
    assert refused == fields_of(cls)


COUNT = [0, -1, 2.0, "2", True]  # For whole numbers from 1 on.
FLOAT = [NAN, "1", True]
SHARE = [-0.1, 1.1, *FLOAT]
POSITIVE = [-0.1, *FLOAT]
FINITE = [INF, *POSITIVE]
FLAG = [1, None, "yes"]
BAD_WINDOW = dict(
    gen_length=[*COUNT, None], temperature=[1e-7, *FINITE, None], stop_at_eos=FLAG
)
BAD_SAMPLING = dict(sample_top_p=[0, 0.0, None, *SHARE], sample_top_k=COUNT)
BAD_DECODE = dict(
    block_length=[*COUNT, 3, 16],
    r_f=[*SHARE, None],
    r_f_decode=SHARE,
    top_p=[*SHARE, None],
    tau_refine=[*POSITIVE, None],
    tau_decode=[*POSITIVE, None],
    max_refine_steps=[-1, 2.0, "2", True, None],
    refine_per_commit=[-2, 1.0, "1", True, None],
    kl_reduction=["median", 1, None],
    kl_criterion=["ratio", 1, None],
    kl_patience=[*COUNT, None],
    stop_entropy=[*POSITIVE, None],
    commit_order=["random", 1, None],
    tokens_per_step=[*COUNT, None],
    threshold=SHARE,
    entropy_bound=POSITIVE,
    klass_conf=SHARE,
    klass_kl=[0, 0.0, *POSITIVE],
    klass_steps=COUNT,
    max_steps=COUNT,
    cache=["both", 1, None],
    cache_refresh_steps=COUNT,
    cache_refresh_kl=POSITIVE,
    cache_lane=[*COUNT, None],
    trim_tail=FLAG,
)
BAD = {
    DecodeConfig: BAD_WINDOW | BAD_SAMPLING | BAD_DECODE,
    BaselineConfig: {
        name: values
        for name, values in (BAD_WINDOW | BAD_SAMPLING | BAD_DECODE).items()
        if name not in FIXED_IN_BASELINE
    },
    LladaConfig: BAD_WINDOW
    | dict(
        steps=[*COUNT, 5],  # Not a multiple of the two blocks.
        block_length=[*COUNT, 3, 16],
        cfg_scale=[*FINITE, None],
        remasking=["entropy", 1, None],
        logits_eos_inf=FLAG,
        confidence_eos_eot_inf=FLAG,
    ),
    DreamConfig: BAD_WINDOW
    | BAD_SAMPLING
    | dict(
        steps=COUNT,
        alg=["random", 1, None],
        alg_temp=[1e-7, *FINITE, None],
        eps=[0, 0.0, 1, 1.0, None, *POSITIVE],
    ),
}
# Without these a value could be refused for another reason.
NEEDS = dict(
    klass_kl=dict(klass_conf=0.9),
    klass_steps=dict(klass_conf=0.9),
    sample_top_p=dict(temperature=1.0),
    sample_top_k=dict(temperature=1.0),
    steps=dict(block_length=4),
    cache_refresh_steps=dict(cache="dual"),
    cache_refresh_kl=dict(cache="dual"),
    cache_lane=dict(cache="dual"),
)


@pytest.fixture(scope="module")
def unchecked():
    """The classes without the shape checker of these tests, which would answer first.

    Users have no such checker.
    """
    spec = importlib.util.spec_from_file_location("plain_config", config.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def refusal(make, *args, **kwargs):
    with pytest.raises(UserError) as error:
        make(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls, table in BAD.items() for name in table]
)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(unchecked, cls, name):
    needs = NEEDS.get(name, {})
    given = {"gen_length": 8} | {k: v for k, v in needs.items() if k in fields_of(cls)}
    for value in BAD[cls][name]:
        changed = given | {name: value}
        message = refusal(getattr(unchecked, cls.__name__), **changed)
        assert f"`{name}`" in message
        assert repr(value) in message


@pytest.mark.parametrize(("name", "value"), FIXED_IN_BASELINE.items())
def test_what_the_baseline_fixes_or_has_no_use_for_cannot_be_set(name, value):
    assert getattr(BaselineConfig(), name) == value
    message = refusal(settings.build, BaselineConfig, {name: value}, "run.toml")
    assert f"unknown setting '{name}'" in message


RULES = dict(threshold=0.9, entropy_bound=0.5, klass_conf=0.9)


@pytest.mark.parametrize("cls", [DecodeConfig, BaselineConfig])
@pytest.mark.parametrize("left_out", [*RULES, None])
def test_two_multi_commit_rules_at_once_are_refused(cls, left_out):
    given = {name: value for name, value in RULES.items() if name != left_out}
    message = refusal(cls, **given)
    for name, value in given.items():
        assert f"`{name}` = {value}" in message


@pytest.mark.parametrize(
    ("cls", "given", "name"),
    [
        (DecodeConfig, dict(klass_kl=0.1), "klass_kl"),
        (DecodeConfig, dict(klass_steps=3), "klass_steps"),
        (DecodeConfig, dict(sample_top_p=0.5), "sample_top_p"),
        (DecodeConfig, dict(sample_top_k=5), "sample_top_k"),
        (DecodeConfig, dict(refine_per_commit=-1, max_refine_steps=0), "max_refine"),
        (DecodeConfig, dict(refine_per_commit=3, max_refine_steps=0), "max_refine"),
        (DecodeConfig, dict(cache_refresh_steps=3), "cache_refresh_steps"),
        (BaselineConfig, dict(cache_refresh_kl=0.5), "cache_refresh_kl"),
        (DecodeConfig, dict(cache_lane=2), "cache_lane"),
        (DreamConfig, dict(alg="origin", alg_temp=0.5), "alg_temp"),
        (DreamConfig, dict(alg="origin", sample_top_p=0.5), "sample_top_p"),
        (DreamConfig, dict(alg="origin", sample_top_k=5), "sample_top_k"),
        (
            LladaConfig,
            dict(remasking="random", confidence_eos_eot_inf=True),
            "confidence_eos_eot_inf",
        ),
    ],
)
def test_a_setting_that_would_do_nothing_beside_another_is_refused(cls, given, name):
    assert name in refusal(cls, **given)


@pytest.mark.parametrize(
    ("cls", "given"),
    [
        (DecodeConfig, dict(r_f=1, top_p=0, tau_refine=0, tau_decode=INF, threshold=0)),
        (DecodeConfig, dict(r_f=0, top_p=1, stop_entropy=INF, entropy_bound=0)),
        (DecodeConfig, dict(max_refine_steps=0, klass_conf=1, max_steps=1)),
        (
            DecodeConfig,
            dict(cache="prefix", cache_refresh_steps=1, cache_refresh_kl=0),
        ),
        (BaselineConfig, dict(threshold=1, tokens_per_step=1, temperature=0)),
        (LladaConfig, dict(gen_length=8, block_length=4, steps=2, cfg_scale=0)),
        (DreamConfig, dict(steps=1, eps=0.999, sample_top_k=1)),
    ],
)
def test_the_ends_of_the_ranges_are_taken(unchecked, cls, given):
    cfg = getattr(unchecked, cls.__name__)(**given)
    assert all(getattr(cfg, name) == value for name, value in given.items())
