"""The loop against plain Python: a float64 reference, its own steps, its own rows."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import toy
from jax.extend.core import jaxprs_in_params
from reference import lrd
from reference.compare import (
    REASON,
    TOO_CLOSE,
    assert_same_decode,
    assert_same_trees,
    row_of,
)
from toy import LIKES_EOS, PLAIN, RICH, SAMPLED, SOFT, config

from lrd_jax.config import DreamConfig, LladaConfig
from lrd_jax.decode.state import NEVER, Phase, StopReason

SEEDS = range(4)
CASES = {
    "plain": {},
    "paper": dict(tau_refine=0.1, tau_decode=0.1, max_refine_steps=20),
    "defaults": dict(
        tau_refine=0.1,
        tau_decode=0.1,
        max_refine_steps=20,
        stop_entropy=0.1,
        stop_at_eos=True,
        eos=3.0,
    ),
    "soft": SOFT,
    "hard": dict(r_f=0.0),
    "top_p_none": dict(top_p=0.0, r_f_decode=0.3),
    "top_p_small": dict(top_p=0.3, **SOFT),
    "top_p_all": dict(top_p=1.0, **SOFT),
    "decode_softer": dict(r_f=0.1, r_f_decode=0.5),
    "decode_hard": dict(r_f_decode=0.0, **SOFT),
    "refine_hard": dict(r_f=0.0, r_f_decode=0.4, refine_per_commit=1),
    "no_refinement": dict(max_refine_steps=0, **SOFT),
    "tau_refine_off": dict(tau_refine=0.0, **SOFT),
    "kl_stop": dict(tau_decode=0.3),
    "kl_stop_patient": dict(tau_decode=0.5, kl_patience=2),
    "kl_stop_sure": dict(tau_decode=2.0, stop_entropy=1.5),
    "sum": dict(kl_reduction="sum", tau_refine=0.1, tau_decode=2.0, **SOFT),
    "max": dict(kl_reduction="max", tau_refine=0.05, tau_decode=1.0, **SOFT),
    "mean_open": dict(kl_reduction="mean_open", tau_decode=0.3, **SOFT),
    "delta": dict(kl_criterion="delta", tau_refine=0.02, **SOFT),
    "confidence": dict(commit_order="confidence"),
    "margin": dict(commit_order="margin"),
    "two_a_step": dict(tokens_per_step=2),
    "three_a_step": dict(tokens_per_step=3, block_length=4),
    "threshold": dict(threshold=0.6, commit_order="confidence"),
    "threshold_by_entropy": dict(threshold=0.5, tau_decode=0.1),
    "entropy_bound": dict(entropy_bound=1.5),
    "entropy_bound_blocks": dict(entropy_bound=0.8, block_length=4),
    "klass": dict(klass_conf=0.4, klass_kl=0.3, klass_steps=1),
    "klass_two": dict(klass_conf=0.3, klass_kl=0.4, klass_steps=2, block_length=4),
    "klass_defaults": dict(klass_conf=0.5, max_refine_steps=3, tau_refine=0.0),
    "refine_each": dict(refine_per_commit=2, tau_decode=0.2, kl_patience=2),
    "refine_each_auto": dict(refine_per_commit=-1, **SOFT),
    "refine_each_delta": dict(
        refine_per_commit=-1, kl_criterion="delta", tau_refine=0.05, **SOFT
    ),
    "blocks": dict(block_length=4, **SOFT),
    "blocks_kl_stop": dict(block_length=2, tau_decode=0.4, kl_patience=1),
    "blocks_kl_stop_patient": dict(block_length=4, tau_decode=99.0, kl_patience=2),
    "blocks_of_one": dict(block_length=1),
    "eos": dict(stop_at_eos=True, eos=3.0, turn=2.0),
    "eos_blocks": dict(stop_at_eos=True, block_length=4, eos=2.5, turn=2.0),
    "eos_and_kl": dict(stop_at_eos=True, block_length=4, tau_decode=0.5, eos=3.0),
    "trimmed": dict(stop_at_eos=True, trim_tail=True, eos=3.0, turn=2.0),
    "trimmed_blocks": dict(
        stop_at_eos=True, trim_tail=True, block_length=4, eos=2.5, threshold=0.5
    ),
    "trimmed_kl": dict(
        stop_at_eos=True, trim_tail=True, tau_decode=0.5, eos=2.5, gen_length=10
    ),
    "trimmed_klass": dict(
        stop_at_eos=True, trim_tail=True, klass_conf=0.3, klass_kl=0.4, eos=2.5
    ),
    "one_forward": dict(max_steps=1),
    "capped_in_phase_1": dict(max_steps=3, tau_refine=0.0),
    "capped": dict(max_steps=6, block_length=4),
    "capped_at_a_kl_stop": dict(max_steps=4, block_length=2, tau_decode=5.0),
    "capped_eos": dict(max_steps=7, block_length=4, stop_at_eos=True, eos=3.0),
}


def split(case):
    """A case's decode settings and the tokens its toy likes."""
    liked = {k: v for k, v in case.items() if k in ("eos", "turn", "mask", "pad")}
    return {k: v for k, v in case.items() if k not in liked}, liked


