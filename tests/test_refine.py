"""Phase 1: what is softened, how D is summed up, when it has settled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import INF, config

from lrd_jax.decode.commit import lrd_plan
from lrd_jax.decode.loop import make_plan
from lrd_jax.decode.refine import after_commit, reduce_kl, refine_step, settled
from lrd_jax.decode.state import Phase

G, W, OFFSET = 8, 4, 6
PARAMS = toy.params(0)


def window_state(cfg):
    """Row 0 in block 0, rows 1 and 2 in block 1; one position of each is committed."""
    state = toy.first_state(cfg, seed=0)
    batch = state.step.shape[0]
    rng = np.random.default_rng(0)
    newest = dataclasses.replace(
        state.belief,
        expected=jnp.asarray(rng.normal(size=(batch, W, toy.D)), jnp.float32),
        entropy=jnp.asarray(rng.uniform(0, 3, (batch, W)), jnp.float32),
    )
    return dataclasses.replace(
        state,
        block=jnp.array([0, 1, 1, 0], jnp.int32),
        committed=state.committed.at[:, 5].set(True).at[:, 0].set(True),
        belief=newest,
    )


@pytest.fixture(scope="module")
def refined():
    cfg = config(block_length=W, r_f=0.3)
    state = window_state(cfg)
    rows = jnp.array([True, True, False, False])
    new = refine_step(make_plan(toy.DENOISER, cfg), PARAMS, state, rows)
    return jax.device_get(state.replace(keys=None)), jax.device_get(
        new.replace(keys=None)
    )


def test_only_open_positions_of_the_active_block_of_its_rows_are_softened(refined):
    old, new = refined
    changed = (new.embeds != old.embeds).any(axis=-1)[:, OFFSET:]
    want = np.zeros((4, G), bool)
    want[0, [1, 2, 3]] = True  # Position 0 is committed.
    want[1, [4, 6, 7]] = True  # Position 5 is.
    np.testing.assert_array_equal(changed, want)
    assert (new.embeds[:, :OFFSET] == old.embeds[:, :OFFSET]).all()


def test_softened_positions_read_equation_3(refined):
    old, new = refined
    mask_row = np.asarray(PARAMS["embed"][toy.MASK])
    for row, position, column in [(0, 1, 1), (1, 7, 3)]:
        alpha = 0.3 * (1 - old.belief.entropy[row, column] / np.log(toy.V))
        want = (1 - alpha) * mask_row + alpha * old.belief.expected[row, column]
        got = new.embeds[row, OFFSET + position]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_refining_commits_and_counts_nothing(refined):
    old, new = refined
    same = dataclasses.replace(new, embeds=old.embeds)
    jax.tree.map(np.testing.assert_array_equal, same, old)


def test_a_weight_of_zero_puts_the_plain_mask_back():
    """Soft embeddings of another phase must not be left behind."""
    cfg = config(block_length=W, r_f=0.0, r_f_decode=0.3)
    state = window_state(cfg)
    state = dataclasses.replace(state, embeds=state.embeds + 1.0)
    rows = jnp.ones(4, bool)
    new = refine_step(make_plan(toy.DENOISER, cfg), PARAMS, state, rows)
    mask_row = PARAMS["embed"][toy.MASK]
    assert (new.embeds[0, OFFSET + 1 : OFFSET + W] == mask_row[None, :]).all()


KL = jnp.array([[0.1, 0.2, 0.6, 9.0], [0.4, 0.0, 0.2, 9.0]], jnp.float32)
IN_BLOCK = jnp.array([[True, True, True, False]] * 2)
OPEN = jnp.array([[True, False, True, False], [False, False, False, False]])


@pytest.mark.parametrize(
    ("reduction", "want"),
    [
        ("mean", [0.3, 0.2]),
        ("sum", [0.9, 0.6]),
        ("max", [0.6, 0.4]),
        ("mean_open", [0.35, 0.0]),  # Nothing open has not moved.
    ],
)
def test_d_sums_up_the_positions_that_are_generated(reduction, want):
    got = reduce_kl(KL, IN_BLOCK, OPEN, reduction)
    np.testing.assert_allclose(got, want, rtol=1e-6)


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "kl", "last_kl", "run", "want"),
    [
        (dict(tau_refine=0.1), 0.09, NAN, 1, True),
        (dict(tau_refine=0.1), 0.1, NAN, 1, False),  # Below, not at.
        (dict(tau_refine=0.1), 0.5, 0.5, 4, False),
        (dict(tau_refine=0.1), 0.5, 0.5, 5, True),  # T_refine forwards are spent.
        (dict(tau_refine=0.0), 0.0, 0.0, 1, False),  # 0 means never.
        (dict(tau_refine=INF), 9.0, NAN, 1, True),
        (dict(tau_refine=0.1, kl_criterion="delta"), 0.01, NAN, 1, False),
        (dict(tau_refine=0.1, kl_criterion="delta"), 0.5, 0.45, 2, True),
        (dict(tau_refine=0.1, kl_criterion="delta"), 0.45, 0.5, 2, True),
        (dict(tau_refine=0.1, kl_criterion="delta"), 0.5, 0.2, 2, False),
        (dict(tau_refine=0.1, kl_criterion="delta"), 0.2, 0.5, 2, False),
        (dict(refine_per_commit=2), 0.0, 0.0, 1, False),
        (dict(refine_per_commit=2), 9.0, 0.0, 2, True),
        (dict(refine_per_commit=-1, tau_refine=0.1), 0.09, NAN, 1, True),
        (dict(refine_per_commit=-1, tau_refine=0.1), 0.5, NAN, 5, True),
    ],
)
def test_refinement_settles_by_d_or_when_its_forwards_are_spent(
    options, kl, last_kl, run, want
):
    cfg = config(block_length=W, max_refine_steps=5, **options)
    state = dataclasses.replace(
        window_state(cfg),
        refine_run=jnp.full(4, run, jnp.int32),
        last_kl=jnp.full(4, last_kl, jnp.float32),
    )
    got = settled(lrd_plan(toy.DENOISER, cfg), state, jnp.full(4, kl, jnp.float32))
    assert got.tolist() == [want] * 4


@pytest.mark.parametrize(
    ("refine_per_commit", "phase"),
    [(0, Phase.COMMIT), (3, Phase.REFINE), (-1, Phase.REFINE)],
)
def test_refinement_follows_a_commit_only_if_asked_for(refine_per_commit, phase):
    cfg = config(refine_per_commit=refine_per_commit)
    assert after_commit(lrd_plan(toy.DENOISER, cfg)) == phase


@pytest.mark.parametrize(
    ("settings", "mixes"),
    [
        (dict(r_f_decode=0.0), True),
        (dict(max_refine_steps=0), True),
        (dict(max_refine_steps=0, r_f_decode=0.0), False),
        (dict(r_f=0.0, r_f_decode=0.1), True),
        (dict(r_f=0.0), False),
        (dict(top_p=0.0), False),
    ],
)
def test_a_nucleus_is_searched_only_where_something_is_mixed(settings, mixes):
    plan = make_plan(toy.DENOISER, config(**settings))
    assert (plan.mixing_top_p > 0) == mixes
