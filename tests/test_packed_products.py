"""Products with packed weights: their derivatives, and updates that ride along."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_close, randomise

import jlora


def adapted(key, d_in, d_out, fmt="nf4"):
    params = {"w": 0.1 * jax.random.normal(key, (d_in, d_out))}
    config = jlora.LoraConfig(rank=4, targets=("w",))
    return randomise(jlora.init(key, jlora.quantize(params, fmt), config), key), config


def model(params, x):
    return jnp.tanh(x @ params["w"])


def loss_of(params, config):
    trainable, frozen = jlora.split(params, config)
    forward = jlora.adapt(model, on_unsupported="error")
    return trainable, lambda t, x: jnp.sum(forward(jlora.combine(t, frozen), x) ** 2)


DERIVATIVES = {
    "value": lambda loss, t, x: loss(t, x),
    "grad": lambda loss, t, x: jax.grad(loss, (0, 1))(t, x),
    "jvp": lambda loss, t, x: jax.jvp(loss, (t, x), (t, x)),
    "linearize": lambda loss, t, x: jax.linearize(lambda x: loss(t, x), x)[1](x),
    "vmap of grad": lambda loss, t, x: jax.vmap(jax.grad(loss, (0, 1)), (None, 0))(t, x),
    "vmap over adapters": lambda loss, t, x: jax.vmap(jax.grad(loss), (0, None))(
        jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), t), x
    ),
    "grad of grad": lambda loss, t, x: jax.grad(
        lambda t: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(t, x)))
    )(t),
    "checkpoint": lambda loss, t, x: jax.grad(jax.checkpoint(loss), (0, 1))(t, x),
}


@pytest.mark.parametrize(("d_in", "d_out"), [(64, 64), (64, 256), (256, 64), (128, 192)])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_every_derivative_is_that_on_the_dequantised_weight(getkey, name, d_in, d_out):
    params, config = adapted(getkey(), d_in, d_out)
    x = jax.random.normal(getkey(), (3, 5, d_in))
    got, wanted = (
        jax.jit(functools.partial(DERIVATIVES[name], loss))(trainable, x)
        for trainable, loss in (loss_of(p, config) for p in (params, jlora.dequantize(params)))
    )
    assert_close(got, wanted, 2e-6)  # a sum of d_in terms and one of d_in + rank round apart


def test_a_wide_update_of_the_input_gradient_is_no_array_of_its_own(getkey):
    d_in, d_out = 256, 64
    params, config = adapted(getkey(), d_in, d_out)
    trainable, loss = loss_of(params, config)
    x = jnp.ones((7, d_in))
    wide = (7, d_in)

    def products(jaxpr):
        for eqn in jaxpr.eqns:
            inner = [getattr(v, "jaxpr", v) for v in jax.tree.leaves(
                list(eqn.params.values()),
                is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
            )]  # fmt: skip
            for sub in inner:
                if hasattr(sub, "eqns"):
                    yield from products(sub)
            if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape == wide:
                yield min(v.aval.shape[-1] for v in eqn.invars)

    narrow = [rank for rank in products(jax.make_jaxpr(jax.grad(loss, 1))(trainable, x).jaxpr)
              if rank == config.rank]  # fmt: skip
    assert narrow == []


def test_a_checkpoint_that_allows_it_restores_a_weight_once(getkey):
    """For what it computes again and for the gradient: no barrier keeps the two apart."""
    params, config = adapted(getkey(), 64, 256)
    trainable, frozen = jlora.split(params, config)

    def gradient(**options):
        def again(params, x):
            return jax.checkpoint(model, **options)(params, x)

        forward = jlora.adapt(again, on_unsupported="error")

        def loss(trainable, x):
            return jnp.sum(forward(jlora.combine(trainable, frozen), x) ** 2)

        return jax.grad(loss, (0, 1))

    x = jax.random.normal(getkey(), (3, 64))
    merged, apart = gradient(prevent_cse=False), gradient()
    assert "optimization_barrier" not in str(jax.make_jaxpr(merged)(trainable, x))
    assert "optimization_barrier" in str(jax.make_jaxpr(apart)(trainable, x))
    assert_close(merged(trainable, x), apart(trainable, x), 1e-6)  # the same sums, fused otherwise


def test_a_scale_that_is_traced_keeps_its_gradient(getkey):
    packed = jlora.quantize({"w": jax.random.normal(getkey(), (64, 32))}, "nf4")
    x = jax.random.normal(getkey(), (5, 64))

    def scaled(params, factor, x):
        return x @ (factor * params["w"])

    def slope(params):
        forward = jlora.adapt(scaled, on_unsupported="error")
        return jax.grad(lambda f: jnp.sum(forward(params, f, x) ** 2))(0.5)

    np.testing.assert_allclose(slope(packed), slope(jlora.dequantize(packed)), rtol=1e-5)
