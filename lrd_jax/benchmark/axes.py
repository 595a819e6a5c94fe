"""The axes along which cost is measured, and the points on them."""

import dataclasses
from collections.abc import Sequence

from lrd_jax.config import DreamConfig, MethodConfig, ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.evaluation.methods import Entries, parse_sweep
from lrd_jax.settings import check

AXES = {
    "B": "rows of the batch",
    "P": "positions of the prompt",
    "G": "positions to generate",
    "V": "vocabulary",
    "W": "positions decoded at a time",
}
LEAST_V = 16  # Special ids, and some that are not.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """The shape of one measurement, see `AXES`; W None is the method's own."""

    B: int
    P: int
    G: int
    V: int
    W: int | None = None


def read_sweep(
    texts: Sequence[str], base: Point, *, fixed_vocabulary: bool
) -> dict[str, list[Point]]:
    """The points of each axis, which differ from `base` along that axis alone.

    Raises:
        UserError: not of the form `AXIS=N,N,...`, no such axis, or not its values.
    """
    sweep: dict[str, list[Point]] = {}
    for text in texts:
        read = parse_sweep(text)
        axis = read.setting
        known = ", ".join(f"{name} ({what})" for name, what in AXES.items())
        check(axis in AXES, "--sweep", axis, f"an axis: {known}")
        if axis in sweep:
            raise UserError(f"--sweep: {axis} is given twice; name it once.")
        if axis == "V" and fixed_vocabulary:
            raise UserError(
                "--sweep: V is fixed by a checkpoint; give a shape as `--model`."
            )
        least = LEAST_V if axis == "V" else 1
        for value in read.values:
            whole = isinstance(value, int) and not isinstance(value, bool)
            expected = f"a whole number, at least {least}"
            check(whole and value >= least, f"--sweep {axis}", value, expected)
        sweep[axis] = [dataclasses.replace(base, **{axis: v}) for v in read.values]
    return sweep


def method_at(entries: Entries, name: str, point: Point) -> MethodConfig:
    """The method's settings for the window of a point.

    Raises:
        UserError: they do not go together with it.
    """
    cfg = entries.method(name, point.G).cfg
    if point.W is None:
        return cfg
    if isinstance(cfg, DreamConfig):
        raise UserError(f"--sweep: method {name} has one block only; leave out W.")
    return dataclasses.replace(cfg, block_length=point.W)


def check_context(point: Point, max_length: int) -> None:
    """Raises a `UserError` unless prompt and window fit the model."""
    if point.P + point.G > max_length:
        raise UserError(
            f"a prompt of {point.P} and a window of {point.G} are more than the "
            f"model's context of {max_length}; give a smaller `--prompt` or "
            "`--gen-length`."
        )


def shape_at(shape: ModelConfig, vocab_size: int) -> ModelConfig:
    """The shape with another vocabulary, its special ids at the end of it."""
    if vocab_size == shape.vocab_size:
        return shape
    end = vocab_size - 3
    return dataclasses.replace(
        shape,
        vocab_size=vocab_size,
        mask_id=vocab_size - 1,
        eos_ids=(end, vocab_size - 2),
        pad_id=end,
        raw_bos_id=None,
    )
