"""LLaDA's and Dream's samplers, against plain loops and their probabilities."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import toy
from reference import samplers
from reference.compare import TOO_CLOSE
from toy import LIKES_EOS

from lrd_jax.config import DreamConfig, LladaConfig
from lrd_jax.decode.samplers import transfer_shares
from lrd_jax.decode.state import StopReason

SEEDS = range(4)
# Likely enough to be chosen now and then, so that positions stay open.
LIKES_MASK = {"mask": 2.5}


def assert_same_tokens(cfg, reference, liked, **settings):
    """All rows of all seeds that no tie is near; most of them must be left."""
    kept = rows = 0
    for seed in SEEDS:
        result = toy.decode(cfg, seed, seed, **liked)
        model = toy.NumpyModel(toy.weights(seed, **liked))
        for r, prompt in enumerate(toy.prompts(seed)):
            want = reference(model, prompt, **settings)
            rows += 1
            if want.margin > TOO_CLOSE:
                kept += 1
                assert result.tokens[r].tolist() == want.tokens[want.first :]
                assert result.commit_step[r].tolist() == want.commit_step[want.first :]
    assert kept > 0.7 * rows


@pytest.mark.parametrize(
    ("settings", "liked"),
    [
        (dict(steps=8, block_length=8), {}),
        (dict(steps=6, block_length=4), LIKES_MASK),
        (dict(steps=3, block_length=8), LIKES_MASK),
        (dict(steps=8, block_length=4, cfg_scale=0.7), {}),
        (dict(steps=4, block_length=8, cfg_scale=2.0), LIKES_MASK),
        (dict(steps=8, block_length=8, logits_eos_inf=True), LIKES_EOS),
        (dict(steps=8, block_length=8, confidence_eos_eot_inf=True), LIKES_EOS),
        (
            dict(
                steps=4,
                block_length=4,
                logits_eos_inf=True,
                confidence_eos_eot_inf=True,
                cfg_scale=0.5,
            ),
            LIKES_EOS,
        ),
    ],
)
def test_llada_commits_as_two_plain_loops_do(settings, liked):
    cfg = LladaConfig(gen_length=8, stop_at_eos=False, **settings)
    assert_same_tokens(cfg, samplers.llada, liked, gen_length=8, **settings)


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize(("steps", "liked"), [(9, {}), (3, LIKES_MASK)])
def test_dream_commits_as_a_plain_loop_does(alg, steps, liked):
    settings = dict(gen_length=8, steps=steps, alg=alg)
    cfg = DreamConfig(stop_at_eos=False, **settings)
    assert_same_tokens(cfg, samplers.dream, liked, **settings)


def bits(values):
    return np.float32(values).view(np.int32).tolist()


@pytest.mark.parametrize(
    ("steps", "eps", "times"),
    [
        # torch.linspace(1, eps, steps + 1), float32: up from the start in the first
        # half, down from the end in the second.
        (1, 1e-3, [1.0, 0.001]),
        (2, 1e-3, [1.0, 0.5005, 0.001]),
        (4, 1e-3, [1.0, 0.75025, 0.5005, 0.25075, 0.001]),
        (5, 0.1, [1.0, 0.82, 0.64, 0.45999998, 0.28, 0.1]),
        (6, 1e-3, [1, 0.8335, 0.667, 0.5005, 0.334, 0.1675, 0.001]),
    ],
)
def test_shares_follow_the_published_timesteps_to_the_last_bit(steps, eps, times):
    t = np.float32(times)
    want = np.float32(1) - t[1:] / t[:-1]
    want[-1] = 1
    assert bits(transfer_shares(steps, eps)) == bits(want)


@pytest.mark.parametrize(("steps", "eps"), [(24, 1e-3), (512, 1e-3), (7, 0.3)])
def test_shares_are_those_of_the_exact_timesteps_within_rounding(steps, eps):
    t = np.linspace(1, eps, steps + 1)
    shares = transfer_shares(steps, eps)
    assert shares.dtype == np.float32
    np.testing.assert_allclose(shares[:-1], 1 - t[1:-1] / t[:-2], atol=1e-6, rtol=1e-3)
    assert shares[-1] == 1


def steps_of(cfg, seed=0, **liked):
    """`(before, after)` of each turn, NumPy arrays."""
    stepper, params = toy.stepper(cfg), toy.params(seed, **liked)
    ids, mask = toy.left_pad(toy.prompts(seed))
    states = [stepper.init(params, ids, mask, jax.random.key(seed))]
    while stepper.active(states[-1]):
        states.append(stepper.step(params, states[-1]))
    plain = [jax.device_get(dataclasses.replace(s, keys=None)) for s in states]
    return list(itertools.pairwise(plain))


def expected_commits(state, row, count):
    """The `count` best open positions of one row, less those that chose the mask."""
    still_open = np.flatnonzero(~state.committed[row])
    score = state.belief.score[row]
    best = sorted(still_open, key=lambda i: (-score[i], i))[:count]
    return [i for i in sorted(best) if state.belief.token[row, i] != toy.MASK]


def shares_of_dream(state, row, cfg):
    num_open = np.float32((~state.committed[row]).sum())
    share = transfer_shares(cfg.steps, cfg.eps)[state.block_step[row] - 1]
    return int(num_open * share)


def shares_of_llada(state, row, cfg):
    share, extra = divmod(cfg.gen_length, cfg.steps)
    return share + (state.block_step[row] <= extra)


@pytest.mark.parametrize(
    ("cfg", "count"),
    [
        (
            DreamConfig(gen_length=8, steps=5, temperature=0.8, stop_at_eos=False),
            shares_of_dream,
        ),
        (
            LladaConfig(gen_length=8, steps=5, temperature=0.8, stop_at_eos=False),
            shares_of_llada,
        ),
    ],
    ids=["dream", "llada"],
)
def test_uneven_rows_commit_their_own_counts_and_a_sampled_mask_stays_open(cfg, count):
    uneven = left_open = 0
    for before, after in steps_of(cfg, **LIKES_MASK)[1:]:
        new = after.committed & ~before.committed
        for row in range(4):
            want = expected_commits(before, row, count(before, row, cfg))
            assert np.flatnonzero(new[row]).tolist() == want
            left_open += count(before, row, cfg) - len(want)
        uneven += len(set((~before.committed).sum(axis=1).tolist())) > 1
        stays = ~after.committed
        assert (after.tokens[stays] == toy.MASK).all()
    assert uneven > 0
    assert left_open > 0


def test_what_is_open_after_the_last_step_is_reported():
    cfg = LladaConfig(gen_length=8, steps=2, stop_at_eos=False)
    result = toy.decode(cfg, 0, mask=50.0)
    assert not result.committed.any()
    assert (result.tokens == toy.MASK).all()
    assert (result.stop_reason == StopReason.STEP_LIMIT).all()


def test_a_row_with_an_open_position_in_an_earlier_block_is_not_called_committed():
    cfg = LladaConfig(gen_length=8, block_length=4, temperature=0.8, stop_at_eos=False)
    earlier = 0
    for seed in range(4):
        result = toy.decode(cfg, seed, mask=2.0)
        done = result.committed.all(axis=1)
        want = np.where(done, StopReason.COMMITTED, StopReason.STEP_LIMIT)
        np.testing.assert_array_equal(result.stop_reason, want)
        earlier += (~done & (result.block_stop[:, 1] == StopReason.COMMITTED)).sum()
    assert earlier > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_positions_that_pick_an_end_score_nothing_at_any_temperature(temperature):
    cfg = LladaConfig(
        gen_length=8,
        temperature=temperature,
        confidence_eos_eot_inf=True,
        stop_at_eos=False,
    )
    ends = 0
    for _, after in steps_of(cfg, **LIKES_EOS)[:-1]:
        is_end = np.isin(after.belief.token, (toy.EOS, toy.TURN))
        np.testing.assert_array_equal(after.belief.score == 0, is_end)
        ends += is_end.sum()
    assert ends > 0


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_barred_end_of_text_is_never_chosen(temperature):
    cfg = LladaConfig(
        gen_length=8, temperature=temperature, logits_eos_inf=True, stop_at_eos=False
    )
    result = toy.decode(cfg, 0, eos=6.0, turn=5.0, mask=-20.0)
    assert toy.EOS not in result.tokens
    assert toy.TURN in result.tokens  # Only the end of turn may be.


def test_confidence_is_not_tempered():
    """Temperature changes the choice of token; its score is the plain probability."""
    cfg = LladaConfig(gen_length=8, temperature=2.0, stop_at_eos=False)
    for _, after in steps_of(cfg)[:-1]:
        np.testing.assert_allclose(
            after.belief.score, after.belief.token_prob, rtol=1e-6
        )


ROWS = 3000


def many_rows(cfg, seed=3):
    """One prompt, greedy tokens: only the order is random."""
    return toy.decode(cfg, [toy.prompts(seed)[0]] * ROWS, seed, mask=-20.0)


def assert_frequency(hits, chance):
    """`hits`, booleans, within five standard deviations of `chance`."""
    sigma = (chance * (1 - chance) / hits.size) ** 0.5
    assert abs(hits.mean() - chance) < 5 * sigma


def test_random_remasking_takes_positions_evenly():
    cfg = LladaConfig(gen_length=4, remasking="random", stop_at_eos=False)
    steps = many_rows(cfg).commit_step
    assert (np.sort(steps, axis=1) == np.arange(4)).all()
    for position, step in np.ndindex(4, 4):
        assert_frequency(steps[:, position] == step, 1 / 4)


def test_origin_commits_each_mask_with_the_chance_of_its_step():
    cfg = DreamConfig(gen_length=4, steps=3, alg="origin", eps=0.1, stop_at_eos=False)
    steps = many_rows(cfg).commit_step
    t = np.linspace(1, 0.1, 4)
    for step in range(2):
        still_open = steps >= step
        assert_frequency(steps[still_open] == step, 1 - t[step + 1] / t[step])
    first = (steps == 0).sum(axis=1)
    assert set(first.tolist()) >= {0, 1, 2, 3}  # Each by itself, not a fixed number.
    assert steps.min() >= 0
    assert steps.max() == 2  # All that were left, at the last step.


def first_scores(prompt, gen_length, seed):
    """Top probability at each position of the window before anything is committed."""
    model = toy.NumpyModel(toy.weights(seed, mask=-20.0))
    logits = model.logits(model.table[[*prompt, *[toy.MASK] * gen_length]])
    return samplers.softmax(logits)[len(prompt) :].max(axis=1)


@pytest.mark.parametrize(
    "cfg",
    [
        LladaConfig(gen_length=4, stop_at_eos=False, remasking="random"),
        DreamConfig(gen_length=4, stop_at_eos=False, alg="origin"),
        DreamConfig(gen_length=4, stop_at_eos=False, alg_temp=0.5),
    ],
)
def test_random_orders_work_where_jax_has_float64(cfg):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        result = toy.decode(cfg, 0, mask=-20.0)
    assert (result.commit_step >= 0).all()


def test_alg_temp_draws_positions_without_replacement():
    """Two of five at the first step, as two draws from what is left each time."""
    cfg = DreamConfig(
        gen_length=5, steps=2, alg="maskgit_plus", alg_temp=0.2, stop_at_eos=False
    )
    steps = many_rows(cfg).commit_step
    assert ((steps == 0).sum(axis=1) == 2).all()
    weight = np.exp(first_scores(toy.prompts(3)[0], 5, 3) / 0.2)
    p = weight / weight.sum()
    for i, j in itertools.combinations(range(5), 2):
        chance = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert_frequency((steps[:, i] == 0) & (steps[:, j] == 0), chance)


def test_alg_temp_makes_the_first_draw_by_the_softmax_of_the_scores():
    cfg = DreamConfig(
        gen_length=5, steps=4, alg="maskgit_plus", alg_temp=0.2, stop_at_eos=False
    )
    steps = many_rows(cfg).commit_step
    assert ((steps == 0).sum(axis=1) == 1).all()
    weight = np.exp(first_scores(toy.prompts(3)[0], 5, 3) / 0.2)
    for i, chance in enumerate(weight / weight.sum()):
        assert_frequency(steps[:, i] == 0, chance)


def test_filtering_comes_before_the_scores():
    """With the top token alone left, every position is certain: left to right."""
    cfg = DreamConfig(gen_length=8, steps=8, sample_top_k=1, stop_at_eos=False)
    steps = toy.decode(cfg, 0, mask=-20.0).commit_step
    assert (np.diff(steps, axis=1) >= 0).all()
    free = dataclasses.replace(cfg, sample_top_k=None)
    assert (np.diff(toy.decode(free, 0, mask=-20.0).commit_step, axis=1) < 0).any()


@pytest.mark.parametrize("method", [LladaConfig, DreamConfig])
def test_rows_sample_alike_alone_and_in_a_batch(method):
    cfg = method(gen_length=8, steps=4, temperature=1.0)
    rows, keys = toy.prompts(1), jax.random.split(jax.random.key(2), 4)
    ids, mask = toy.left_pad(rows)
    params = toy.params(1, **LIKES_MASK)
    together = toy.run(cfg, params, ids, mask, keys)
    for r in range(4):
        one = slice(r, r + 1)
        alone = toy.run(cfg, params, ids[one], mask[one], keys[one])
        np.testing.assert_array_equal(together.tokens[r], alone.tokens[0])


def test_guidance_hides_the_prompt_only_from_the_unguided_pass():
    """Padding stays hidden from both: a padded prompt gives the same tokens."""
    cfg = LladaConfig(gen_length=8, cfg_scale=1.5, stop_at_eos=False)
    rows, params = toy.prompts(0), toy.params(0, mask=-20.0)
    narrow, wide = (
        toy.run(cfg, params, *toy.left_pad(rows, width), jax.random.key(0))
        for width in (6, 9)
    )
    np.testing.assert_array_equal(narrow.tokens, wide.tokens)
