"""DoRA: equal to its merged weights in every use, equal to the base at the start, never dense."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import variant_laws
from laws import arrays_of_size, assert_close, grad_of, is_lora
from test_laws import CONFIG, LAYERS, USES

import jlora
from jlora.dora import DoraArray

DORA = dataclasses.replace(CONFIG, variant="dora")


def trained(leaf, seed=3):
    """A leaf whose factors and lengths have moved away from the start."""
    if not is_lora(leaf):
        return leaf
    keys = jax.random.split(jax.random.key(seed), 3)
    a, b, change = (
        jax.random.normal(key, x.shape, x.dtype) / 2
        for key, x in zip(keys, (leaf.a, leaf.b, leaf.magnitude))
    )
    return dataclasses.replace(leaf, a=a, b=b, magnitude=leaf.magnitude * (1 + change / 3))


def train(params, seed=3):
    return jax.tree.map(functools.partial(trained, seed=seed), params, is_leaf=is_lora)


@pytest.mark.parametrize("transformation", variant_laws.COMPILED)
@pytest.mark.parametrize("use", USES)
def test_adapted_equals_merged(use, transformation):
    variant_laws.assert_adapted_equals_merged(DORA, use, transformation, train)


@pytest.mark.parametrize("use", USES)
def test_a_fresh_adapter_changes_no_bit(use):
    fn, params, fresh, x, _ = variant_laws.make(DORA, use)
    forward = jlora.adapt(fn, on_unsupported=variant_laws.policy(use))
    with jax.disable_jit():  # the length is the norm, so that the gain is 1
        np.testing.assert_array_equal(forward(fresh, x), fn(params, x))
    assert_close(forward(fresh, x), fn(params, x), rtol=2e-6)
    assert_close(jlora.merge_params(fresh), params, rtol=1e-6)


@pytest.mark.parametrize("use", variant_laws.LOW_RANK_USES)
def test_nothing_of_the_weights_size_is_built(use):
    variant_laws.assert_nothing_of_the_weights_size_is_built(DORA, use)


def test_no_array_as_long_as_the_input_on_both_sides():
    """Nor `[in in]`, which is smaller than the weight where that is wide."""
    d, wide = 64, 512
    params = {"w": jax.random.normal(jax.random.key(0), (d, wide))}
    fresh = jlora.init(jax.random.key(2), params, DORA)
    forward = jlora.adapt(lambda p, x: x @ p["w"], on_unsupported="error")
    x = jnp.ones((2, d))
    assert not arrays_of_size(lambda x: grad_of(forward, fresh, DORA, x), x, size=d * d)


def published(w, a, b, scaling, magnitude):
    """The paper's equation 5 on a matrix `[in out]`, by numpy."""
    v = w + scaling * a @ b
    return magnitude * v / np.sqrt(np.square(v).sum(0))