@pytest.mark.parametrize("name", CASES)
def test_every_row_decodes_as_the_reference_does(name):
    settings, liked = split(CASES[name])
    kept = rows = 0
    for seed in SEEDS:
        result = toy.decode(config(**settings), seed, seed, **liked)
        model = toy.NumpyModel(toy.weights(seed, **liked))
        for r, prompt in enumerate(toy.prompts(seed)):
            want = lrd.decode(model, prompt, **(PLAIN | settings))
            rows += 1
            if want.margin > TOO_CLOSE:
                assert_same_decode(row_of(result, r), want)
                kept += 1
    assert kept > 0.7 * rows


def test_the_cases_reach_every_way_to_end():
    """Else a case above could compare what never happens."""
    seen = set()
    for case in CASES.values():
        settings, liked = split(case)
        for seed in SEEDS:
            model = toy.NumpyModel(toy.weights(seed, **liked))
            for prompt in toy.prompts(seed):
                want = lrd.decode(model, prompt, **(PLAIN | settings))
                seen |= {("block", s) for s in want.block_stop}
                seen.add(("row", want.stop_reason))
    assert seen == {(kind, reason) for kind in ("block", "row") for reason in REASON}


TO_THE_EOS = config(block_length=4, stop_at_eos=True)
RUN_ON = config(block_length=4)


def run_steps(stepper, params, state):
    """Every state of a decode, from the first to the last."""
    states = [state]
    while stepper.active(states[-1]):
        states.append(stepper.step(params, states[-1]))
    return states


def start(stepper, seed, rows=None, **liked):
    params = toy.params(seed, **liked)
    ids, mask = toy.left_pad(rows or toy.prompts(seed))
    return params, stepper.init(params, ids, mask, jax.random.key(0))


@pytest.mark.parametrize(
    "cfg",
    [
        RICH,
        dataclasses.replace(SAMPLED, stop_at_eos=True),
        LladaConfig(gen_length=8, block_length=4, cfg_scale=0.5, temperature=0.7),
        DreamConfig(gen_length=8, steps=5, alg="origin", temperature=0.7),
    ],
    ids=["rich", "sampled", "llada", "dream"],
)
def test_a_python_loop_over_step_replays_the_decode_exactly(cfg):
    stepper = toy.stepper(cfg)
    for seed in SEEDS:
        params, state = start(stepper, seed, **LIKES_EOS)
        last = run_steps(stepper, params, state)[-1]
        prompts = toy.left_pad(toy.prompts(seed))
        want = toy.run(cfg, params, *prompts, jax.random.key(0))
        assert_same_trees(stepper.finish(last), want)


PHASE_OF = {
    Phase.OPEN: "refine",
    Phase.REFINE: "refine",
    Phase.COMMIT: "commit",
    Phase.DONE: None,
}


def test_refine_and_commit_in_turn_touch_only_rows_in_their_phase():
    stepper, rows = toy.stepper(RICH), range(4)
    params, state = start(stepper, seed=1)
    bodies = {"refine": stepper.refine, "commit": stepper.commit}
    spared = {"refine": 0, "commit": 0}
    for _ in range(20):
        for name, body in bodies.items():
            new = body(params, state)
            for r in rows:
                if PHASE_OF[int(state.phase[r])] == name:
                    moved = new.step[r] > state.step[r]
                    assert moved or new.phase[r] == Phase.DONE
                else:
                    assert_same_trees(row_of(new, r), row_of(state, r))
                    spared[name] += int(state.phase[r] != Phase.DONE)
            state = new
    assert min(spared.values()) > 0
    assert not stepper.active(state)
    got, want = stepper.finish(state), toy.decode(RICH, 1, 1)
    for field in ("tokens", "num_forwards", "commit_step", "stop_reason", "phase"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field))


@pytest.fixture(scope="module")
def histories():
    """All states of some decodes: `(params, states)`, random keys left out."""
    stepper = toy.stepper(RICH)
    taken = []
    for seed in SEEDS:
        params, state = start(stepper, seed)
        states = run_steps(stepper, params, state)
        plain = [jax.device_get(dataclasses.replace(s, keys=None)) for s in states]
        taken.append((jax.device_get(params), plain))
    return taken


def successive(histories):
    for params, states in histories:
        for old, new in itertools.pairwise(states):
            yield params, old, new


def test_a_committed_position_never_changes(histories):
    for _, old, new in successive(histories):
        assert (new.committed | ~old.committed).all()
        np.testing.assert_array_equal(
            new.tokens[old.committed], old.tokens[old.committed]
        )


