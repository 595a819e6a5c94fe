"""Latent Refinement Decoding as plain loops in float64: one row, greedy, no padding.

Written from the equations of arXiv 2510.11052 and the rules of the README, and sharing
nothing with `lrd_jax`. The model is any object with `table` `[V, D]`, `mask_id`,
`eos_ids`, `pad_id` and `logits([T, D]) -> [T, V]`, whose row i predicts token i.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(kw_only=True)
class Options:
    """The settings of `lrd_jax.config.DecodeConfig`, without the sampling ones."""

    gen_length: int = 256
    stop_at_eos: bool = True
    block_length: int | None = None
    r_f: float = 0.15
    r_f_decode: float | None = None
    top_p: float = 0.9
    tau_refine: float = 0.1
    tau_decode: float = 0.1
    max_refine_steps: int = 20
    refine_per_commit: int = 0
    kl_reduction: str = "mean"
    kl_criterion: str = "value"
    kl_patience: int = 1
    stop_entropy: float = 0.1
    commit_order: str = "entropy"
    tokens_per_step: int = 1
    threshold: float | None = None
    entropy_bound: float | None = None
    klass_conf: float | None = None
    klass_kl: float = 0.01
    klass_steps: int = 2
    max_steps: int | None = None
    trim_tail: bool = False


@dataclasses.dataclass
class Result:
    """What a decode did; lists per forward have one entry for each that was run."""

    tokens: list = dataclasses.field(default_factory=list)
    committed: list = dataclasses.field(default_factory=list)
    num_forwards: int = 0
    kl: list = dataclasses.field(default_factory=list)
    phase: list = dataclasses.field(default_factory=list)
    nucleus_size: list = dataclasses.field(default_factory=list)
    commit_step: list = dataclasses.field(default_factory=list)
    commit_prob: list = dataclasses.field(default_factory=list)
    commit_entropy: list = dataclasses.field(default_factory=list)
    refine_steps: list = dataclasses.field(default_factory=list)
    block_stop: list = dataclasses.field(default_factory=list)
    stop_reason: str = ""
    # How far from going the other way the closest decision was.
    margin: float = math.inf


def probabilities(logits, mask_id):
    """Softmax of one row; the mask token is never predicted."""
    logits = np.array(logits, np.float64)
    logits[mask_id] = -np.inf
    p = np.exp(logits - logits.max())
    return p / p.sum()


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def kl(new, old):
    return sum(x * math.log(x / y) for x, y in zip(new, old, strict=True) if x > 0)


def nucleus(p, top_p):
    """Tokens from the likeliest on until they hold `top_p`, with all ties of the last.

    Returns:
        The set, and how close its mass or that of the next smaller set is to `top_p`.
    """
    if top_p >= 1:
        return set(range(len(p))), math.inf
    mass, slack = 0.0, math.inf
    for value in sorted(set(p), reverse=True):
        mass = sum(x for x in p if x >= value)
        slack = min(slack, abs(mass - top_p))
        if mass >= top_p:
            return {v for v, x in enumerate(p) if x >= value}, slack
    return set(range(len(p))), slack


class Decoder:
    """One row on its way; `run` takes it to the end."""

    def __init__(self, model, prompt, options, open_positions=None):
        self.model, self.options = model, options
        if open_positions is None:
            self.text = [*prompt, *[None] * options.gen_length]
            self.first = len(prompt)
        else:
            self.text = [
                None if i in open_positions else t for i, t in enumerate(prompt)
            ]
            self.first = 0
        self.embeds = np.array(
            [model.table[model.mask_id if t is None else t] for t in self.text]
        )
        length = len(self.text)
        self.out = Result(
            commit_step=[-1] * length,
            commit_prob=[math.nan] * length,
            commit_entropy=[math.nan] * length,
        )
        self.p = {}  # Position of the active block -> its newest prediction.
        self.trimmed = set()  # Positions that an end of text has taken away.

    # Decisions report here how close they were.
    def close_call(self, *distances):
        self.out.margin = min(self.out.margin, *map(abs, distances), math.inf)

    def is_open(self, position):
        return self.text[position] is None

    def open_in(self, block):
        return [i for i in block if self.is_open(i)]

    def spent(self):
        cap = self.options.max_steps
        return cap is not None and self.out.num_forwards >= cap

    def forward(self, block, phase):
        """Runs the model; returns D and the KL of each position (None at a start)."""
        logits = self.model.logits(self.embeds[: self.seen()])
        new = {
            i: probabilities(logits[i], self.model.mask_id)
            if i < len(logits)
            else self.p[i]
            for i in block
        }
        each = None
        if phase != 0:
            counted = [i for i in block if i not in self.trimmed]
            each = {i: kl(new[i], self.p[i]) for i in counted}
        self.p = new
        d = None if each is None else self.reduce(each, block)
        out, opts = self.out, self.options
        out.num_forwards += 1
        out.kl.append(d)
        out.phase.append(phase)
        mixes = opts.top_p > 0 and (opts.r_f > 0 or (opts.r_f_decode or 0) > 0)
        if mixes:
            sizes = [len(self.mixed_tokens(i)) for i in self.open_in(block)]
            out.nucleus_size.append(sum(sizes) / len(sizes))
        else:
            out.nucleus_size.append(None)
        return d, each

    def text_end(self):
        """The position of the first committed end of text, or None."""
        ends = (i for i in range(self.first, len(self.text)) if self.ends(i))
        return next(ends, None)

    def ends(self, i):
        return self.text[i] in self.model.eos_ids

    def seen(self):
        """How many positions the next forward reads: the window in quarters."""
        end, window = self.text_end(), len(self.text) - self.first
        if not self.options.trim_tail or end is None:
            return len(self.text)
        quarters = (math.ceil(window * k / 4) for k in (1, 2, 3, 4))
        return self.first + min(q for q in quarters if q > end - self.first)

    def trim(self):
        """Takes away what is open behind an end of text."""
        end = self.text_end()
        if not self.options.trim_tail or end is None:
            return
        for i in range(end, len(self.text)):
            if self.is_open(i):
                self.trimmed.add(i)
                self.text[i] = self.model.pad_id
                self.embeds[i] = self.model.table[self.model.pad_id]

    def mixed_tokens(self, position):
        chosen, slack = nucleus(self.p[position], self.options.top_p)
        # Ten times the slack: masses are more exact than what follows from them.
        self.close_call(10 * slack)
        return chosen - {self.model.mask_id}

    def reduce(self, each, block):
        how = self.options.kl_reduction
        if how == "sum":
            return sum(each.values())
        if how == "max":
            return max(each.values())
        if how == "mean":
            return sum(each.values()) / len(each)
        still_open = self.open_in(block)
        return sum(each[i] for i in still_open) / len(still_open)

    def soften(self, block, r_f):
        """Eq. 3 and 4 at the open positions of the block."""
        table, mask_row = self.model.table, self.model.table[self.model.mask_id]
        for i in self.open_in(block):
            if r_f == 0 or self.options.top_p == 0:
                self.embeds[i] = mask_row
                continue
            p = self.p[i]
            alpha = r_f * (1 - entropy(p) / math.log(len(p)))
            chosen = self.mixed_tokens(i)
            total = sum(p[v] for v in chosen)
            mean = sum(p[v] / total * table[v] for v in chosen)
            self.embeds[i] = (1 - alpha) * mask_row + alpha * mean

    def commit(self, positions):
        """The likeliest token at each of these positions, for good."""
        for i in positions:
            p = self.p[i]
            second, first = sorted(p)[-2:]
            self.close_call(first - second)
            token = max(range(len(p)), key=lambda v: p[v])
            self.text[i] = token
            self.embeds[i] = self.model.table[token]
            self.out.commit_step[i] = self.out.num_forwards - 1
            self.out.commit_prob[i] = p[token]
            self.out.commit_entropy[i] = entropy(p)
        self.trim()

    def eagerness(self, position):
        p = sorted(self.p[position], reverse=True)
        if self.options.commit_order == "entropy":
            return -entropy(p)
        if self.options.commit_order == "confidence":
            return p[0]
        return p[0] - p[1]

    def take_best(self, candidates, count, score):
        """The `count` candidates of the highest score, the leftmost of equals."""
        ranked = sorted(candidates, key=lambda i: (-score(i), i))
        if 0 < count < len(ranked):
            self.close_call(score(ranked[count - 1]) - score(ranked[count]))
        return set(ranked[:count])

    def choose(self, block, stable_for):
        opts, candidates = self.options, self.open_in(block)
        chosen = self.take_best(candidates, opts.tokens_per_step, self.eagerness)
        top = {i: max(self.p[i]) for i in candidates}
        if opts.threshold is not None:
            self.close_call(*(top[i] - opts.threshold for i in candidates))
            chosen |= {i for i in candidates if top[i] >= opts.threshold}
        if opts.entropy_bound is not None:
            chosen |= self.within_entropy_bound(candidates)
        if opts.klass_conf is not None:
            self.close_call(*(top[i] - opts.klass_conf for i in candidates))
            chosen |= {
                i
                for i in candidates
                if top[i] >= opts.klass_conf and stable_for[i] >= opts.klass_steps
            }
        return sorted(chosen)

    def within_entropy_bound(self, candidates):
        h = {i: entropy(self.p[i]) for i in candidates}
        ranked = sorted(candidates, key=lambda i: (h[i], i))
        size = 0
        for k in range(1, len(ranked) + 1):
            inside = [h[i] for i in ranked[:k]]
            excess = sum(inside) - max(inside)
            if k > 1:
                self.close_call(excess - self.options.entropy_bound)
            if excess <= self.options.entropy_bound:
                size = k
        return self.take_best(candidates, size, lambda i: -h[i])

    def below(self, value, tau):
        """`value < tau`; a tau of 0 can never be undercut."""
        if tau > 0 and math.isfinite(tau):
            self.close_call(value - tau)
        return value < tau

    def count_stable(self, stable_for, each):
        if self.options.klass_conf is None:
            return
        for i in stable_for:
            if each is None:
                stable_for[i] = 0
                continue
            self.close_call(10 * (each[i] - self.options.klass_kl))
            small = each[i] < self.options.klass_kl
            stable_for[i] = stable_for[i] + 1 if small else 0

    def refine(self, block, stable_for):
        """Phase 1, or the refinement before one commit."""
        opts = self.options
        exactly = opts.refine_per_commit if opts.refine_per_commit > 0 else None
        limit = opts.max_refine_steps if exactly is None else exactly
        for _ in range(limit):
            if self.spent():
                return
            before = self.out.kl[-1]
            self.soften(block, opts.r_f)
            d, each = self.forward(block, 1)
            self.out.refine_steps[-1] += 1
            self.count_stable(stable_for, each)
            if exactly is not None:
                continue
            if opts.kl_criterion == "value" and self.below(d, opts.tau_refine):
                return
            if (
                opts.kl_criterion == "delta"
                and before is not None
                and self.below(abs(d - before), opts.tau_refine)
            ):
                return

    def text_has_ended(self):
        """Pads what is open behind the first eos id once nothing before it is open."""
        if not self.options.stop_at_eos:
            return False
        for i in range(self.first, len(self.text)):
            if self.is_open(i):
                return False
            if self.text[i] in self.model.eos_ids:
                behind = [j for j in range(i, len(self.text)) if self.is_open(j)]
                for j in behind:
                    self.text[j] = self.model.pad_id
                return bool(behind) or bool(self.trimmed)
        return False

    def decode_block(self, block):
        """Returns why the block ended."""
        opts, calm = self.options, 0
        self.out.refine_steps.append(0)
        stable_for = dict.fromkeys(block, 0)
        r_f_decode = opts.r_f if opts.r_f_decode is None else opts.r_f_decode
        self.forward(block, 0)
        if opts.refine_per_commit == 0:
            self.refine(block, stable_for)
        while True:
            if opts.refine_per_commit != 0:
                self.refine(block, stable_for)
            if self.spent():
                self.commit(self.open_in(block))
                return "step limit"
            self.commit(self.choose(block, stable_for))
            if not self.open_in(block):
                return "committed"
            if self.text_has_ended():
                return "eos"
            self.soften(block, r_f_decode)
            d, each = self.forward(block, 2)
            self.count_stable(stable_for, each)
            calm = calm + 1 if self.below(d, opts.tau_decode) else 0
            if calm >= opts.kl_patience:
                worst = max(entropy(self.p[i]) for i in self.open_in(block))
                if math.isfinite(opts.stop_entropy):
                    self.close_call(worst - opts.stop_entropy)
                if worst <= opts.stop_entropy:
                    self.commit(self.open_in(block))
                    return "kl"

    def run(self, blocks):
        out, length = self.out, len(self.text)
        was_open = [self.is_open(i) for i in range(length)]
        out.stop_reason = "committed"
        for n, block in enumerate(blocks):
            if not block:
                continue
            out.block_stop.append(self.decode_block(block))
            out.stop_reason = out.block_stop[-1]
            if out.stop_reason == "eos" or self.text_has_ended():
                out.stop_reason = "eos"
                break
            if self.spent() and n < len(blocks) - 1:
                out.stop_reason = "step limit"
                break
        generated = range(self.first, length)
        out.tokens = [
            self.model.mask_id if self.is_open(i) else self.text[i] for i in generated
        ]
        out.committed = [was_open[i] and out.commit_step[i] >= 0 for i in generated]
        for name in ("commit_step", "commit_prob", "commit_entropy"):
            setattr(out, name, getattr(out, name)[self.first :])
        return out


def decode(model, prompt, **settings):
    """Generates behind `prompt`, block by block."""
    options = Options(**settings)
    decoder = Decoder(model, prompt, options)
    length = options.block_length or options.gen_length
    starts = range(len(prompt), len(prompt) + options.gen_length, length)
    return decoder.run([list(range(s, s + length)) for s in starts])


def infill(model, text, open_positions, **settings):
    """Generates at `open_positions` of `text`, as one block."""
    options = Options(**settings)
    decoder = Decoder(model, text, options, set(open_positions))
    return decoder.run([sorted(open_positions)])
