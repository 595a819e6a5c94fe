"""Batches as a pure function of seed and step number, from tasks or from a file.

Examples are drawn in pools of a few batches. Within a pool they are sorted by prompt
length and dealt out in random order: a batch is padded to its longest prompt.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.tasks import TASKS, Task, instances
from lrd_jax.text import encode_prompt, left_pad
from lrd_jax.tokenizer import Tokenizer
from lrd_jax.training.loss import Batch
from lrd_jax.training.mixture import task_weights
from lrd_jax.training.settings import Phase, TrainConfig

# Problems in a row that do not fit, after which a task is said never to.
MAX_MISFITS = 1000


class Example(NamedTuple):
    """One prompt and its response, without any padding.

    Attributes:
        prompt: ids.
        response: ids; what is left of the window is filled with the pad id.
        group: which entry of the log it belongs to.
    """

    prompt: Sequence[int]
    response: Sequence[int]
    group: int


# (number of the pool, size of the pool) -> its examples.
DrawFn = Callable[[int, int], list[Example]]


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Steps in a row whose batches are made alike.

    Attributes:
        start: the first step.
        draw: where the examples come from.
        batch_size: rows of a batch.
        windows: lengths of the response with padding, one of which a step draws.
    """

    start: int
    draw: DrawFn
    batch_size: int
    windows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Data:
    """All batches of a run.

    Attributes:
        stretches: in order, the first one starting at step 0.
        groups: names of what the log tells apart.
        pool_batches: see `TrainConfig`.
        pad_id: fills prompts on the left and responses on the right.
        seed: of the order.
    """

    stretches: tuple[Stretch, ...]
    groups: tuple[str, ...]
    pool_batches: int
    pad_id: int
    seed: int

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        number, stretch = max(
            (i, s) for i, s in enumerate(self.stretches) if s.start <= step
        )
        pool, place = divmod(step - stretch.start, self.pool_batches)
        examples = self._pool(number, pool)[place]
        window = stretch.windows[
            _rng(self.seed, 1, step).integers(len(stretch.windows))
        ]
        return pad(examples, window, self.pad_id)

    @functools.lru_cache(maxsize=1)  # noqa: B019 - one pool, of the one `Data` there is
    def _pool(self, number: int, pool: int) -> list[list[Example]]:
        stretch = self.stretches[number]
        size = stretch.batch_size
        examples = stretch.draw(pool, size * self.pool_batches)
        rng = _rng(self.seed, 2, number, pool)
        examples = sorted(examples, key=lambda example: len(example.prompt))
        # Rows in random order: their masking probabilities go by their number.
        return [
            [examples[i * size + j] for j in rng.permutation(size)]
            for i in rng.permutation(self.pool_batches)
        ]


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def pad(examples: Sequence[Example], window: int, pad_id: int) -> Batch:
    """Stacks examples as a batch of a shape that few lengths of prompt share."""
    longest = max(len(example.prompt) for example in examples)
    ids, mask = left_pad(
        [example.prompt for example in examples], prompt_length(longest), pad_id
    )
    response = np.full((len(examples), window), pad_id, np.int32)
    for row, example in zip(response, examples, strict=True):
        row[: len(example.response)] = example.response
    group = np.array([example.group for example in examples], np.int32)
    return Batch(*map(jnp.asarray, (ids, mask, response, group)))


