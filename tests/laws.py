"""What several test files check adapted functions with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jlora


def randomise(params, key, scale=0.3):
    """The tree with random `b` factors: with b = 0 an adapter proves nothing."""

    def randomise_leaf(path, leaf):
        if not isinstance(leaf, jlora.LoraArray):
            return leaf
        leaf_key = jax.random.fold_in(key, sum(map(ord, path)))
        b = scale * jax.random.normal(leaf_key, leaf.b.shape, leaf.b.dtype)
        return dataclasses.replace(leaf, b=b)

    return jlora.tree.map_with_path(randomise_leaf, params, is_leaf=is_lora)


def is_lora(leaf):
    return isinstance(leaf, jlora.LoraArray)


def assert_adapted_equals_dense(fn, params, *args, rtol=1e-5, gradients=True, **adapt_options):
    """Output and gradients of the adapted function against the dense one's on merged weights."""
    forward = jlora.adapt(fn, **adapt_options)
    assert_close(forward(params, *args), fn(jlora.merge_params(params), *args), rtol)
    if not gradients:
        return
    factors = jax.tree.map(lambda x: (x.a, x.b) if is_lora(x) else None, params, is_leaf=is_lora)

    def with_factors(factors):
        return jax.tree.map(
            lambda x, f: dataclasses.replace(x, a=f[0], b=f[1]) if f else x,
            params,
            factors,
            is_leaf=is_lora,
        )

    def total(run):
        def loss(factors, args):
            out = jax.tree.leaves(run(factors, args))
            return sum(jnp.sum(jnp.sin(x)) for x in out if jnp.issubdtype(x.dtype, jnp.floating))

        return loss

    adapted = total(lambda f, args: forward(with_factors(f), *args))
    dense = total(lambda f, args: fn(jlora.merge_params(with_factors(f)), *args))
    floating = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in jax.tree.leaves(args)]
    with_respect_to = (0, 1) if all(floating) else 0
    got, wanted = (jax.jit(jax.grad(f, with_respect_to))(factors, args) for f in (adapted, dense))
    assert_close(got, wanted, rtol)


def assert_close(got, wanted, rtol):
    """Leaf by leaf, relative to the largest element."""
    got, wanted = jax.tree.leaves(got), jax.tree.leaves(wanted)
    assert len(got) == len(wanted)
    for x, y in zip(got, wanted):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        y = np.asarray(y, np.float64)
        scale = np.abs(y).max() if y.size else 0
        # A sum's rounding error is relative to its largest terms, not to each result.
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, rtol=rtol, atol=rtol * max(scale, 1)
        )


def grad_of(fn, params, config, x):
    """Gradients with respect to the factors and to the input."""
    trainable, frozen = jlora.split(params, config)

    def loss(trainable, x):
        return jnp.sum(jnp.sin(fn(jlora.combine(trainable, frozen), x)))

    return jax.grad(loss, (0, 1))(trainable, x)


def _doubled(tree):
    return jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree)


def _vmap_over_adapters(fn, params, config, x):
    trainable, frozen = jlora.split(params, config)
    return jax.vmap(lambda t: fn(jlora.combine(t, frozen), x))(_doubled(trainable))


def _vmap_over_both(fn, params, config, x):
    trainable, frozen = jlora.split(params, config)
    return jax.vmap(lambda t, x: fn(jlora.combine(t, frozen), x))(_doubled(trainable), _doubled(x))


def _shard_map_over_data(fn, params, config, x):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")

    def mean_loss_grad(trainable, x):
        def loss(trainable):
            out = fn(jlora.combine(trainable, frozen), x)
            return jax.lax.pmean(jnp.sum(jnp.sin(out)), "data")

        return jax.grad(loss)(trainable)

    trainable, frozen = jlora.split(params, config)
    return jax.jit(
        jax.shard_map(mean_loss_grad, mesh=mesh, in_specs=(jax.P(), rows), out_specs=jax.P())
    )(trainable, x)


TRANSFORMATIONS = {
    "eager": lambda fn, params, config, x: fn(params, x),
    "jit": lambda fn, params, config, x: jax.jit(lambda x: fn(params, x))(x),
    "grad": grad_of,
    "jit of grad": lambda fn, params, config, x: jax.jit(lambda x: grad_of(fn, params, config, x))(
        x
    ),
    "grad of checkpoint": lambda fn, params, config, x: grad_of(
        lambda params, x: jax.checkpoint(lambda x: fn(params, x))(x), params, config, x
    ),
    "jvp": lambda fn, params, config, x: jax.jvp(lambda x: fn(params, x), (x,), (x + 1,)),
    "vjp": lambda fn, params, config, x: (lambda out, pull: pull(jnp.ones_like(out)))(
        *jax.vjp(lambda x: fn(params, x), x)
    ),
    "linearize": lambda fn, params, config, x: jax.linearize(lambda x: fn(params, x), x)[1](x),
    "vmap over data": lambda fn, params, config, x: jax.vmap(lambda x: fn(params, x))(_doubled(x)),
    "vmap over adapters": _vmap_over_adapters,
    "vmap over both": _vmap_over_both,
    "scan over data": lambda fn, params, config, x: jax.lax.scan(
        lambda c, x: (c + 1, fn(params, x)), 0, _doubled(x)
    ),
    "shard_map over data": _shard_map_over_data,
}  # transformations of fn(params, x) in which adapted and dense agree


def arrays_of_size(fn, *args, size):
    """The primitives in fn's jaxpr, nested ones included, that make an array of `size` or more."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            inner = [x for value in eqn.params.values() for x in _jaxprs(value)]
            for sub in inner:
                walk(sub)
            if not inner and any(np.prod(v.aval.shape) >= size for v in eqn.outvars):
                found.append(str(eqn.primitive))

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


def _jaxprs(value):
    values = value if isinstance(value, tuple | list) else [value]
    for item in values:
        item = getattr(item, "jaxpr", item)
        if hasattr(item, "eqns"):
            yield item
