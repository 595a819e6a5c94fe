"""One step: optimiser, running average, soft inputs; and that steps learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lrd_jax import builtin
from lrd_jax.model import backbone, families
from lrd_jax.training import start
from lrd_jax.training.data import Example, data_from_examples, pad
from lrd_jax.training.loop import is_soft
from lrd_jax.training.optimiser import learning_rate, make_optimiser, matrix_axes
from lrd_jax.training.settings import TrainConfig, read_recipe
from lrd_jax.training.step import batch_loss, init_state, make_step_fn
from tests.train_toy import copy_lines, model_config
from tests.train_toy import quick_compile as quick_compile

CONFIG = TrainConfig(
    steps=100,
    batch_size=16,
    windows=(4,),
    learning_rate=1e-2,
    warmup_steps=5,
    optimiser="adamw",
)


@pytest.fixture(scope="module")
def model():
    cfg = model_config()
    return (
        cfg,
        families.make_denoiser(cfg),
        backbone.init_params(cfg, jax.random.key(0)),
    )


def run(model, cfg, steps, soft=False, every=False):
    """The state after some steps and the mean loss of each; or all their weights."""
    model_cfg, denoiser, params = model
    examples = [Example(x["prompt_ids"], x["response_ids"], 0) for x in copy_lines(6)]
    data = data_from_examples(cfg, examples, model_cfg)
    optimiser = make_optimiser(cfg)
    state = init_state(jax.tree.map(jnp.copy, params), optimiser, 1)
    step_fn = make_step_fn(denoiser, cfg, optimiser, soft=soft)
    losses, weights = [], []
    for step in range(steps):
        before = float(state.loss_sums[0])
        state = step_fn(state, data.batch(step))
        losses.append((float(state.loss_sums[0]) - before) / cfg.batch_size)
        if every:
            weights.append(jax.tree.map(np.asarray, (state.params, state.average)))
    return weights if every else (state, losses)


def distance(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return sum(float(jnp.abs(a - b).sum()) for a, b in pairs)


@pytest.mark.parametrize(("optimiser", "soft"), [("muon", False), ("adamw", True)])
def test_the_loss_falls(model, optimiser, soft):
    cfg = dataclasses.replace(CONFIG, optimiser=optimiser)
    state, losses = run(model, cfg, 100, soft)
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:10])
    assert int(state.step) == 100
    assert float(state.row_counts[0]) == 1600


def test_the_seed_makes_masks_and_first_weights(model):
    """From the same weights and rows; what order the rows have is the data's."""
    model_cfg, denoiser, params = model
    row = Example(*copy_lines(1)[0].values(), 0)
    batch = pad([row] * 16, 4, model_cfg.pad_id)
    optimiser = make_optimiser(CONFIG)
    first, other = (
        make_step_fn(
            denoiser, dataclasses.replace(CONFIG, seed=seed), optimiser, soft=False
        )(init_state(jax.tree.map(jnp.copy, params), optimiser, 1), batch)
        for seed in (0, 1)
    )
    assert first.loss_sums[0] != other.loss_sums[0]
    recipe = read_recipe("tiny_train")
    first, other = (
        start.from_recipe(recipe, seed, builtin.find("tiny")).params()
        for seed in (0, 1)
    )
    assert distance(first, other) > 0


@functools.cache
def updated(cfg, steps=6):
    """Small parameters after some updates by gradients of their own."""
    key = jax.random.key(0)
    params = {
        "embed": jax.random.normal(key, (6, 4)),
        "blocks": {"q": jax.random.normal(key, (2, 4, 4))},
    }
    optimiser = make_optimiser(cfg)

    @jax.jit
    def update(params, state, step):
        grads = jax.tree.map(lambda p: (step + 1.0) * jnp.sin(3 * p), params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimiser.init(params)
    for step in range(steps):
        params, state = update(params, state, jnp.float32(step))
    return params


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 2e-2},
        {"adam_b2": 0.9},
        {"weight_decay": 0.5},
        {"clip_norm": 1e-8},
        {"warmup_steps": 0},
        {"final_rate": 0.9},
        {"steps": 10},
    ],
    ids=str,
)
def test_a_setting_changes_the_updates(change, optimiser):
    cfg = dataclasses.replace(CONFIG, optimiser=optimiser, weight_decay=0.0)
    got = updated(dataclasses.replace(cfg, **change), 8)
    assert distance(got, updated(cfg, 8)) > 1e-4


