"""What tells one decode method from another; all of it static to the loop."""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Bool

from lrd_jax.base import Denoiser
from lrd_jax.config import DecodeConfig
from lrd_jax.decode.belief import PickFn
from lrd_jax.decode.state import DecodeState

# Which of the open positions `[B, W]` of the active block a commit takes.
ChooseFn = Callable[[DecodeState, Bool[Array, "B W"]], Bool[Array, "B W"]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A decode method, resolved for one model.

    Attributes:
        denoiser: the model.
        cfg: window, soft feedback, refinement and stops.
        pick: each position's token and score, from its prediction.
        choose: which open positions a commit takes.
        predicts_mask: whether the mask token keeps its probability; a position that
            picks it stays open.
        block_steps: forwards a block gets; None for as many as it needs.
        guidance: scale of classifier-free guidance; 0 for none.
    """

    denoiser: Denoiser
    cfg: DecodeConfig
    pick: PickFn
    choose: ChooseFn
    predicts_mask: bool = False
    block_steps: int | None = None
    guidance: float = 0.0

    @property
    def refine_weight(self) -> float:
        """r_f in phase 1; 0 also where `top_p` 0 turns mixing off."""
        return self.cfg.r_f if self.cfg.top_p > 0 else 0.0

    @property
    def decode_weight(self) -> float:
        """r_f in phase 2."""
        if self.cfg.r_f_decode is None or self.cfg.top_p == 0:
            return self.refine_weight
        return self.cfg.r_f_decode

    @property
    def mixing_top_p(self) -> float:
        """Nucleus mass to average embeddings over; 0 where nothing is ever mixed."""
        mixes = (self.refines and self.refine_weight > 0) or self.decode_weight > 0
        return self.cfg.top_p if mixes else 0.0

    @property
    def refines(self) -> bool:
        """Whether there is a phase 1 at all."""
        return self.cfg.max_refine_steps > 0 or self.cfg.refine_per_commit > 0

    def budget(self, num_blocks: int, gen_length: int) -> int:
        """Most forwards of a row, which sizes the buffers."""
        if self.block_steps is not None:
            return num_blocks * self.block_steps
        cfg = self.cfg
        if cfg.refine_per_commit > 0:
            enough = num_blocks + gen_length * (1 + cfg.refine_per_commit)
        elif cfg.refine_per_commit < 0:
            enough = num_blocks + gen_length * (1 + cfg.max_refine_steps)
        else:
            enough = num_blocks * (1 + cfg.max_refine_steps) + gen_length
        return enough if cfg.max_steps is None else min(enough, cfg.max_steps)
