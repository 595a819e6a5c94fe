"""The result of a run, as a checkpoint that `lrd_jax.load` reads."""

import pathlib
import shutil

import jax
import jax.numpy as jnp

from lrd_jax.base import Params
from lrd_jax.checkpoint import is_checkpoint, save
from lrd_jax.config import ModelConfig
from lrd_jax.saving import flat
from lrd_jax.staging import staged

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def export(
    path: pathlib.Path, cfg: ModelConfig, params: Params, tokenizer: pathlib.Path
) -> None:
    """Writes the weights in bfloat16, with the tokenizer's files.

    Args:
        path: the checkpoint to make; an older one is replaced.
        cfg: the model.
        params: its weights.
        tokenizer: directory of the tokenizer's files.

    Raises:
        UserError: the disk is full, or something else is at `path`.
    """
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    with staged(path, overwrite=True, replaceable=is_checkpoint) as folder:
        save(folder, cfg, flat(narrow).items(), jnp.bfloat16)
        copy_tokenizer(tokenizer, folder)


def copy_tokenizer(src: pathlib.Path, dst: pathlib.Path) -> None:
    """Copies the tokenizer's files, as far as there are any."""
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)
