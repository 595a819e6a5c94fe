"""A model and a decode for tests of the command line that need no real ones.

As a program it is `lrd_jax.generate` with them, so that a test can kill it:

    python tests/toy_run.py SECONDS_PER_BATCH [arguments of lrd_jax.generate]

With `inf` seconds the device is busy for ever.
"""

import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lrd_jax.config import ModelConfig
from lrd_jax.decode.slots import Slots
from lrd_jax.decode.state import NEVER, DecodeResult, StopReason
from lrd_jax.generate import main
from lrd_jax.process import leave
from lrd_jax.scheduler import Scheduler
from lrd_jax.source import Source
from lrd_jax.tokenizer import Tokenizer

EOS, TURN, MASK = 60, 61, 63
POISON = 13  # A prompt that begins with it meets NaN.


def toy_config(**changes):
    fields = dict(
        family="llada",
        vocab_size=64,
        d_model=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=32,
        rope_theta=1e4,
        norm_eps=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
        max_length=96,
        mask_id=MASK,
        eos_ids=(EOS, TURN),
        pad_id=EOS,
    )
    return ModelConfig(**(fields | changes))


def toy_backend():
    """Words `w0` to `w59` are their numbers."""
    vocab = {f"w{i}": i for i in range(60)} | {"<mask>": MASK}
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocab=vocab, unk_token="w0")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return backend


def toy_source(
    tokenizer=True, template=None, load=lambda _: (None, jnp.zeros(())), **changes
):
    return Source(
        config=toy_config(**changes),
        tokenizer=Tokenizer(toy_backend(), {}, template) if tokenizer else None,
        fingerprint="toy",
        dtype="float32",
        load=load,
    )


def toy_result(prompt_ids, prompt_mask, key_data, fill):
    """Tokens that depend on the row's own prompt and key only."""
    rows, length = fill.shape
    total = (prompt_ids * prompt_mask).sum(1) + key_data.astype(np.int64).sum(1)
    tokens = (total[:, None] + np.arange(length) ** 2) % 60
    if prompt_ids.shape == fill.shape:
        tokens = np.where(fill, tokens, prompt_ids)
    bad = prompt_ids[np.arange(rows), prompt_mask.argmax(1)] == POISON
    result = DecodeResult(
        tokens=tokens,
        committed=fill & ~bad[:, None],
        num_forwards=np.full(rows, 3),
        num_full_forwards=np.full(rows, 1),
        useful_tokens=np.full(rows, 2),
        stop_reason=np.where(bad, StopReason.NONFINITE, StopReason.KL),
        block_stop=np.tile([StopReason.EOS, StopReason.RUNNING], (rows, 1)),
        refine_steps=np.tile([1, 0], (rows, 1)),
        kl=np.tile([np.nan, 0.1, np.inf, np.nan], (rows, 1)),
        phase=np.tile([0, 1, 2, NEVER], (rows, 1)),
        nucleus_size=np.tile([4, 4, np.nan, np.nan], (rows, 1)),
        commit_step=np.where(fill, 1, NEVER),
        commit_prob=np.where(fill, 0.5, np.nan),
        commit_entropy=np.where(fill, 0.25, np.nan),
    )
    narrow = {"f": np.float32, "i": np.int32, "b": np.bool_}
    return jax.tree.map(lambda x: x.astype(narrow[x.dtype.kind]), result)


def toy_make_decode_fn(denoiser, cfg, seconds=0.0, calls=None):
    """A decode in NumPy, so that next to nothing is compiled."""
    del denoiser

    def decode(*arrays):
        if calls is not None:
            calls.append(arrays[-1].shape)
        time.sleep(seconds)
        return toy_result(*map(np.asarray, arrays))

    def decode_fn(params, prompt_ids, prompt_mask, key, open_mask=None):
        del params
        if open_mask is None:
            open_mask = jnp.ones((prompt_ids.shape[0], cfg.gen_length), bool)
        arrays = (prompt_ids, prompt_mask, jax.random.key_data(key), open_mask)
        shapes = toy_result(*(np.zeros(x.shape, x.dtype) for x in arrays))
        return jax.pure_callback(decode, shapes, *arrays)

    return decode_fn


def toy_make_slots(denoiser, cfg, calls=None):
    return slots_of(toy_make_decode_fn(denoiser, cfg, calls=calls))


def slots_of(decode_fn):
    """Slots whose rows are all done after one round."""

    def advance(params, state, refill, enough, *arrays):
        return state, decode_fn(params, *arrays)

    return Slots(jax.jit(lambda params, *arrays: jnp.zeros(())), jax.jit(advance))


def run_toy(argv, calls=None, **source):
    """`main` with the toy model; returns its exit code."""
    return main(
        [str(word) for word in argv],
        open_source=lambda *_: toy_source(**source),
        make_slots=lambda denoiser, cfg: toy_make_slots(denoiser, cfg, calls=calls),
    )


if __name__ == "__main__":

    def step(x):
        # Heavy enough that JAX runs it beside Python, as it does a real decode.
        return jnp.tanh(x @ x)

    seconds, launch = float(sys.argv[1]), Scheduler._launch

    def slow_launch(*args):
        if math.isinf(seconds):
            print("busy", file=sys.stderr, flush=True)
            x = jnp.ones((512, 512))
            busy = jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 2, step, x))
            jax.device_get(busy(x))
        time.sleep(seconds)
        return launch(*args)

    Scheduler._launch = slow_launch
    leave(run_toy(sys.argv[2:]))
