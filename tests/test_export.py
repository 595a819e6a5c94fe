"""The decode loop lowers for accelerators that are not here."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lrd_jax.config import DecodeConfig, DreamConfig, LladaConfig, ModelConfig
from lrd_jax.decode.loop import make_decode_fn
from lrd_jax.model import backbone, families

MODEL = ModelConfig(
    family="dream",
    vocab_size=512,
    d_model=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=512,
    rope_theta=1e6,
    norm_eps=1e-6,
    qkv_bias=True,
    tie_embeddings=False,
    max_length=1024,
    mask_id=511,
    eos_ids=(509,),
    pad_id=509,
)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
    "cfg",
    [
        DecodeConfig(gen_length=64, block_length=32, temperature=0.5, sample_top_k=9),
        LladaConfig(gen_length=64, cfg_scale=1.0),
        DreamConfig(gen_length=64, alg="entropy", sample_top_p=0.9),
    ],
    ids=lambda cfg: cfg.method,
)
def test_the_loop_lowers_in_bfloat16_for(platform, cfg):
    decode_fn = make_decode_fn(families.make_denoiser(MODEL), cfg)
    shape = functools.partial(jax.ShapeDtypeStruct, (2, 32))
    exported = jax.export.export(decode_fn, platforms=[platform])(
        backbone.abstract_params(MODEL, jnp.bfloat16),
        shape(jnp.int32),
        shape(jnp.bool_),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    assert exported.platforms == (platform,)
    assert exported.out_avals[0].shape == (2, 64)
