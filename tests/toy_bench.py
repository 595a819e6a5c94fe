"""A model file small enough to benchmark in a test."""

TOY = """
family = "{family}"
vocab_size = 64
d_model = 16
num_layers = 2
num_heads = 2
num_kv_heads = {kv_heads}
head_dim = 8
mlp_dim = 32
rope_theta = 1e4
norm_eps = 1e-5
qkv_bias = {qkv_bias}
tie_embeddings = {tied}
max_length = 96
mask_id = 63
eos_ids = [60, 61]
pad_id = 60
"""
LLADA = dict(family="llada", kv_heads=2, qkv_bias="false", tied="false")
DREAM = dict(family="dream", kv_heads=1, qkv_bias="true", tied="true")


def model_file(folder, fields=LLADA):
    """Path of a TOML file that describes the toy."""
    path = folder / f"{fields['family']}.toml"
    path.write_text(TOY.format(**fields))
    return str(path)
