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
    got = jax.grad(adapted, with_respect_to)(factors, args)
    wanted = jax.grad(dense, with_respect_to)(factors, args)
    assert_close(got, wanted, rtol)


def assert_close(got, wanted, rtol):
    """Equal structures of arrays up to a rounding error relative to each array's largest."""
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
