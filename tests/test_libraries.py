"""Models in each library's own idioms: adapted equals dense, fresh equals base, paths are alike."""

import dataclasses
import functools
import itertools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from laws import TRANSFORMATIONS, assert_close, is_lora, randomise

import jlora

DIM, LAYERS = 8, 3
X = jax.random.normal(jax.random.key(9), (4, DIM))


def linen_scan(key):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.DenseGeneral((2, 6), dtype=jnp.float32, name="up")(nn.LayerNorm(name="norm")(x))
            return x + nn.DenseGeneral(DIM, axis=(-2, -1), name="down")(nn.gelu(h)), None

    stack = nn.scan(
        nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
    )(name="layers")
    params = stack.init(key, X, None)
    return (lambda params, x: stack.apply(params, x, None)[0]), params, ("up", "down")


def linen_einsum_and_shared(key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(0.3), (DIM, 2, 4))
            shared = nn.Dense(DIM, name="shared")
            h = jnp.einsum("bd,dhk->bhk", x, w).reshape(x.shape)
            return shared(jnp.tanh(shared(h)))

    model = Model()
    return model.apply, model.init(key, X), ("w", "shared")


def nnx_model(key):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(DIM, 12, rngs=rngs)
            self.norm = nnx.BatchNorm(12, use_running_average=True, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.down = nnx.Linear(12, DIM, rngs=rngs)

        def __call__(self, x):
            return x + self.down(self.dropout(jax.nn.relu(self.norm(self.up(x)))))

    graph, params, rest = nnx.split(Model(nnx.Rngs(key)), nnx.Param, ...)

    def fn(params, x):
        return nnx.merge(graph, params, rest)(x)

    return fn, params, ("up", "down")


def nnx_scan(key):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(DIM, DIM, rngs=rngs)

        def __call__(self, x):
            return x + jnp.tanh(self.linear(x))

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return Block(nnx.Rngs(key))

    graph, params = nnx.split(make(jax.random.split(key, LAYERS)))

    def fn(params, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return block(x)

        return forward(nnx.merge(graph, params), x)

    return fn, params, ("linear",)


def haiku(key):
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([12, DIM], name="mlp")(x)))
    return net.apply, net.init(key, X), ("w",)


def equinox(key):
    mlp = eqx.nn.MLP(DIM, DIM, 12, depth=2, key=key)
    params, static = eqx.partition(mlp, eqx.is_array)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return fn, params, ("weight",)


def equinox_whole(key):
    """The module itself as the argument: its activation functions are leaves, too."""

    def fn(mlp, x):
        return jax.vmap(mlp)(x)

    return fn, eqx.nn.MLP(DIM, DIM, 12, depth=1, key=key), ("weight",)


