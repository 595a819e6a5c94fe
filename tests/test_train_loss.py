"""The masked-diffusion loss and soft inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrd_jax.decode import belief
from lrd_jax.decode.nucleus import nucleus
from lrd_jax.model import backbone, families
from lrd_jax.training import loss
from lrd_jax.training.loss import Batch, Noise
from tests.train_toy import END_ID, MASK_ID, model_config
from tests.train_toy import quick_compile as quick_compile

ROWS, PROMPT, WINDOW = 5, 6, 7
FAMILIES = ("llada", "dream")


@functools.cache
def problem(family="llada"):
    cfg = model_config(family, num_layers=2)
    params = backbone.init_params(cfg, jax.random.key(1))
    rng = np.random.default_rng(2)
    response = rng.integers(2, cfg.vocab_size, (ROWS, WINDOW))
    response[:, 5:] = END_ID
    batch = Batch(
        prompt_ids=jnp.asarray(rng.integers(2, cfg.vocab_size, (ROWS, PROMPT))),
        prompt_mask=jnp.asarray(np.arange(PROMPT) >= rng.integers(0, 5, (ROWS, 1))),
        response_ids=jnp.asarray(response),
        group=jnp.zeros(ROWS, jnp.int32),
    )
    noise = loss.draw_noise(jax.random.key(3), ROWS, WINDOW)
    return families.make_denoiser(cfg), params, batch, noise


@functools.partial(jax.jit, static_argnums=0)
def logits_of(denoiser, params, batch, noise):
    embeds = loss.masked_embeds(denoiser, params, batch, noise.masked)
    return loss.response_logits(denoiser, params, batch, embeds)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_formula_in_float64(family):
    denoiser, params, batch, noise = problem(family)
    logits = logits_of(denoiser, params, batch, noise)
    got = loss.row_losses(denoiser, logits, batch, noise)

    table = np.asarray(logits, np.float64).reshape(ROWS, WINDOW, -1)
    want = np.zeros(ROWS)
    for row in range(ROWS):
        for i in range(WINDOW):
            if noise.masked[row, i]:
                z = table[row, i].copy()
                z[MASK_ID] = -np.inf
                ce = np.log(np.exp(z).sum()) - z[batch.response_ids[row, i]]
                want[row] += ce / np.float64(noise.prob[row]) / WINDOW
    assert want.max() > 0
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_position_i_is_predicted_for_position_i(family):
    denoiser, params, batch, noise = problem(family)
    got = logits_of(denoiser, params, batch, noise).reshape(ROWS, WINDOW, -1)
    for row in range(ROWS):
        real = np.asarray(batch.prompt_mask[row])
        response = jnp.where(noise.masked[row], MASK_ID, batch.response_ids[row])
        ids = jnp.concatenate([batch.prompt_ids[row][real], response])[None]
        # Alone, without padding, through the whole model.
        hidden, _ = denoiser.hidden(
            params,
            denoiser.embed(params, ids),
            jnp.arange(ids.shape[1])[None],
            jnp.ones(ids.shape, bool),
        )
        want = denoiser.logits(params, hidden[0])[-WINDOW:]
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4)


def test_the_mask_token_gets_no_probability():
    denoiser, params, batch, noise = problem()
    logits = logits_of(denoiser, params, batch, noise)
    want = loss.row_losses(denoiser, logits, batch, noise)
    high = logits.at[:, MASK_ID].set(50.0)
    np.testing.assert_array_equal(loss.row_losses(denoiser, high, batch, noise), want)


def test_the_padding_behind_the_answer_counts():
    denoiser, params, batch, noise = problem()
    tail = Noise(noise.prob, jnp.arange(WINDOW)[None] >= jnp.full((ROWS, 1), 5))
    logits = logits_of(denoiser, params, batch, tail)
    assert jnp.all(loss.row_losses(denoiser, logits, batch, tail) > 0)


@pytest.mark.parametrize("seed", range(3))
def test_one_probability_falls_into_each_equal_part(seed):
    noise = loss.draw_noise(jax.random.key(seed), 64, 3)
    assert noise.prob.min() >= loss.LEAST_PROB
    assert noise.prob.max() <= 1
    even = (1 - np.sort(np.asarray(noise.prob))) / (1 - loss.LEAST_PROB) * 64
    assert sorted(np.floor(even - even.min() + 1e-3)) == list(range(64))


def test_tokens_are_masked_with_their_rows_probability():
    noise = loss.draw_noise(jax.random.key(0), 50, 4000)
    np.testing.assert_allclose(noise.masked.mean(1), noise.prob, atol=0.04)


def test_masks_lie_in_the_response_only():
    denoiser, params, batch, noise = problem()
    everything = jnp.ones_like(noise.masked)
    embeds = loss.masked_embeds(denoiser, params, batch, everything)
    prompt, response = jnp.split(embeds, [PROMPT], axis=1)
    np.testing.assert_array_equal(prompt, params["embed"][batch.prompt_ids])
    assert (response == params["embed"][MASK_ID][None, None]).all()


@functools.partial(jax.jit, static_argnums=(3, 5))
def soften(params, batch, noise, denoiser, r_f, top_p=0.9):
    return loss.soften(denoiser, params, batch, noise.masked, r_f, top_p)


def test_soft_inputs_are_lrds_soft_embeddings():
    denoiser, params, batch, noise = problem()
    r_f = jnp.linspace(0.0, 0.8, ROWS)
    got = soften(params, batch, noise, denoiser, r_f)
    hard = loss.masked_embeds(denoiser, params, batch, noise.masked)

    new = belief.predict(logits_of(denoiser, params, batch, noise), MASK_ID)
    kept = jnp.where(nucleus(new.probs, 0.9), new.probs, 0.0)
    expected = (kept / kept.sum(-1, keepdims=True)) @ params["embed"]
    expected = expected.reshape(ROWS, WINDOW, -1)
    entropy = new.entropy.reshape(ROWS, WINDOW)
    for row in range(ROWS):
        soft = belief.soft_embeddings(
            expected[row : row + 1],
            entropy[row : row + 1],
            params["embed"][MASK_ID],
            float(r_f[row]),
            denoiser.vocab_size,
        )[0]
        masked = np.asarray(noise.masked[row])
        np.testing.assert_allclose(
            got[row, PROMPT:][masked], soft[masked], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_array_equal(
            got[row, PROMPT:][~masked], hard[row, PROMPT:][~masked]
        )
    np.testing.assert_array_equal(got[:, :PROMPT], hard[:, :PROMPT])
    np.testing.assert_array_equal(got[0], hard[0])  # r_f = 0
    assert jnp.abs(got[-1] - hard[-1]).max() > 0.01


def test_the_nucleus_of_soft_inputs_matters():
    denoiser, params, batch, noise = problem()
    r_f = jnp.full(ROWS, 0.5)
    narrow, wide = (soften(params, batch, noise, denoiser, r_f, p) for p in (0.2, 1.0))
    assert jnp.abs(narrow - wide).max() > 1e-3


def test_no_gradient_flows_through_the_first_forward():
    denoiser, params, batch, noise = problem()
    r_f = jnp.full(ROWS, 0.7)

    def total(params):
        return jnp.sum(jnp.sin(soften(params, batch, noise, denoiser, r_f)))

    grads = jax.jit(jax.grad(total))(params)
    # All that is not the table acts through the first forward alone.
    for leaf in jax.tree.leaves({k: v for k, v in grads.items() if k != "embed"}):
        assert not leaf.any()

    # And the table's is that of mixing it with beliefs that stay as they are.
    frozen = dataclasses.replace(
        denoiser,
        hidden=lambda _, *rest: denoiser.hidden(params, *rest),
        logits=lambda _, hidden: denoiser.logits(params, hidden),
    )
    table_only = jax.grad(
        lambda p: jnp.sum(jnp.sin(soften(p, batch, noise, frozen, r_f)))
    )(params)
    np.testing.assert_allclose(
        grads["embed"], table_only["embed"], rtol=1e-5, atol=1e-6
    )
    assert grads["embed"].any()
