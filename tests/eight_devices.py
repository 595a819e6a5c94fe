"""What needs eight devices, checked in one process that simulates them.

Run by `test_sharding.py`; prints one JSON line, the traceback of each check, or null.
"""

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import re
import tempfile
import traceback

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from toy_evaluate import TOYS
from toy_run import toy_config, toy_source

import lrd_jax
from lrd_jax import checkpoint, evaluate, generate, sharding, tasks
from lrd_jax.config import (
    BaselineConfig,
    DecodeConfig,
    DreamConfig,
    LladaConfig,
    ModelConfig,
)
from lrd_jax.decode.loop import make_decode_fn
from lrd_jax.decode.nucleus import few
from lrd_jax.mesh_shape import MeshShape
from lrd_jax.model import backbone, families
from lrd_jax.quantization import KINDS

# The vocabularies are too large for the dense way alone and divide by 8 into parts of
# more than `nucleus.few` tokens. No other axis is as long: what has that length is over
# the vocabulary.
LLADA = ModelConfig(
    family="llada",
    vocab_size=8 * 257,
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
ODD = dataclasses.replace(ODD, vocab_size=2049)
# Over 8 devices its vocabulary and its MLP are split, its attention is not.
WIDE = dataclasses.replace(DREAM, num_heads=6, num_kv_heads=2)

TOP_K = 30
SHARED = dict(gen_length=8, block_length=4)
LRD = DecodeConfig(
    **SHARED, r_f=0.4, tau_refine=0.01, tau_decode=0.2, max_refine_steps=4
)
SAMPLED = dataclasses.replace(
    LRD, temperature=0.7, sample_top_p=0.8, sample_top_k=TOP_K, commit_order="margin"
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
DATA, MODEL, BOTH = MESHES = (MeshShape(8, 1), MeshShape(1, 8), MeshShape(4, 2))
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
    """Spread over a mesh as on one device; and no more crosses between than has to."""
    decode, params = spread(cfg, method, shape)
    inputs = (params, *prompts(batch), KEY)
    compiled = jax.jit(decode).lower(*inputs).compile()
    if batch % shape.data == 0:  # Else rows are padded and cut off, across devices.
        check_collectives(collectives(compiled.as_text()), cfg, shape)
    got = jax.device_get(compiled(*inputs))
    assert got.tokens.shape == (batch, 8)
    assert_same(got, alone(cfg, method, batch))


def plain_pmap():
    decode_fn = make_decode_fn(families.make_denoiser(LLADA), LRD)
    inputs = jax.tree.map(lambda x: x[:, None], prompts(8))
    keys = jax.vmap(lambda r: jax.random.fold_in(KEY, r)[None])(jnp.arange(8))
    got = jax.pmap(decode_fn, in_axes=(None, 0, 0, 0))(params_of(LLADA), *inputs, keys)
    got = jax.tree.map(lambda x: x[:, 0], jax.device_get(got))
    assert_same(got, alone(LLADA, "lrd", 8))


def plain_shard_map():
    decode_fn = make_decode_fn(families.make_denoiser(LLADA), LRD)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    keys = jax.vmap(lambda r: jax.random.fold_in(KEY, r))(jnp.arange(8))
    rows = P("rows")
    spread = jax.shard_map(
        decode_fn,
        mesh=mesh,
        in_specs=(P(), rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )
    got = jax.jit(spread)(params_of(LLADA), *prompts(8), keys)
    assert_same(jax.device_get(got), alone(LLADA, "lrd", 8))


def masks_of_other_rows_are_refused():
    decode_fn = make_decode_fn(families.make_denoiser(LLADA), LRD)
    mesh = sharding.make_mesh(BOTH)
    decode = sharding.batch_decode(decode_fn, mesh, sharding.specs(LLADA, 2))
    ids, mask = prompts(3)
    with pytest.raises(ValueError, match=r"prompt_mask.* of shape \(3, 6\)"):
        decode(placed(LLADA, mesh), ids, mask[:2], KEY)


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


def int8_as_on_one_device(cfg, kind, shape):
    """A checkpoint that is rounded on the mesh as it is read."""
    mesh = sharding.make_mesh(shape)
    decode_fn = make_decode_fn(families.make_denoiser(cfg), LRD)
    specs = sharding.specs(cfg, shape.model, kind)
    with tempfile.TemporaryDirectory() as name:
        checkpoint.save_params(pathlib.Path(name) / "ckpt", cfg, params_of(cfg))
        flags = dict(quantize="int8", quantize_embeddings=kind == KINDS[1])
        one, many = (
            lrd_jax.load(f"{name}/ckpt", mesh=where, **flags).params
            for where in (None, mesh)
        )
    chex.assert_trees_all_equal(many, one)
    inputs = (*prompts(4), KEY)
    got = sharding.batch_decode(decode_fn, mesh, specs)(many, *inputs)
    assert_same(jax.device_get(got), jax.device_get(decode_fn(one, *inputs)))


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


def check_collectives(found, cfg, shape):
    """Only inside a group of `model`, only candidates are gathered, nothing [.., V]."""
    if shape.model == 1:
        assert found == []
        return
    own = np.arange(8).reshape(shape.data, shape.model)
    lengths = {cfg.vocab_size, cfg.vocab_size // shape.model}
    candidates = {few(cfg.vocab_size) * shape.model, TOP_K * shape.model}
    assert found
    for kind, shapes, groups in found:
        assert groups == set(map(tuple, own.tolist())), (kind, groups)
        for dims in shapes:
            assert not lengths & {*dims}, (kind, dims)
            gathered = kind == "all-gather" and dims[-1] in candidates
            assert kind == "all-reduce" or gathered, (kind, dims)


def command(folder, main, *words):
    """Runs a command that writes to `folder`; gives what it said."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        with contextlib.redirect_stdout(io.StringIO()):
            code = main([*map(str, words), "--output", str(folder)])
    assert code == 0, said.getvalue()
    return said.getvalue()


def records(path):
    kept = ("id", "token_ids", "text", "num_forwards", "stop_reason")
    lines = map(json.loads, path.read_text().splitlines())
    return [{key: line.get(key) for key in kept} for line in lines]


def generate_on_a_mesh():
    """A file of prompts, more than there are slots, from a checkpoint on disk."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        checkpoint.save_params(folder / "ckpt", toy_config(), params_of(toy_config()))
        rows = [[1 + i] * (1 + i % 4) for i in range(11)]
        lines = [json.dumps({"prompt_ids": row}) for row in rows]
        (folder / "in.jsonl").write_text("\n".join(lines))
        words = ["--ckpt", folder / "ckpt", "--input", folder / "in.jsonl"]
        words += ["--batch-size", 6, "--decode.gen-length", 8, "--decode.cache", "dual"]
        words += ["--decode.block-length", 4]
        for mesh, number in (("data=1", 1), ("data=4,model=2", 2), ("auto", 3)):
            out = folder / f"{number}.jsonl"
            said = command(out, generate.main, *words, "--mesh", mesh)
            assert records(out) == records(folder / "1.jsonl")
            assert ("mesh data=8,model=1: the devices share" in said) == (number == 3)
        assert len(records(folder / "1.jsonl")) == 11
        words += ["--quantize", "int8"]
        for mesh, number in (("data=1", 4), ("data=4,model=2", 5)):
            command(folder / f"{number}.jsonl", generate.main, *words, "--mesh", mesh)
        assert records(folder / "4.jsonl") == records(folder / "5.jsonl")
        first, rounded = (
            json.loads((folder / f"{n}.jsonl").read_text().splitlines()[0])
            for n in (1, 4)
        )
        assert first["commit_prob"] != rounded["commit_prob"]


def evaluate_on_a_mesh():
    tasks.TASKS.update(TOYS)
    cfg, meshes = toy_config(), []

    def load(mesh=None):
        meshes.append(None if mesh is None else dict(mesh.shape))
        params = params_of(cfg) if mesh is None else placed(cfg, mesh)
        return families.make_denoiser(cfg), params

    main = functools.partial(
        evaluate.main, open_source=lambda *_: toy_source(load=load)
    )
    words = ["--tasks", "single", "--n", 5, "--methods", "lrd", "--gen-length", 4]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for mesh in ("data=1", "data=2,model=2"):
            command(folder / mesh, main, *words, "--mesh", mesh)
        one, four = (records(folder / m / "lrd.jsonl") for m in (mesh, "data=1"))
    assert one == four
    assert len(one) == 5
    assert meshes == [None, {"data": 2, "model": 2}]


CHECKS = {
    f"{method} on {shape}, {family.family}, {batch} rows": functools.partial(
        same_tokens, family, method, shape, batch
    )
    # Each program takes seconds to compile: every method is on a mesh that splits the
    # weights, and what they share on all.
    for family, method, shape, batch in [
        *((LLADA, "lrd", s, 8) for s in MESHES),
        *((LLADA, "dual", s, 8) for s in (DATA, BOTH)),
        (LLADA, "baseline", BOTH, 8),
        (LLADA, "prefix", MODEL, 8),
        (LLADA, "lrd", DATA, 3),
        *((DREAM, "lrd", s, 8) for s in (MODEL, BOTH)),
        (LLADA, "sampled", MODEL, 3),
        (LLADA, "llada", MODEL, 3),
        (DREAM, "dream", BOTH, 4),
    ]
} | {
    "a tied head": functools.partial(same_tokens, TIED, "lrd", BOTH, 4),
    "heads that alone divide": functools.partial(same_tokens, ODD, "lrd", BOTH, 4),
    "heads that do not divide": functools.partial(same_tokens, WIDE, "dual", MODEL, 3),
    "int8": functools.partial(int8_as_on_one_device, LLADA, KINDS[1], MODEL),
    "pmap": plain_pmap,
    "shard_map": plain_shard_map,
    "masks of other rows": masks_of_other_rows_are_refused,
    "infilling": infilling,
    "parameters that lie elsewhere": parameters_that_lie_elsewhere_are_refused,
    "generate": generate_on_a_mesh,
    "evaluate": evaluate_on_a_mesh,
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
