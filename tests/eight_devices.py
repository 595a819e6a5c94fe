"""What needs eight devices, checked in one process that simulates them.

Run by `test_sharding.py`; prints one JSON line, the traceback of each check, or null.
"""

import dataclasses
import functools
import json
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lrd_jax import sharding
from lrd_jax.config import (
    BaselineConfig,
    DecodeConfig,
    DreamConfig,
    LladaConfig,
    ModelConfig,
)
from lrd_jax.decode.loop import make_decode_fn
from lrd_jax.mesh_shape import MeshShape
from lrd_jax.model import backbone, families

# The vocabularies divide by 8 into parts of more than `nucleus.FEW` tokens, and no
# other axis is as long: an array of that length is one over the vocabulary.
LLADA = ModelConfig(
    family="llada",
    vocab_size=8 * 71,
    d_model=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    mlp_dim=48,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
    tie_embeddings=False,
    max_length=64,
    mask_id=540,
    eos_ids=(541, 542),
    pad_id=541,
)
# Over 2 devices its keys are split, over 8 only its queries.
DREAM = dataclasses.replace(LLADA, family="dream", num_kv_heads=2, qkv_bias=True)
TIED = dataclasses.replace(LLADA, tie_embeddings=True)
# Over 2 devices its heads are split and nothing else.
ODD = dataclasses.replace(LLADA, num_heads=6, num_kv_heads=3, mlp_dim=49)
ODD = dataclasses.replace(ODD, vocab_size=569)
# Over 8 devices its vocabulary and its MLP are split, its attention is not.
WIDE = dataclasses.replace(DREAM, num_heads=6, num_kv_heads=2)

SHARED = dict(gen_length=8, block_length=4)
LRD = DecodeConfig(
    **SHARED, r_f=0.4, tau_refine=0.01, tau_decode=0.2, max_refine_steps=4
)
SAMPLED = dataclasses.replace(
    LRD, temperature=0.7, sample_top_p=0.8, sample_top_k=30, commit_order="margin"
)
METHODS = {
    "lrd": LRD,
    "baseline": BaselineConfig(**SHARED),
    "prefix": dataclasses.replace(LRD, cache="prefix", cache_lane=2),
    "dual": dataclasses.replace(LRD, cache="dual", cache_refresh_steps=3),
    "sampled": SAMPLED,
    "llada": LladaConfig(**SHARED, steps=8, temperature=0.5, logits_eos_inf=True),
    "dream": DreamConfig(gen_length=8, steps=6, alg="topk_margin", temperature=0.3),
}
DATA, MODEL, BOTH = (MeshShape(8, 1), MeshShape(1, 8), MeshShape(4, 2))
EXACT = ("tokens", "committed", "num_forwards", "num_full_forwards", "commit_step")
EXACT += ("stop_reason", "phase")
KEY = jax.random.key(4)


