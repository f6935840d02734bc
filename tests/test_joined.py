"""Weights that the function joins itself: a fused q, k, v; a stack of layers made on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import arrays_of_size, assert_adapted_equals_dense, randomise

import jlora

D = 8
X = jax.random.normal(jax.random.key(9), (5, D))


def adapted(shapes, fn, targets, **options):
    key = jax.random.key(0)
    params = {
        name: jax.random.normal(jax.random.fold_in(key, i), shape) / 3
        for i, (name, shape) in enumerate(shapes.items())
    }
    config = jlora.LoraConfig(**{"rank": 2, "alpha": 3, "targets": targets, **options})
    return randomise(jlora.init(key, params, config, fn=fn, args=(X,)), key)


def scan(p, x):
    stack = jnp.stack([p["a"], p["b"], p["c"]])
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, stack)[0]


SQUARES = {"a": (D, D), "b": (D, D), "c": (D, D)}
USES = {
    "fused outputs": (
        lambda p, x: jnp.split(x @ jnp.concatenate([p["a"], p["b"], p["c"]], 1), [4, 9], 1),
        {"a": (D, 4), "b": (D, 5), "c": (D, 3)},
    ),
    "fused inputs": (
        lambda p, x: jnp.tile(x, 3) @ jnp.concatenate([p["a"], p["b"], p["c"]], 0),
        SQUARES,
    ),
    "transposed and reversed": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"][:, ::-1], p["c"][::-1]], 0).T,
        SQUARES,
    ),
    "stacked for a scan": (scan, SQUARES),
    "stacked for a product": (
        lambda p, x: jnp.einsum("bd,edf->ebf", x, jnp.stack([p["a"], p["b"], p["c"]])),
        SQUARES,
    ),
    "stacked last": (
        lambda p, x: jnp.einsum("bd,dfe->bef", x, jnp.stack([p["a"], p["b"], p["c"]], -1)),
        SQUARES,
    ),
    "cut again": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"], p["c"]], 1)[:, 4:14],
        SQUARES,
    ),
    "heads": (
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, jnp.concatenate([p["a"], p["b"], p["c"]], 1)),
        {"a": (D, 4, 3), "b": (D, 2, 3), "c": (D, 2, 3)},
    ),
    "stacks of layers": (
        lambda p, x: jax.lax.scan(
            lambda c, w: (jnp.tanh(c @ w), None), x, jnp.concatenate([p["a"], p["b"], p["c"]])
        )[0],
        {"a": (2, D, D), "b": (1, D, D), "c": (2, D, D)},
    ),
}


@pytest.mark.parametrize("targets", [("a", "b", "c"), ("b",)], ids=["all", "one of three"])
@pytest.mark.parametrize("use", USES)
def test_adapted_equals_dense(use, targets):
    fn, shapes = USES[use]
    ranks = {"rank_pattern": {"b": 1}, "alpha_pattern": {"b": 7.0}}  # what differs is kept apart
    params = adapted(shapes, fn, targets, **ranks)
    assert_adapted_equals_dense(fn, params, X, rtol=2e-5, on_unsupported="error")


@pytest.mark.parametrize("use", ["fused outputs", "fused inputs", "stacked for a product"])
def test_nothing_of_the_weights_size_is_built_from_the_factors(use):
    d = 64
    x, key = jnp.ones((2, d)), jax.random.key(0)
    params = {name: jnp.ones((d, d)) for name in "abc"}
    config = jlora.LoraConfig(rank=2, targets=("a", "b", "c"))
    fn = USES[use][0]
    params = jlora.init(key, params, config)
    trainable, frozen = jlora.split(params, config)

    def total(out):
        return sum(map(jnp.sum, jax.tree.leaves(out)))

    forward = jlora.adapt(fn, on_unsupported="error")
    loss = jax.grad(lambda t, x: total(forward(jlora.combine(t, frozen), x)), (0, 1))
    built = arrays_of_size(loss, trainable, x, size=d * d)
    base = {name: leaf.w for name, leaf in params.items()}
    assert built == arrays_of_size(jax.grad(lambda x: total(fn(base, x))), x, size=d * d)


def test_weights_of_other_roles_are_joined_if_their_factors_fit():
    def fn(p, x):
        return x @ jnp.concatenate([p["a"], p["b"]], 1)

    axes = {"a": ("in", "out"), "b": ("out", "in")}  # factors the other way round
    params = adapted({"a": (D, D), "b": (D, 3)}, fn, ("a", "b"), axes=axes)
    assert_adapted_equals_dense(fn, params, X, rtol=2e-5, on_unsupported="error")


def test_weights_whose_factors_do_not_fit_together_are_joined_dense():
    def fn(p, x):
        return jnp.einsum("bd,dhk->bhk", x, jnp.concatenate([p["a"], p["b"]], 0)[:D])

    axes = {"a": ("in", "out", "out"), "b": ("in", "in", "out")}
    params = adapted({"a": (4, 2, 3), "b": (4, 2, 3)}, fn, ("a", "b"), axes=axes)
    with pytest.warns(UserWarning, match="concatenate"):
        assert_adapted_equals_dense(fn, params, X, rtol=2e-5)


def test_how_joined_weights_are_used_is_seen_for_each():
    fn, shapes = USES["fused outputs"]
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    uses = jlora.find_weights(fn, params, X)
    assert {use.kind for use in uses.values()} == {"product"}
    assert [use.multiply_adds for use in uses.values()] == [5 * D * 4, 5 * D * 5, 5 * D * 3]
    stacked = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SQUARES.items()}
    use = jlora.find_weights(scan, stacked, X)["b"]
    assert (use.contracted, use.free, use.stacked) == ((0,), (1,), ())
    report = jlora.explain(fn, adapted(shapes, fn, ("a", "b", "c")), X)
    assert report.low_rank == {name: ("dot_general",) for name in "abc"}


def test_joined_weights_drop_the_same_inputs():
    fn, shapes = USES["fused outputs"]
    params = adapted(shapes, fn, ("a", "b", "c"), dropout=0.5)
    outs = [
        jlora.adapt(fn, dropout_key=jax.random.key(seed), on_unsupported="error")(params, X)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(outs[0][0], outs[1][0])
    assert not np.allclose(outs[0][0], outs[2][0])
