"""`python -m convert.random_checkpoint`: a small published-layout checkpoint to try on.

Random weights say nothing sensible, but they go through every step that real ones go
through: convert, load, decode. It needs no download.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from lrd_jax.errors import UserError

SPECIAL_TOKENS = ("<|endoftext|>", "<|mdm_mask|>")  # Behind the 256 bytes.
NAME = "lrd_jax/random-base"  # In config.json: only such a directory is replaced.
NUM_IDS = 256 + len(SPECIAL_TOKENS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Writes a small random checkpoint in the published Hugging Face layout.

    Attributes:
        dst: directory to make.
        family: which architecture.
        seed: of the weights.
        overwrite: replace an earlier one at `dst`.
    """

    dst: Annotated[str, tyro.conf.arg(metavar="DIR")]
    family: Literal["llada", "dream"] = "llada"
    seed: int = 0
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(argv: Sequence[str] | None = None) -> int:
    """Writes it; returns the exit code."""
    args = tyro.cli(Args, prog="python -m convert.random_checkpoint", args=argv)
    try:
        write(pathlib.Path(args.dst), args.family, args.seed, args.overwrite)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.dst}: a small {args.family} with RANDOM weights, in the published "
        "layout; what it generates means nothing."
    )
    return 0


def write(
    dst: pathlib.Path,
    family: Literal["llada", "dream"],
    seed: int,
    overwrite: bool = False,
) -> None:
    """Writes config.json, safetensors and a byte-level tokenizer.

    Raises:
        UserError: `dst` exists (and is not to be, or not one of these) or cannot be
            written.
    """
    import jax
    import numpy as np
    from safetensors.numpy import save_file

    from convert import keymap
    from lrd_jax.config import ModelConfig
    from lrd_jax.model import backbone, families
    from lrd_jax.staging import staged

    cfg = ModelConfig(
        family=family,
        vocab_size=NUM_IDS,
        d_model=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4 if family == "llada" else 2,
        head_dim=32,
        mlp_dim=384,
        rope_theta=5e5,
        norm_eps=1e-5,
        qkv_bias=family == "dream",
        tie_embeddings=False,
        max_length=1024,
        mask_id=257,
        eos_ids=(256,),
        pad_id=256,
    )
    params = backbone.init_params(cfg, jax.random.key(seed))
    tensors: dict[str, Any] = {}
    for entry in keymap.entries(cfg):
        leaf: Any = params
        for name in entry.rule.path:
            leaf = leaf[name]
        layers = [leaf] if entry.layers is None else list(leaf)
        for name, ours in zip(entry.names, layers, strict=True):
            rows = entry.rule.to_published(np.asarray(ours))
            tensors[name] = np.ascontiguousarray(rows)
    published = families.to_published(cfg) | {"_name_or_path": NAME}
    with staged(dst, overwrite=overwrite, replaceable=_is_random) as folder:
        (folder / "config.json").write_text(json.dumps(published))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _byte_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": SPECIAL_TOKENS[0], "pad_token": SPECIAL_TOKENS[0]})
        )


def _is_random(path: pathlib.Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_text())
        return bool(config["_name_or_path"] == NAME)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _byte_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
