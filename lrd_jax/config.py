"""Every setting, its default and its range, as frozen dataclasses.

Symbols and equations are those of arXiv 2510.11052; p is a position's predictive
distribution, H its entropy in nats, D the KL divergence between successive predictions.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from lrd_jax.errors import UserError
from lrd_jax.settings import check, check_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and special ids of one LLaDA or Dream checkpoint.

    Attributes:
        family: which published architecture, and so which prediction alignment.
        chat: whether a prompt is wrapped by the chat template (Instruct models).
        vocab_size: V, rows of the embedding table and of the output head.
        d_model: D.
        mlp_dim: inner width of the gated MLP.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every RMSNorm.
        qkv_bias: whether query, key and value projections have a bias.
        tie_embeddings: whether the head is the embedding table.
        max_length: longest prompt + window.
        mask_id: id of the mask token.
        eos_ids: ids that end a text, end of text first.
        pad_id: what fills the window behind the end of the text.
        raw_bos_id: put before a prompt that no chat template wraps; None for nothing.
    """

    family: Literal["llada", "dream"]
    chat: bool = False
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    tie_embeddings: bool
    max_length: int
    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    raw_bos_id: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "vocab_size d_model num_layers num_heads num_kv_heads head_dim mlp_dim "
            "rope_theta norm_eps max_length"
        ).split():
            value = getattr(self, name)
            check(0 < value < math.inf, name, value, "positive")
        check(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads = {self.num_heads}",
        )
        check(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even")
        check(len(self.eos_ids) > 0, "eos_ids", self.eos_ids, "at least one id")
        ids = {"mask_id": self.mask_id, "pad_id": self.pad_id}
        ids |= {f"eos_ids[{i}]": v for i, v in enumerate(self.eos_ids)}
        if self.raw_bos_id is not None:
            ids["raw_bos_id"] = self.raw_bos_id
        for name, value in ids.items():
            below = f"an id in [0, {self.vocab_size})"
            check(0 <= value < self.vocab_size, name, value, below)
        check(
            self.mask_id not in (*self.eos_ids, self.pad_id),
            "mask_id",
            self.mask_id,
            "an id of its own, neither an eos nor the pad id",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """What every decode method has.

    Attributes:
        gen_length: G, positions to generate.
        temperature: 0 takes the likeliest token, above 0 samples from p^(1/T).
        stop_at_eos: whether a row ends once its first end-of-text id and everything
            before it are committed; the text is the same, the tail is not computed.
    """

    gen_length: int = 256
    temperature: float = 0.0
    stop_at_eos: bool = True

    method: ClassVar[str]

    def __post_init__(self) -> None:
        check_types(self)
        check(self.gen_length >= 1, "gen_length", self.gen_length, "at least 1")
        _check_temperature("temperature", self.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig(WindowConfig):
    """Latent Refinement Decoding.

    Attributes:
        block_length: W, positions decoded at a time, left to right; None for one block.
        r_f: largest weight of the predicted embeddings against the mask's (Eq. 4).
        r_f_decode: the same for phase 2; None for `r_f`.
        top_p: nucleus mass of the predicted embeddings (Eq. 3); 0 turns mixing off.
        tau_refine: phase 1 ends when D falls below it.
        tau_decode: phase 2 ends when D falls below it (KL stop); 0 turns that off.
        max_refine_steps: most refinement forwards before a commit; 0 skips phase 1.
        refine_per_commit: k > 0 puts exactly k refinement forwards before each commit,
            whatever D is, `tau_refine`, `kl_criterion` and `max_refine_steps`; -1
            refines until D < tau_refine before each commit; 0 before the first only.
        kl_reduction: how D sums up the positions of the block: `mean` (Eq. 6), `sum`,
            `max`, or `mean_open` over positions not yet committed.
        kl_criterion: phase 1 settles by D itself (`value`) or its change (`delta`).
        kl_patience: consecutive D < tau_decode that the KL stop needs.
        stop_entropy: the KL stop also needs H at most this (nats) at every open
            position; inf is the paper's literal rule.
        commit_order: which open positions go first: lowest `entropy`, highest
            `confidence` (top probability) or highest `margin` (top two).
        tokens_per_step: positions committed in that order at each step.
        threshold: also commits every position whose top probability reaches it.
        entropy_bound: also commits the lowest-entropy positions while the sum of their
            entropies less the largest stays within it (EB-sampler).
        klass_conf: also commits every position whose top probability reaches it and
            whose prediction was stable (KLASS).
        klass_kl: stable means KL below this at the position; None for 0.01.
        klass_steps: over this many last forwards; None for 2.
        sample_top_p: nucleus of the tempered distribution that tokens are drawn from.
        sample_top_k: draw among the k likeliest only; None for all.
        max_steps: most forwards a row may take; None for enough in every case.
        cache: keys and values that are kept from a block's first forward and read by
            the others of the block, though they would have moved a little: `prefix`,
            those ahead of the block; `dual`, those behind it, too; or `none`.
        cache_refresh_steps: with a cache, every so many forwards of a row compute all
            of them anew; None for a block's first forward only.
        cache_refresh_kl: so does the next forward once the sum of D since then exceeds
            it; None for no such bound.
        cache_lane: rows of a batch that may do so in the same turn; the others wait,
            which changes when they are decoded but not to what.
        trim_tail: once an end-of-text id is committed, open positions behind it are
            padded at once, and a row's forwards leave out what of the window it no
            longer needs, in quarters of G; those over a single block (`dual`) and those
            that fill a cache are as long as ever. Approximate: what is left out is no
            longer attended to. In a batch a row's numbers are its own up to rounding.
    """

    block_length: int | None = None
    r_f: float = 0.15
    r_f_decode: float | None = None
    top_p: float = 0.9
    tau_refine: float = 0.1
    tau_decode: float = 0.1
    max_refine_steps: int = 20
    refine_per_commit: int = 0
    kl_reduction: Literal["mean", "sum", "max", "mean_open"] = "mean"
    kl_criterion: Literal["value", "delta"] = "value"
    kl_patience: int = 1
    stop_entropy: float = 0.1
    commit_order: Literal["entropy", "confidence", "margin"] = "entropy"
    tokens_per_step: int = 1
    threshold: float | None = None
    entropy_bound: float | None = None
    klass_conf: float | None = None
    klass_kl: float | None = None
    klass_steps: int | None = None
    sample_top_p: float = 1.0
    sample_top_k: int | None = None
    max_steps: int | None = None
    cache: Literal["none", "prefix", "dual"] = "none"
    cache_refresh_steps: int | None = None
    cache_refresh_kl: float | None = None
    cache_lane: int = 1
    trim_tail: bool = False

    method: ClassVar[str] = "lrd"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_blocks(self.gen_length, self.block_length)
        for name in ("r_f", "r_f_decode", "top_p", "threshold", "klass_conf"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= 1, name, value, "in [0, 1]")
        for name in (
            "tau_refine tau_decode stop_entropy entropy_bound cache_refresh_kl"
        ).split():
            value = getattr(self, name)
            check(value is None or value >= 0, name, value, "0 or more")
        check(
            self.max_refine_steps >= 0,
            "max_refine_steps",
            self.max_refine_steps,
            "0 or more",
        )
        check(
            self.refine_per_commit >= -1,
            "refine_per_commit",
            self.refine_per_commit,
            "-1 (until settled), 0 (off) or more",
        )
        for name in (
            "kl_patience tokens_per_step klass_steps max_steps cache_refresh_steps "
            "cache_lane"
        ).split():
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "at least 1")
        _check_sampling(self.sample_top_p, self.sample_top_k)
        self._check_together()

    def _check_together(self) -> None:
        rules = {
            name: value
            for name in ("threshold", "entropy_bound", "klass_conf")
            if (value := getattr(self, name)) is not None
        }
        if len(rules) > 1:
            raise UserError(
                "only one multi-commit rule at a time: got "
                + " and ".join(f"`{name}` = {value}" for name, value in rules.items())
                + "; keep one of them."
            )
        if self.klass_conf is None:
            for name in ("klass_kl", "klass_steps"):
                value = getattr(self, name)
                check(value is None, name, value, "left out unless `klass_conf` is set")
        if self.klass_kl is not None:
            check(self.klass_kl > 0, "klass_kl", self.klass_kl, "above 0")
        if self.temperature == 0:
            why = "left out when `temperature` is 0: nothing is sampled"
            _check_unfiltered(self.sample_top_p, self.sample_top_k, why)
        if self.cache == "none":
            why = "left out when `cache` is none"
            steps, kl = self.cache_refresh_steps, self.cache_refresh_kl
            check(steps is None, "cache_refresh_steps", steps, why)
            check(kl is None, "cache_refresh_kl", kl, why)
            check(self.cache_lane == 1, "cache_lane", self.cache_lane, why)
        if self.trim_tail:
            why = "true with `trim_tail`, which takes away what lies behind an end"
            check(self.stop_at_eos, "stop_at_eos", self.stop_at_eos, why)
        if self.refine_per_commit:
            check(
                self.max_refine_steps > 0,
                "max_refine_steps",
                self.max_refine_steps,
                f"at least 1 when `refine_per_commit` is {self.refine_per_commit}",
            )


def _fixed(value: Any) -> Any:
    """A setting that has this value and cannot be given."""
    return dataclasses.field(default=value, init=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig(DecodeConfig):
    """The paper's baseline: the same loop on hard masks, one forward per commit.

    `r_f`, `max_refine_steps` and `tau_decode` are 0, which leaves the other settings of
    soft embeddings, phase 1 and the KL stop nothing to act on: none can be set.
    """

    r_f: float = _fixed(0.0)
    r_f_decode: float | None = _fixed(None)
    top_p: float = _fixed(DecodeConfig.top_p)
    tau_refine: float = _fixed(DecodeConfig.tau_refine)
    tau_decode: float = _fixed(0.0)
    max_refine_steps: int = _fixed(0)
    refine_per_commit: int = _fixed(0)
    kl_criterion: Literal["value", "delta"] = _fixed(DecodeConfig.kl_criterion)
    kl_patience: int = _fixed(DecodeConfig.kl_patience)
    stop_entropy: float = _fixed(DecodeConfig.stop_entropy)

    method: ClassVar[str] = "baseline"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LladaConfig(WindowConfig):
    """LLaDA's own sampler: low-confidence or random remasking.

    Attributes:
        steps: forwards in all, shared evenly by the blocks; None for `gen_length`.
        block_length: W, positions decoded at a time; None for one block.
        cfg_scale: classifier-free guidance, z = z_u + (s + 1)(z_c - z_u); 0 for none.
        remasking: commit the likeliest predictions first, or in random order.
        logits_eos_inf: whether end of text cannot be sampled.
        confidence_eos_eot_inf: whether positions that predict end of text or of turn
            are committed last.
    """

    steps: int | None = None
    block_length: int | None = None
    cfg_scale: float = 0.0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    method: ClassVar[str] = "llada"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_blocks(self.gen_length, self.block_length)
        finite = 0 <= self.cfg_scale < math.inf
        check(finite, "cfg_scale", self.cfg_scale, "a finite number, 0 or more")
        if self.steps is not None:
            blocks = self.gen_length // (self.block_length or self.gen_length)
            even = self.steps >= 1 and self.steps % blocks == 0
            check(even, "steps", self.steps, f"a multiple of the {blocks} block(s)")
        if self.remasking == "random":
            why = "false when `remasking` is random: its positions go by no confidence"
            ends = self.confidence_eos_eot_inf
            check(not ends, "confidence_eos_eot_inf", ends, why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamConfig(WindowConfig):
    """Dream's own sampler, `diffusion_generate`.

    Attributes:
        steps: forwards in all; None for `gen_length`.
        alg: which predictions are committed first: in random order (`origin`), highest
            probability (`maskgit_plus`), margin (`topk_margin`), lowest `entropy`.
        alg_temp: above 0 draws the positions at this temperature instead.
        eps: the last timestep of the schedule.
        sample_top_p: nucleus of the tempered distribution, scores included.
        sample_top_k: only the k likeliest tokens, scores included; None for all.
    """

    steps: int | None = None
    alg: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = "entropy"
    alg_temp: float = 0.0
    eps: float = 1e-3
    sample_top_p: float = 1.0
    sample_top_k: int | None = None

    method: ClassVar[str] = "dream"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.steps is None or self.steps >= 1, "steps", self.steps, "at least 1")
        check(0 < self.eps < 1, "eps", self.eps, "between 0 and 1")
        _check_temperature("alg_temp", self.alg_temp)
        _check_sampling(self.sample_top_p, self.sample_top_k)
        if self.alg == "origin":
            why = "0 when `alg` is origin: its positions are random already"
            check(self.alg_temp == 0, "alg_temp", self.alg_temp, why)
            if self.temperature == 0:
                why = "left out when `alg` is origin and `temperature` 0: no use of it"
                _check_unfiltered(self.sample_top_p, self.sample_top_k, why)


MethodConfig = DecodeConfig | LladaConfig | DreamConfig
METHODS: dict[str, type[MethodConfig]] = {
    cls.method: cls for cls in (DecodeConfig, BaselineConfig, LladaConfig, DreamConfig)
}


def _check_temperature(name: str, value: float) -> None:
    """0 for none. A logit over a tiny one would be infinite."""
    ok = value == 0 or 1e-6 <= value < math.inf
    check(ok, name, value, "0, or a finite number from 1e-6 on")


def _check_blocks(gen_length: int, block_length: int | None) -> None:
    if block_length is not None:
        check(block_length >= 1, "block_length", block_length, "at least 1")
        if gen_length % block_length:
            raise UserError(
                f"`gen_length` must be a multiple of `block_length`, got {gen_length} "
                f"and {block_length}."
            )


def _check_sampling(sample_top_p: float, sample_top_k: int | None) -> None:
    check(0 < sample_top_p <= 1, "sample_top_p", sample_top_p, "in (0, 1]")
    ok = sample_top_k is None or sample_top_k >= 1
    check(ok, "sample_top_k", sample_top_k, "at least 1")


def _check_unfiltered(sample_top_p: float, sample_top_k: int | None, why: str) -> None:
    """Where filters would change nothing."""
    check(sample_top_p == 1, "sample_top_p", sample_top_p, why)
    check(sample_top_k is None, "sample_top_k", sample_top_k, why)
