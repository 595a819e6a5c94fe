"""Every setting of a training run, its default and its range, and the file of them."""

import dataclasses
import math
from typing import Any, Literal

from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.settings import build, check, check_types, read_toml, unknown_name

MAX_SEED = 2**31 - 1
# What the tokenizer decides, so that no config can contradict it.
VOCABULARY_FIELDS = ("chat", "vocab_size", "mask_id", "eos_ids", "pad_id")
TABLES = ("train", "model", "vocabulary", "phase")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: updates of the weights.
        batch_size: rows of a step, unless the phase says otherwise.
        windows: lengths of the response with its padding; each step draws one of them,
            so that the length says nothing of the answer. A phase may have others.
        seed: of the data's order, the masks and random weights.
        optimiser: `muon` on matrices with AdamW on the rest, or `adamw` on all.
        learning_rate: the highest; Muon's steps are scaled so that AdamW's rates fit.
        adam_learning_rate: AdamW's beside Muon; None for `learning_rate`.
        warmup_steps: over which the rate rises from 0.
        final_rate: fraction of the rate that is left at the end of its cosine decay.
        weight_decay: of the blocks' matrices.
        adam_b2: decay of AdamW's second moment.
        clip_norm: longest gradient, over all weights together; inf for no limit.
        average_decay: of the running average of the weights that is exported; 0
            exports the last weights.
        pool_batches: batches whose examples are drawn together and sorted by prompt
            length, so that less is padding, but a batch no longer mixes tasks whose
            prompts differ in length; 1 does not sort.
        soft_input: fraction of the steps whose masked inputs are soft embeddings.
        soft_start: fraction of the run after which they begin: the beliefs of a model
            that knows little are not worth feeding back.
        soft_r_f: range that r_f is drawn from for those, a row at a time.
        soft_top_p: nucleus mass of their predicted embeddings.
        log_steps: steps that one line of the log sums up.
        save_seconds: time between checkpoints.
    """

    steps: int
    batch_size: int
    windows: tuple[int, ...]
    seed: int = 0
    optimiser: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 2e-3
    adam_learning_rate: float | None = None
    warmup_steps: int = 100
    final_rate: float = 0.05
    weight_decay: float = 0.01
    adam_b2: float = 0.98
    clip_norm: float = 1.0
    average_decay: float = 0.999
    pool_batches: int = 1
    soft_input: float = 0.0
    soft_start: float = 0.0
    soft_r_f: tuple[float, ...] = (0.05, 0.3)
    soft_top_p: float = 0.9
    log_steps: int = 50
    save_seconds: float = 180.0

    def __post_init__(self) -> None:
        check_types(self)
        for name in "steps batch_size pool_batches log_steps".split():
            value = getattr(self, name)
            check(value >= 1, name, value, "at least 1")
        check_windows(self.windows)
        check(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"in [0, {MAX_SEED}]")
        _check_positive(self, "learning_rate")
        if self.adam_learning_rate is not None:
            _check_positive(self, "adam_learning_rate")
            beside = self.optimiser == "muon"
            why = "left out unless `optimiser` is muon"
            check(beside, "adam_learning_rate", self.adam_learning_rate, why)
        warmup = f"in [0, {self.steps}), below `steps`"
        ok = 0 <= self.warmup_steps < self.steps
        check(ok, "warmup_steps", self.warmup_steps, warmup)
        for name in ("final_rate", "soft_input", "soft_start"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("adam_b2", "average_decay"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        decay = self.weight_decay
        check(
            0 <= decay < math.inf, "weight_decay", decay, "a finite number, 0 or more"
        )
        for name in ("clip_norm", "save_seconds"):
            check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        low_high = len(self.soft_r_f) == 2 and 0 <= self.soft_r_f[0] <= self.soft_r_f[1]
        ok = low_high and self.soft_r_f[1] <= 1
        check(ok, "soft_r_f", self.soft_r_f, "two numbers, 0 <= low <= high <= 1")
        top_p = self.soft_top_p
        check(0 < top_p <= 1, "soft_top_p", top_p, "in (0, 1]")


def check_windows(windows: tuple[int, ...]) -> None:
    """Raises `UserError` unless they are window lengths."""
    ok = len(windows) > 0 and min(windows) >= 1
    check(ok, "windows", windows, "one or more lengths of at least 1")


def _check_positive(config: TrainConfig, name: str) -> None:
    value = getattr(config, name)
    check(0 < value < math.inf, name, value, "a finite number above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run with its own mixture of tasks.

    Attributes:
        fraction: of the run's steps.
        weights: task or family of tasks -> its share of the examples, up to a common
            factor; a family's is shared evenly by its tasks.
        batch_size: rows of a step; None for the run's.
        windows: see `TrainConfig`; None for the run's.
    """

    fraction: float
    weights: dict[str, int | float]
    batch_size: int | None = None
    windows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        fraction = self.fraction
        ok = isinstance(fraction, int | float) and 0 < fraction <= 1
        check(ok, "fraction", fraction, "a number in (0, 1]")
        ok = isinstance(self.weights, dict) and len(self.weights) > 0
        check(ok, "weights", self.weights, "a table of tasks and their shares")
        for name, weight in self.weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            ok = number and 0 < weight < math.inf
            check(ok, f"weights.{name}", weight, "a number above 0")
        if self.batch_size is not None:
            ok = type(self.batch_size) is int and self.batch_size >= 1
            check(ok, "batch_size", self.batch_size, "a whole number, at least 1")
        if self.windows is not None:
            ok = isinstance(self.windows, tuple)
            ok = ok and all(type(window) is int for window in self.windows)
            check(ok, "windows", self.windows, "a list of whole numbers")
            check_windows(self.windows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """The tokenizer that is made for the built-in model.

    Attributes:
        size: tokens, special ones included.
        digits: whether numbers are read digit by digit (`single`), or all but those of
            two digits, so that 0 to 99 are one token each (`pairs`).
    """

    size: int = 384
    digits: Literal["single", "pairs"] = "single"

    def __post_init__(self) -> None:
        check_types(self)
        # All bytes and the special tokens, and the numbers of two digits.
        least = 260 if self.digits == "single" else 360
        check(self.size >= least, "size", self.size, f"at least {least}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a config file says.

    Attributes:
        train: the `[train]` table as it stands; flags may add to it.
        model: the `[model]` table, `ModelConfig` without `VOCABULARY_FIELDS`.
        vocabulary: the `[vocabulary]` table.
        phases: the `[[phase]]` tables, in order; () for none.
        where: the file, for error messages.
    """

    train: dict[str, Any]
    model: dict[str, Any]
    vocabulary: VocabularyConfig
    phases: tuple[Phase, ...]
    where: str

    def model_config(self, **of_vocabulary: Any) -> ModelConfig:
        """The model for a tokenizer.

        Raises:
            UserError: a field is unknown, missing or out of range.
        """
        for name in VOCABULARY_FIELDS:
            if name in self.model:
                raise UserError(
                    f"{self.where}: [model] cannot set {name!r}: the vocabulary does."
                )
        return _build(ModelConfig, self.model | of_vocabulary, f"{self.where}: [model]")


def read_recipe(path_or_name: str) -> Recipe:
    """Reads a config file, or a shipped one by its name.

    Raises:
        UserError: no such file, not TOML, an unknown key, or a value out of range.
    """
    table, where = read_toml(path_or_name)
    for name in table:
        if name not in TABLES:
            raise unknown_name(name, list(TABLES), where)
    for name in ("train", "model", "vocabulary"):
        if not isinstance(table.get(name, {}), dict):
            raise UserError(f"{where}: `{name}` must be a table, [{name}].")
    phases = table.get("phase", [])
    if not isinstance(phases, list) or not all(isinstance(p, dict) for p in phases):
        raise UserError(f"{where}: `phase` must be a list of tables, [[phase]].")
    read = tuple(
        _build(Phase, values, f"{where}: [[phase]] {number}")
        for number, values in enumerate(phases, start=1)
    )
    total = sum(phase.fraction for phase in read)
    if read and not math.isclose(total, 1, abs_tol=1e-6):
        raise UserError(
            f"{where}: the fractions of [[phase]] must add up to 1, got {total:g}."
        )
    return Recipe(
        train=_tuples(table.get("train", {})),
        model=_tuples(table.get("model", {})),
        vocabulary=_build(
            VocabularyConfig, table.get("vocabulary", {}), f"{where}: [vocabulary]"
        ),
        phases=read,
        where=where,
    )


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
    ]
    values = _tuples(values)
    # Unknown names first: a misspelt one is why another is missing.
    if missing := [name for name in required if name not in values]:
        for name in values:
            if name not in (known := [f.name for f in dataclasses.fields(cls)]):
                raise unknown_name(name, known, where)
        raise UserError(f"{where}: missing: {', '.join(missing)}.")
    return build(cls, values, where)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