def test_each_position_is_filled_once(histories):
    for _, old, new in successive(histories):
        filled = new.record.commit_step != old.record.commit_step
        assert (old.record.commit_step[filled] == NEVER).all()
        np.testing.assert_array_equal(filled, new.committed & ~old.committed)
    for _, states in histories:
        assert states[-1].committed.all()


def test_the_model_reads_the_prompt_committed_tokens_and_plain_masks_as_they_are(
    histories,
):
    for params, states in histories:
        table = params["embed"]
        for state in states:
            first = state.offset
            np.testing.assert_array_equal(
                state.embeds[:, :first], states[0].embeds[:, :first]
            )
            np.testing.assert_array_equal(
                state.embeds[:, first:][state.committed],
                table[state.tokens[state.committed]],
            )
            block = np.arange(state.tokens.shape[1]) // state.block_length
            later = block[None, :] > state.block[:, None]
            assert (state.embeds[:, first:][later] == table[toy.MASK]).all()


def test_open_positions_of_the_active_block_read_soft_embeddings(histories):
    """The counterpart: what is not plain is seen to change."""
    softened = 0
    for params, old, new in successive(histories):
        mask_row = params["embed"][toy.MASK]
        soft = (new.embeds[:, new.offset :] != mask_row).any(-1) & ~new.committed
        softened += (soft & ~old.committed).sum()
    assert softened > 0


def test_the_cap_fills_the_block_and_leaves_later_blocks_masked():
    cfg = config(block_length=4, max_steps=2, max_refine_steps=0)
    result = toy.decode(cfg, 0)
    assert (result.num_forwards == 2).all()
    assert result.committed[:, :4].all()
    assert not result.committed[:, 4:].any()
    assert (result.tokens[:, 4:] == toy.MASK).all()
    assert (result.stop_reason == StopReason.STEP_LIMIT).all()
    reasons = [StopReason.STEP_LIMIT, StopReason.RUNNING]
    assert (result.block_stop == np.array(reasons)).all()
    assert (result.commit_step[:, :4] == 1).sum() == 4 * 3


def text(tokens):
    """What stands before the first id that ends a text."""
    ends = np.isin(tokens, (toy.EOS, toy.TURN))
    return tokens[: ends.argmax()].tolist() if ends.any() else tokens.tolist()


def test_stopping_at_the_eos_gives_the_same_text_with_fewer_forwards():
    saved = behind = padded = 0
    for seed in SEEDS:
        stopped = toy.decode(TO_THE_EOS, seed, seed, **LIKES_EOS)
        ran_on = toy.decode(RUN_ON, seed, seed, **LIKES_EOS)
        for r in range(4):
            want = text(ran_on.tokens[r])
            assert text(stopped.tokens[r]) == want
            assert stopped.useful_tokens[r] == ran_on.useful_tokens[r] == len(want)
            tail = slice(len(want) + 1, None)
            kept = stopped.committed[r, tail]
            np.testing.assert_array_equal(
                stopped.tokens[r, tail],
                np.where(kept, ran_on.tokens[r, tail], toy.PAD),
            )
            ended = stopped.stop_reason[r] == StopReason.EOS
            assert ended == (not kept.all())
            assert ended == (stopped.num_forwards[r] < ran_on.num_forwards[r])
            saved += ran_on.num_forwards[r] - stopped.num_forwards[r]
            behind += kept.sum() * ended
            padded += (~kept).sum()
    assert min(saved, behind, padded) > 0


def sub_jaxprs(jaxpr):
    """The jaxpr and all those inside it, outer ones first."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for sub in jaxprs_in_params(eqn.params):
            yield from sub_jaxprs(sub)


def test_the_loop_carries_nothing_of_the_size_of_the_vocabulary():
    ids, mask = toy.left_pad(toy.prompts(0))
    traced = jax.make_jaxpr(toy.decode_fn(RICH))(
        toy.params(0), ids, mask, jax.random.key(0)
    )
    whiles = [
        eqn
        for jaxpr in sub_jaxprs(traced.jaxpr)
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "while"
    ]
    assert whiles
    for eqn in whiles:
        first = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        shapes = [v.aval.shape for v in eqn.invars[first:]]
        assert not any(toy.V in shape for shape in shapes)
    assert any(  # The walk does see such arrays where they may be: inside a turn.
        toy.V in v.aval.shape and len(v.aval.shape) == 2
        for inner in sub_jaxprs(whiles[0].params["body_jaxpr"].jaxpr)
        for eqn in inner.eqns
        for v in eqn.outvars
    )


def test_the_patience_of_the_kl_stop_starts_anew_at_each_block():
    """A block of two has one forward after a commit: never two in a row."""
    cfg = toy.config(
        gen_length=8,
        block_length=2,
        max_refine_steps=0,
        tau_decode=1e9,
        stop_entropy=float("inf"),
        kl_patience=2,
    )
    result = toy.decode(cfg, toy.prompts(0))
    assert (result.block_stop == StopReason.COMMITTED).all()
