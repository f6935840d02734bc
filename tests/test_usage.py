import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jlora


def use_of(fn, shape, *args):
    return jlora.find_weights(fn, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, *args)["w"]


X = jax.ShapeDtypeStruct((2, 8), jnp.float32)


@pytest.mark.parametrize(
    ("fn", "shape", "roles"),
    [
        (lambda p, x: x @ p["w"], (8, 5), ((0,), (1,), ())),
        (lambda p, x: x @ p["w"].T, (5, 8), ((1,), (0,), ())),
        (lambda p, x: p["w"] @ x.T, (5, 8), ((1,), (0,), ())),
        (lambda p, x: x.astype("float16") @ p["w"].astype("float16"), (8, 5), ((0,), (1,), ())),
        (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), (8, 2, 3), ((0,), (1, 2), ())),
        (lambda p, x: jnp.einsum("bhk,hkd->bd", x.reshape(2, 2, 4), p["w"]), (2, 4, 5),
         ((0, 1), (2,), ())),
        (lambda p, x: x @ p["w"].reshape(8, 6), (8, 2, 3), ((0,), (1, 2), ())),
        (lambda p, x: x @ (p["w"] * 2)[1], (3, 8, 5), ((1,), (2,), (0,))),
        (lambda p, x: jnp.einsum("ebd,edf->ebf", x[None], p["w"]), (1, 8, 5), ((1,), (2,), (0,))),
        (lambda p, x: jax.lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0], (3, 8, 8),
         ((1,), (2,), (0,))),
        (lambda p, x: jax.lax.fori_loop(0, 3, lambda i, c: c @ p["w"][i], x), (3, 8, 8),
         ((1,), (2,), (0,))),
        (lambda p, x: x @ p["w"][:, :4], (8, 6), ((0,), (1,), ())),
    ],
)  # fmt: skip
def test_products_show_which_axes_meet_the_input(fn, shape, roles):
    use = use_of(fn, shape, X)
    assert (use.kind, use.contracted, use.free, use.stacked) == ("product", *roles)


def test_embeddings_biases_and_unused_leaves_are_told_apart():
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    embedding = use_of(lambda p, t: jnp.take(p["w"], t, axis=0) @ p["w"].T, (50, 8), tokens)
    assert (embedding.kind, embedding.contracted, embedding.free) == ("embedding", (0,), (1,))
    assert use_of(lambda p, x: x + p["w"], (8,), X).kind == "elementwise"
    assert use_of(lambda p, x: x, (8, 8), X).kind == "unused"
    stacked = use_of(lambda p, x: jax.lax.scan(lambda c, b: (c + b, None), x, p["w"])[0], (3, 8), X)
    assert stacked.kind == "elementwise"


def test_multiply_adds_count_every_iteration_of_a_scan():
    use = use_of(lambda p, x: jax.lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0], (3, 8, 8), X)
    assert use.multiply_adds == 3 * 2 * 8 * 8


def test_a_weight_shared_by_two_calls_is_counted_twice():
    layer = jax.jit(lambda w, x: x @ w)
    use = use_of(lambda p, x: layer(p["w"], layer(p["w"], x)), (8, 8), X)
    assert use.multiply_adds == 2 * 2 * 8 * 8


def test_a_70b_model_is_read_without_memory():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.Dense(28672, use_bias=False, name="up")(nn.RMSNorm()(x))
            return x + nn.Dense(8192, use_bias=False, name="down")(nn.silu(h)), None

    stack = nn.scan(
        nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=80
    )(name="layers")
    x = jax.ShapeDtypeStruct((1, 16, 8192), jnp.float32)
    params = jax.eval_shape(stack.init, jax.random.key(0), x, None)
    uses = jlora.find_weights(lambda p, x: stack.apply(p, x, None)[0], params, x)
    assert uses["up/kernel"].stacked == (0,)
    assert uses["up/kernel"].multiply_adds == 80 * 16 * 8192 * 28672
