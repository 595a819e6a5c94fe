"""Continuous batching on the host: which row goes into which slot, and when.

Rows are padded to one of few lengths, and each length has a pool of slots. The pool
that runs is always the one of the oldest row that is not done, so that results can be
handed over in the order of the rows without many of them being held back.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from lrd_jax.base import Params
from lrd_jax.batches import Row, stack
from lrd_jax.config import ModelConfig
from lrd_jax.decode.slots import Slots
from lrd_jax.decode.state import DecodeResult, DecodeState, StopReason
from lrd_jax.process import memory_errors
from lrd_jax.text import bucket

# How far ahead of the oldest row that is not done others may begin, in rows per slot.
# It bounds the results that wait for an older one, which a run that is killed loses;
# with much less, slots stay idle while a slow row holds up the rest.
AHEAD = 32
SPREAD = 1.25  # Rows share a pool that makes them at most this much longer.
ROUND = 8  # One slot in so many (at least one) has to be done before the host looks.


@dataclasses.dataclass
class Pool:
    """Slots of one padded length.

    Attributes:
        length: P.
        rows: the index of the row in each slot, None where it is idle.
        state: on the device; None before the first row.
    """

    length: int
    rows: list[int | None]
    state: DecodeState | None = None

    @property
    def live(self) -> list[int]:
        """The rows that are being decoded."""
        return [index for index in self.rows if index is not None]

    def take(self, waiting: Sequence[int], lengths: Sequence[int]) -> list[int | None]:
        """Puts waiting rows into idle slots; gives the new row of each slot, or None.

        Rows of the pool's own length come first. While it has some, shorter ones fill
        what is left: they cost nothing there. Later they would only keep it busy.

        Args:
            waiting: rows that may begin, the oldest first.
            lengths: the padded length of every row.
        """
        own = [index for index in waiting if lengths[index] == self.length]
        shorter = [index for index in waiting if lengths[index] < self.length]
        if not own and all(lengths[index] < self.length for index in self.live):
            shorter = []
        shorter.sort(key=lambda index: -lengths[index])
        chosen = iter([*own, *shorter])
        new = [next(chosen, None) if old is None else None for old in self.rows]
        self.rows = [
            fresh if old is None else old
            for old, fresh in zip(self.rows, new, strict=True)
        ]
        return new

    def release(self, result: DecodeResult) -> dict[int, DecodeResult]:
        """Makes the slots of finished rows idle; gives the results of these rows."""
        done = {}
        for slot, index in enumerate(self.rows):
            if index is not None and result.stop_reason[slot] != StopReason.RUNNING:
                self.rows[slot] = None
                done[index] = row_of(result, slot)
        return done


def enough_done(rows: Sequence[int | None], groups: int) -> np.ndarray:
    """How many slots of each group are done or idle when the host has to look.

    Returns:
        `[groups]`, or one number where there is one group.
    """
    idle = np.array([index is None for index in rows]).reshape(groups, -1)
    enough = idle.sum(axis=1, dtype=np.int32) + np.int32(max(1, idle.shape[1] // ROUND))
    return enough if groups > 1 else enough.reshape(())


def row_of(result: DecodeResult, slot: int) -> DecodeResult:
    """One row, B = 1; a copy, so that the rest of the batch is not kept with it."""
    return jax.tree.map(lambda x: x[[slot]], result)


def pool_of(index: int, pools: Mapping[int, Pool], lengths: Sequence[int]) -> Pool:
    """The pool that row `index` is in, or will be."""
    for pool in pools.values():
        if index in pool.rows:
            return pool
    return pools[lengths[index]]


def pad_lengths(
    lengths: Sequence[int], config: ModelConfig, gen_length: int | None
) -> list[int]:
    """The padded length of each row's prompt.

    They are the buckets of `text.bucket`, without those whose rows can as well be
    padded to the next longer one: a pool more is worth having only if it is much
    cheaper, as every pool is compiled and runs empty at the end.

    Args:
        lengths: real tokens of each prompt.
        config: of the model.
        gen_length: positions behind a prompt; None for infilling.
    """
    window = gen_length or 0
    buckets = [bucket(n, config.max_length - window) for n in lengths]
    kept: dict[int, int] = {}
    longer = None
    for length in sorted({*buckets}, reverse=True):
        if longer is None or longer + window > SPREAD * (length + window):
            longer = length
        kept[length] = longer
    return [kept[length] for length in buckets]


def _row_keys(key_data: Array, lines: Array) -> Array:
    """A key for each row, of the numbers of their lines."""
    key = jax.random.wrap_key_data(key_data)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, lines)


class Scheduler:
    """Decodes any number of rows, compiling once for each padded length.

    Attributes:
        compile_seconds: spent on tracing and compiling so far.
        run_seconds: spent on decoding so far.
    """

    def __init__(
        self,
        slots: Slots,
        params: Params,
        seed: int,
        *,
        num_slots: int,
        config: ModelConfig,
        gen_length: int | None,
    ) -> None:
        """Compiles nothing yet.

        Args:
            slots: of the model and the method.
            params: the model's weights.
            seed: with a row's line number it makes the row's random key.
            num_slots: rows decoded together; rounded up to fill the groups of `slots`.
            config: of the model.
            gen_length: positions behind a prompt; None for infilling.
        """
        self.compile_seconds = 0.0
        self.run_seconds = 0.0
        self._slots = slots
        self._params = params
        # Of NumPy: where a mesh is over several processes, all give the same.
        self._key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))
        self._row_keys = jax.jit(_row_keys, out_shardings=slots.everywhere)
        # As many in each group: some are then idle that need not be.
        self._num_slots = -(-num_slots // slots.groups) * slots.groups
        self._config = config
        self._gen_length = gen_length
        self._compiled: dict[tuple[str, int], Callable[..., Any]] = {}

    def stream(
        self, rows: Sequence[Row], begin: int = 0, *, ahead: bool = True
    ) -> Iterator[tuple[Row, DecodeResult]]:
        """Decodes `rows[begin:]` and gives each with its result, in their order.

        A row's result depends neither on the rows beside it nor on `begin`.

        Args:
            rows: all rows, also those done by an earlier run: they decide on the
                shapes, so that a run taken up again compiles no others.
            begin: the first row to decode.
            ahead: whether the device goes on while the caller uses a result. If so,
                `run_seconds` has the time that the caller takes beyond it.

        Yields:
            A row and its result, arrays of NumPy with B = 1.

        Raises:
            UserError: the device has too little memory for so many slots.
        """
        lengths = pad_lengths(
            [len(row.ids) for row in rows], self._config, self._gen_length
        )
        pools = {n: Pool(n, [None] * self._num_slots) for n in {*lengths}}
        begun: set[int] = set()
        results: dict[int, DecodeResult] = {}
        oldest = begin
        ready: list[tuple[Row, DecodeResult]] = []
        while oldest < len(rows):
            if not ahead:
                yield from ready
                ready = []
            pool = pool_of(oldest, pools, lengths)
            window = range(oldest, min(oldest + AHEAD * self._num_slots, len(rows)))
            waiting = [index for index in window if index not in begun]
            new = pool.take(waiting, lengths)
            begun.update(pool.live)
            hint = (
                f"for {self._num_slots} rows of {pool.length} prompt tokens: give a "
                "smaller `--batch-size` or gen_length"
            )
            with memory_errors(hint):
                started, result = self._launch(pool, new, rows)
                yield from ready
                result = jax.device_get(result)
            self.run_seconds += time.perf_counter() - started
            results |= pool.release(result)
            ready = []
            while oldest in results:
                ready.append((rows[oldest], results.pop(oldest)))
                oldest += 1
        yield from ready

    def _launch(
        self, pool: Pool, new: Sequence[int | None], rows: Sequence[Row]
    ) -> tuple[float, DecodeResult]:
        """Sets the pool going; gives the time then, and a result still being made."""
        batch = stack(
            [None if index is None else rows[index] for index in new],
            pool.length,
            self._config.pad_id,
            infill=self._gen_length is None,
        )
        keys = self._row_keys(self._key_data, batch.lines)
        inputs: list[Any] = [batch.ids, batch.mask, keys]
        if batch.open_mask is not None:
            inputs.append(batch.open_mask)
        if pool.state is None:
            start = self._compile("start", pool.length, self._params, *inputs)
            pool.state = start(self._params, *inputs)
        enough = enough_done(pool.rows, self._slots.groups)
        refill = np.array([index is not None for index in new])
        arrays = (self._params, pool.state, refill, enough, *inputs)
        advance = self._compile("advance", pool.length, *arrays)
        started = time.perf_counter()
        pool.state, result = advance(*arrays)
        return started, result

    def _compile(self, name: str, length: int, *arrays: Any) -> Callable[..., Any]:
        if (name, length) not in self._compiled:
            start = time.perf_counter()
            lowered = getattr(self._slots, name).lower(*arrays)
            self._compiled[name, length] = lowered.compile()
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[name, length]
