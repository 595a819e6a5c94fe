"""The run: batches through steps, with checkpoints, a log and a progress bar."""

import dataclasses
import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from lrd_jax.base import Denoiser, Params
from lrd_jax.errors import UserError
from lrd_jax.process import memory_errors
from lrd_jax.training.data import Data
from lrd_jax.training.optimiser import learning_rate, make_optimiser
from lrd_jax.training.rundir import RunDir
from lrd_jax.training.settings import TrainConfig
from lrd_jax.training.step import TrainState, init_state, make_step_fn


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of, apart from its state.

    Attributes:
        folder: where everything is written.
        cfg: how to train.
        denoiser: the model.
        data: its batches.
    """

    folder: RunDir
    cfg: TrainConfig
    denoiser: Denoiser
    data: Data


def is_soft(cfg: TrainConfig, step: int) -> bool:
    """Whether a step's masked inputs are soft: spread evenly, from `soft_start` on."""
    if step < cfg.soft_start * cfg.steps:
        return False
    fraction = cfg.soft_input
    return math.floor((step + 1) * fraction) > math.floor(step * fraction)


def restore(run: Run, params: Params) -> tuple[TrainState, float]:
    """The newest state of a run, and the seconds that it took.

    Args:
        run: the run.
        params: the weights that it starts from, or only their shapes and dtypes if it
            has checkpoints.
    """
    optimiser = make_optimiser(run.cfg)
    steps = run.folder.saved_steps()
    if not steps:
        return init_state(params, optimiser, len(run.data.groups)), 0.0
    like = jax.eval_shape(
        lambda p: init_state(p, optimiser, len(run.data.groups)), params
    )
    here = SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like
    )
    return run.folder.restore(steps[-1], like)


def train(run: Run, state: TrainState, seconds: float) -> TrainState:
    """Takes the steps that are left, and saves the last state.

    Args:
        run: the run.
        state: where to start; it is used up.
        seconds: that training took before.

    Raises:
        UserError: the loss is no longer a number, or the disk is full.
    """
    cfg, folder = run.cfg, run.folder
    optimiser = make_optimiser(cfg)
    step_fns = {
        soft: make_step_fn(run.denoiser, cfg, optimiser, soft=soft)
        for soft in (False, True)
    }
    first = int(state.step)
    folder.remove_unfinished()
    folder.cut_log(first)
    hint = (
        "to train this model: give a smaller `--train.batch-size` or shorter "
        "`--train.windows`"
    )
    began = saved = logged = time.monotonic()
    tokens = 0
    with (
        # Around all steps: what a step lacks is told where its sums are read.
        memory_errors(hint),
        tqdm(
            total=cfg.steps, initial=first, unit="step", disable=not sys.stderr.isatty()
        ) as bar,
    ):
        for step in range(first, cfg.steps):
            batch = run.data.batch(step)
            state = step_fns[is_soft(cfg, step)](state, batch)
            tokens += batch.prompt_ids.size + batch.response_ids.size
            bar.update()
            done = step + 1
            last = done == cfg.steps
            if done % cfg.log_steps == 0 or last:
                state, line = _read_sums(run, state, done)
                now = time.monotonic()
                line["tokens_per_second"] = round(tokens / (now - logged))
                line["seconds"] = round(seconds + now - began, 1)
                folder.append_log(line)
                bar.set_postfix_str(
                    f"loss {line['loss']:.3f}, {line['tokens_per_second']} tokens/s"
                )
                tokens, logged = 0, now
            if last or time.monotonic() - saved >= cfg.save_seconds:
                folder.save(done, state, seconds + time.monotonic() - began)
                saved = time.monotonic()
    return state


def _read_sums(
    run: Run, state: TrainState, done: int
) -> tuple[TrainState, dict[str, Any]]:
    """A line of the log, and the state with its sums set back."""
    sums, counts = np.asarray(state.loss_sums), np.asarray(state.row_counts)
    loss = float(sums.sum() / counts.sum())
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} within the last {run.cfg.log_steps} steps before "
            f"{done}: try a lower learning rate."
        )
    rate = learning_rate(run.cfg, run.cfg.learning_rate)(done - 1)
    line = {
        "step": done,
        "loss": loss,
        "losses": {
            name: float(total / count)
            for name, total, count in zip(run.data.groups, sums, counts, strict=True)
            if count
        },
        "learning_rate": float(rate),
    }
    zeros = {name: jnp.zeros_like(state.loss_sums) for name in _SUMS}
    return state._replace(**zeros), line


_SUMS = ("loss_sums", "row_counts")
