"""A quantised weight is not differentiated by accident, and what is beside it still is."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

X = jax.random.normal(jax.random.key(1), (3, 64))
W = 0.1 * jax.random.normal(jax.random.key(2), (64, 64))


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["layer"]["w"]))


def trees(fmt):
    packed = jlora.quantize({"layer": {"w": W}}, fmt)
    yield packed
    for variant in ("lora", "dora", "vera"):
        config = jlora.LoraConfig(rank=2, targets="w", variant=variant)
        yield jlora.init(jax.random.key(0), packed, config)


ALONG_THE_WEIGHT = {
    "grad": jax.grad(loss),
    "value_and_grad": jax.value_and_grad(loss, argnums=(1, 0)),
    "jit": jax.jit(jax.grad(loss)),
    "checkpoint": jax.grad(jax.checkpoint(loss)),
    "vmap": jax.vmap(jax.grad(loss), in_axes=(None, 0)),
    "jacrev": jax.jacrev(loss),
    "jacfwd": jax.jacfwd(loss),
    "vjp": lambda p, x: jax.vjp(loss, p, x)[1](1.0),
    "allow_int": jax.grad(loss, allow_int=True),
    "equinox": eqx.filter_grad(loss),
    "of_the_weight_alone": jax.grad(lambda p, x: jnp.sum(p["layer"]["w"] ** 2)),
    "used_inside": lambda p, x: jnp.sum(jax.grad(loss)(p, x)["layer"]["w"] ** 2),
    "of_a_cast": lambda p, x: jax.grad(lambda w: jnp.sum(x @ w))(p["layer"]["w"].T),
    "a_step": lambda p, x: loss(jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(loss)(p, x)), x),
}


@pytest.mark.parametrize("name", ALONG_THE_WEIGHT)
def test_a_gradient_inside_adapt_of_a_quantised_weight_is_refused(name):
    adapted = jlora.adapt(ALONG_THE_WEIGHT[name], on_unsupported="allow")
    for params in trees("nf4"):
        with pytest.raises(TypeError, match=r"'layer/w' is quantised \(nf4\) and frozen.*split"):
            adapted(params, X)


@pytest.mark.parametrize("fmt", ["int8", "float8"])
def test_the_refusal_names_the_format(fmt):
    for params in trees(fmt):
        with pytest.raises(TypeError, match=rf"'layer/w' is quantised \({fmt}\) and frozen"):
            jlora.adapt(jax.grad(loss))(params, X)
        with pytest.raises(TypeError, match=rf"'layer/w' is quantised \({fmt}\) and frozen"):
            jlora.explain(jax.grad(loss), params, X)


def test_the_one_weight_that_is_differentiated_is_named():
    params = jlora.quantize({"a": W, "b": W, "c": W}, "nf4")

    def along_b(params, x):
        return jax.grad(lambda b: jnp.sum(jnp.tanh(x @ params["a"] @ b) @ params["c"]))(params["b"])

    with pytest.raises(TypeError, match="'b' is quantised"):
        jlora.adapt(along_b)(params, X)
    with pytest.raises(TypeError, match=r"A weight of shape \(64, 64\) is quantised"):
        jlora.adapt(jax.grad(lambda w: jnp.sum(X @ w)))(params["a"])


def test_the_gradient_of_stacked_weights_is_refused():
    params = jlora.quantize({"w": jnp.stack([W, W])}, "nf4", axes={"w": ("stack", "in", "out")})

    def scanned(params, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0])

    for fn in (scanned, lambda p, x: jnp.sum(jnp.tanh(x @ p["w"][0]) @ p["w"][1])):
        with pytest.raises(TypeError, match="'w' is quantised"):
            jlora.adapt(jax.grad(fn))(params, X)
        dense = jax.grad(fn, argnums=1)(jlora.dequantize(params), X)
        got = jlora.adapt(jax.grad(fn, argnums=1), on_unsupported="error")(params, X)
        np.testing.assert_allclose(got, dense, rtol=1e-5, atol=1e-5)


def scanned(params, x):
    w = params["layer"]["w"]
    return jnp.sum(jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0])


def no_integers(params, x):
    if not jnp.issubdtype(params["layer"]["w"].dtype, jnp.floating):
        raise TypeError("This layer is for numbers of floating point.")
    return loss(params, x)


@jax.custom_vjp
def own_square(x):
    return x**2


own_square.defvjp(lambda x: (x**2, x), lambda x, dy: (2 * x * dy,))

BESIDE_THE_WEIGHT = {
    "grad": jax.grad(loss, argnums=1),
    "value_and_grad": jax.value_and_grad(loss, argnums=1),
    "jit": jax.jit(jax.grad(loss, argnums=1)),
    "checkpoint": jax.grad(jax.checkpoint(loss), argnums=1),
    "scan": jax.grad(scanned, argnums=1),
    "vmap": jax.vmap(jax.grad(loss, argnums=1), in_axes=(None, 0)),
    "jvp": lambda p, x: jax.jvp(lambda x: loss(p, x), (x,), (x,)),
    "jacfwd": lambda p, x: jax.jacfwd(lambda y: jnp.tanh(y @ p["layer"]["w"]))(x[0]),
    "hessian": lambda p, x: jax.hessian(lambda y: loss(p, y))(x[0]),
    "custom_vjp": jax.grad(lambda p, x: loss(p, own_square(x)), argnums=1),
    "vjp": lambda p, x: jax.vjp(lambda x: loss(p, x), x)[1](1.0),
    "one_cotangent_of_two": lambda p, x: jax.vjp(loss, p, x)[1](1.0)[1],
    "stop_gradient": jax.grad(lambda p, x: loss(jax.lax.stop_gradient(p), x), argnums=1),
    "refuses_integers": jax.grad(no_integers, argnums=1),
}


@pytest.mark.parametrize("name", BESIDE_THE_WEIGHT)
@pytest.mark.parametrize("rows", [3, 64])  # 64 makes gradients of the weight's own shape
def test_a_gradient_inside_adapt_of_anything_else_is_that_of_the_dense_weight(name, rows):
    fn = BESIDE_THE_WEIGHT[name]
    x = jax.random.normal(jax.random.key(3), (rows, 64))
    packed, adapted, *_ = trees("nf4")
    for params in (packed, adapted):
        got = jlora.adapt(fn, on_unsupported="error")(params, x)
        wanted = fn(jlora.merge_params(params), x)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_dense_weight_of_the_same_shape_may_be_differentiated_inside():
    params = jlora.quantize({"w": W, "free": W + 1}, "nf4", targets="w")

    def along_free(params, x):
        return jax.grad(lambda free: jnp.sum(jnp.tanh(x @ params["w"] @ free)))(params["free"])

    got = jlora.adapt(along_free, on_unsupported="error")(params, X)
    np.testing.assert_allclose(got, along_free(jlora.dequantize(params), X), rtol=1e-5, atol=1e-5)


def test_the_gradient_inside_adapt_of_an_adapter_on_a_plain_weight_is_that_of_the_sum():
    config = jlora.LoraConfig(rank=2, targets="w")
    params = jlora.init(jax.random.key(0), {"layer": {"w": W}}, config)
    got = jlora.adapt(jax.grad(loss))(params, X)
    wanted = jax.grad(loss)(jlora.merge_params(params), X)
    np.testing.assert_allclose(got["layer"]["w"], wanted["layer"]["w"], rtol=1e-5, atol=1e-5)


def test_a_function_is_traced_once_where_it_makes_no_array_like_the_weight():
    packed, adapted, *_ = trees("nf4")
    traces = []

    def counted(params, x):
        traces.append(0)
        return loss(params, x)

    config = jlora.LoraConfig(rank=2, targets="w")
    trainable, frozen = jlora.split(adapted, config)
    forward = jlora.adapt(counted)
    jax.grad(lambda t: forward(jlora.combine(t, frozen), X))(trainable)
    assert len(traces) == 1
    jlora.adapt(jax.grad(counted, argnums=1))(packed, X)
    assert len(traces) == 2


@pytest.mark.parametrize("restore", [jlora.dequantize, jlora.merge_params])
def test_the_gradient_of_a_restored_weight_is_refused_by_its_path(restore):
    for params in trees("nf4"):
        with pytest.raises(TypeError, match="'layer/w' is quantised"):
            jax.grad(lambda p: jnp.sum(restore(p)["layer"]["w"]), allow_int=True)(params)