def raw_dict(key):
    def fn(params, x):
        return (params["blocks"][1] @ jnp.tanh(x @ params["blocks"][0]).T).T

    k1, k2 = jax.random.split(key)
    blocks = [jax.random.normal(k1, (DIM, 6)), jax.random.normal(k2, (DIM, 6))]
    return fn, {"blocks": blocks, "unused": None}, ("blocks",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: jax.Array
    b: jax.Array


def dataclass(key):
    layers = (Layer(jax.random.normal(key, (DIM, DIM)), jnp.ones(DIM)),) * 2

    def fn(layers, x):
        for layer in layers:
            x = jnp.sin(x @ layer.w + layer.b)
        return x

    return fn, layers, ("w",)


LIBRARIES = [
    linen_scan,
    linen_einsum_and_shared,
    nnx_model,
    nnx_scan,
    haiku,
    equinox,
    equinox_whole,
    raw_dict,
    dataclass,
]


@pytest.fixture(scope="module", params=LIBRARIES, ids=lambda make: make.__name__)
def case(request):
    fn, params, targets = request.param(jax.random.key(0))
    config = jlora.LoraConfig(rank=2, alpha=1, targets=targets)
    fresh = jlora.init(jax.random.key(1), params, config, fn=fn, args=(X,))
    return fn, params, fresh, config


def cells(count=4):
    """(model, transformation): four a model, the next four of the next one."""
    names = itertools.cycle(TRANSFORMATIONS)  # test_laws.py has all of them of each use
    for make in LIBRARIES:
        for name in itertools.islice(names, count):
            yield pytest.param(make, name, id=f"{make.__name__}-{name}")


@pytest.mark.parametrize(("case", "transformation"), cells(), indirect=["case"])
def test_adapted_equals_dense(case, transformation):
    fn, _, fresh, config = case
    params = randomise(fresh, jax.random.key(2), scale=0.1)
    transform = TRANSFORMATIONS[transformation]
    adapted = jlora.adapt(fn, on_unsupported="error")
    got = transform(adapted, params, config, X)
    merged = functools.partial(transform, lambda params, x: fn(jlora.merge_params(params), x))
    assert_close(got, jax.jit(lambda x: merged(params, config, x))(X), rtol=2e-5)


def test_a_fresh_adapter_is_bit_equal_to_the_base(case):
    fn, params, fresh, _ = case
    with jax.disable_jit():  # the same operations on the same operands, and zeros added
        np.testing.assert_array_equal(jlora.adapt(fn)(fresh, X), fn(params, X))
    # Compiled, XLA may order a product's sum differently where more than one operation reads it.
    arrays, static = eqx.partition(params, eqx.is_array)
    base = jax.jit(lambda arrays, x: fn(eqx.combine(arrays, static), x))(arrays, X)
    np.testing.assert_allclose(jlora.adapt(fn)(fresh, X), base, rtol=1e-6, atol=1e-7)


def test_only_the_targets_became_adapters_and_merging_restores_the_tree(case):
    _, params, fresh, config = case
    adapted = [leaf for leaf in jax.tree.leaves(fresh, is_leaf=is_lora) if is_lora(leaf)]
    assert adapted
    merged = jlora.merge_params(fresh)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        if eqx.is_array(x):
            np.testing.assert_array_equal(x, y)
    trainable, frozen = jlora.split(fresh, config)
    joined = jlora.combine(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(fresh)


def test_shapes_are_enough(case):
    fn, params, _, config = case
    arrays, static = eqx.partition(params, eqx.is_array)
    shapes = eqx.combine(jax.eval_shape(lambda: arrays), static)
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    abstract = jlora.init(jax.random.key(1), shapes, config, fn=fn, args=(x,))
    adapters = [leaf for leaf in jax.tree.leaves(abstract, is_leaf=is_lora) if is_lora(leaf)]
    assert all(isinstance(leaf.a, jax.ShapeDtypeStruct) for leaf in adapters)
    report = jlora.explain(fn, abstract, x)
    assert all(report.low_rank.values())
    assert not any(report.dense.values())


@pytest.fixture(scope="module", params=LIBRARIES, ids=lambda make: make.__name__)
def packed_case(request):
    fn, params, targets = request.param(jax.random.key(0))
    packed = jlora.quantize(params, "nf4", targets=targets, fn=fn, args=(X,))
    config = jlora.LoraConfig(rank=2, alpha=1, targets=targets)
    adapted = jlora.init(jax.random.key(1), packed, config, fn=fn, args=(X,))
    return fn, packed, randomise(adapted, jax.random.key(2), scale=0.1), config


def test_a_quantised_tree_gives_what_the_dequantised_one_gives(packed_case):
    fn, packed, adapted, config = packed_case
    leaves = jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, jlora.quant.QuantArray))
    assert any(isinstance(leaf, jlora.quant.QuantArray) for leaf in leaves)
    forward = jlora.adapt(fn, on_unsupported="error")
    assert_close(forward(packed, X), fn(jlora.dequantize(packed), X), rtol=2e-5)
    dense = jlora.dequantize(adapted)
    for name in ("eager", "jit of grad"):
        transform = TRANSFORMATIONS[name]
        got, wanted = (transform(forward, params, config, X) for params in (adapted, dense))
        assert_close(got, wanted, rtol=2e-5)


def test_eight_adapters_share_one_quantised_base(packed_case):
    fn, _, adapted, config = packed_case
    trainable, frozen = jlora.split(adapted, config)
    eight = jax.tree.map(lambda x: jnp.stack([x * (i + 1) for i in range(8)]), trainable)
    forward = jlora.adapt(fn, on_unsupported="error")
    got = jax.vmap(lambda t: forward(jlora.combine(t, frozen), X))(eight)
    for i in (0, 7):
        one = jax.tree.map(lambda x: x[i], eight)  # noqa: B023
        wanted = fn(jlora.merge_params(jlora.combine(one, frozen)), X)
        assert_close(got[i], wanted, rtol=2e-5)
