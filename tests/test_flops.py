"""FLOPs counted on the jaxpr, against closed formulas; and what a turn of LRD costs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lrd_jax.config import DecodeConfig
from lrd_jax.decode import nucleus
from lrd_jax.decode.loop import make_stepper
from lrd_jax.flops import count_flops
from lrd_jax.model import backbone, families
from lrd_jax.shapes import SHAPES

M, K, N = 3, 5, 7
DOT = 2 * M * K * N
PROMPT, WINDOW = 512, 1024


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


A, B = array(M, K), array(K, N)


@jax.custom_jvp
def with_jvp(a, b):
    return a @ b


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[0]))


@jax.custom_vjp
def with_vjp(a, b):
    return a @ b


with_vjp.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, g: kept)


@pytest.mark.parametrize(
    "fn",
    [
        jnp.dot,
        jax.jit(jnp.dot),
        jax.checkpoint(jnp.dot),
        with_jvp,
        with_vjp,
        lambda a, b: jnp.sin(a) @ b + 1,
        lambda a, b: jax.closure_convert(jnp.dot, a, b)[0](a, b),
    ],
)
def test_a_product_counts_once_whatever_it_is_wrapped_in(fn):
    assert count_flops(fn, A, B) == DOT


@pytest.mark.parametrize(
    ("spec", "left", "right", "flops"),
    [
        ("bmk,bkn->bmn", (4, M, K), (4, K, N), 4 * DOT),
        ("mk,kn->nm", (M, K), (K, N), DOT),
        ("abk,kba->", (2, 3, K), (K, 3, 2), 2 * 2 * 3 * K),
        ("k,k->", (K,), (K,), 2 * K),
        ("m,n->mn", (M,), (N,), 2 * M * N),
        ("bthd,bshd->bhts", (2, 4, 3, 8), (2, 5, 3, 8), 2 * 2 * 4 * 5 * 3 * 8),
    ],
)
def test_batched_and_contracted_axes(spec, left, right, flops):
    product = functools.partial(jnp.einsum, spec)
    assert count_flops(product, array(*left), array(*right)) == flops


def test_the_gradient_of_a_product_is_two_more():
    def loss(a, b):
        return jnp.sum((a @ b) ** 2)

    assert count_flops(jax.grad(loss, argnums=(0, 1)), A, B) == 3 * DOT


def test_a_scan_counts_as_often_as_it_runs():
    def scanned(a, b):
        def inner(x, _):
            return jax.lax.fori_loop(0, 4, lambda _, x: x + a @ b, x), None

        return jax.lax.scan(inner, jnp.zeros((M, N)), length=6)[0]

    assert count_flops(scanned, A, B) == 6 * 4 * DOT
    mapped = functools.partial(jax.lax.map, lambda a: a @ jnp.ones((K, N)))
    assert count_flops(mapped, array(9, M, K)) == 9 * DOT


def test_a_cond_counts_as_its_most_expensive_branch():
    def branches(i, a, b):
        small, large = (lambda: jnp.zeros((M, N))), (lambda: jnp.sin(a) @ b + a @ b)
        return jax.lax.switch(i, [small, large, lambda: a @ b])

    assert count_flops(branches, array(dtype=jnp.int32), A, B) == 2 * DOT


def test_a_while_counts_as_one_turn_of_condition_and_body():
    def loop(a, b):
        return jax.lax.while_loop(
            lambda x: jnp.sum(x @ b) < 3, lambda x: x + (a @ b) @ b.T, a
        )

    assert count_flops(loop, A, B) == 3 * DOT


def test_a_shard_map_counts_all_devices():
    mesh = jax.sharding.AbstractMesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)
    for axes, spec, devices in [({"x", "y"}, P("x"), 8), ({"x"}, P("x"), 4)]:
        product = jax.shard_map(
            jnp.dot, mesh=mesh, in_specs=(spec, P()), out_specs=spec, axis_names=axes
        )
        # Along y, which splits nothing, each device computes the same again.
        each = count_flops(jnp.dot, array(2, K), B)
        assert count_flops(product, array(8, K), B) == devices * each


def test_an_unknown_product_is_refused():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME")

    with pytest.raises(ValueError, match="`conv_general_dilated` is not known"):
        count_flops(convolve, array(1, 2, 8), array(2, 2, 3))


def plain_flops(name, window):
    """A forward over prompt and window, the head over the last `window` positions."""
    model = SHAPES[name]
    denoiser, length = families.make_denoiser(model), PROMPT + WINDOW

    def forward(params, embeds, positions, key_mask):
        hidden, _ = denoiser.hidden(params, embeds, positions, key_mask)
        return denoiser.logits(params, hidden[0, -window:])

    return count_flops(
        forward,
        backbone.abstract_params(model, jnp.bfloat16),
        array(1, length, model.d_model, dtype=jnp.bfloat16),
        array(1, length, dtype=jnp.int32),
        array(1, length, dtype=jnp.bool_),
    )


@pytest.mark.parametrize("name", SHAPES)
def test_a_forward_is_the_closed_formula(name):
    m, length = SHAPES[name], PROMPT + WINDOW
    heads, kv_heads = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    weights = m.d_model * (2 * heads + 2 * kv_heads + 3 * m.mlp_dim)
    attention = 2 * length * heads
    backbone_flops = 2 * m.num_layers * length * (weights + attention)
    head = 2 * 32 * m.d_model * m.vocab_size
    assert plain_flops(name, 32) == backbone_flops + head


def turn_flops(name, window):
    """One turn of LRD, at most: act, forward, measure, for a batch of one."""
    model = SHAPES[name]
    cfg = DecodeConfig(gen_length=WINDOW, block_length=window)
    stepper = make_stepper(families.make_denoiser(model), cfg)
    params = backbone.abstract_params(model, jnp.bfloat16)
    state = jax.eval_shape(
        stepper.init,
        params,
        array(1, PROMPT, dtype=jnp.int32),
        array(1, PROMPT, dtype=jnp.bool_),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    return count_flops(stepper.step, params, state)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("window", "most"), [(1024, 1.10), (32, 1.02)])
def test_the_belief_costs_little_beside_a_forward(name, window, most):
    assert 1 < turn_flops(name, window) / plain_flops(name, window) <= most


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("window", "most"), [(1024, 1.103), (32, 1.02)])
def test_so_it_does_where_every_nucleus_is_large(name, window, most, monkeypatch):
    """Then the dense products take all their turns, which is as good as one of all."""
    monkeypatch.setattr(nucleus, "DENSE_ROWS", 10**6)
    assert turn_flops(name, window) / plain_flops(name, window) <= most
