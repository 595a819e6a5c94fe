import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import toy_config, toy_make_decode_fn

from lrd_jax.batches import Row, make_batches
from lrd_jax.config import DecodeConfig
from lrd_jax.engine import Engine
from lrd_jax.errors import UserError

CFG = DecodeConfig(gen_length=8)
ROWS = [Row(id=i, line=i, ids=[i + 1] * (i + 1)) for i in range(4)]


def batches(size, rows=ROWS):
    return list(make_batches(rows, size, toy_config(), CFG.gen_length))


def engine(seed=0, **options):
    return Engine(toy_make_decode_fn(None, CFG, **options), jnp.zeros(()), seed)


def tokens(engine, batches):
    return np.concatenate([engine.decode(batch).tokens for batch in batches])


def test_a_sample_depends_on_seed_and_line_only():
    together = tokens(engine(), batches(4))
    np.testing.assert_array_equal(tokens(engine(), batches(1)), together)
    np.testing.assert_array_equal(tokens(engine(), batches(2, ROWS[2:])), together[2:])
    assert (tokens(engine(seed=1), batches(4)) != together).any()
    moved = [dataclasses.replace(row, line=row.line + 9) for row in ROWS]
    assert (tokens(engine(), batches(4, moved)) != together).any()


def test_compiling_and_running_are_timed_apart():
    run = engine(seconds=0.2)
    for batch in batches(2):
        run.decode(batch)
    assert 0.4 <= run.run_seconds < 0.8
    assert 0 < run.compile_seconds < 5


def test_one_compilation_a_shape():
    traces = []
    inner = toy_make_decode_fn(None, CFG)

    def counted(params, ids, *rest):
        traces.append(ids.shape)
        return inner(params, ids, *rest)

    run = Engine(counted, jnp.zeros(()), 0)
    long = Row(id=9, line=9, ids=[1] * 40)
    for batch in [*batches(2), *batches(2, [*ROWS[:3], long]), *batches(2)]:
        run.decode(batch)
    assert traces == [(2, 32), (2, 48)]


def test_too_little_memory_is_one_line():
    def decode_fn(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")

    with pytest.raises(UserError, match="too little memory for 2 rows of 32 prompt"):
        Engine(decode_fn, jnp.zeros(()), 0).decode(batches(2)[0])

    def broken(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        Engine(broken, jnp.zeros(()), 0).decode(batches(2)[0])