def prompt_length(longest: int) -> int:
    """Rounds up to 8, 16, 24, 32, 48, ..., 128, 192, ...: few shapes to compile."""
    grain = 8 if longest <= 32 else 16 if longest <= 128 else 64
    return -(-longest // grain) * grain


def data_from_tasks(
    cfg: TrainConfig,
    phases: Sequence[Phase],
    model: ModelConfig,
    tokenizer: Tokenizer | None,
    where: str,
) -> Data:
    """The training split of the tasks, mixed phase by phase.

    Raises:
        UserError: an unknown task, one whose problems fit no window, or no tokenizer.
    """
    if tokenizer is None:
        raise UserError(
            "the tasks are text, and this checkpoint has no tokenizer.json to read it."
        )
    shares = [task_weights(phase.weights, where) for phase in phases]
    groups = tuple(sorted({TASKS[name].family for share in shares for name in share}))
    stretches = []
    passed = 0.0
    for number, (phase, share) in enumerate(zip(phases, shares, strict=True)):
        windows = phase.windows or cfg.windows
        source = _TaskSource(share, groups, model, tokenizer, windows)
        source.check((cfg.seed, number))
        stretches.append(
            Stretch(
                start=round(passed * cfg.steps),
                draw=functools.partial(source.draw, (cfg.seed, number)),
                batch_size=phase.batch_size or cfg.batch_size,
                windows=windows,
            )
        )
        passed += phase.fraction
    return Data(tuple(stretches), groups, cfg.pool_batches, model.pad_id, cfg.seed)


@dataclasses.dataclass(frozen=True)
class _TaskSource:
    """Problems of a mixture of tasks, as examples that fit the windows."""

    shares: Mapping[str, float]
    groups: tuple[str, ...]
    model: ModelConfig
    tokenizer: Tokenizer
    windows: tuple[int, ...]

    def check(self, seed: tuple[int, int]) -> None:
        """Raises a `UserError` for a task at which the run would stop, hours on."""
        for stream in self._streams(seed, pool=0):
            next(stream)

    def draw(self, seed: tuple[int, int], pool: int, count: int) -> list[Example]:
        names = list(self.shares)
        streams = self._streams(seed, pool)
        picks = _rng(*seed, pool).choice(
            len(names), size=count, p=list(self.shares.values())
        )
        return [next(streams[i]) for i in picks]

    def _streams(self, seed: tuple[int, int], pool: int) -> list[Iterator[Example]]:
        # Each pool has streams of its own, so that none depends on those before it.
        own_seed = ((seed[0] * 1000 + seed[1]) << 40) + pool
        return [self._examples(TASKS[name], own_seed) for name in self.shares]

    def _examples(self, task: Task, seed: int) -> Iterator[Example]:
        group, misfits = self.groups.index(task.family), 0
        for problem in instances(task, "train", seed):
            prompt = encode_prompt(self.tokenizer, self.model, prompt=problem.prompt)
            response = with_end(self.tokenizer.encode(problem.answer), self.model)
            why = misfit(len(prompt), len(response), self.windows, self.model)
            if why is None:
                misfits = 0
                yield Example(prompt, response, group)
            elif (misfits := misfits + 1) == MAX_MISFITS:
                raise UserError(
                    f"task {task.name}: {misfits} problems in a row do not fit; the "
                    f"last one's {why}."
                )


def with_end(response: Sequence[int], model: ModelConfig) -> list[int]:
    """The ids of an answer with the end that the model's own answers have."""
    end_of_turn = model.eos_ids[1:2] if model.chat else ()
    return [*response, *end_of_turn, model.eos_ids[0]]


def misfit(
    prompt: int, response: int, windows: Sequence[int], model: ModelConfig
) -> str | None:
    """Why an example of that many tokens cannot be trained on, or None if it can."""
    if response > min(windows):
        return (
            f"response has {response} tokens with its end, more than the shortest "
            f"window, {min(windows)}"
        )
    if prompt + max(windows) > model.max_length:
        return (
            f"prompt has {prompt} tokens: with a window of {max(windows)} that is more "
            f"than the model's context, {model.max_length}"
        )
    return None


def data_from_examples(
    cfg: TrainConfig, examples: Sequence[Example], model: ModelConfig
) -> Data:
    """Examples of a file, in a new random order each time all have come."""
    draw = functools.partial(_draw_in_turn, examples, cfg.seed)
    stretch = Stretch(0, draw, cfg.batch_size, cfg.windows)
    return Data((stretch,), ("data",), cfg.pool_batches, model.pad_id, cfg.seed)


def _draw_in_turn(
    examples: Sequence[Example], seed: int, pool: int, count: int
) -> list[Example]:
    drawn = []
    for place in range(pool * count, (pool + 1) * count):
        turn, i = divmod(place, len(examples))
        drawn.append(examples[_order(seed, turn, len(examples))[i]])
    return drawn


@functools.lru_cache(maxsize=2)
def _order(seed: int, turn: int, count: int) -> np.ndarray:
    return _rng(seed, 3, turn).permutation(count)
