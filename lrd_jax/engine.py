"""Runs batches through a decode function, with compiling and running timed apart."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lrd_jax.base import Params
from lrd_jax.batches import Batch
from lrd_jax.decode.state import DecodeResult
from lrd_jax.errors import UserError


@contextlib.contextmanager
def memory_errors(rows: int, length: int) -> Iterator[None]:
    """Turns a device's lack of memory into a `UserError`.

    Args:
        rows: decoded together.
        length: of their prompts, padded.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the device has too little memory for {rows} rows of {length} prompt "
            "tokens: give a smaller `--batch-size` or gen_length."
        ) from None


class Engine:
    """A decode function with its weights; compiles once per shape of a batch.

    Attributes:
        compile_seconds: spent on tracing and compiling so far.
        run_seconds: spent on decoding so far.
    """

    def __init__(
        self, decode_fn: Callable[..., DecodeResult], params: Params, seed: int
    ) -> None:
        self.compile_seconds = 0.0
        self.run_seconds = 0.0
        self._decode_fn = jax.jit(decode_fn)
        self._params = params
        self._key = jax.random.key(seed)
        self._compiled: dict[tuple[int, ...], Callable[..., DecodeResult]] = {}

    def decode(self, batch: Batch) -> DecodeResult:
        """Decodes a batch; the arrays of the answer are NumPy's.

        A row's key is made of the seed and the row's line number alone, so its sample
        depends neither on the rows beside it nor on where a run was taken up again.

        Raises:
            UserError: the device has too little memory for a batch of this size.
        """
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self._key, batch.lines)
        arrays = [jnp.asarray(batch.ids), jnp.asarray(batch.mask), keys]
        if batch.open_mask is not None:
            arrays.append(jnp.asarray(batch.open_mask))
        with memory_errors(*batch.ids.shape):
            run = self._compile(arrays)
            start = time.perf_counter()
            result = jax.device_get(run(self._params, *arrays))
            self.run_seconds += time.perf_counter() - start
        return result

    def _compile(self, arrays: list[Any]) -> Callable[..., DecodeResult]:
        shape = arrays[0].shape
        if shape not in self._compiled:
            start = time.perf_counter()
            lowered = self._decode_fn.lower(self._params, *arrays)
            self._compiled[shape] = lowered.compile()
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[shape]
