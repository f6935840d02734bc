"""Functions on quantised weights, with and without adapters, against the dequantised ones."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from laws import arrays_of_size, assert_close, randomise
from test_interpret import OTHER_USES, USES

import jlora
from jlora.quant import QuantArray

FORMATS = {
    "nf4": ("nf4", {}),
    "nf4 without double quantisation": ("nf4", {"double_quantize": False}),
    "int8": ("int8", {}),
    "float8": ("float8", {}),
}


def quantised(w, roles, fmt="nf4"):
    fmt, options = FORMATS[fmt]
    return jlora.quantize({"w": w}, fmt, targets=("w",), axes={"w": roles}, **options)


def with_adapters(params, roles, key):
    config = jlora.LoraConfig(rank=2, alpha=3, targets=("w",), axes={"w": roles})
    return randomise(jlora.init(key, params, config), key), config


def outputs_and_gradients(fn, alone, adapted, config, args):
    """Of the weight alone and under an adapter; gradients of the factors and, if any, of args."""
    trainable, frozen = jlora.split(adapted, config)
    floating = all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in args)

    def loss(trainable, args, alone, frozen):
        outs = [fn(alone, *args), fn(jlora.combine(trainable, frozen), *args)]
        total = sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(outs))
        return total, outs

    with_respect_to = (0, 1) if floating and args else 0
    grads, outs = jax.jit(jax.grad(loss, with_respect_to, has_aux=True))(
        trainable, args, alone, frozen
    )
    return outs, grads


def check(fn, shape, roles, *args, fmt="nf4", rtol=1e-5, dtype=jnp.float32):
    """A quantised weight, alone and as the base of an adapter, is what it stands for."""
    key = jax.random.key(3)
    alone = quantised(jax.random.normal(key, shape, dtype), roles, fmt)
    assert isinstance(alone["w"], QuantArray)
    assert (alone["w"].shape, alone["w"].dtype) == (shape, dtype)
    adapted, config = with_adapters(alone, roles, key)
    forward = jlora.adapt(fn, on_unsupported="error")
    got = outputs_and_gradients(forward, alone, adapted, config, args)
    dense = jlora.dequantize(alone), jlora.dequantize(adapted)
    wanted = outputs_and_gradients(forward, *dense, config, args)
    assert_close(got, wanted, rtol)


X = jax.random.normal(jax.random.key(9), (7, 12))


@pytest.mark.parametrize("use", USES)
def test_every_use_gives_what_the_dequantised_weight_gives(use):
    fn, (shape, roles) = USES[use]
    check(fn, shape, roles, X, rtol=2e-2 if use == "cast" else 1e-5)


FEW = ["right", "transposed", "einsum", "two contracted axes", "one of a stack", "scanned"]


@pytest.mark.parametrize("fmt", list(FORMATS)[1:])
@pytest.mark.parametrize("use", FEW)
def test_every_format_is_used_alike(use, fmt):
    fn, (shape, roles) = USES[use]
    check(fn, shape, roles, X, fmt=fmt)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def sharded_product(spec_of_w, spec_of_x, spec_of_out, reduce=False):
    """A product under shard_map over all devices, its weight cut by `spec_of_w`."""

    def fn(params, x):
        def product(w, x):
            out = x @ w
            return jax.lax.psum(out, "rows") if reduce else out

        return jax.shard_map(
            product,
            mesh=jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,)),
            in_specs=(spec_of_w, spec_of_x),
            out_specs=spec_of_out,
        )(params["w"], x)

    return fn


def experts_in_layers(params, x):
    """Ragged products with the experts of each layer, under a scan over layers."""

    def layer(x, w):
        return jnp.tanh(jax.lax.ragged_dot(x, w, jnp.array([2, 0, 5]))), None

    return jax.lax.scan(layer, x, params["w"])[0]


MORE_USES = {
    "whole blocks": (lambda p, x: x @ p["w"], (128, 24), ("in", "out"), normal(3, 128)),
    "a traced scale": (
        lambda p, x, s: x @ (p["w"] * s) - x @ (p["w"] / s),
        (12, 8),
        ("in", "out"),
        normal(3, 12),
        jnp.float32(1.7),
    ),
    "a traced scale of a stack": (
        lambda p, x, s: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"] * s)[0],
        (3, 12, 12),
        ("stack", "in", "out"),
        normal(3, 12),
        jnp.float32(1.7),
    ),
    "layers of experts": (
        lambda p, x: jax.lax.scan(
            lambda c, w: (jnp.tanh(jnp.einsum("ebd,edf->ebf", c, w)), None), x, p["w"]
        )[0],
        (2, 3, 12, 12),
        ("stack", "stack", "in", "out"),
        normal(3, 5, 12),
    ),
    "ragged experts": (experts_in_layers, (2, 3, 12, 12), ("stack", "stack", "in", "out"),
                       normal(7, 12)),
    "experts picked by index": (
        lambda p, x: jnp.einsum("bd,bdf->bf", x, p["w"][jnp.array([2, 0, 2, 1])]),
        (3, 12, 20),
        ("stack", "in", "out"),
        normal(4, 12),
    ),
    "some layers": (
        lambda p, x: jax.lax.scan(
            lambda c, w: (jnp.tanh(c @ w), None), x, jax.lax.dynamic_slice_in_dim(p["w"], 1, 2)
        )[0] + x @ p["w"][::2][1],
        (4, 12, 12),
        ("stack", "in", "out"),
        normal(3, 12),
    ),
    "convolution": (
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"], (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (3, 3, 4, 10),
        ("in", "in", "in", "out"),
        normal(2, 5, 6, 4),
    ),
    "depthwise convolution": (
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=4
        ),
        (3, 1, 8),
        ("in", "in", "out"),
        normal(2, 5, 4),
    ),
    "vmapped over data": (
        lambda p, x: jax.vmap(lambda x: jnp.tanh(p["w"] @ x))(x),
        (20, 12),
        ("out", "in"),
        normal(4, 12),
    ),
    "vmapped over a stack": (
        lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]),
        (3, 12, 20),
        ("stack", "in", "out"),
        normal(3, 5, 12),
    ),
    "a while loop": (
        lambda p, x: jax.lax.stop_gradient(jax.lax.while_loop(
            lambda state: state[0] < 3, lambda state: (state[0] + 1, jnp.tanh(state[1] @ p["w"])),
            (0, x),
        )[1]) + x @ p["w"],
        (12, 12),
        ("in", "out"),
        normal(4, 12),
    ),
    "tangents": (
        lambda p, x: jax.jvp(lambda x: jnp.tanh(x @ p["w"]), (x,), (jnp.sin(x),))[1],
        (12, 20),
        ("in", "out"),
        normal(4, 12),
    ),
    "gradients inside": (
        lambda p, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x),
        (12, 20),
        ("in", "out"),
        normal(4, 12),
    ),
    "columns over devices": (
        sharded_product(P(None, "rows"), P(), P(None, "rows")), (128, 24), ("in", "out"),
        normal(4, 128),
    ),
    "contracted axis over devices": (
        sharded_product(P("rows", None), P(None, "rows"), P(), reduce=True), (512, 24),
        ("in", "out"), normal(4, 512),
    ),
    "whole on each device": (
        sharded_product(P(), P("rows"), P("rows")), (100, 24), ("in", "out"), normal(8, 100),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("use", MORE_USES)
def test_further_uses_give_what_the_dequantised_weight_gives(use):
    fn, shape, roles, *args = MORE_USES[use]
    check(fn, shape, roles, *args)


@pytest.mark.parametrize("fmt", ["int8", "nf4 without double quantisation"])
@pytest.mark.parametrize("use", ["ragged experts", "columns over devices", "convolution"])
def test_further_uses_of_other_formats(use, fmt):
    fn, shape, roles, *args = MORE_USES[use]
    check(fn, shape, roles, *args, fmt=fmt)


@pytest.mark.parametrize("shape", [(4, 30, 64), (4, 30, 5), (1, 1, 1), (2, 64, 129)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_sizes_that_blocks_do_not_divide(shape, fmt):
    roles = ("stack", "out", "in")
    w = normal(*shape)
    leaf = quantised(w, roles, fmt)["w"]
    restored = jlora.dequantize(leaf)
    assert (leaf.shape, restored.shape) == (shape, shape)
    limit = {"int8": 0.004, "float8": 0.07}.get(fmt, 0.16)
    assert np.all(np.abs(restored - w) <= limit * np.abs(w).max(-1, keepdims=True))
    x = normal(3, shape[-1], seed=1)
    got = jlora.adapt(lambda w, x: jnp.einsum("bi,soi->sbo", x, w), on_unsupported="error")(leaf, x)
    np.testing.assert_allclose(got, jnp.einsum("bi,soi->sbo", x, restored), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_products_are_computed_in_the_weights_dtype(dtype):
    params = quantised(normal(64, 24).astype(dtype), ("in", "out"))
    x = normal(5, 64).astype(dtype)
    out = jlora.adapt(lambda p, x: x @ p["w"])(params, x)
    assert out.dtype == dtype
    wanted = jax.jit(jnp.matmul)(x, jlora.dequantize(params)["w"])
    assert_close(out, wanted, rtol=4 * jnp.finfo(dtype).eps)


def table_of(rows, columns, fmt="nf4"):
    """A table whose rows are looked up: blocks run along them."""
    return quantised(normal(rows, columns), ("out", "in"), fmt)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds", None])
def test_rows_are_looked_up_as_in_the_dense_table(mode, fmt):
    params = table_of(30, 72, fmt)
    outside = [] if mode == "promise_in_bounds" else [[60, -1, -31, 2]]
    tokens = jnp.array([[0, 29, 3, 7], *outside])

    def rows(params, tokens):
        return params["w"].at[tokens].get(mode=mode) * 2

    got = jlora.adapt(rows, on_unsupported="error")(params, tokens)
    np.testing.assert_array_equal(got, rows(jlora.dequantize(params), tokens))


def test_a_lookup_unpacks_the_rows_alone():
    params, tokens = table_of(5000, 64), jnp.array([3, 4999])
    forward = jlora.adapt(lambda p, t: jnp.take(p["w"], t, axis=0).astype(jnp.bfloat16))
    assert arrays_of_size(forward, params, tokens, size=5000 * 64 // 2) == []
    # The checker is not blind.
    assert arrays_of_size(lambda p, t: jlora.dequantize(p)["w"][t], params, tokens, size=5000 * 64)


def test_a_quantised_table_serves_as_its_tied_head():
    def tied(params, tokens):
        return jnp.tanh(params["w"][tokens]) @ params["w"].T

    def scaled_and_cast(params, tokens):
        x = params["w"].astype(jnp.bfloat16)[tokens] * jnp.bfloat16(8)
        return jnp.einsum("td,vd->tv", x, params["w"].astype(jnp.bfloat16)).astype(jnp.float32)

    tokens = jnp.array([3, 0, 29, -1])
    check(tied, (30, 64), ("out", "in"), tokens)
    check(scaled_and_cast, (30, 64), ("out", "in"), tokens, rtol=2e-2)


@pytest.mark.parametrize("use", OTHER_USES)
def test_any_other_use_builds_the_exact_dense_weight_and_warns(use):
    params = quantised(normal(12, 20), ("in", "out"))
    fn = OTHER_USES[use]
    with pytest.warns(UserWarning, match="'w' of shape"):
        got = jlora.adapt(fn)(params, X)
    assert_close(got, fn(jlora.dequantize(params), X), 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jlora.adapt(fn, on_unsupported="allow")(params, X)
    with pytest.raises(NotImplementedError, match="'w'"):
        jlora.adapt(fn, on_unsupported="error")(params, X)


def test_explain_says_what_becomes_of_quantised_leaves():
    params = {"w": quantised(normal(12, 20), ("in", "out"))["w"], "t": table_of(30, 12)["w"]}
    report = jlora.explain(lambda p, t: p["t"][t] @ p["w"], params, jnp.array([1, 2]))
    assert report.low_rank == {"w": ("dot_general",), "t": ("gather",)}
    assert not any(report.dense.values())
    assert "dequantised there" in str(report)
    masked = jlora.explain(lambda p, t: jnp.where(p["w"] > 0, p["w"], 0), params, jnp.array([1]))
    assert masked.dense["w"]


def test_a_leaf_outside_adapt_or_cut_by_split_says_what_to_do():
    params = quantised(normal(12, 20), ("in", "out"))
    with pytest.raises(TypeError, match=r"NF4Array.*jlora\.adapt"):
        jnp.matmul(X, params["w"])
    adapted, config = with_adapters(params, ("in", "out"), jax.random.key(0))
    trainable, _ = jlora.split(adapted, config)
    with pytest.raises(ValueError, match=r"jlora\.combine"):
        jlora.adapt(lambda p, x: x @ p["w"])(trainable, X)


CUT_INSIDE_BLOCKS = {
    "padded rows": ("bi,io->bo", (96, 24), ("in", "out"), P("rows")),
    "half a block each": ("bi,io->bo", (256, 24), ("in", "out"), P("rows")),
    "the second contracted axis": ("bij,ijo->bo", (4, 8, 24), ("in", "in", "out"), P(None, "rows")),
    "moved before": ("bi,oi->bo", (24, 512), ("out", "in"), P(None, "rows")),
}


@pytest.mark.parametrize("case", CUT_INSIDE_BLOCKS)
def test_what_a_shard_map_cuts_inside_blocks_is_built_dense(case):
    einsum, shape, roles, spec = CUT_INSIDE_BLOCKS[case]
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    inputs = P(None, "rows") if len(shape) == 2 else P(None, *spec)

    def fn(params, x):
        w = 2 * params["w"] if case == "moved before" else params["w"]
        return jax.shard_map(
            lambda w, x: jax.lax.psum(jnp.einsum(einsum, x, w), "rows"),
            mesh=mesh,
            in_specs=(spec, inputs),
            out_specs=P(),
        )(w, x)

    alone = quantised(normal(*shape), roles)
    x = normal(3, *(n for n, role in zip(shape, roles) if role == "in"))
    for params in (alone, with_adapters(alone, roles, jax.random.key(1))[0]):
        with pytest.warns(UserWarning, match="shard_map"):
            got = jlora.adapt(fn)(params, x)
        assert_close(got, jlora.adapt(fn)(jlora.dequantize(params), x), 1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8", "float8"])
def test_a_scan_outside_takes_the_stacked_axis(kind):
    weights = {"w": jax.random.normal(jax.random.key(1), (3, 64, 64)) / 8}
    x = jax.random.normal(jax.random.key(2), (5, 64))

    def layer(x, params):
        return jnp.tanh(x @ params["w"]), None

    def model(params, x):
        return jax.lax.scan(layer, x, params)

    packed = jlora.quantize(weights, kind, fn=model, args=(x,))
    config = jlora.LoraConfig(rank=2)
    for params in (packed, jlora.init(jax.random.key(3), packed, config, fn=model, args=(x,))):
        got, _ = jax.lax.scan(jlora.adapt(layer), x, params)
        wanted, _ = model(jlora.merge_params(params), x)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
        first = jlora.merge_params(jax.tree.map(lambda part: part[0], params))
        np.testing.assert_array_equal(first["w"], jlora.merge_params(params)["w"][0])


@pytest.mark.parametrize("shape", [(256, 256), (256, 1024), (1024, 256), (100, 400)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fresh_adapter_leaves_the_output_bit_equal(shape, dtype):
    params = quantised(normal(*shape).astype(dtype), ("in", "out"), "int8")
    config = jlora.LoraConfig(rank=8, targets=("w",), axes={"w": ("in", "out")})
    fresh = jlora.init(jax.random.key(0), params, config)
    forward = jlora.adapt(lambda p, x: x @ p["w"], on_unsupported="error")
    for rows in (1, 5):
        x = normal(rows, shape[0], seed=1).astype(dtype)
        np.testing.assert_array_equal(jax.jit(forward)(fresh, x), jax.jit(forward)(params, x))
        with jax.disable_jit():
            np.testing.assert_array_equal(forward(fresh, x), forward(params, x))
