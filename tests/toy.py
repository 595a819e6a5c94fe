"""A toy model small enough to write down twice: in JAX, and in float64 NumPy.

Two layers of attention let every position influence every other, in both directions;
padded keys are ignored through `key_mask`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lrd_jax.base import Denoiser, KVCache
from lrd_jax.config import DecodeConfig
from lrd_jax.decode.loop import make_decode_fn, make_stepper

V, D, LAYERS = 24, 16, 2
PAD, EOS, TURN, MASK = 0, 1, 2, 23


def weights(seed, *, sharpness=3.0, **liked):
    """Random weights, float64; `liked` adds to logits: `eos=3.0`, `mask=9.0`."""
    rng = np.random.default_rng([seed, 7])
    bias = np.zeros(V)
    for name, amount in liked.items():
        bias[{"pad": PAD, "eos": EOS, "turn": TURN, "mask": MASK}[name]] = amount
    return {
        "embed": rng.normal(size=(V, D)),
        "query": rng.normal(size=(LAYERS, D, D)) / D**0.5,
        "key": rng.normal(size=(LAYERS, D, D)) / D**0.5,
        "value": 1.5 * rng.normal(size=(LAYERS, D, D)) / D**0.5,
        "head": sharpness * rng.normal(size=(D, V)) / D**0.5,
        "bias": bias,
    }


def params(seed, **options):
    """The same weights as the JAX model takes them."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights(seed, **options))


def first_layer(params):
    """Its keys and values are functions of a position's own embedding."""
    return params | {name: params[name][:1] for name in ("query", "key", "value")}


def waves(positions):
    """`[n, D]` what tells positions apart; float64."""
    return np.sin(np.outer(positions, 0.3 + 0.4 * np.arange(D)))


@dataclasses.dataclass(frozen=True)
class NumpyModel:
    """One row without padding, in float64."""

    weights: dict
    mask_id: int = MASK
    eos_ids: tuple = (EOS, TURN)
    pad_id: int = PAD

    @property
    def table(self):
        return self.weights["embed"]

    def logits(self, embeds):
        """`[T, D]` -> `[T, V]`; row i predicts token i."""
        w, x = self.weights, embeds + waves(np.arange(len(embeds)))
        for query, key, value in zip(w["query"], w["key"], w["value"], strict=True):
            scores = (x @ query) @ (x @ key).T / D**0.5
            attention = np.exp(scores - scores.max(axis=1, keepdims=True))
            attention /= attention.sum(axis=1, keepdims=True)
            x = x + np.tanh(attention @ x @ value)
        return x @ w["head"] + w["bias"]


def _hidden(params, embeds, positions, key_mask, cache=None, start=None, write=None):
    table = jnp.asarray(waves(np.arange(64)), jnp.float32)
    x = embeds + table[positions]
    for layer in range(len(params["query"])):
        query, key, value = (params[name][layer] for name in ("query", "key", "value"))
        keys, values = x @ key, x
        if cache is not None:
            cache = KVCache(
                keys=_write(cache.keys, layer, keys, start, write),
                values=_write(cache.values, layer, values, start, write),
            )
            keys, values = cache.keys[layer, :, :, 0], cache.values[layer, :, :, 0]
        scores = jnp.einsum("bid,bjd->bij", x @ query, keys) / D**0.5
        scores = jnp.where(key_mask[:, None, :], scores, -jnp.inf)
        x = x + jnp.tanh(jax.nn.softmax(scores, axis=-1) @ values @ value)
    return x, cache


def _write(slots, layer, rows, start, write):
    """`[B, n, D]` rows into one layer of `[L, B, T, 1, D]` slots, for a cache."""
    batch, length, _ = rows.shape
    at = jnp.broadcast_to(jnp.arange(length)[None, :], (batch, length))
    if start is not None:
        at = jnp.where(write, at + start[:, None], slots.shape[2])
    row = jnp.arange(batch)[:, None]
    return slots.at[layer, row, at, 0].set(rows, mode="drop")


def _init_cache(params, batch, length, dtype):
    del params
    empty = jnp.zeros((LAYERS, batch, length, 1, D), dtype)
    return KVCache(keys=empty, values=empty)


def _logits(params, hidden):
    return hidden @ params["head"] + params["bias"][None, :]


def _expect(params, probs, ids=None):
    if ids is None:
        return probs @ params["embed"]
    return jnp.sum(probs[..., None] * params["embed"][ids], axis=1)