@functools.cache
def params_of(cfg):
    """Random weights of which some predictions are sharp and some flat."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        scale = 0.9 if path[-1].key == "head" else 0.3
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, backbone.abstract_params(cfg))


def prompts(batch):
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 500, (batch, 6)).astype(np.int32)
    return ids, np.arange(6)[None] >= rng.integers(0, 5, batch)[:, None]


def placed(cfg, mesh):
    return jax.device_put(params_of(cfg), sharding.param_shardings(cfg, mesh))


@functools.cache
def alone(cfg, method, batch):
    decode_fn = make_decode_fn(families.make_denoiser(cfg), METHODS[method])
    return jax.device_get(decode_fn(params_of(cfg), *prompts(batch), KEY))


def spread(cfg, method, shape):
    mesh = sharding.make_mesh(shape)
    decode_fn = make_decode_fn(families.make_denoiser(cfg), METHODS[method])
    specs = sharding.specs(cfg, shape.model)
    return sharding.batch_decode(decode_fn, mesh, specs), placed(cfg, mesh)


def assert_same(got, want):
    for field in EXACT:
        np.testing.assert_array_equal(
            getattr(got, field), getattr(want, field), err_msg=field
        )
    np.testing.assert_allclose(got.kl, want.kl, atol=2e-5)


def same_tokens(cfg, method, shape, batch=8):
    decode, params = spread(cfg, method, shape)
    got = jax.device_get(decode(params, *prompts(batch), KEY))
    assert got.tokens.shape == (batch, 8)
    assert_same(got, alone(cfg, method, batch))


def plain_pmap():
    decode_fn = make_decode_fn(families.make_denoiser(LLADA), LRD)
    inputs = jax.tree.map(lambda x: x[:, None], prompts(8))
    keys = jax.vmap(lambda r: jax.random.fold_in(KEY, r)[None])(jnp.arange(8))
    got = jax.pmap(decode_fn, in_axes=(None, 0, 0, 0))(params_of(LLADA), *inputs, keys)
    got = jax.tree.map(lambda x: x[:, 0], jax.device_get(got))
    assert_same(got, alone(LLADA, "lrd", 8))


def infilling():
    """The optional argument goes along, and rows of nothing to fill are no trouble."""
    cfg = dataclasses.replace(LRD, stop_at_eos=False, block_length=None)
    decode_fn = make_decode_fn(families.make_denoiser(LLADA), cfg)
    ids, mask = prompts(3)
    opened = np.array([[False] * 3 + [True] * 3, [False] * 6, [False] * 5 + [True]])
    want = decode_fn(params_of(LLADA), ids, mask, KEY, opened)
    mesh = sharding.make_mesh(BOTH)
    decode = sharding.batch_decode(decode_fn, mesh, sharding.specs(LLADA, 2))
    got = decode(placed(LLADA, mesh), ids, mask, KEY, open_mask=opened)
    assert_same(jax.device_get(got), jax.device_get(want))


def parameters_that_lie_elsewhere_are_refused():
    decode, _ = spread(LLADA, "lrd", BOTH)
    mesh = sharding.make_mesh(BOTH)
    whole = jax.device_put(params_of(LLADA), jax.NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match="does not match"):
        decode(whole, *prompts(8), KEY)


COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute|collective-broadcast)(?:-start)?\((?P<rest>.*)"
)


def collectives(text):
    """`(kind, shapes of the result, groups of devices)` of each collective."""
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match:
            shapes = re.findall(r"\[([0-9,]*)\]", match["shapes"])
            shapes = [tuple(map(int, filter(None, s.split(",")))) for s in shapes]
            found.append((match["kind"], shapes, groups_of(match["rest"])))
    return found


def groups_of(text):
    listed = re.search(r"replica_groups=\{(\{[0-9,{}]*\})\}", text)
    if listed:
        groups = re.findall(r"\{([0-9,]+)\}", listed[1])
        return {tuple(map(int, group.split(","))) for group in groups}
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[(\d+)\](?!T)", text)
    assert tiled, f"groups not understood: {text}"
    rows = np.arange(int(tiled[3])).reshape(int(tiled[1]), int(tiled[2]))
    return set(map(tuple, rows.tolist()))


def compiled(cfg, method, shape):
    decode, params = spread(cfg, method, shape)
    return jax.jit(decode).lower(params, *prompts(8), KEY).compile().as_text()


def nothing_of_the_vocabulary_crosses(method):
    for cfg, shape in ((LLADA, MODEL), (DREAM, BOTH)):
        found = collectives(compiled(cfg, method, shape))
        assert {kind for kind, *_ in found} <= {"all-reduce", "all-gather"}
        group = np.arange(8).reshape(shape.data, shape.model)
        lengths = {cfg.vocab_size, cfg.vocab_size // shape.model}
        for kind, shapes, groups in found:
            assert groups == set(map(tuple, group.tolist())), (kind, groups)
            for dims in shapes:
                assert not lengths & {*dims}, (kind, dims)
                # Candidates of the nucleus are all that is gathered.
                assert kind == "all-reduce" or dims[1:] == (64 * shape.model,), dims
        assert len(found) > 5


def devices_that_share_no_weights_do_not_talk():
    assert collectives(compiled(LLADA, "lrd", DATA)) == []


CHECKS = {
    f"{method} on {shape}, {family.family}, {batch} rows": functools.partial(
        same_tokens, family, method, shape, batch
    )
    for family, method, shape, batch in [
        *((LLADA, m, s, 8) for m in ("lrd", "baseline") for s in (DATA, MODEL)),
        *((LLADA, m, BOTH, 6) for m in ("lrd", "baseline", "dual")),
        *((LLADA, m, s, 8) for m in ("prefix", "dual") for s in (DATA, MODEL)),
        (LLADA, "lrd", DATA, 3),
        *((DREAM, m, s, 6) for m in ("lrd", "prefix") for s in (MODEL, BOTH)),
        (LLADA, "sampled", MODEL, 3),
        (LLADA, "llada", MODEL, 3),
        (DREAM, "dream", BOTH, 4),
    ]
} | {
    "a tied head": functools.partial(same_tokens, TIED, "lrd", BOTH, 4),
    "heads that alone divide": functools.partial(same_tokens, ODD, "lrd", BOTH, 4),
    "heads that do not divide": functools.partial(same_tokens, WIDE, "dual", MODEL, 3),
    "pmap": plain_pmap,
    "infilling": infilling,
    "parameters that lie elsewhere": parameters_that_lie_elsewhere_are_refused,
    "collectives of lrd": functools.partial(nothing_of_the_vocabulary_crosses, "lrd"),
    "collectives of sampling": functools.partial(
        nothing_of_the_vocabulary_crosses, "sampled"
    ),
    "no collectives on data": devices_that_share_no_weights_do_not_talk,
}


def main():
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert len(jax.devices()) == 8
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
