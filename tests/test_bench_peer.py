"""The peer of the benchmark: the same logits and the same tokens as ours."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from toy_bench import DREAM, LLADA, model_file

from lrd_jax.batches import Row, stack
from lrd_jax.bench import main
from lrd_jax.benchmark import ours, torch_peer
from lrd_jax.benchmark.parts import plain_forward
from lrd_jax.benchmark.request import parse
from lrd_jax.benchmark.subject import make_subject
from lrd_jax.config import BaselineConfig, LladaConfig

torch = pytest.importorskip("torch")

G = 8
# Peaked enough for a threshold, and for ends of texts, to matter.
SHARP = "--sharpness 8 --prompt 7 --batch-size 3 --gen-length 8"


@functools.cache
def subject(folder, family):
    """The toy with three prompts, two of them padded."""
    fields = {"llada": LLADA, "dream": DREAM}[family]
    made = make_subject(parse(["--model", model_file(folder, fields), *SHARP.split()]))
    rows = [
        Row(id=i, line=i, ids=ids[i:].tolist())
        for i, ids in enumerate(made.batches[0].ids)
    ]
    batch = stack(rows, 9, made.config.pad_id, infill=False)
    return dataclasses.replace(made, batches=[batch])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=["llada", "dream"])
def model(request, folder):
    made = subject(folder, request.param)
    return made, torch_peer.build(made.config, made.params)


def test_a_forward_gives_the_same_logits(model):
    made, peer = model
    batch = made.batches[0]
    want = plain_forward(made.denoiser, made.params, batch, G)()
    found = torch_peer.forward_run(peer, batch, G)()
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-4, atol=1e-3)


LOOPS = {
    "published": (
        functools.partial(torch_peer.published_loop, gen_length=G),
        LladaConfig(gen_length=G, stop_at_eos=False),
    ),
    "threshold": (
        functools.partial(torch_peer.threshold_loop, gen_length=G, threshold=0.6),
        BaselineConfig(gen_length=G, threshold=0.6, commit_order="confidence"),
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_gives_the_same_tokens_forwards_and_count(model, loop):
    made, peer = model
    decode, cfg = LOOPS[loop]
    found = torch_peer.decode_all(made, functools.partial(decode, peer))
    want = ours.compile_method(made, cfg, seed=0).run()
    np.testing.assert_array_equal(found.tokens, want.tokens)
    np.testing.assert_array_equal(found.num_forwards, want.num_forwards)
    np.testing.assert_array_equal(found.useful_tokens, want.useful_tokens)
    assert found.turns == want.turns
    if loop == "threshold":
        assert found.num_forwards.min() < G
    else:
        assert np.all(found.num_forwards == G)


def test_padding_that_no_row_needs_is_left_out(folder):
    batch = subject(folder, "llada").batches[0]
    assert batch.ids.shape[1] == 9
    ids, real = torch_peer.prompt_tensors(batch)
    assert ids.shape == real.shape == (3, 7)
    assert real.sum(1).tolist() == [7, 6, 5]


@pytest.fixture(scope="module")
def report(folder):
    output = folder / "report.json"
    flags = "--peer torch --methods lrd,threshold --repeats 1 " + SHARP
    argv = ["--model", model_file(folder, LLADA), "--output", str(output)]
    assert main([*argv, *flags.split()]) == 0
    return json.loads(output.read_text())


def test_the_peer_is_compared_with_methods_of_the_same_rule(report):
    loops = report["peer"]["loops"]
    # The first is added, the second is among the methods already.
    assert list(report["methods"]) == ["lrd", "threshold", "llada"]
    assert {name: loop["same_as"] for name, loop in loops.items()} == {
        "llada": "llada",
        "threshold": "threshold",
    }
    assert all(loop["rows_that_differ"] == 0 for loop in loops.values())
    assert loops["llada"]["forwards_per_prompt"] == G
    assert report["settings"]["versions"]["torch"]


def test_forward_and_peak_are_compared(report):
    peer = report["peer"]
    assert peer["largest_logit_difference"] < 1e-2
    ratio, peaks = (peer[k]["median"] for k in ("forward_ratio", "peak_ratio"))
    equal = peer["forward_ratio_at_equal_peak"]["median"]
    assert equal == pytest.approx(ratio / peaks)  # One round.
    assert report["peak_gflops"]["torch"]["median"] > 0


def test_the_speed_up_is_a_ratio_of_useful_tokens_in_a_second(report):
    rate = report["methods"]["lrd"]["tokens_per_second"]["median"]
    for name, loop in report["peer"]["loops"].items():
        theirs = loop["tokens_per_second"]["median"]
        found = report["methods"]["lrd"]["speed_up"][name]["median"]
        assert found == pytest.approx(rate / theirs)


def test_other_tokens_are_told(folder, monkeypatch, capsys):
    def wrong(model, ids, real, gen_length):
        found = torch_peer.threshold_loop(model, ids, real, gen_length, 0.9)
        found.tokens[0, 0] += 1
        return found

    monkeypatch.setattr(torch_peer, "published_loop", wrong)
    flags = "--peer torch --methods threshold --repeats 1 --prompt 6 --gen-length 4"
    assert main(["--model", model_file(folder, LLADA), *flags.split()]) == 0
    assert "Tokens of torch llada and of llada differ in 1 row(s)." in (
        capsys.readouterr().out
    )
