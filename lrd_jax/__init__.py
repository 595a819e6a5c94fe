"""Latent Refinement Decoding for masked diffusion language models, in JAX.

model = lrd_jax.load()  # The built-in one; or a directory made by `python -m convert`.
cfg = lrd_jax.DecodeConfig(gen_length=64)
decode_fn = lrd_jax.make_decode_fn(model.denoiser, cfg)
result = decode_fn(model.params, prompt_ids, prompt_mask, jax.random.key(0))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrd_jax.base import Denoiser, KVCache
    from lrd_jax.config import (
        BaselineConfig,
        DecodeConfig,
        DreamConfig,
        LladaConfig,
        ModelConfig,
    )
    from lrd_jax.decode.loop import Stepper, make_decode_fn, make_stepper
    from lrd_jax.decode.state import DecodeResult, DecodeState, Phase, StopReason
    from lrd_jax.errors import UserError
    from lrd_jax.pretrained import Model, load

# Public name -> its module. Looked up on first use, so that the command line can check
# its arguments, and print its help, before JAX is imported.
_HOMES = {
    "BaselineConfig": "lrd_jax.config",
    "DecodeConfig": "lrd_jax.config",
    "DecodeResult": "lrd_jax.decode.state",
    "DecodeState": "lrd_jax.decode.state",
    "Denoiser": "lrd_jax.base",
    "DreamConfig": "lrd_jax.config",
    "KVCache": "lrd_jax.base",
    "LladaConfig": "lrd_jax.config",
    "Model": "lrd_jax.pretrained",
    "ModelConfig": "lrd_jax.config",
    "Phase": "lrd_jax.decode.state",
    "Stepper": "lrd_jax.decode.loop",
    "StopReason": "lrd_jax.decode.state",
    "UserError": "lrd_jax.errors",
    "load": "lrd_jax.pretrained",
    "make_decode_fn": "lrd_jax.decode.loop",
    "make_stepper": "lrd_jax.decode.loop",
}

__all__ = [
    "BaselineConfig",
    "DecodeConfig",
    "DecodeResult",
    "DecodeState",
    "Denoiser",
    "DreamConfig",
    "KVCache",
    "LladaConfig",
    "Model",
    "ModelConfig",
    "Phase",
    "Stepper",
    "StopReason",
    "UserError",
    "load",
    "make_decode_fn",
    "make_stepper",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lrd_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
