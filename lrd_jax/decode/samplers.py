"""LLaDA's and Dream's own samplers, on the same state and loop.

Both keep the probabilities of the published code: the mask token's logit stays in, and
a position that picks it stays open.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lrd_jax.base import Denoiser
from lrd_jax.config import BaselineConfig, DreamConfig, LladaConfig
from lrd_jax.decode import belief
from lrd_jax.decode.commit import best_open, margin
from lrd_jax.decode.plan import Plan
from lrd_jax.decode.state import DecodeState


def llada_plan(denoiser: Denoiser, cfg: LladaConfig) -> Plan:
    """Low-confidence or random remasking.

    Source: `generate.py` of the LLaDA repository (arXiv 2502.09992).
    """
    block_length = cfg.block_length or cfg.gen_length
    steps = cfg.steps or cfg.gen_length
    block_steps = steps // (cfg.gen_length // block_length)
    return Plan(
        denoiser=denoiser,
        cfg=BaselineConfig(
            gen_length=cfg.gen_length,
            block_length=block_length,
            stop_at_eos=cfg.stop_at_eos,
        ),
        pick=functools.partial(_llada_pick, cfg, denoiser.eos_ids),
        choose=functools.partial(_llada_choose, block_steps),
        predicts_mask=True,
        block_steps=block_steps,
        guidance=cfg.cfg_scale,
    )


def _llada_pick(
    cfg: LladaConfig,
    eos_ids: tuple[int, ...],
    prediction: belief.Prediction,
    keys: Array,
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    token_keys, score_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    logits, vocab = prediction.logits, prediction.vocab
    if cfg.logits_eos_inf:
        is_end = vocab.ids(logits) == eos_ids[0]
        logits = jnp.where(is_end[None, :], -jnp.inf, logits)
    if cfg.temperature == 0:
        token = vocab.first(logits == vocab.max(logits)[:, None])
    else:
        # argmax(z + T * Gumbel) is a sample of softmax(z / T).
        token = belief.draw(logits / cfg.temperature, token_keys, vocab)
    if cfg.remasking == "random":
        return token, _uniform(score_keys)
    if cfg.confidence_eos_eot_inf:
        ends = jnp.isin(vocab.ids(logits), jnp.asarray(eos_ids))
        logits = jnp.where(ends[None, :], -jnp.inf, logits)
    # A barred token has probability 0 here, and so its position goes last.
    return token, vocab.at(vocab.softmax(logits), token)


def _llada_choose(
    block_steps: int, state: DecodeState, still_open: Bool[Array, "B W"]
) -> Bool[Array, "B W"]:
    """The block's positions spread over its steps, the first steps taking one more."""
    share, extra = divmod(state.block_length, block_steps)
    count = jnp.where(state.block_step <= extra, share + 1, share)
    return best_open(state.belief.score, still_open, count)


def dream_plan(denoiser: Denoiser, cfg: DreamConfig) -> Plan:
    """`diffusion_generate`.

    Source: `generation_utils.py` of the Dream checkpoints (arXiv 2508.15487).
    """
    steps = cfg.steps or cfg.gen_length
    return Plan(
        denoiser=denoiser,
        cfg=BaselineConfig(gen_length=cfg.gen_length, stop_at_eos=cfg.stop_at_eos),
        pick=functools.partial(_dream_pick, cfg),
        choose=functools.partial(
            _dream_choose, cfg.alg, transfer_shares(steps, cfg.eps)
        ),
        predicts_mask=True,
        block_steps=steps,
    )


def transfer_shares(steps: int, eps: float) -> np.ndarray:
    """`[S]` 1 - s/t between successive timesteps; everything that is left at the last.

    The timesteps are `torch.linspace(1, eps, steps + 1)` to the last bit, which counts
    up from the start in the first half and down from the end in the second: the share
    times the number of masks is floored, so an ulp can move a commit.
    """
    start, end = np.float32(1), np.float32(eps)
    delta = (end - start) / np.float32(steps)
    index = np.arange(steps + 1)
    times = np.where(
        index < (steps + 1) // 2,
        start + delta * index.astype(np.float32),
        end - delta * (steps - index).astype(np.float32),
    ).astype(np.float32)
    shares = np.float32(1) - times[1:] / times[:-1]
    shares[-1] = 1
    return shares


def _dream_pick(
    cfg: DreamConfig, prediction: belief.Prediction, keys: Array
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    token_keys, score_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    logits, vocab = prediction.logits, prediction.vocab
    if cfg.temperature > 0:
        logits = logits / cfg.temperature
    logits = belief.keep_likely(logits, cfg.sample_top_p, cfg.sample_top_k, vocab)
    filtered = belief.predict(logits, None, vocab)
    token = filtered.best
    if cfg.temperature > 0:
        token = belief.draw(logits, token_keys, vocab)
    if cfg.alg == "origin":
        return token, _uniform(score_keys)
    if cfg.alg == "entropy":
        score = -filtered.entropy
    elif cfg.alg == "topk_margin":
        score = margin(filtered.probs, filtered.best, vocab)
    else:
        score = vocab.at(filtered.probs, token)
    if cfg.alg_temp > 0:
        # The top n of score / T + Gumbel are n draws without replacement.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, dtype=jnp.float32))
        score = score / cfg.alg_temp + noise(score_keys)
    return token, score


def _uniform(keys: Key[Array, " R"]) -> Float[Array, " R"]:
    """A number for each key; float32, as all scores are, also where JAX has float64."""
    draw = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))
    return draw(keys)


def _dream_choose(
    alg: str, shares: np.ndarray, state: DecodeState, still_open: Bool[Array, "B W"]
) -> Bool[Array, "B W"]:
    share = jnp.asarray(shares)[state.block_step - 1]
    if alg == "origin":
        # The score is uniform: each position is committed with probability `share`.
        return still_open & (state.belief.score < share[:, None])
    num_open = jnp.sum(still_open, axis=1).astype(jnp.float32)
    count = jnp.floor(num_open * share).astype(jnp.int32)
    return best_open(state.belief.score, still_open, count)
