"""One table of laws over library, transformation and what the function does with the weight.

Adapted outputs and gradients equal the dense ones, a fresh adapter changes no bit, and nothing of
the weight's size is built. Each library keeps the weight in its own way and path.
"""

import collections
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
from laws import TRANSFORMATIONS, arrays_of_size, assert_close, grad_of, is_lora

import jlora

D, LAYERS = 8, 3


def lookup(w, x):
    tokens = (jnp.abs(x[:, 0]) * 7).astype(int) % w.shape[0]
    return jnp.take(w, tokens, axis=0)


def scanned(w, x):
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, w)[0]


def branch_and_loop(w, x):
    x = jax.lax.cond(jnp.max(x) > -9, lambda x: x @ w[0], lambda x: jnp.sin(x @ w[1]), x)
    return jax.lax.fori_loop(0, LAYERS, lambda i, x: jnp.tanh(x @ w[i]), x)


def fused(w, x):
    query, key, value = jnp.split(x @ w, 3, axis=1)
    again = x @ jnp.concatenate([w[:, : w.shape[0]], jnp.ones_like(w[:, :2])], axis=1)
    return jnp.concatenate([query * jnp.tanh(key), value, again], axis=1)


def convolution(w, x):
    return jax.lax.conv_general_dilated(
        x[:, :, None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


# From a use's name: what is done with the weight and the input, and the weight's shape.
USES = {
    "product": (lambda w, x: x @ w, lambda d: (d, d + 1)),
    "product on the left": (lambda w, x: (w @ x.T).T, lambda d: (d + 1, d)),
    "product cast, scaled and transposed": (
        lambda w, x: jnp.tanh(x @ (w.astype(jnp.float32) * 0.5).T),
        lambda d: (d + 1, d),
    ),
    "product over several axes": (
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w),
        lambda d: (d, 2, d),
    ),
    "weight used twice": (lambda w, x: jnp.tanh(x @ w) @ w, lambda d: (d, d)),
    "embedding and tied head": (
        lambda w, x: jnp.tanh(lookup(w, x) * x) @ w.T,
        lambda d: (2 * d, d),
    ),
    "convolution": (convolution, lambda d: (3, 1, d)),
    "scanned and checkpointed stack": (scanned, lambda d: (LAYERS, d, d)),
    "stack in a branch and a loop": (branch_and_loop, lambda d: (LAYERS, d, d)),
    "experts": (lambda w, x: jnp.einsum("bd,edf->bef", x, w), lambda d: (LAYERS, d, d)),
    "fused and joined": (fused, lambda d: (d, 3 * d)),
    "in a shard_map": (
        lambda w, x: jax.shard_map(
            lambda w, x: jax.lax.psum(x @ w, "in"),
            mesh=jax.make_mesh((2,), ("in",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=(jax.P("in"), jax.P(None, "in")),
            out_specs=jax.P(),
        )(w, x),
        lambda d: (d, d + 1),
    ),
    "nothing low-rank": (lambda w, x: x @ jax.nn.softmax(w), lambda d: (d, d + 1)),
}


def linen(use, w):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return use(self.param("w", lambda key: w), x)

    return lambda params, x: Model().apply(params, x), {"params": {"w": w}}


def nnx_(use, w):
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(w)
            self.rngs = nnx.Rngs(0)  # state that is no parameter

        def __call__(self, x):
            return use(self.w[...], x)

    graph, params, rest = nnx.split(Model(), nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x), params


def haiku(use, w):
    def forward(x):
        return use(hk.get_parameter("w", w.shape, init=hk.initializers.Constant(0)), x)

    net = hk.without_apply_rng(hk.transform(forward))
    return lambda params, x: net.apply(params, x), {"~": {"w": w}}


def equinox(use, w):
    class Model(eqx.Module):
        w: jax.Array
        activation: object = jnp.tanh  # a leaf that is no array

        def __call__(self, x):
            return use(self.w, x)

    return lambda model, x: model(x), Model(w)


def lists_and_dicts(use, w):
    return lambda params, x: use(params["layers"][0]["w"], x), {"layers": [{"w": w}], "no": None}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: jax.Array
    name: str = dataclasses.field(default="layer", metadata={"static": True})


def dataclass(use, w):
    return lambda layer, x: use(layer.w, x), Layer(w)


LIBRARIES = {
    "linen": linen,
    "nnx": nnx_,
    "haiku": haiku,
    "equinox": equinox,
    "lists and dicts": lists_and_dicts,
    "dataclass": dataclass,
}
PLAIN = "lists and dicts"
CONFIG = jlora.LoraConfig(rank=2, alpha=3, targets=("w",))


def weight_and_input(use, d=D):
    w = jax.random.normal(jax.random.key(0), USES[use][1](d)) / d**0.5
    return w, jax.random.normal(jax.random.key(1), (4, d))


@functools.cache
def make(library, use):
    """The function, its parameters, and the same with a fresh and with a trained adapter."""
    w, x = weight_and_input(use)
    function, params = LIBRARIES[library](USES[use][0], w)
    config = CONFIG if use != "convolution" else dataclasses.replace(CONFIG, rank=1)

    def fn(params, x):  # one name for all, so that equal programs are found again
        return function(params, x)

    fresh = jlora.init(jax.random.key(2), params, config, fn=fn, args=(x,))
    return fn, params, fresh, jax.tree.map(train, fresh, is_leaf=is_lora)


def train(leaf):
    """Factors that are the same in every library; init draws them by path."""
    if not is_lora(leaf):
        return leaf
    a, b = (
        jax.random.normal(jax.random.key(seed), factor.shape) / 2
        for seed, factor in ((3, leaf.a), (4, leaf.b))
    )
    return dataclasses.replace(leaf, a=a, b=b)


@functools.cache
def dense_result(use, transformation):
    fn, _, _, trained = make(PLAIN, use)
    x = weight_and_input(use)[1]

    def dense(params, x):
        return fn(jlora.merge_params(params), x)

    run = TRANSFORMATIONS[transformation]
    return jax.jit(lambda x: run(dense, trained, CONFIG, x))(x)


def policy(use):
    return "allow" if use == "nothing low-rank" else "error"


def cells():
    """(library, use, transformation): all of the plainest library; of each other one its diagonal.

    A library decides where the weight comes from and nothing else, so that each one meets every use
    once and every transformation once, another pair in each library.
    """
    yield from itertools.product([PLAIN], USES, TRANSFORMATIONS)
    others = [library for library in LIBRARIES if library != PLAIN]
    for (i, library), (j, use) in itertools.product(enumerate(others), enumerate(USES)):
        yield library, use, list(TRANSFORMATIONS)[(i + j) % len(TRANSFORMATIONS)]


@pytest.mark.parametrize(("library", "use", "transformation"), cells())
def test_adapted_equals_dense(library, use, transformation):
    if use == "in a shard_map" and transformation == "shard_map over data":
        pytest.skip("JAX has no shard_map over another mesh inside one")
    fn, _, _, trained = make(library, use)
    forward = jlora.adapt(fn, on_unsupported=policy(use))
    got = TRANSFORMATIONS[transformation](forward, trained, CONFIG, weight_and_input(use)[1])
    assert_close(got, dense_result(use, transformation), rtol=2e-5)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_fresh_adapter_is_bit_equal_to_the_base(library, use):
    fn, params, fresh, _ = make(library, use)
    x = weight_and_input(use)[1]
    forward = jlora.adapt(fn, on_unsupported=policy(use))
    with jax.disable_jit():  # the same operations on the same operands, and zeros added
        np.testing.assert_array_equal(forward(fresh, x), fn(params, x))
    assert_close(forward(fresh, x), fn(params, x), rtol=1e-6)


@pytest.mark.parametrize("use", [use for use in USES if use != "nothing low-rank"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_of_the_weights_size_is_built(library, use):
    d = 128
    w, x = weight_and_input(use, d)
    fn, params = LIBRARIES[library](USES[use][0], w)
    x = x[:2] if use != "convolution" else x[:1, :2]
    config = CONFIG if use != "convolution" else dataclasses.replace(CONFIG, rank=1)
    adapted = jlora.init(jax.random.key(2), params, config, fn=fn, args=(x,))
    forward = jlora.adapt(fn, on_unsupported="error")
    stack = LAYERS if w.shape[0] == LAYERS and use != "convolution" else 1
    size = w.size // stack // (2 if use == "in a shard_map" else 1)

    def loss(x):
        return jnp.sum(jnp.sin(fn(params, x)))

    def merged_grad(x):
        return grad_of(lambda p, x: fn(jlora.merge_params(p), x), adapted, config, x)

    built = arrays_of_size(lambda x: grad_of(forward, adapted, config, x), x, size=size)
    base = arrays_of_size(jax.grad(loss), x, size=size)
    # The base's own program may move its weight (a transpose); the adapter adds nothing to that.
    assert not list((collections.Counter(built) - collections.Counter(base)).elements())
    # The checker is not blind: merging does build the dense update.
    assert "dot_general" in arrays_of_size(merged_grad, x, size=size)
