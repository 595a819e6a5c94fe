"""The model that is measured, and the prompts that it is given."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lrd_jax.base import Denoiser, Params
from lrd_jax.batches import Batch, Row, stack
from lrd_jax.benchmark.request import Request
from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.evaluation.problems import Problem, make_groups
from lrd_jax.evaluation.run import score
from lrd_jax.model import backbone, families
from lrd_jax.source import open_checkpoint
from lrd_jax.text import text_of
from lrd_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its prompts.

    Attributes:
        config: of the model.
        denoiser: the model as the decoder sees it.
        params: its weights.
        batches: the prompts, all of one shape.
        problems: what the prompts ask, row by row; None where they are random ids.
        tokenizer: reads the answers to problems.
    """

    config: ModelConfig
    denoiser: Denoiser
    params: Params
    batches: Sequence[Batch]
    problems: Sequence[Problem] | None = None
    tokenizer: Tokenizer | None = None

    def accuracy(self, tokens: np.ndarray) -> float | None:
        """The share of problems that `[n, G]` tokens solve; None if there are none."""
        if self.problems is None or self.tokenizer is None:
            return None
        cfg = self.config
        texts = [
            text_of(self.tokenizer, row.tolist(), cfg.eos_ids, cfg.mask_id)
            for row in tokens
        ]
        right = score(self.problems, texts)
        return sum(right) / len(right)


def make_subject(request: Request) -> Subject:
    """Reads or makes the weights, and makes the prompts.

    Raises:
        UserError: a damaged checkpoint, or one whose prompts are too few or too long.
    """
    if request.shape is not None:
        return random_subject(request, request.shape)
    flags = request.flags
    source = open_checkpoint(flags.model, None)
    groups = make_groups(
        {flags.tasks: request.tasks},
        n=request.num_prompts,
        split="test",
        seed=flags.seed,
        gen_length=flags.gen_length,
        source=source,
    )
    problems = groups[0].problems
    if len(problems) < request.num_prompts:
        raise UserError(
            f"`--n` {request.num_prompts}: {flags.tasks} has {len(problems)} problems "
            "only; ask for fewer, or for more `--tasks`."
        )
    denoiser, params = source.load()
    return Subject(
        config=source.config,
        denoiser=denoiser,
        params=params,
        batches=_stack([p.row for p in problems], flags.batch_size, source.config),
        problems=problems,
        tokenizer=source.tokenizer,
    )


def random_subject(request: Request, shape: ModelConfig) -> Subject:
    """Random weights of that shape, and random prompts."""
    flags = request.flags
    shape_of_all = (request.num_prompts, flags.prompt)
    ids = random_ids(shape, shape_of_all, np.random.default_rng(flags.seed))
    rows = [Row(id=i, line=i, ids=row.tolist()) for i, row in enumerate(ids)]
    return Subject(
        config=shape,
        denoiser=families.make_denoiser(shape),
        params=random_params(shape, flags.seed, flags.sharpness),
        batches=_stack(rows, flags.batch_size, shape),
    )


def random_ids(
    cfg: ModelConfig, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Ids of ordinary tokens."""
    special = [cfg.mask_id, cfg.pad_id, *cfg.eos_ids]
    return rng.choice(np.setdiff1d(np.arange(cfg.vocab_size), special), shape)


def random_params(shape: ModelConfig, seed: int, sharpness: float) -> Params:
    """Random weights whose logits are `sharpness` times the usual."""
    params = jax.jit(lambda key: backbone.init_params(shape, key))(jax.random.key(seed))
    scale: Any = params["norm"]["scale"]
    return params | {"norm": {"scale": scale * sharpness}}


def _stack(rows: Sequence[Row], batch_size: int, cfg: ModelConfig) -> list[Batch]:
    longest = max(len(row.ids) for row in rows)
    return [
        stack(rows[i : i + batch_size], longest, cfg.pad_id, infill=False)
        for i in range(0, len(rows), batch_size)
    ]
