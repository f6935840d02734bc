"""What holds of every variant of LoRA: one test of each in the file of a variant calls it here."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from laws import TRANSFORMATIONS, arrays_of_size, assert_close, grad_of
from test_laws import LAYERS, USES, weight_and_input

import jlora

# Without jit a call costs several times as much; test_laws.py shows that it gives the same.
COMPILED = [name for name in TRANSFORMATIONS if name not in ("eager", "grad")]
LOW_RANK_USES = [use for use in USES if use != "nothing low-rank"]


@functools.cache
def make(config, use, d=8):
    """A function that uses a weight so, its parameters, fresh adapters, an input, their config."""
    w, x = weight_and_input(use, d)
    if use == "convolution":
        config = dataclasses.replace(config, rank=1)

    def fn(params, x):
        return USES[use][0](params["w"], x)

    fresh = jlora.init(jax.random.key(2), {"w": w}, config, fn=fn, args=(x,))
    return fn, {"w": w}, fresh, x, config


def policy(use):
    return "allow" if use == "nothing low-rank" else "error"


def assert_adapted_equals_merged(config, use, transformation, train):
    if use == "in a shard_map" and transformation == "shard_map over data":
        pytest.skip("JAX has no shard_map over another mesh inside one")
    fn, _, fresh, x, config = make(config, use)
    params = train(fresh)
    run = TRANSFORMATIONS[transformation]
    got = run(jlora.adapt(fn, on_unsupported=policy(use)), params, config, x)
    merged = functools.partial(run, lambda params, x: fn(jlora.merge_params(params), x))
    assert_close(got, jax.jit(lambda x: merged(params, config, x))(x), rtol=3e-5)


def assert_nothing_of_the_weights_size_is_built(config, use):
    """Nothing but what the function itself builds."""
    fn, params, fresh, x, config = make(config, use, 128)
    x = x[:2] if use != "convolution" else x[:1, :2]
    forward = jlora.adapt(fn, on_unsupported="error")
    w = params["w"]
    stack = LAYERS if w.shape[0] == LAYERS and use != "convolution" else 1
    size = w.size // stack // (2 if use == "in a shard_map" else 1)

    def loss(x):
        return jnp.sum(jnp.sin(fn(params, x)))

    built = arrays_of_size(lambda x: grad_of(forward, fresh, config, x), x, size=size)
    built = [name for name in built if name != "squeeze"]  # the same array, without axes of size 1
    base = arrays_of_size(jax.grad(loss), x, size=size)
    assert not list((collections.Counter(built) - collections.Counter(base)).elements())


def assert_packed_equals_dense(config, fmt, train):
    """On a quantised stack as on what that stands for; returns the packed tree with adapters."""
    w = jax.random.normal(jax.random.key(0), (LAYERS, 64, 48)) / 8
    axes = {"w": ("stack", "in", "out")}
    base = jlora.quantize({"w": w}, fmt, targets=("w",), axes=axes)
    config = dataclasses.replace(config, axes=axes)
    packed = train(jlora.init(jax.random.key(1), base, config))
    dense = train(jlora.init(jax.random.key(1), jlora.dequantize(base), config))

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, params["w"])[0]

    x = jax.random.normal(jax.random.key(2), (4, 64))
    forward = jlora.adapt(fn, on_unsupported="error")
    assert_close(forward(packed, x), forward(dense, x), rtol=1e-5)
    got, wanted = (grad_of(forward, params, config, x) for params in (packed, dense))
    assert_close(got, wanted, rtol=2e-5)
    assert_close(jlora.merge_params(packed), jlora.merge_params(dense), rtol=1e-6)
    again = jlora.merge_params(packed, requantize=True)["w"]
    assert type(again) is type(base["w"])
    return packed
