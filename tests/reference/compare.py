"""Says whether a row of a `DecodeResult` is what the reference decoded."""

import jax
import jax.numpy as jnp
import numpy as np

from lrd_jax.decode.state import NEVER, StopReason

REASON = {
    "committed": StopReason.COMMITTED,
    "kl": StopReason.KL,
    "eos": StopReason.EOS,
    "step limit": StopReason.STEP_LIMIT,
}
# Closer than this to going the other way, float32 may decide otherwise.
TOO_CLOSE = 1e-4


def row_of(result, row):
    return jax.tree.map(lambda x: x[row], result)


def num_ran(got):
    return int(got.num_forwards)


def assert_same_decode(got, want):
    """One row of a `DecodeResult` against a `lrd.Result`."""

    def close(name, atol):
        ours = getattr(got, name)
        theirs = np.array(getattr(want, name), np.float64)  # None becomes NaN.
        np.testing.assert_allclose(
            ours[: len(theirs)], theirs, atol=atol, rtol=1e-3, err_msg=name
        )
        assert np.isnan(ours[len(theirs) :]).all(), name

    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.commit_step, want.commit_step)
    np.testing.assert_array_equal(got.committed, want.committed)
    assert num_ran(got) == want.num_forwards
    ran = got.phase[: want.num_forwards]
    np.testing.assert_array_equal(ran, want.phase)
    assert (got.phase[want.num_forwards :] == NEVER).all()
    close("kl", 1e-4)
    close("nucleus_size", 1e-4)
    close("commit_prob", 1e-4)
    close("commit_entropy", 2e-4)
    begun = len(want.block_stop)
    stops = [REASON[reason] for reason in want.block_stop]
    np.testing.assert_array_equal(got.block_stop[:begun], stops)
    assert (got.block_stop[begun:] == StopReason.RUNNING).all()
    np.testing.assert_array_equal(got.refine_steps[:begun], want.refine_steps)
    assert (got.refine_steps[begun:] == 0).all()
    assert got.stop_reason == REASON[want.stop_reason]


def assert_same_trees(got, want):
    """Bit for bit, NaN like NaN; random keys by their data."""

    def plain(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), got, want
    )
