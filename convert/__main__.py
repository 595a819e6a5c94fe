"""`python -m convert`: the command line of the converter."""

import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from lrd_jax import builtin
from lrd_jax.errors import UserError
from lrd_jax.flags import DtypeFlag, QuantizeFlag, Switch, shown
from lrd_jax.process import exit_code
from lrd_jax.quantization import kind_of
from lrd_jax.settings import check_given_once

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights, config and tokenizer.
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Converts a LLaDA or Dream checkpoint from the Hugging Face layout, or back to it.

    Attributes:
        src: directory to read: config.json and safetensors, or with `--to hf` a
            checkpoint that this command made, or the name of a built-in one.
        dst: directory to make.
        to: layout of `dst`.
        dtype: of the weights written; by default bfloat16 if all of the source are,
            else float32.
        quantize: int8 writes all matrices but the embedding table in int8.
        quantize_embeddings: write the embedding table in int8, too.
        variant: base or instruct, where the source does not tell.
        overwrite: replace an earlier result at `dst`.
    """

    src: Annotated[str, shown("DIR|NAME")]
    dst: Annotated[str, shown("DIR")]
    to: Literal["lrd", "hf"] = "lrd"
    dtype: DtypeFlag = None
    quantize: QuantizeFlag = None
    quantize_embeddings: Switch = False
    variant: Annotated[Literal["base", "instruct"] | None, tyro.conf.DisallowNone] = (
        None
    )
    overwrite: Switch = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one conversion.

    Returns:
        0, 2 after a mistake of the user (one line on stderr), 130 if interrupted, 141
        if the reader of the output went away.
    """

    def run() -> int:
        words = sys.argv[1:] if argv is None else argv
        check_given_once(words)
        return _run(tyro.cli(Args, prog="python -m convert", args=words))

    return exit_code(run, lambda: "nothing was written")


def _run(args: Args) -> int:
    dst = pathlib.Path(args.dst)
    src = builtin.find(args.src) if args.to == "hf" else pathlib.Path(args.src)
    _check_paths(args, src, dst)
    kind = kind_of(args.quantize, args.quantize_embeddings)
    from convert import convert  # Imports JAX: not for --help and mistyped paths.

    if args.to == "hf":
        if args.variant is not None:
            raise UserError("`--variant` says what to convert from, not to.")
        if kind is not None:
            raise UserError("`--quantize`: the published layout has no int8.")
        report = convert.to_hf(src, dst, dtype=args.dtype, overwrite=args.overwrite)
    else:
        report = convert.from_hf(
            src,
            dst,
            dtype=args.dtype,
            variant=args.variant,
            quantization=kind,
            overwrite=args.overwrite,
        )
    print(f"{args.src} -> {dst}: {report}")
    if args.to == "hf":
        print(
            "To load it with PyTorch, put configuration_*.py, modeling_*.py and the "
            "other .py files of the model's hub repository beside it."
        )
    return 0


def _check_paths(args: Args, src: pathlib.Path, dst: pathlib.Path) -> None:
    """Raises `UserError` unless there is a source, well apart from the destination."""
    if not src.is_dir():
        if _HUB_ID.fullmatch(args.src) and not src.exists():
            raise UserError(_download_hint(args))
        raise UserError(f"no such directory: {src}")
    inner, outer = dst.resolve(), src.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UserError(f"{dst} and {src} must be apart, not one inside the other.")


def _download_hint(args: Args) -> str:
    name = args.src.partition("/")[2]
    includes = " ".join(f'--include "{pattern}"' for pattern in _HUB_FILES)
    command = ["python", "-m", "convert", "--src", name, "--dst", args.dst]
    for flag in ("dtype", "quantize", "quantize_embeddings", "variant", "overwrite"):
        value = getattr(args, flag)
        if value:
            command.append(f"--{flag.replace('_', '-')}")
            command += [] if value is True else [value]
    return (
        f"no such directory: {args.src}; if it is a model of the Hugging Face hub: "
        f"hf download {args.src} {includes} --local-dir {name} && {shlex.join(command)}"
    )


def _set_up_process() -> None:
    """What must be set before JAX starts."""
    # Not an accelerator's work; and the chunks of a leaf are devices of the host.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from lrd_jax.leaf_buffer import GRID_DEVICES

    jax.config.update("jax_num_cpu_devices", GRID_DEVICES)
    with contextlib.suppress(ValueError):  # Not the main thread.
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    _set_up_process()
    sys.exit(main())
