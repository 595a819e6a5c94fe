"""LLaDA's and Dream's own samplers as plain loops in float64: one row, greedy.

After `generate.py` of the LLaDA repository and `generation_utils.py` of the Dream
checkpoints, with a boolean for what is open instead of comparing ids with the mask.
"""

import itertools

import numpy as np


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class Sampler:
    """One row on its way. `margin` is how close the closest decision was."""

    def __init__(self, model, prompt, gen_length):
        self.model, self.first = model, len(prompt)
        self.tokens = [*prompt, *[model.mask_id] * gen_length]
        self.open = [False] * len(prompt) + [True] * gen_length
        self.commit_step = [-1] * len(self.tokens)
        self.margin = np.inf

    def logits(self, blind_prompt=False):
        ids = list(self.tokens)
        if blind_prompt:
            ids[: self.first] = [self.model.mask_id] * self.first
        return self.model.logits(self.model.table[ids])

    def commit(self, candidates, count, score, token, step):
        """The `count` best candidates; one whose token is the mask stays open."""
        ranked = sorted(candidates, key=lambda i: (-score[i], i))
        if 0 < count < len(ranked):
            gap = score[ranked[count - 1]] - score[ranked[count]]
            # Two scores of exactly 0 tie in any precision.
            if gap or score[ranked[count]]:
                self.margin = min(self.margin, gap)
        for i in ranked[:count]:
            if token[i] != self.model.mask_id:
                self.tokens[i], self.open[i] = int(token[i]), False
                self.commit_step[i] = step

    def note_argmax(self, z, rows):
        for i in rows:
            second, first = np.sort(z[i])[-2:]
            self.margin = min(self.margin, first - second)


def llada(
    model,
    prompt,
    *,
    gen_length,
    steps,
    block_length,
    cfg_scale=0.0,
    logits_eos_inf=False,
    confidence_eos_eot_inf=False,
):
    row = Sampler(model, prompt, gen_length)
    num_blocks = gen_length // block_length
    block_steps, step = steps // num_blocks, 0
    for start in range(row.first, row.first + gen_length, block_length):
        share, extra = divmod(block_length, block_steps)
        for k in range(block_steps):
            candidates = [i for i in range(start, start + block_length) if row.open[i]]
            if not candidates:
                break
            z = row.logits()
            if cfg_scale:
                unguided = row.logits(blind_prompt=True)
                z = unguided + (cfg_scale + 1) * (z - unguided)
            if logits_eos_inf:
                z[:, model.eos_ids[0]] = -np.inf
            token = z.argmax(axis=1)
            row.note_argmax(z, candidates)
            if confidence_eos_eot_inf:
                z[:, list(model.eos_ids)] = -np.inf
            score = np.take_along_axis(softmax(z), token[:, None], axis=1)[:, 0]
            row.commit(candidates, share + (k < extra), score, token, step)
            step += 1
    return row


def dream(model, prompt, *, gen_length, steps, alg, eps=1e-3):
    row = Sampler(model, prompt, gen_length)
    times = np.linspace(1, eps, steps + 1)
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        candidates = [i for i, is_open in enumerate(row.open) if is_open]
        if not candidates:
            break
        z = row.logits()
        p, token = softmax(z), z.argmax(axis=1)
        row.note_argmax(z, candidates)
        ranked = np.sort(p, axis=1)
        score = {
            "maskgit_plus": ranked[:, -1],
            "topk_margin": ranked[:, -1] - ranked[:, -2],
            "entropy": (p * np.log(p)).sum(axis=1),
        }[alg]
        count = len(candidates)
        if step < steps - 1:
            exact = count * (1 - s / t)
            row.margin = min(row.margin, abs(exact - round(exact)))
            count = int(exact)
        row.commit(candidates, count, score, token, step)
    return row
