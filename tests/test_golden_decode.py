"""Published samplers' tokens, and LRD's step by step, through the real converter.

How the numbers were made is said in each file's `source`. LRD's were made with the
paper's literal rules: no stop at an eos, no entropy gate on the KL stop.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from convert.__main__ import main
from lrd_jax.config import BaselineConfig, DecodeConfig, DreamConfig, LladaConfig
from lrd_jax.decode.state import NEVER, Phase, StopReason
from lrd_jax.pretrained import load

GOLDEN = pathlib.Path(__file__).parent / "golden"
INF = float("inf")


def read(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Both tiny checkpoints as users get them: converted, then loaded."""
    folder = tmp_path_factory.mktemp("golden")
    loaded = {}
    for family in ("llada", "dream"):
        src, dst = GOLDEN / f"{family}_tiny", folder / family
        assert main(["--src", str(src), "--dst", str(dst)]) == 0
        loaded[family] = load(dst, dtype=jnp.float32)
    return loaded


@pytest.fixture(scope="session")
def decode(models):
    """`decode(family, cfg, prompts)` -> DecodeResult of NumPy arrays."""

    def run(family, cfg, prompts, width=None, params=None):
        model = models[family]
        ids, mask = toy.left_pad(prompts, width)
        params = model.params if params is None else params
        key = jax.random.key(0)
        return toy.run(cfg, params, ids, mask, key, denoiser=model.denoiser)

    return run


def lrd_config(args):
    """The config that a case's arguments mean."""
    names = {"t_refine": "max_refine_steps", "reduce": "kl_reduction"}
    ablations = {
        "refine": {"max_refine_steps": 0},
        "mix": {"r_f": 0.0},
        "early_stop": {"tau_decode": 0.0},
    }
    settings = dict(stop_at_eos=False, stop_entropy=INF)
    for name, value in args.items():
        if name in ablations:
            assert value is False
            settings |= ablations[name]
        else:
            settings[names.get(name, name)] = value
    return DecodeConfig(**settings)


LRD = [
    pytest.param(family, case, id=f"{family}-{n}")
    for family in ("llada", "dream")
    for n, case in enumerate(read(f"{family}_lrd")["cases"])
]


@pytest.mark.parametrize(("family", "case"), LRD)
def test_lrd_is_that_of_the_golden_file_step_by_step(decode, family, case):
    result = decode(family, lrd_config(case["args"]), [case["prompt"]])
    got = jax.tree.map(lambda x: x[0], result)
    assert got.tokens.tolist() == case["tokens"]
    assert got.num_forwards == case["nfe"]
    has_d = got.phase[: case["nfe"]] != Phase.OPEN
    assert got.phase[: case["nfe"]][has_d].tolist() == case["phase"]
    np.testing.assert_allclose(got.kl[: case["nfe"]][has_d], case["kl"], atol=1e-3)
    assert np.isnan(got.kl[: case["nfe"]][~has_d]).all()
    assert got.refine_steps.tolist() == [b["refine_steps"] for b in case["blocks"]]
    stopped = [b["early_stopped"] for b in case["blocks"]]
    assert (got.block_stop == StopReason.KL).tolist() == stopped
    assert commits(got) == case["order"]


def commits(row):
    """Positions of each commit of phase 2, in order; those of a KL stop left out."""
    block = len(row.tokens) // len(row.block_stop)
    steps = row.commit_step.copy()
    for n, reason in enumerate(row.block_stop):
        if reason == StopReason.KL:
            inside = steps[n * block : (n + 1) * block]
            inside[inside == inside.max()] = NEVER
    return [np.flatnonzero(steps == s).tolist() for s in np.unique(steps[steps >= 0])]


@pytest.mark.parametrize(
    ("family", "numbers"), [("llada", (3, 4)), ("dream", (18, 19)), ("dream", (0, 1))]
)
def test_golden_prompts_in_a_padded_batch_give_the_same_tokens(decode, family, numbers):
    cases = [read(f"{family}_lrd")["cases"][n] for n in numbers]
    assert cases[0]["args"] == cases[1]["args"]
    longer = np.random.default_rng(0).integers(0, 350, 12).tolist()
    prompts = [cases[0]["prompt"], longer, cases[1]["prompt"], longer[:4]]
    result = decode(family, lrd_config(cases[0]["args"]), prompts, width=14)
    assert result.tokens[[0, 2]].tolist() == [case["tokens"] for case in cases]
    assert result.num_forwards[[0, 2]].tolist() == [case["nfe"] for case in cases]


@pytest.mark.parametrize("n", range(len(read("llada_generate")["cases"])))
def test_llada_sampler_gives_the_published_tokens(decode, n):
    golden = read("llada_generate")
    case = golden["cases"][n]
    cfg = LladaConfig(stop_at_eos=False, **case["args"])
    result = decode("llada", cfg, [golden["prompt"]])
    assert result.tokens[0].tolist() == case["tokens"]
    assert result.num_forwards[0] == case["args"]["steps"]


@pytest.mark.parametrize("n", range(len(read("dream_generate")["cases"])))
def test_dream_sampler_gives_the_published_tokens(decode, n):
    golden = read("dream_generate")
    case = golden["cases"][n]
    # They were recorded under the default of transformers' generation config,
    # top_k 50, which changes the scores that order the commits.
    cfg = DreamConfig(
        gen_length=24, stop_at_eos=False, eps=1e-3, sample_top_k=50, **case["args"]
    )
    result = decode("dream", cfg, [golden["prompt"]])
    assert result.tokens[0].tolist() == case["tokens"]
    assert result.num_forwards[0] == case["args"]["steps"]


CACHED = {
    "none": "generate",
    "prefix": "generate_with_prefix_cache",
    "dual": "generate_with_dual_cache",
}


@pytest.mark.parametrize("cache", CACHED)
@pytest.mark.parametrize("threshold", [0.9, 0.4, None])
def test_confidence_threshold_gives_the_published_tokens(decode, threshold, cache):
    """The prompts differ in length, so they also share a padded batch."""
    cases = [
        case
        for case in read("llada_cached")["cases"]
        if case["function"] == CACHED[cache]
        and case["args"].get("threshold") == threshold
    ]
    assert len({len(case["prompt"]) for case in cases}) == len(cases) == 2
    cfg = BaselineConfig(
        gen_length=32,
        block_length=8,
        commit_order="confidence",
        threshold=threshold,
        stop_at_eos=False,
        cache=cache,
    )
    result = decode("llada", cfg, [case["prompt"] for case in cases])
    assert result.tokens.tolist() == [case["tokens"] for case in cases]
    assert (result.num_forwards <= [case["nfe"] for case in cases]).all()
    num_full = result.num_forwards if cache == "none" else 4  # One a block.
    assert (result.num_full_forwards == num_full).all()


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_bfloat16_model_decodes(models, decode, family):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), models[family].params)
    prompt = read(f"{family}_lrd")["cases"][0]["prompt"]
    cfg = DecodeConfig(gen_length=8, stop_at_eos=False)
    result = decode(family, cfg, [prompt, prompt[:5]], params=params)
    assert result.committed.all()
    assert not np.isin(result.tokens, models[family].denoiser.mask_id).any()
    forwards = np.arange(result.kl.shape[1]) < result.num_forwards[:, None]
    has_d = forwards & (result.phase != Phase.OPEN)
    assert np.isfinite(result.kl[has_d]).all()
