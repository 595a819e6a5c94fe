"""What is told of a decode: one JSON object a row, and one line of figures."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lrd_jax.batches import Row
from lrd_jax.config import ModelConfig
from lrd_jax.decode.state import NEVER, DecodeResult, StopReason
from lrd_jax.text import text_of
from lrd_jax.tokenizer import Tokenizer


def make_record(
    row: Row,
    result: DecodeResult,
    index: int,
    tokenizer: Tokenizer | None,
    cfg: ModelConfig,
) -> dict[str, Any]:
    """The JSON object of row `index` of a decoded batch.

    What does not exist is None: D at a block's first forward, the commit record of a
    position never committed. An infilled row shows its whole text, without padding.

    Args:
        row: the prompt.
        result: of the batch, arrays on the host.
        index: of the row in the batch.
        tokenizer: for `text`; None leaves it None.
        cfg: of the model.
    """
    infilled = row.open is not None
    first = result.tokens.shape[1] - len(row.ids) if infilled else 0
    taken = int(result.num_forwards[index])
    token_ids = [int(i) for i in result.tokens[index, first:]]
    text = None
    if tokenizer is not None:
        # An end-of-text id inside a given text does not end it.
        eos_ids = () if infilled else cfg.eos_ids
        text = text_of(tokenizer, token_ids, eos_ids, cfg.mask_id)
    return {
        "id": row.id,
        "text": text,
        "token_ids": token_ids,
        "num_forwards": taken,
        "num_full_forwards": int(result.num_full_forwards[index]),
        "useful_tokens": int(result.useful_tokens[index]),
        "stop_reason": _reason(result.stop_reason[index]),
        "block_stop": [_reason(code) for code in result.block_stop[index]],
        "refine_steps": [int(n) for n in result.refine_steps[index]],
        "kl": _numbers(result.kl[index, :taken]),
        "phase": [int(code) for code in result.phase[index, :taken]],
        "nucleus_size": _numbers(result.nucleus_size[index, :taken]),
        "commit_step": [
            None if step == NEVER else int(step)
            for step in result.commit_step[index, first:]
        ],
        "commit_prob": _numbers(result.commit_prob[index, first:]),
        "commit_entropy": _numbers(result.commit_entropy[index, first:]),
    }


def _reason(code: Any) -> str | None:
    reason = StopReason(int(code))
    return None if reason == StopReason.RUNNING else reason.name.lower()


def _numbers(values: Any) -> list[float | None]:
    """JSON has neither NaN nor infinity, and the digits of float32 are enough."""
    return [
        float(str(v)) if math.isfinite(v) else None
        for v in np.asarray(values, np.float32)
    ]


@dataclasses.dataclass
class Totals:
    """Sums over the rows decoded so far.

    Attributes:
        rows: how many.
        forwards: forward passes, each counted once for each row that took it.
        full_forwards: those of them that read no cache.
        useful_tokens: committed tokens before the end of the text.
        nonfinite: ids of rows that met NaN or infinity.
    """

    rows: int = 0
    forwards: int = 0
    full_forwards: int = 0
    useful_tokens: int = 0
    nonfinite: list[int | str] = dataclasses.field(default_factory=list)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Counts the rows of one batch."""
        for record in records:
            self.rows += 1
            self.forwards += record["num_forwards"]
            self.full_forwards += record["num_full_forwards"]
            self.useful_tokens += record["useful_tokens"]
            if record["stop_reason"] == "nonfinite":
                self.nonfinite.append(record["id"])

    def figures(self, compile_seconds: float, run_seconds: float) -> str:
        """One line for the terminal; tokens are the useful ones throughout."""
        per_forward = self.useful_tokens / max(self.forwards, 1)
        per_second = self.useful_tokens / max(run_seconds, 1e-9)
        return (
            f"prompts {self.rows} | forwards {self.forwards} "
            f"({self.full_forwards} full) | "
            f"useful tokens {self.useful_tokens} | "
            f"tokens per forward {per_forward:.2f} | "
            f"useful tokens/s {per_second:.1f} | "
            f"compile {compile_seconds:.3g} s | run {run_seconds:.3g} s"
        )


def shown(record: dict[str, Any], heading: bool) -> str:
    """A result for the terminal: its text, or its ids if there is no tokenizer."""
    text = record["text"]
    if text is None:
        text = " ".join(map(str, record["token_ids"]))
    return f"=== {record['id']} ===\n{text}" if heading else text
