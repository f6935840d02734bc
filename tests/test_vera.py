"""VeRA: equal to its merged weights in every use, equal to the base at the start, never dense."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import variant_laws
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from laws import assert_close, grad_of, is_lora
from test_laws import CONFIG, LAYERS, USES

import jlora
from jlora.vera import VeraArray

VERA = dataclasses.replace(CONFIG, variant="vera", rank=3, rank_pattern=(), alpha_pattern=())


def trained(leaf, seed=3):
    """A leaf whose vectors have moved away from the start."""
    if not is_lora(leaf):
        return leaf
    keys = jax.random.split(jax.random.key(seed), 2)
    d, b = (
        jax.random.normal(key, x.shape, x.dtype) / 2
        for key, x in zip(keys, (leaf.lambda_d, leaf.lambda_b))
    )
    return dataclasses.replace(leaf, lambda_d=d, lambda_b=b)


def train(params, seed=3):
    return jax.tree.map(functools.partial(trained, seed=seed), params, is_leaf=is_lora)


@pytest.mark.parametrize("transformation", variant_laws.COMPILED)
@pytest.mark.parametrize("use", USES)
def test_adapted_equals_merged(use, transformation):
    variant_laws.assert_adapted_equals_merged(VERA, use, transformation, train)


@pytest.mark.parametrize("use", USES)
def test_a_fresh_adapter_changes_no_bit(use):
    fn, params, fresh, x, _ = variant_laws.make(VERA, use)
    forward = jlora.adapt(fn, on_unsupported=variant_laws.policy(use))
    with jax.disable_jit():
        np.testing.assert_array_equal(forward(fresh, x), fn(params, x))
    chex.assert_trees_all_equal(jlora.merge_params(fresh), params)


@pytest.mark.parametrize("use", variant_laws.LOW_RANK_USES)
def test_nothing_of_the_weights_size_is_built(use):
    variant_laws.assert_nothing_of_the_weights_size_is_built(VERA, use)


def test_it_is_the_papers_equation_in_float64():
    with jax.enable_x64(True):
        w = jax.random.normal(jax.random.key(0), (40, 30), jnp.float64)
        config = dataclasses.replace(VERA, rank=50, dtype="float64")  # above both sides
        leaf = trained(jlora.init(jax.random.key(1), {"w": w}, config)["w"])
        x = jax.random.normal(jax.random.key(2), (7, 40), jnp.float64)

        def published(d, b, x):
            return x @ w + ((x @ leaf.a) * d @ leaf.b) * b

        def adapted(d, b, x):
            return jlora.adapt(jnp.matmul)(x, dataclasses.replace(leaf, lambda_d=d, lambda_b=b))

        arguments = leaf.lambda_d, leaf.lambda_b, x
        wanted = published(*arguments)
        np.testing.assert_allclose(adapted(*arguments), wanted, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(x @ jlora.merge_params(leaf), wanted, rtol=1e-11, atol=1e-12)
        got, wanted = (
            jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), (0, 1, 2))(*arguments)  # noqa: B023
            for fn in (adapted, published)
        )
        for x_, y in zip(got, wanted):
            np.testing.assert_allclose(x_, y, rtol=1e-10, atol=1e-11)


def two_weights():
    shapes = {"wide": (16, 40), "tall": (24, 12), "square": (16, 16)}
    return {k: jax.random.normal(jax.random.key(i), s) for i, (k, s) in enumerate(shapes.items())}


def test_all_weights_share_one_pair():
    params = jlora.init(jax.random.key(1), two_weights(), jlora.LoraConfig(
        rank=5, targets=("*",), variant="vera"))  # fmt: skip
    wide, tall, square = params["wide"], params["tall"], params["square"]
    np.testing.assert_array_equal(wide.a, tall.a[:16])
    np.testing.assert_array_equal(tall.b, wide.b[:, :12])
    assert square.a is wide.a  # one array, not two that are equal
    for x, fan in ((tall.a, 24), (wide.b, 5)):
        bound = np.sqrt(6 / fan)
        assert 0.9 * bound < np.abs(x).max() <= bound
    compiled = jax.jit(lambda key, params: jlora.init(key, params, jlora.LoraConfig(
        rank=5, targets=("*",), variant="vera")))(jax.random.key(1), two_weights())  # fmt: skip
    chex.assert_trees_all_equal(compiled, params)


def test_the_projections_are_not_stacked_and_do_not_train():
    w = jnp.ones((LAYERS, 16, 12))
    config = dataclasses.replace(VERA, axes={"w": ("stack", "in", "out")})
    params = jlora.init(jax.random.key(1), {"w": w}, config)
    leaf = params["w"]
    assert isinstance(leaf, VeraArray)
    assert (leaf.a.shape, leaf.b.shape) == ((16, 3), (3, 12))
    assert (leaf.lambda_d.shape, leaf.lambda_b.shape) == ((LAYERS, 3), (LAYERS, 12))
    assert jax.tree.leaves(jlora.labels(params, config)) == ["frozen"] * 3 + ["lora_a", "lora_b"]
    trainable, frozen = jlora.split(params, config)
    chex.assert_trees_all_equal(jlora.combine(trainable, frozen), params)
    assert len(jax.tree.leaves(trainable)) == 2
    moments = jlora.optimizer(optax.adam(1e-3), config).init(trainable)
    assert sum(x.size for x in jax.tree.leaves(moments) if x.ndim) == 2 * LAYERS * (3 + 12)
    assert jlora.summary(params, config).trainable == LAYERS * (3 + 12)
    assert "VeRA, rank 3" in str(jlora.summary(params, config))
    step = jlora.lora_plus(optax.sgd, 1.0, config, ratio=4)
    updates, _ = step.update(jax.tree.map(jnp.ones_like, trainable), step.init(trainable))
    assert (updates["w"].lambda_d[0, 0], updates["w"].lambda_b[0, 0]) == (-1, -4)


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_on_a_quantised_base_it_is_vera_on_what_that_stands_for(fmt):
    packed = variant_laws.assert_packed_equals_dense(VERA, fmt, train)
    row = jlora.merge_error(packed).rows[0]
    assert row.rounding < 1e-6
    assert row.update > 0


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_the_vectors_follow_their_weight(kind):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    w, x = jax.random.normal(jax.random.key(0), (8, 12)), jnp.ones((4, 8))
    params = train(jlora.init(jax.random.key(1), {"w": w}, VERA))
    for spec in (PartitionSpec(None, "tensor"), PartitionSpec("tensor", None)):
        where = jlora.sharding.follow(params, {"w": NamedSharding(mesh, spec)})
        assert where["w"].a.spec == PartitionSpec(spec[0], None)
        assert where["w"].lambda_b.spec == PartitionSpec(spec[1])
        placed = jax.device_put(params, where)

        def fn(params, x):
            out = None if kind == AxisType.Auto else PartitionSpec("data", spec[1])  # noqa: B023
            return jnp.matmul(x, params["w"], out_sharding=out)

        with jax.set_mesh(mesh):
            rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
            forward = jlora.adapt(fn, on_unsupported="error")
            got = jax.jit(lambda p, x: grad_of(forward, p, VERA, x))(placed, rows)  # noqa: B023
        wanted = grad_of(jlora.adapt(lambda p, x: x @ p["w"]), params, VERA, x)
        assert_close(jax.device_get(got), wanted, rtol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"shares one pair .* leave rank_pattern"):
        dataclasses.replace(VERA, rank_pattern={"w": 2})
    with pytest.raises(ValueError, match="cannot be combined"):
        dataclasses.replace(VERA, init="pissa")
    assert jlora.LoraConfig.from_json(VERA.to_json()) == VERA
    params = jlora.init(jax.random.key(0), {"w": jnp.ones((8, 8))}, VERA)
    with pytest.raises(ValueError, match="w' is VeRA; these starts are for LoRA alone"):
        jlora.variants.pissa(params)
    trainable, frozen = jlora.split(params, VERA)
    tx = jlora.lora_fa(optax.sgd(1.0), VERA)
    with pytest.raises(ValueError, match="VeRA trains neither"):
        tx.update(trainable, tx.init(trainable), trainable)
    for half in (trainable, frozen):
        with pytest.raises(ValueError, match=r"one half of jlora\.split"):
            jlora.adapt(jnp.matmul)(jnp.ones((2, 8)), half["w"])
