"""What a run starts from: random weights and a new tokenizer, or a checkpoint."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lrd_jax import builtin, checkpoint
from lrd_jax.base import Denoiser, Params
from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.model import backbone, families
from lrd_jax.staging import one_line_disk_errors
from lrd_jax.tokenizer import Tokenizer, write_backend
from lrd_jax.training import vocabulary
from lrd_jax.training.export import copy_tokenizer
from lrd_jax.training.settings import Recipe

# Layers up to which unrolling them costs little time to compile.
MAX_UNROLLED = 8


@dataclasses.dataclass(frozen=True)
class Start:
    """A model before training.

    Attributes:
        config: shape and special ids.
        tokenizer: None if the checkpoint has none.
        params: makes or reads the weights, in float32.
        fingerprint: of the checkpoint's weights, None for random ones.
        write_tokenizer: writes the tokenizer's files into a directory.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    params: Callable[[], Params]
    fingerprint: str | None
    write_tokenizer: Callable[[pathlib.Path], None]

    @property
    def denoiser(self) -> Denoiser:
        few = self.config.num_layers <= MAX_UNROLLED
        return families.make_denoiser(self.config, unroll=few)

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the weights."""
        return backbone.abstract_params(self.config)

    def save_tokenizer(self, folder: pathlib.Path) -> None:
        """Writes the tokenizer's files unless they are there; whole or not at all.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        if folder.is_dir():
            return
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        with one_line_disk_errors(folder):
            try:
                part.mkdir()
                self.write_tokenizer(part)
                os.replace(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)


def from_checkpoint(path_or_name: str) -> Start:
    """Goes on from a converted checkpoint, or a built-in one.

    Raises:
        UserError: not a checkpoint, a damaged one, or one in int8, which has no
            gradient.
    """
    folder = builtin.find(path_or_name)
    if checkpoint.read_quantization(folder) is not None:
        raise UserError(
            f"{folder}: its weights are in int8, which training cannot change; convert "
            "the published checkpoint without `--quantize`."
        )
    return Start(
        config=checkpoint.read_config(folder),
        tokenizer=Tokenizer.load(folder),
        params=lambda: checkpoint.restore(folder, dtype=jnp.float32),
        fingerprint=checkpoint.read_fingerprint(folder),
        write_tokenizer=lambda dst: copy_tokenizer(folder, dst),
    )


def from_recipe(recipe: Recipe, seed: int, written: pathlib.Path) -> Start:
    """Random weights of the recipe's shape, and a tokenizer for the tasks.

    Args:
        recipe: gives the shape and the vocabulary.
        seed: of the weights.
        written: where an earlier start of the run has left the tokenizer, if it has.

    Raises:
        UserError: the recipe's [model] is wrong.
    """
    recipe.model_config(**vocabulary.stand_in_ids(recipe.vocabulary))
    tokenizer = Tokenizer.load(written)
    if tokenizer is None:
        texts = vocabulary.task_texts(vocabulary.EXAMPLES_PER_TASK)
        backend = vocabulary.build_tokenizer(recipe.vocabulary, texts)
        tokenizer = Tokenizer(backend, vocabulary.NAMED, vocabulary.CHAT_TEMPLATE)
    config = recipe.model_config(**vocabulary.special_ids(tokenizer.backend))

    def write_tokenizer(dst: pathlib.Path) -> None:
        write_backend(tokenizer.backend, dst / "tokenizer.json")
        settings = vocabulary.NAMED | {"chat_template": vocabulary.CHAT_TEMPLATE}
        text = json.dumps(settings, indent=2) + "\n"
        (dst / "tokenizer_config.json").write_text(text, encoding="utf-8")

    return Start(
        config=config,
        tokenizer=tokenizer,
        params=lambda: backbone.init_params(config, jax.random.key(seed)),
        fingerprint=None,
        write_tokenizer=write_tokenizer,
    )
