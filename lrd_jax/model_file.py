"""`model.json`: what a checkpoint says of itself, beside its weights.

Not `config.json`, so that our checkpoints and Hugging Face's are told apart.
"""

import dataclasses
import json
import pathlib
import shlex
from typing import Any

from lrd_jax import builtin
from lrd_jax.config import ModelConfig
from lrd_jax.errors import UserError
from lrd_jax.quantization import KINDS
from lrd_jax.settings import build

NAME = "model.json"
FORMAT = 1
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """The content of the file.

    Attributes:
        config: of the model.
        dtype: of the stored weights, one of `DTYPES`.
        weights_sha256: over the names, shapes, dtype and values of all leaves.
        sizes: of the files of the weights in bytes, by path in the checkpoint; tells a
            half-copied checkpoint before it is read.
        quantization: which matrices are stored in int8, one of `quantization.KINDS`.
    """

    config: ModelConfig
    dtype: str
    weights_sha256: str
    sizes: dict[str, int]
    quantization: str | None = None


def write(path: pathlib.Path, file: ModelFile) -> None:
    """Writes the file of the checkpoint `path`."""
    content = {
        "format": FORMAT,
        "model": dataclasses.asdict(file.config),
        "dtype": file.dtype,
        "weights_sha256": file.weights_sha256,
        "sizes": file.sizes,
    }
    if file.quantization is not None:
        content["quantization"] = file.quantization
    text = json.dumps(content, indent=1) + "\n"
    (path / NAME).write_text(text, encoding="utf-8")


def read(path: pathlib.Path | str) -> ModelFile:
    """Reads the file of the checkpoint `path`.

    Raises:
        UserError: no such directory, not a checkpoint, a damaged one, or of a format
            that this version does not know.
    """
    path = pathlib.Path(path)
    file = path / NAME
    if not file.is_file():
        raise UserError(_why_not_a_checkpoint(path))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{file}: damaged: it has no format.")
    if content["format"] != FORMAT:
        raise UserError(
            f"{file}: its format is {content['format']!r}, "
            f"this version of lrd_jax reads {FORMAT}."
        )
    return _build(content, str(file))


def _build(content: dict[str, Any], where: str) -> ModelFile:
    fields: Any = content.get("model")
    dtype: Any = content.get("dtype")
    sha256: Any = content.get("weights_sha256")
    sizes: Any = content.get("sizes")
    kind: Any = content.get("quantization")
    known = dtype in DTYPES and kind in (None, *KINDS)
    tables = isinstance(fields, dict) and isinstance(sizes, dict)
    if not tables or not known or not sha256:
        raise UserError(
            f"{where}: damaged: model, dtype, weights_sha256, sizes or quantization is "
            "wrong."
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        config = build(ModelConfig, values, where)
        return ModelFile(config, dtype, str(sha256), sizes, kind)
    except TypeError as error:  # A required field is missing.
        raise UserError(f"{where}: damaged: {error}") from None


def _why_not_a_checkpoint(path: pathlib.Path) -> str:
    wanted = (
        "give a directory made by `python -m convert --src HF_DIR --dst DIR`, or the "
        f"name of a built-in model: {', '.join(builtin.names())}."
    )
    if not path.exists():
        return f"no such checkpoint: {path}; {wanted}"
    if (path / "config.json").is_file():
        if path.name in ("", ".."):  # No name to make another of.
            path = path.resolve()
        src, dst = shlex.quote(str(path)), shlex.quote(f"{path}-lrd")
        return (
            f"{path} is a Hugging Face directory; convert it first: "
            f"python -m convert --src {src} --dst {dst}"
        )
    return f"{path} is not a checkpoint, it has no {NAME}; {wanted}"
