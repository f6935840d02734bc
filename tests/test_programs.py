"""Random programs: whatever moves a weight takes before its product, adapted equals dense."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import randomise

import jlora

SETTINGS = settings(
    max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def adapted_weight(shape, roles, seed):
    key = jax.random.key(seed)
    d_in = math.prod(size for size, role in zip(shape, roles) if role == "in")
    d_out = math.prod(size for size, role in zip(shape, roles) if role == "out")
    config = jlora.LoraConfig(rank=min(2, d_in, d_out), alpha=2, targets=("w",), axes={"w": roles})
    return randomise(jlora.init(key, {"w": jax.random.normal(key, shape)}, config), key)


def check(fn, params, *args, on_unsupported="allow", compiled=False):
    """Runs operation by operation, as a rule: all these programs would take minutes to compile."""
    with jax.disable_jit(not compiled):
        got = jlora.adapt(fn, on_unsupported=on_unsupported)(params, *args)
        wanted = fn(jlora.merge_params(params), *args)
    scale = max(1.0, float(jnp.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(got / scale, wanted / scale, rtol=1e-4, atol=1e-5)


def draw_roles(draw, count):
    roles = ["in", "out", *draw(st.lists(st.sampled_from(["in", "out", "stack"]),
                                         min_size=count - 2, max_size=count - 2))]  # fmt: skip
    return tuple(draw(st.permutations(roles)))


@pytest.mark.slow
@SETTINGS
@given(data=st.data())
def test_random_einsums(data):
    draw = data.draw
    letters = "abcdefg"
    sizes = {letter: draw(st.integers(1, 4), label=letter) for letter in letters}
    count = draw(st.integers(2, 4), label="weight axes")
    w_axes = "".join(draw(st.permutations(letters), label="weight"))[:count]
    x_axes = "".join(draw(st.permutations(letters), label="input"))[: draw(st.integers(1, 4))]
    both = [letter for letter in letters if letter in w_axes or letter in x_axes]
    kept = draw(st.permutations(both), label="output")[: draw(st.integers(0, len(both)))]
    spec = f"{x_axes},{w_axes}->{''.join(kept)}"
    if draw(st.booleans(), label="weight on the left"):
        spec = f"{w_axes},{x_axes}->{''.join(kept)}"
    roles = draw_roles(draw, count)
    params = adapted_weight(tuple(sizes[a] for a in w_axes), roles, seed=1)
    x = jax.random.normal(jax.random.key(2), tuple(sizes[a] for a in x_axes))

    def fn(params, x):
        operands = (params["w"], x) if spec.startswith(f"{w_axes},") else (x, params["w"])
        return jnp.einsum(spec, *operands)

    check(fn, params, x)


def random_move(draw, shape):
    """One operation on an array of `shape`: its name, the function, and the new shape."""
    kind = draw(
        st.sampled_from(["scale", "negate", "transpose", "reshape", "slice", "index", "expand"])
    )
    if kind == "scale":
        return lambda w: w * 1.5
    if kind == "negate":
        return lambda w: -w
    if kind == "transpose":
        order = draw(st.permutations(range(len(shape))))
        return lambda w: w.transpose(order)
    if kind == "reshape":
        merged = draw(st.integers(0, max(0, len(shape) - 2)))
        if len(shape) > 2 and draw(st.booleans()):
            new = (*shape[:merged], shape[merged] * shape[merged + 1], *shape[merged + 2 :])
        else:
            axis = draw(st.integers(0, len(shape) - 1))
            factor = draw(st.sampled_from([f for f in (1, 2, 3) if shape[axis] % f == 0]))
            new = (*shape[:axis], factor, shape[axis] // factor, *shape[axis + 1 :])
        return lambda w: w.reshape(new)
    axis = draw(st.integers(0, len(shape) - 1))
    if kind == "slice":
        start = draw(st.integers(0, shape[axis] - 1))
        step = draw(st.integers(1, 2))
        return lambda w: w[(slice(None),) * axis + (slice(start, None, step),)]
    if kind == "index" and len(shape) > 2:
        place = draw(st.integers(0, shape[axis] - 1))
        if draw(st.booleans()):
            return lambda w: jax.lax.dynamic_index_in_dim(w, place, axis, keepdims=False)
        return lambda w: jnp.take(w, jnp.array([place, 0]), axis=axis)
    return lambda w: jnp.expand_dims(w, axis)


@pytest.mark.slow
@SETTINGS
@given(data=st.data())
def test_random_chains_of_moves_before_a_product(data):
    draw = data.draw
    count = draw(st.integers(2, 4), label="weight axes")
    shape = tuple(draw(st.sampled_from([2, 3, 4, 6])) for _ in range(count))
    params = adapted_weight(shape, draw_roles(draw, count), seed=3)
    moves, moved = [], params["w"].w
    for _ in range(draw(st.integers(1, 4), label="moves")):
        if moved.ndim < 6:
            moves.append(random_move(draw, moved.shape))
            moved = moves[-1](moved)
    axis = draw(st.integers(0, moved.ndim - 1), label="contracted axis")
    x = jax.random.normal(jax.random.key(4), (5, moved.shape[axis]))

    def fn(params, x):
        w = params["w"]
        for move in moves:
            w = move(w)
        return jnp.tensordot(x, w, axes=(1, axis))

    check(fn, params, x)


@pytest.mark.slow
@SETTINGS
@given(data=st.data())
def test_random_scans(data):
    draw = data.draw
    length, dim = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    roles = draw(st.permutations(["in", "out"]))
    stacked = draw(st.booleans(), label="stacked")
    shape = (length, dim, dim) if stacked else (dim, dim)
    roles = ("stack", *roles) if stacked else tuple(roles)
    params = adapted_weight(shape, roles, seed=5)
    reverse, transpose = draw(st.booleans()), draw(st.booleans())
    rematerialise, collect = draw(st.booleans()), draw(st.booleans())
    x = jax.random.normal(jax.random.key(6), (3, dim))

    def fn(params, x):
        def body(carry, w):
            w = params["w"] if w is None else w
            carry = jnp.tanh(carry @ (w.T if transpose else w))
            return carry, carry if collect else None

        body = jax.checkpoint(body) if rematerialise else body
        xs = params["w"] if stacked else None
        last, all_of_them = jax.lax.scan(body, x, xs, length=length, reverse=reverse)
        return all_of_them if collect else last

    check(fn, params, x, on_unsupported="error", compiled=True)