def test_muon_is_not_adam_and_adam_beside_it_has_its_own_rate():
    adam, muon = (dataclasses.replace(CONFIG, optimiser=o) for o in ("adamw", "muon"))
    faster = dataclasses.replace(muon, adam_learning_rate=2e-2)
    assert distance(updated(adam)["blocks"], updated(muon)["blocks"]) > 1e-3
    assert distance(updated(faster)["embed"], updated(muon)["embed"]) > 1e-3
    assert distance(updated(faster)["blocks"], updated(muon)["blocks"]) < 1e-5


def test_settings_of_soft_inputs_change_the_loss(model):
    model_cfg, denoiser, params = model
    examples = [Example(x["prompt_ids"], x["response_ids"], 0) for x in copy_lines(6)]
    batch = data_from_examples(CONFIG, examples, model_cfg).batch(0)

    def loss_of(**changes):
        cfg = dataclasses.replace(CONFIG, **changes)
        run = jax.jit(functools.partial(batch_loss, denoiser, cfg, soft=True))
        return float(run(params, batch, jax.random.key(0))[0])

    changed = [loss_of(), loss_of(soft_r_f=(0.6, 0.9)), loss_of(soft_top_p=0.1)]
    assert len({round(value, 4) for value in changed}) == 3


def test_the_average_is_the_formula(model):
    decay, want = 0.25, jax.tree.map(np.asarray, model[2])
    cfg = dataclasses.replace(CONFIG, average_decay=decay)
    states = run(model, cfg, 3, every=True)
    for done, (params, average) in enumerate(states, start=1):
        d = min(decay, (1 + done) / (10 + done))
        want = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * p, want, params)
        assert distance(average, want) < 1e-4
    assert distance(average, params) > 1e-2


def test_rates_rise_and_fall_with_the_step_number():
    rate = learning_rate(CONFIG, CONFIG.learning_rate)
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(1e-2)
    assert float(rate(100)) == pytest.approx(1e-2 * CONFIG.final_rate)


def test_muon_takes_each_matrix_of_the_blocks():
    cfg = model_config("dream", num_layers=2)
    params = backbone.abstract_params(cfg)
    axes = matrix_axes(params)
    inputs = {
        "q": cfg.d_model,
        "k": cfg.d_model,
        "v": cfg.d_model,
        "out": cfg.d_model,
        "gate": cfg.d_model,
        "up": cfg.d_model,
        "down": cfg.mlp_dim,
    }
    blocks = params["blocks"]["attn"] | params["blocks"]["mlp"]
    found = axes["blocks"]["attn"] | axes["blocks"]["mlp"]
    for name, width in inputs.items():
        assert blocks[name].shape[found[name].reduction_axis] == width
        assert {found[name].reduction_axis, found[name].output_axis} == {1, 2}
    rest = [axes["embed"], axes["head"], axes["norm"]["scale"], found["q_bias"]]
    assert rest == [None] * 4


def test_muon_orthogonalises_layer_by_layer():
    params = {"gate": jax.random.normal(jax.random.key(0), (2, 8, 12))}
    cfg = dataclasses.replace(
        CONFIG, optimiser="muon", warmup_steps=0, weight_decay=0.0
    )
    optimiser = make_optimiser(cfg)
    grads = {"gate": jax.random.normal(jax.random.key(1), (2, 8, 12))}
    update = jax.jit(lambda g, p: optimiser.update(g, optimiser.init(p), p)[0])
    updates = update(grads, params)["gate"]
    for layer in updates:
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.max() / singular.min() < 2.5
    rms = float(jnp.sqrt(jnp.mean(updates**2)))
    assert rms == pytest.approx(0.2 * cfg.learning_rate, rel=0.3)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.6, 1.0])
def test_soft_steps_are_spread_evenly(fraction):
    cfg = dataclasses.replace(CONFIG, soft_input=fraction)
    soft = [is_soft(cfg, step) for step in range(100)]
    assert sum(soft) == 100 * fraction
    assert abs(sum(soft[:50]) - 50 * fraction) <= 1


def test_soft_steps_begin_when_asked():
    cfg = dataclasses.replace(CONFIG, steps=100, soft_input=1.0, soft_start=0.7)
    assert [is_soft(cfg, step) for step in range(100)] == [False] * 70 + [True] * 30
