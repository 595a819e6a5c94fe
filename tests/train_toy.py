"""Small models and data for the tests of training."""

import json

import jax
import pytest

from lrd_jax import checkpoint
from lrd_jax.config import ModelConfig
from lrd_jax.model import backbone

MASK_ID, END_ID = 1, 0
# What a run needs besides `--out`, for two-token answers that copy the prompt.
FLAGS = (
    "--train.steps 12 --train.batch-size 8 --train.windows 4 --train.warmup-steps 2 "
    "--train.log-steps 3 --train.optimiser adamw"
).split()


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    """For modules that import it: compiling is most of what their tests do."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def model_config(family="llada", **changes):
    fields = {
        "family": family,
        "vocab_size": 24,
        "d_model": 16,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_dim": 32,
        "rope_theta": 1e4,
        "norm_eps": 1e-5,
        "qkv_bias": family == "dream",
        "tie_embeddings": False,
        "max_length": 64,
        "mask_id": MASK_ID,
        "eos_ids": (END_ID,),
        "pad_id": END_ID,
    }
    return ModelConfig(**(fields | changes))


def write_checkpoint(path, cfg):
    checkpoint.save_params(path, cfg, backbone.init_params(cfg, jax.random.key(0)))
    return path


def copy_lines(count=4):
    return [
        {"prompt_ids": [2 + i, 3 + i], "response_ids": [2 + i, 3 + i]}
        for i in range(count)
    ]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(folder):
    """The log without what differs from one run to the next."""
    timing = ("tokens_per_second", "seconds")
    return [
        {name: value for name, value in line.items() if name not in timing}
        for line in read_jsonl(folder / "log.jsonl")
    ]