DENOISER = Denoiser(
    embed=lambda params, ids: params["embed"][ids],
    hidden=_hidden,
    logits=_logits,
    expect=_expect,
    init_cache=_init_cache,
    mask_id=MASK,
    eos_ids=(EOS, TURN),
    pad_id=PAD,
    vocab_size=V,
    lead=0,
    max_length=64,
)


def poisoned(token, denoiser=DENOISER):
    """The toy whose logits are NaN in a row that holds `token`, given or committed."""

    def hidden(params, embeds, *args, **kwargs):
        out, cache = denoiser.hidden(params, embeds, *args, **kwargs)
        is_token = embeds == params["embed"][token][None, None, :]
        sick = jnp.any(jnp.all(is_token, axis=-1), axis=-1)
        return jnp.where(sick[:, None, None], jnp.nan, out), cache

    return dataclasses.replace(denoiser, hidden=hidden)


def prompts(seed, lengths=(6, 3, 5, 4)):
    """Ordinary tokens (no special ids): one list a row."""
    rng = np.random.default_rng([seed, 11])
    return [rng.integers(3, MASK, n).tolist() for n in lengths]


def left_pad(rows, width=None):
    """Rows as `(prompt_ids, prompt_mask)`, padded on the left."""
    width = width or max(map(len, rows))
    ids = np.full((len(rows), width), PAD, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for r, row in enumerate(rows):
        ids[r, width - len(row) :] = row
        mask[r, width - len(row) :] = True
    return jnp.asarray(ids), jnp.asarray(mask)


INF = float("inf")
# No stop is on, so that what a test changes shows alone.
PLAIN = dict(
    gen_length=8,
    stop_at_eos=False,
    stop_entropy=INF,
    tau_refine=0.01,
    tau_decode=0.0,
    max_refine_steps=5,
)
SOFT = dict(r_f=0.4)  # Soft enough for refinement to take several steps.


def config(**changes):
    return DecodeConfig(**(PLAIN | changes))


# Blocks, refinement, several tokens a step and KL stops all happen in these.
RICH = config(block_length=4, tau_decode=0.2, threshold=0.7, **SOFT)
SAMPLED = config(block_length=4, tau_decode=0.2, temperature=1.0, **SOFT)
LIKES_EOS = {"eos": 3.0, "turn": 2.0}  # For `weights`.


# Compiles five times as fast: code for a toy need not be optimised.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


class Quick:
    """A jitted function and what it was compiled to for each shape of its arguments."""

    def __init__(self, fn):
        self.fn, self._compiled = fn, {}

    def __call__(self, *args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        signature = (structure, *map(jax.typeof, leaves))
        if signature not in self._compiled:
            lowered = self.fn.lower(*args, **kwargs)
            self._compiled[signature] = lowered.compile(compiler_options=QUICK)
        return self._compiled[signature](*args, **kwargs)


# Tests that ask for the same settings share what was compiled. Not for ever: a program
# takes some 400 of the 65530 memory maps that Linux gives a process.
@functools.lru_cache(maxsize=40)
def runner(cfg, denoiser=DENOISER):
    return Quick(make_decode_fn(denoiser, cfg))


@functools.lru_cache(maxsize=4)
def stepper(cfg, denoiser=DENOISER):
    made = make_stepper(denoiser, cfg)
    names = ("init", "refine", "commit", "step", "finish")
    return made._replace(**{name: Quick(getattr(made, name)) for name in names})


def run(cfg, *args, denoiser=DENOISER, **kwargs):
    """`decode_fn(*args)` as NumPy arrays."""
    return jax.device_get(runner(cfg, denoiser)(*args, **kwargs))


def decode_fn(cfg, denoiser=DENOISER):
    """The function as users get it."""
    return runner(cfg, denoiser).fn


def decode(cfg, rows, seed=0, *, denoiser=DENOISER, **liked):
    """Decodes `rows` (or the rows of prompt seed `rows`) with the toy."""
    rows = prompts(rows) if isinstance(rows, int) else rows
    key = jax.random.key(0)
    return run(cfg, params(seed, **liked), *left_pad(rows), key, denoiser=denoiser)


def first_state(cfg, seed=0):
    """The state before the first forward, of the four rows of prompt seed `seed`."""
    ids, mask = left_pad(prompts(seed))
    return stepper(cfg).init(params(seed), ids, mask, jax.random.key(0))
