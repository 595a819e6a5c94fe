"""Shapes of models by name, to plan and measure without weights."""

from lrd_jax.config import ModelConfig

# The published models.
SHAPES = {
    "llada-8b": ModelConfig(
        family="llada",
        vocab_size=126464,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        mlp_dim=12288,
        rope_theta=5e5,
        norm_eps=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
        max_length=4096,
        mask_id=126336,
        eos_ids=(126081, 126348),
        pad_id=126081,
    ),
    "dream-7b": ModelConfig(
        family="dream",
        vocab_size=152064,
        d_model=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_dim=18944,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        tie_embeddings=False,
        max_length=131072,
        mask_id=151666,
        eos_ids=(151643, 151645),
        pad_id=151643,
    ),
}

# Large enough for the arithmetic to count, small enough for a laptop.
BENCHMARK_SHAPES = SHAPES | {
    "llada-100m": ModelConfig(
        family="llada",
        vocab_size=32768,
        d_model=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        mlp_dim=2048,
        rope_theta=5e5,
        norm_eps=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
        max_length=4096,
        mask_id=32767,
        eos_ids=(32765, 32766),
        pad_id=32765,
    ),
}
