"""The plan: its formulas against compiled programs, and every line that it prints."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from test_aot import SMALL

from lrd_jax import aot, builtin, costs, model_file, plan, sharding
from lrd_jax.collectives import Collectives
from lrd_jax.config import DecodeConfig
from lrd_jax.costs import Job
from lrd_jax.hardware import DEVICES, GIB
from lrd_jax.model import backbone
from lrd_jax.shapes import SHAPES

# GiB of temporaries of one v5p chip, as libtpu 0.0.42.1 compiled them: `python -m
# lrd_jax.aot --chip v5p`, batch 1, prompt 512, window 1024, bfloat16.
COMPILED = {
    ("llada-8b", None): 0.40,
    ("dream-7b", None): 0.36,
    ("llada-8b", 32): 0.32,
    ("dream-7b", 32): 0.32,
}


def job(model=SMALL, batch=2, split=1, quantization=None, **settings):
    cfg = DecodeConfig(**{"gen_length": 64, **settings})
    return Job(model, cfg, batch, 64, split, quantization)


@pytest.mark.parametrize(("name", "block"), COMPILED)
def test_temporaries_are_near_the_compiled_ones(name, block):
    cfg = DecodeConfig(gen_length=1024, block_length=block)
    ours = costs.temporary_bytes(Job(SHAPES[name], cfg, 1, 512)) / GIB
    assert ours == pytest.approx(COMPILED[name, block], rel=0.15)


def test_temporaries_are_near_those_of_a_real_program():
    """On this CPU, at shapes whose float32 scores or logits outweigh the rest."""
    model = dataclasses.replace(SMALL, vocab_size=4096, max_length=1024)
    one = job(model, batch=1, gen_length=256)
    device = jax.devices("cpu")[0]
    real = aot.decode_memory(model, one.cfg, device, 1, one.prompt)
    assert 1 / 3 < costs.temporary_bytes(one) / real.temporaries < 3
    assert costs.memory(one).weights == pytest.approx(real.weights, rel=0.01)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_the_cache_is_the_real_one(cache):
    one = job(batch=3, cache=cache)
    params = backbone.abstract_params(SMALL, jnp.bfloat16)
    real = jax.eval_shape(
        lambda: backbone.init_cache(SMALL, params, 3, one.length, jnp.bfloat16)
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(real))
    assert costs.cache_bytes(one) == size > 0
    split = dataclasses.replace(one, split=2)
    assert costs.cache_bytes(split) == size // 2
    assert costs.cache_bytes(job()) == 0


def test_a_split_shares_the_work_and_pays_in_collectives():
    whole, half = costs.costs(job()), costs.costs(job(split=2))
    assert whole.collectives == Collectives()
    # All that is split is halved; norms are whole.
    assert half.flops == pytest.approx(whole.flops / 2, rel=0.01)
    assert half.weights == sharding.weight_bytes(SMALL, jnp.bfloat16, 2)
    assert half.weights < 0.51 * whole.weights
    assert half.temporaries < whole.temporaries
    # Each layer sums the parts of attention and MLP, [B, T, D] in bfloat16.
    hidden = 2 * SMALL.num_layers * 2 * 128 * SMALL.d_model * 2
    assert half.collectives.reduced >= hidden
    assert half.collectives.number > 2 * SMALL.num_layers
    # Nothing of size V crosses.
    assert half.collectives.gathered < 2 * 64 * SMALL.vocab_size * 4


def test_int8_is_less_to_hold_and_to_read():
    whole, rounded = costs.memory(job()), costs.memory(job(quantization="int8"))
    assert rounded.weights < whole.weights
    assert rounded.traffic < whole.traffic
    assert rounded.temporaries == whole.temporaries


def test_the_roofline_is_the_slower_of_two_and_the_links():
    found = costs.Costs(0, 0, 0, int(2e15), int(1e12), Collectives())
    device = dataclasses.replace(DEVICES["v5p"], flops=1e15, bandwidth=1e12, link=1e11)
    assert found.seconds(device, 1) == 2
    slow = dataclasses.replace(found, traffic=int(3e12))
    assert slow.seconds(device, 1) == 3
    linked = dataclasses.replace(
        found, collectives=Collectives(1, reduced=int(1e11), gathered=int(1e11))
    )
    assert linked.seconds(device, 2) == pytest.approx(2 + (2 * 1 + 1) / 2)


SMALL_COSTS = costs.Costs(GIB, GIB // 2, GIB // 4, 10**12, GIB, Collectives(5, 2**20))


def run(monkeypatch, argv, found=SMALL_COSTS, compiled=None):
    jobs = []
    monkeypatch.setattr(costs, "costs", lambda job: jobs.append(job) or found)

    def group_memory(job, chip):
        if compiled is None:
            raise ImportError
        return compiled

    monkeypatch.setattr(aot, "group_memory", group_memory)
    return plan.main(argv.split()), jobs[-1]


def test_every_line_says_where_it_comes_from(monkeypatch, capsys):
    argv = "--model dream-7b-base --device v5p --mesh data=2,model=8 --batch-size 6"
    code, one = run(monkeypatch, argv + " --tokens-per-forward 2.5")
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert (one.batch, one.split) == (3, 8)
    assert "whole on every device: attention: 28 heads" in lines[1]
    table = {line.split()[0]: line for line in lines if line.endswith("]")}
    assert (
        list(table)
        == (
            "weights cache temporaries memory FLOPs traffic collectives roofline useful"
        ).split()
    )
    assert "1.75 of 95.0 GiB: fits" in table["memory"]
    assert "[formula]" in table["temporaries"]
    seconds = SMALL_COSTS.seconds(DEVICES["v5p"], 8)
    assert f"{6 * 2.5 / seconds:.1f} tokens/s" in table["useful"]
    assert "cloud.google.com/tpu/docs/v5p" in table["roofline"]


def test_what_libtpu_says_goes_before_the_formula(monkeypatch, capsys):
    argv = "--model llada-8b-instruct --device v5p"
    compiled = aot.Memory(weights=GIB, temporaries=3 * GIB)
    code, _ = run(monkeypatch, argv, compiled=compiled)
    out = capsys.readouterr().out
    assert code == 0
    assert "2.50 GiB a device" in out  # The cache is no temporary.
    assert "[compiled by libtpu]" in out
    run(monkeypatch, argv + " --formula", compiled=compiled)
    assert "[compiled by libtpu]" not in capsys.readouterr().out
    run(monkeypatch, argv.replace("v5p", "h100"), compiled=compiled)
    assert "[compiled by libtpu]" not in capsys.readouterr().out


def test_what_does_not_fit_comes_with_what_would(monkeypatch, capsys):
    argv = "--model llada-8b-instruct --device v5e --batch-size 4 --gen-length 512"
    too_large = dataclasses.replace(SMALL_COSTS, weights=15 * GIB)
    code, one = run(monkeypatch, argv, found=too_large)
    lines = capsys.readouterr().out.splitlines()
    assert code == plan.NOT_FITTING
    assert any("DOES NOT FIT" in line for line in lines)
    assert "would fit: --mesh data=1,model=2" in lines
    assert "would fit: --quantize int8" in lines
    # And what is said to fit does, by the plan itself.
    device = DEVICES["v5e"]
    assert not costs.memory(one).fits(device)
    for changes in ({"split": 2}, {"quantization": "int8"}):
        assert costs.memory(dataclasses.replace(one, **changes)).fits(device)


def test_auto_is_the_smallest_split_that_fits(monkeypatch):
    argv = "--model llada-8b-base --mesh auto --device "
    assert run(monkeypatch, argv + "v5e")[1].split == 2
    assert run(monkeypatch, argv + "v5e --quantize int8")[1].split == 1
    assert run(monkeypatch, argv + "h100")[1].split == 1


def test_every_setting_arrives(monkeypatch):
    argv = (
        "--model tiny --device a100 --prompt 8 --gen-length 32 --block-length 16 "
        "--cache dual --quantize int8 --quantize-embeddings --batch-size 3"
    )
    _, one = run(monkeypatch, argv)
    assert (one.prompt, one.cfg.gen_length, one.window) == (8, 32, 16)
    assert (one.cfg.cache, one.quantization, one.batch) == ("dual", "int8+embed", 3)


@pytest.mark.parametrize(
    ("stored", "flags", "planned"),
    [
        ("int8", "", "int8"),
        ("int8+embed", "--quantize int8", "int8+embed"),
        ("int8", "--quantize int8 --quantize-embeddings", "int8+embed"),
    ],
)
def test_a_checkpoint_is_planned_as_it_is_stored(stored, flags, planned, monkeypatch):
    file = dataclasses.replace(
        model_file.read(builtin.find("tiny")), quantization=stored
    )
    monkeypatch.setattr(model_file, "read", lambda path: file)
    argv = f"--model tiny --device a100 --prompt 8 --gen-length 32 {flags}"
    assert run(monkeypatch, argv)[1].quantization == planned


def test_a_checkpoint_in_float32_is_refused(monkeypatch, capsys):
    file = dataclasses.replace(model_file.read(builtin.find("tiny")), dtype="float32")
    monkeypatch.setattr(model_file, "read", lambda path: file)
    assert plan.main(["--model", "tiny", "--device", "a100"]) == 2
    err = capsys.readouterr().err
    assert "`--model tiny`: its weights are in float32" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--model gpt", "`--model` must be a checkpoint or one of llada-8b-base"),
        (
            "--model tiny --gen-length 256",
            "`--gen-length` must be below 256, the context",
        ),
        ("--model tiny --gen-length 64 --prompt 0", "`--prompt` must be 1 to"),
        (
            "--model tiny --gen-length 64 --prompt 8 --batch-size 0",
            "`--batch-size` must be 1 to 29826161, rows of 72 positions, got 0.",
        ),
        ("--model tiny --mesh x=2", "`--mesh` must be"),
        ("--model tiny --tokens-per-forward 0", "`--tokens-per-forward` must be"),
        ("--model tiny --quantize-embeddings", "give both"),
        ("--model tiny --gen-length 64 --block-length 33", "block_length"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv, told, capsys):
    assert plan.main(["--device", "v5e", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert told in err
    assert err.count("\n") == 1
