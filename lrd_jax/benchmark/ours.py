"""Our methods on all prompts of a benchmark."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lrd_jax.benchmark.subject import Subject
from lrd_jax.config import MethodConfig
from lrd_jax.decode.loop import make_decode_fn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a decode of all n prompts gave.

    Attributes:
        tokens: `[n, G]`.
        num_forwards: `[n]` of each row.
        useful_tokens: `[n]` before the end of each text.
        turns: forwards of whole batches, of which one serves all its rows; None where
            rows wait for one another, as for their full forwards with a cache.
    """

    tokens: np.ndarray
    num_forwards: np.ndarray
    useful_tokens: np.ndarray
    turns: int | None


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcomes of several batches as one."""
    turns = [one.turns for one in outcomes]
    return Outcome(
        tokens=np.concatenate([one.tokens for one in outcomes]),
        num_forwards=np.concatenate([one.num_forwards for one in outcomes]),
        useful_tokens=np.concatenate([one.useful_tokens for one in outcomes]),
        turns=None if None in turns else sum(filter(None, turns)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ours:
    """A method, compiled for the prompts.

    Attributes:
        run: decodes all prompts.
        compile_seconds: tracing, and compiling or, if the user has set JAX's own
            JAX_COMPILATION_CACHE_DIR, reading what is there.
        temporaries: bytes that XLA reserves for a decode beside weights and prompts;
            None where it does not say.
    """

    run: Callable[[], Outcome]
    compile_seconds: float
    temporaries: int | None


def compile_method(subject: Subject, cfg: MethodConfig, seed: int) -> Ours:
    """Compiles a method's decode."""
    keys = [jax.random.key(seed + i) for i in range(len(subject.batches))]
    first = subject.batches[0]
    waits = getattr(cfg, "cache", "none") != "none" and len(first.ids) > 1
    decode_fn = jax.jit(make_decode_fn(subject.denoiser, cfg))
    begin = time.perf_counter()
    program = decode_fn.lower(subject.params, first.ids, first.mask, keys[0]).compile()
    spent = time.perf_counter() - begin

    def run() -> Outcome:
        outcomes = []
        for batch, key in zip(subject.batches, keys, strict=True):
            result = jax.device_get(program(subject.params, batch.ids, batch.mask, key))
            outcomes.append(
                Outcome(
                    tokens=result.tokens,
                    num_forwards=result.num_forwards,
                    useful_tokens=result.useful_tokens,
                    turns=None if waits else int(result.num_forwards.max()),
                )
            )
        return join(outcomes)

    memory = program.memory_analysis()
    return Ours(
        run=run,
        compile_seconds=spent,
        temporaries=getattr(memory, "temp_size_in_bytes", None),
    )