def test_it_is_the_papers_equation_in_float64():
    with jax.enable_x64(True):
        w = jax.random.normal(jax.random.key(0), (40, 30), jnp.float64)
        config = dataclasses.replace(DORA, rank=5, dtype="float64")
        leaf = trained(jlora.init(jax.random.key(1), {"w": w}, config)["w"])
        assert leaf.magnitude.dtype == jnp.float64
        wanted = published(*map(np.asarray, (w, leaf.a, leaf.b)), leaf.scaling, leaf.magnitude)
        x = jax.random.normal(jax.random.key(2), (7, 40), jnp.float64)
        got = jlora.adapt(jnp.matmul)(x, leaf)
        np.testing.assert_allclose(got, x @ wanted, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(jlora.merge_params(leaf), wanted, rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(
            leaf.apply(np.asarray(w), np.asarray(leaf.scaling * leaf.a @ leaf.b)), wanted, 1e-13
        )

        # Section 4.3: the norm is a constant in the backward pass.
        norm = np.sqrt(np.square(np.asarray(w + leaf.scaling * leaf.a @ leaf.b)).sum(0))

        def with_constant_norm(a, b, m):
            return jnp.sum(jnp.sin(x @ (m / norm * (w + leaf.scaling * a @ b))))

        def adapted(a, b, m):
            changed = dataclasses.replace(leaf, a=a, b=b, magnitude=m)
            return jnp.sum(jnp.sin(jlora.adapt(jnp.matmul)(x, changed)))

        arguments = (leaf.a, leaf.b, leaf.magnitude)
        got = jax.grad(adapted, (0, 1, 2))(*arguments)
        wanted = jax.grad(with_constant_norm, (0, 1, 2))(*arguments)
        for x_, y in zip(got, wanted):
            np.testing.assert_allclose(x_, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("roles", [("out", "stack", "in", "out"), ("stack", "in", "in", "out")])
def test_every_role_has_its_place(roles):
    w = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    config = jlora.LoraConfig(rank=2, targets=("w",), axes={"w": roles}, variant="dora")
    leaf = trained(jlora.init(jax.random.key(0), {"w": w}, config)["w"])
    inputs = tuple(i for i, role in enumerate(roles) if role == "in")
    outs = [i for role in ("stack", "out") for i, r in enumerate(roles) if r == role]
    assert leaf.magnitude.shape == leaf.square.shape == tuple(w.shape[i] for i in outs)
    plain = dataclasses.replace(config, variant="lora")
    lora = jlora.init(jax.random.key(0), {"w": w}, plain)["w"]
    v = jlora.merge_params(dataclasses.replace(lora, a=leaf.a, b=leaf.b))
    norm = jnp.sqrt(jnp.square(v).sum(inputs, keepdims=True))
    kept = sorted(outs)
    magnitude = leaf.magnitude.transpose([outs.index(i) for i in kept])
    wanted = jnp.expand_dims(magnitude, inputs) / norm * v
    assert_close(jlora.merge_params(leaf), wanted, rtol=1e-5)
    assert_close(jlora.adapt(lambda w: w, on_unsupported="allow")(leaf), wanted, rtol=1e-5)


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_on_a_quantised_base_it_is_dora_on_what_that_stands_for(fmt):
    packed = variant_laws.assert_packed_equals_dense(DORA, fmt, train)
    assert jlora.summary(packed, DORA).trainable == LAYERS * (2 * (64 + 48) + 48)
    assert "DoRA, rank 2" in str(jlora.summary(packed, DORA))


def test_the_length_trains_in_float32_under_its_own_label():
    w = jax.random.normal(jax.random.key(0), (16, 12)).astype(jnp.bfloat16)
    config = dataclasses.replace(DORA, dtype="bfloat16")
    params = jlora.init(jax.random.key(1), {"w": w}, config)
    leaf = params["w"]
    assert isinstance(leaf, DoraArray)
    assert (leaf.a.dtype, leaf.magnitude.dtype) == (jnp.bfloat16, jnp.float32)
    assert jax.tree.leaves(jlora.labels(params, config)) == [
        "frozen", "lora_a", "lora_b", "magnitude", "frozen",
    ]  # fmt: skip
    trainable, frozen = jlora.split(params, config)
    chex.assert_trees_all_equal(jlora.combine(trainable, frozen), params)
    tx = jlora.optimizer(
        {"lora_a": optax.set_to_zero(), "lora_b": optax.set_to_zero(), "magnitude": optax.sgd(1.0)},
        config,
    )
    grads = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    after = optax.apply_updates(trainable, updates)["w"]
    np.testing.assert_allclose(after.magnitude, leaf.magnitude - 1, rtol=1e-6)
    np.testing.assert_array_equal(after.a, leaf.a)
    with pytest.raises(ValueError, match="one half of"):
        jlora.adapt(jnp.matmul)(jnp.ones((2, 16)), dataclasses.replace(leaf, magnitude=None))


def test_it_is_made_in_place_on_a_mesh_and_follows_its_weight():
    mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w = jax.random.normal(jax.random.key(0), (LAYERS, 16, 8))
    config = dataclasses.replace(DORA, axes={"w": ("stack", "in", "out")})
    placed = jax.NamedSharding(mesh, jax.P(None, "in", "out"))
    make = lambda w: jlora.init(jax.random.key(1), {"w": w}, config)  # noqa: E731
    shapes = jax.eval_shape(make, w)
    where = jlora.sharding.follow(shapes, {"w": placed})
    assert where["w"].magnitude.spec == where["w"].square.spec == jax.P(None, "out")
    assert jlora.sharding.follow(shapes, {"w": placed}, replicate=True)["w"].square.spec == (
        jax.P(None, None)
    )
    params = jax.jit(make, out_shardings=where)(jax.device_put(w, placed))
    assert_close(params, make(w), rtol=1e-6)

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, params["w"])[0]

    x = jax.random.normal(jax.random.key(2), (4, 16))
    forward = jlora.adapt(fn, on_unsupported="error")
    whole = train(make(w))
    spread = jax.device_put(whole, where)
    got = jax.jit(lambda params, x: grad_of(forward, params, config, x))(spread, x)
    assert_close(got, grad_of(forward, whole, config, x), rtol=2e-5)


def test_on_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    w = jax.random.normal(jax.random.key(0), (16, 8))
    whole = train(jlora.init(jax.random.key(1), {"w": w}, DORA))
    x = jax.random.normal(jax.random.key(2), (4, 16))
    wanted = x @ jlora.merge_params(whole)["w"]
    with jax.set_mesh(mesh):
        where = jlora.sharding.follow(whole, {"w": jax.NamedSharding(mesh, jax.P("in", "out"))})
        params = jax.device_put(whole, where)
        forward = jlora.adapt(
            lambda p, x: jnp.matmul(x, p["w"], out_sharding=jax.P(None, "out")),
            on_unsupported="error",
        )
        got = jax.jit(forward)(params, jax.device_put(x, jax.P(None, "in")))
    assert_close(np.asarray(got), np.asarray(wanted), rtol=1e-5)


def test_merge_error_measures_the_whole_change():
    w = jax.random.normal(jax.random.key(0), (64, 48))
    base = jlora.quantize({"w": w}, "nf4", targets=("w",))
    for params in (base, {"w": w}):
        leaf = trained(jlora.init(jax.random.key(1), params, DORA)["w"])
        row = jlora.merge_error({"w": leaf}, base={"w": w}).rows[0]
        dense = np.asarray(jlora.dequantize({"w": leaf.w})["w"], np.float64)
        merged = np.asarray(jlora.merge_params(leaf, dtype=jnp.float32), np.float64)
        wanted = np.linalg.norm(merged - dense) / np.linalg.norm(dense)
        np.testing.assert_allclose(row.update, wanted, rtol=1e-5)
        assert row.rounding < 1e-6


def test_joined_with_plain_weights_and_plain_adapters():
    plain = dataclasses.replace(DORA, variant="lora")
    ws = {n: jax.random.normal(jax.random.key(i), (8, 6)) for i, n in enumerate("qkv")}
    params = {
        "q": trained(jlora.init(jax.random.key(1), {"w": ws["q"]}, DORA)["w"]),
        "k": jlora.init(jax.random.key(1), {"w": ws["k"]}, plain)["w"],
        "v": ws["v"],
    }
    params["k"] = dataclasses.replace(params["k"], b=params["k"].b + 0.3)
    x = jax.random.normal(jax.random.key(5), (3, 8))
    for order in ("qkv", "kqv", "vkq"):
        for join in (lambda ws: jnp.concatenate(ws, 1), lambda ws: jnp.stack(ws)):
            fn = lambda p, x: x @ join([p[name] for name in order])  # noqa: B023, E731
            got = jlora.adapt(fn, on_unsupported="error")(params, x)
            assert_close(got, fn(jlora.merge_params(params), x), rtol=1e-5)


def test_experts_on_sorted_rows():
    w = jax.random.normal(jax.random.key(0), (LAYERS, 8, 6))
    x, sizes = jax.random.normal(jax.random.key(1), (10, 8)), jnp.array([4, 0, 6])
    config = dataclasses.replace(DORA, axes={"w": ("stack", "in", "out")})
    params = train(jlora.init(jax.random.key(2), {"w": w}, config))
    fn = lambda params, x: jax.lax.ragged_dot(x, params["w"], sizes)  # noqa: E731
    got = grad_of(jlora.adapt(fn, on_unsupported="error"), params, config, x)
    wanted = grad_of(lambda p, x: fn(jlora.merge_params(p), x), params, config, x)
    assert_close(got, wanted, rtol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="variant must be one of"):
        jlora.init(
            jax.random.key(0), {"w": jnp.ones((4, 4))}, dataclasses.replace(DORA, variant="x")
        )
    with pytest.raises(ValueError, match="cannot be combined"):
        dataclasses.replace(DORA, init="pissa")
    assert jlora.LoraConfig.from_json(DORA.to_json()) == DORA
