import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from laws import arrays_of_size, assert_adapted_equals_dense, randomise

import jlora

D_IN, D_OUT, RANK, LAYERS = 12, 20, 2, 3


def make_params(getkey, shape=(D_IN, D_OUT), roles=("in", "out"), dtype=jnp.float32):
    w = jax.random.normal(getkey(), shape, dtype)
    config = jlora.LoraConfig(rank=RANK, alpha=3, targets=("w",), axes={"w": roles})
    return randomise(jlora.init(getkey(), {"w": w}, config), getkey())


STACKED = ((LAYERS, D_IN, D_IN), ("stack", "in", "out"))
USES = {
    "right": (lambda p, x: x @ p["w"], ((D_IN, D_OUT), ("in", "out"))),
    "left": (lambda p, x: (p["w"] @ x.T).T, ((D_OUT, D_IN), ("out", "in"))),
    "transposed": (lambda p, x: x @ p["w"].T, ((D_OUT, D_IN), ("out", "in"))),
    "cast": (
        lambda p, x: (x.astype("bfloat16") @ p["w"].astype("bfloat16")).astype("float32"),
        ((D_IN, D_OUT), ("in", "out")),
    ),
    "scaled": (lambda p, x: x @ (p["w"] * 2 / 3.0), ((D_IN, D_OUT), ("in", "out"))),
    "negated": (lambda p, x: x @ -p["w"], ((D_IN, D_OUT), ("in", "out"))),
    "einsum": (
        lambda p, x: jnp.einsum("bd,dhk->hbk", x, p["w"]),
        ((D_IN, 4, 5), ("in", "out", "out")),
    ),
    "two contracted axes": (
        lambda p, x: jnp.einsum("bhk,hkd->bd", x.reshape(-1, 3, 4), p["w"]),
        ((3, 4, D_OUT), ("in", "in", "out")),
    ),
    "reshaped": (
        lambda p, x: x @ p["w"].reshape(D_IN, 20),
        ((D_IN, 4, 5), ("in", "out", "out")),
    ),
    "split output": (
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(D_IN, 4, 5)),
        ((D_IN, D_OUT), ("in", "out")),
    ),
    "sliced output": (
        lambda p, x: jnp.concatenate([x @ p["w"][:, :8], jnp.tanh(x @ p["w"][:, 8:])], -1),
        ((D_IN, D_OUT), ("in", "out")),
    ),
    "sliced input": (
        lambda p, x: x[:, :4] @ p["w"][:4] + x[:, 4:] @ p["w"][4:],
        ((D_IN, D_OUT), ("in", "out")),
    ),
    "batched": (
        lambda p, x: jnp.einsum("ebd,edf->bef", jnp.stack([x] * LAYERS), p["w"]),
        ((LAYERS, D_IN, D_OUT), ("stack", "in", "out")),
    ),
    "every expert": (
        lambda p, x: jnp.einsum("bd,edf->bef", x, p["w"]),
        ((LAYERS, D_IN, D_OUT), ("stack", "in", "out")),
    ),
    "one of a stack": (lambda p, x: x @ p["w"][1], STACKED),
    "scanned": (
        lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0],
        STACKED,
    ),
    "scanned backwards and unrolled": (
        lambda p, x: jax.lax.scan(
            lambda c, w: (jnp.tanh(c @ w), c), x, p["w"], reverse=True, unroll=2
        ),
        STACKED,
    ),
    "constant of a scan": (
        lambda p, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, length=3)[0],
        ((D_IN, D_IN), ("in", "out")),
    ),
    "indexed in a loop": (
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"][i]), x),
        STACKED,
    ),
    "checkpointed": (
        lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["w"], x),
        ((D_IN, D_OUT), ("in", "out")),
    ),
    "checkpointed scan": (
        lambda p, x: jax.lax.scan(
            jax.checkpoint(
                lambda c, w: (jnp.tanh(c @ w), None),
                policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            ),
            x,
            p["w"],
        )[0],
        STACKED,
    ),
    "jitted": (lambda p, x: jax.jit(jnp.matmul)(x, p["w"]), ((D_IN, D_OUT), ("in", "out"))),
    "returned by a jitted function": (
        lambda p, x: x @ jax.jit(jnp.transpose)(p["w"]),
        ((D_OUT, D_IN), ("out", "in")),
    ),
    "a branch": (
        lambda p, x: jax.lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: -x @ p["w"], x),
        ((D_IN, D_OUT), ("in", "out")),
    ),
    "stopped gradient": (
        lambda p, x: x @ p["w"] + x @ jax.lax.stop_gradient(p["w"]),
        ((D_IN, D_OUT), ("in", "out")),
    ),
    "barrier": (
        lambda p, x: (lambda w, x: x @ w)(*jax.lax.optimization_barrier((p["w"], x))),
        ((D_IN, D_OUT), ("in", "out")),
    ),
    "collected by a scan": (
        lambda p, x: jax.lax.scan(
            lambda c, w: (jnp.tanh(c @ jax.lax.scan(lambda _, v: (0, v), 0, p["w"])[1][1]), None),
            x,
            p["w"],
        )[0],
        STACKED,
    ),
    "cut in three": (
        lambda p, x: (
            sum(jnp.tanh(x @ w) for w in jnp.split(p["w"], [4, 9], axis=1)[:1])
            + jnp.split(x @ p["w"], 5, axis=1)[2]
        ),
        ((D_IN, 20), ("in", "out")),
    ),
    "unpacked": (
        lambda p, x: jnp.tanh(x @ jnp.unstack(p["w"])[1]) @ list(p["w"])[2],
        STACKED,
    ),
    "reversed": (
        lambda p, x: x[:, ::-1] @ p["w"][::-1, ::-1],
        ((D_IN, D_OUT), ("in", "out")),
    ),
    "named": (
        lambda p, x: x @ checkpoint_name(p["w"], "w"),
        ((D_IN, D_OUT), ("in", "out")),
    ),
    "expanded and squeezed": (
        lambda p, x: x @ jnp.squeeze(jnp.expand_dims(p["w"], 1), 1),
        ((D_IN, D_OUT), ("in", "out")),
    ),
}


@pytest.mark.parametrize("use", USES)
def test_adapted_equals_dense_without_a_dense_temporary(use, getkey):
    fn, (shape, roles) = USES[use]
    params = make_params(getkey, shape, roles)
    x = jax.random.normal(getkey(), (7, D_IN))
    rtol = 2e-2 if use == "cast" else 1e-5  # bfloat16 rounds the dense weight, too
    assert_adapted_equals_dense(fn, params, x, rtol=rtol, on_unsupported="error")


@pytest.mark.parametrize(
    "use", ["right", "left", "transposed", "einsum", "scanned", "checkpointed"]
)
def test_no_array_of_the_weights_size_is_built(use, getkey):
    fn, (shape, roles) = USES[use]
    big = tuple(16 * size if role != "stack" else size for size, role in zip(shape, roles))
    big = big if use != "einsum" else (16 * D_IN, 4, 5 * 16)
    params = make_params(getkey, big, roles)
    x = jax.random.normal(getkey(), (2, 16 * D_IN))
    forward = jlora.adapt(fn)
    config = jlora.LoraConfig(targets=("w",))
    trainable, frozen = jlora.split(params, config)

    def loss(trainable, x):
        return jnp.sum(forward(jlora.combine(trainable, frozen), x) ** 2)

    layer = int(np.prod([size for size, role in zip(big, roles) if role != "stack"]))
    built = arrays_of_size(jax.grad(loss, (0, 1)), trainable, x, size=layer)
    # The base's own program may move its weight (a transpose); the adapter adds nothing to that.
    w = frozen["w"].w
    base = jax.grad(lambda x: jnp.sum(fn({"w": w}, x) ** 2))
    assert built == arrays_of_size(base, x, size=layer)
    # The checker is not blind: merging first does build the dense update.
    dense = arrays_of_size(lambda p, x: fn(jlora.merge_params(p), x), params, x, size=layer)
    assert "dot_general" in dense


def test_an_embedding_and_its_tied_head_share_one_adapter(getkey):
    def tied(params, tokens):
        return jnp.take(params["w"], tokens, axis=0) @ params["w"].T

    params = make_params(getkey, (50, 8))
    tokens = jnp.array([[1, 2, 3], [49, 0, 1]])
    assert_adapted_equals_dense(tied, params, tokens, on_unsupported="error")
    built = arrays_of_size(jlora.adapt(tied), params, tokens, size=50 * 8)
    assert built == ["transpose"]  # the base's own


@pytest.mark.parametrize("mode", ["clip", "fill", "wrap"])
def test_rows_out_of_bounds_are_those_of_the_dense_table(mode, getkey):
    params = make_params(getkey, (50, 8))
    tokens = jnp.array([3, 60, -1])

    def rows(params, tokens):
        return jnp.take(params["w"], tokens, axis=0, mode=mode)

    np.testing.assert_allclose(
        jlora.adapt(rows, on_unsupported="error")(params, tokens),
        rows(jlora.merge_params(params), tokens),
        rtol=1e-5,
        atol=1e-5,
    )


OTHER_USES = {
    "softmax": lambda p, x: x @ jax.nn.softmax(p["w"], axis=0),
    "square": lambda p, x: x @ p["w"] + jnp.mean(p["w"] ** 2),
    "sorted": lambda p, x: x @ jnp.sort(p["w"], axis=0),
    "carried": lambda p, x: x @ jax.lax.fori_loop(0, 3, lambda i, w: 2 * w, p["w"]),
    "masked": lambda p, x: x @ jnp.where(p["w"] > 0, p["w"], 0),
    "returned": lambda p, x: (x @ p["w"], p["w"]),
}


@pytest.mark.parametrize("use", OTHER_USES)
def test_any_other_use_builds_the_exact_dense_weight_and_warns(use, getkey):
    params, x = make_params(getkey), jax.random.normal(getkey(), (7, D_IN))
    fn = OTHER_USES[use]
    with pytest.warns(UserWarning, match="'w' of shape"):
        assert_adapted_equals_dense(fn, params, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_adapted_equals_dense(fn, params, x, on_unsupported="allow")
    with pytest.raises(NotImplementedError, match="'w'"):
        jlora.adapt(fn, on_unsupported="error")(params, x)


def test_a_custom_gradient_is_kept(getkey):
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda saved, g: (7 * g @ saved[1].T, saved[0].T @ g)
    )
    params, x = make_params(getkey), jax.random.normal(getkey(), (7, D_IN))
    with pytest.warns(UserWarning, match="custom_vjp_call"):
        assert_adapted_equals_dense(lambda p, x: product(x, p["w"]), params, x)


def test_a_warning_comes_once(getkey):
    params = make_params(getkey)
    forward = jlora.adapt(lambda p, x: x @ jnp.sort(jnp.sort(p["w"])))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (1, 2, 3):
            forward(params, jnp.ones((length, D_IN)))
    assert len(caught) == 1


def test_dead_code_does_not_warn(getkey):
    def fn(p, x):
        jnp.sort(p["w"])
        return x @ p["w"]

    jlora.adapt(fn, on_unsupported="error")(make_params(getkey), jnp.ones((2, D_IN)))


def test_an_eager_loop_traces_once(getkey):
    traces = []

    def fn(p, x):
        traces.append(1)
        return x @ p["w"]

    forward, params = jlora.adapt(fn), make_params(getkey)
    for step in range(3):
        forward(params, jnp.full((2, D_IN), step))
        jax.grad(lambda x: forward(params, x).sum())(jnp.full((2, D_IN), float(step)))
    assert len(traces) <= 2  # once eagerly, once under grad


def test_flags_reach_the_function_as_they_are(getkey):
    def fn(params, x, *, double=False, name="", activation=jnp.tanh):
        out = activation(x @ params["w"])
        return {"y": 2 * out if double else out, "name": name, "n": 3}

    params, x = make_params(getkey), jnp.ones((2, D_IN))
    out = jlora.adapt(fn)(params, x, double=True, name="hello", activation=jnp.sin)
    assert out["name"] == "hello"
    assert out["n"] == 3
    wanted = fn(jlora.merge_params(params), x, double=True, activation=jnp.sin)["y"]
    np.testing.assert_allclose(out["y"], wanted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(jlora.adapt(fn)(params, x, double=1)["y"], out["y"])


def test_a_captured_weight_is_pointed_out(getkey):
    params = make_params(getkey)
    captured = jnp.ones((D_IN, D_OUT))
    with pytest.warns(UserWarning, match="closure"):
        jlora.adapt(lambda params, x: x @ captured)(params, jnp.ones((2, D_IN)))


def test_it_composes_with_vmap_over_data_and_over_adapters(getkey):
    params = make_params(getkey)
    x = jax.random.normal(getkey(), (3, 5, D_IN))
    forward = jlora.adapt(lambda p, x: jnp.tanh(x @ p["w"]), on_unsupported="error")
    over_data = jax.vmap(forward, (None, 0))(params, x)
    np.testing.assert_allclose(over_data, forward(params, x), rtol=1e-5, atol=1e-6)
    leaf = params["w"]
    many = {"w": jlora.LoraArray(leaf.w, jnp.stack([leaf.a, 2 * leaf.a]), jnp.stack([leaf.b] * 2),
                                 scaling=leaf.scaling)}  # fmt: skip
    axes = {"w": jlora.LoraArray(None, 0, 0, scaling=leaf.scaling)}
    over_adapters = jax.vmap(forward, (axes, None))(many, x)
    np.testing.assert_allclose(over_adapters[0], forward(params, x), rtol=1e-5, atol=1e-6)


def test_a_linen_decoder_is_left_bit_equal_by_fresh_adapters(getkey):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
            return x + nn.Dense(16, name="down")(nn.silu(nn.Dense(32, name="up")(h))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(40, 16, name="embed")
            x = embed(tokens)
            blocks = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = blocks(name="layers")(x, None)
            return embed.attend(x)

    model, tokens = Model(), jnp.arange(10).reshape(2, 5)
    params = model.init(getkey(), tokens)
    config = jlora.LoraConfig(rank=2, targets=("all-linear", "embed"))
    adapted = jlora.init(getkey(), params, config, fn=model.apply, args=(tokens,))
    forward = jlora.adapt(model.apply, on_unsupported="error")
    base = jax.jit(model.apply)(params, tokens)
    np.testing.assert_array_equal(forward(adapted, tokens), base)
    np.testing.assert_array_equal(jax.jit(forward)(adapted, tokens), base)
    assert_adapted_equals_dense(
        model.apply, randomise(adapted, getkey(), scale=0.01), tokens, rtol=1e-4
    )


def dropped_update(fn, w, x, key, rate=0.5):
    """What dropout leaves of the low-rank branch alone: the base weight is zero."""
    config = jlora.LoraConfig(rank=RANK, targets=("w",), dropout=rate)
    params = {"w": jnp.zeros_like(w)}
    adapted = randomise(jlora.init(jax.random.key(1), params, config, fn=fn, args=(x,)), key)
    return adapted, jlora.adapt(fn, dropout_key=key, on_unsupported="error")(adapted, x)


def test_dropout_zeroes_inputs_of_the_low_rank_branch_and_keeps_its_mean(getkey):
    def fn(p, x):
        return x @ p["w"]

    x = jnp.ones((20_000, D_IN))
    adapted, dropped = dropped_update(fn, jnp.ones((D_IN, D_OUT)), x, getkey(), rate=0.25)
    wanted = jlora.adapt(fn)(adapted, x)
    assert not np.allclose(dropped, wanted)
    spread = np.std(np.asarray(dropped), axis=0) / len(x) ** 0.5
    assert np.all(np.abs(np.mean(dropped, axis=0) - wanted[0]) < 5 * spread)
    masks = np.unique(np.asarray(dropped).round(4), axis=0)
    assert len(masks) > 100  # rows lose different inputs


def test_dropout_differs_by_layer_leaf_and_key_and_is_reproducible(getkey):
    def fn(p, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]

    w, x, key = jnp.ones((3, D_IN, D_IN)), jnp.ones((4, D_IN)), getkey()
    _, first = dropped_update(fn, w, x, key)
    adapted, again = dropped_update(fn, w, x, key)
    np.testing.assert_array_equal(first, again)
    same_layers = jlora.LoraArray(
        adapted["w"].w, *(jnp.stack([f[0]] * 3) for f in (adapted["w"].a, adapted["w"].b)),
        scaling=2.0, axes=adapted["w"].axes, dropout=0.5,
    )  # fmt: skip
    layers = jlora.adapt(fn, dropout_key=key)({"w": same_layers}, x)
    assert not np.allclose(layers[0], layers[1])
    other_key = jlora.adapt(fn, dropout_key=getkey())({"w": same_layers}, x)
    assert not np.allclose(layers, other_key)
    twins = {"w": same_layers, "v": same_layers}
    both = jlora.adapt(lambda p, x: (fn(p, x), fn({"w": p["v"]}, x)), dropout_key=key)(twins, x)
    assert not np.allclose(*both)


def test_dropout_is_the_same_on_a_mesh(getkey):
    def fn(p, x):
        return x @ p["w"]

    key, x = getkey(), jax.random.normal(getkey(), (8, D_IN))
    adapted, wanted = dropped_update(fn, jnp.ones((D_IN, D_OUT)), x, key)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    got = jlora.adapt(fn, dropout_key=key)(adapted, placed)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use", ["right", "left", "einsum", "batched", "scanned", "checkpointed"])
def test_in_float64_adapted_equals_dense_to_twelve_digits(use, getkey):
    fn, (shape, roles) = USES[use]
    with jax.enable_x64(True):
        config = jlora.LoraConfig(rank=RANK, targets=("w",), axes={"w": roles}, dtype="float64")
        w = jax.random.normal(getkey(), shape, jnp.float64)
        params = randomise(jlora.init(getkey(), {"w": w}, config), getkey())
        x = jax.random.normal(getkey(), (7, D_IN), jnp.float64)
        assert_adapted_equals_dense(fn, params, x, rtol=1e-12, on_unsupported="error")


def test_the_step_costs_no_more_than_the_base_and_the_factors_own_products(getkey):
    tokens, d, rank, layers = 64, 128, 4, 3

    def fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    weights = [jax.random.normal(getkey(), (d, d)) / d**0.5 for _ in range(layers)]
    config = jlora.LoraConfig(rank=rank, targets=("0", "1", "2"))
    trainable, frozen = jlora.split(jlora.init(getkey(), weights, config), config)
    forward, x = jlora.adapt(fn), jax.random.normal(getkey(), (tokens, d))

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    def adapted_loss(trainable, x):
        return jnp.sum(forward(jlora.combine(trainable, frozen), x))

    base = flops(jax.grad(lambda x: jnp.sum(fn(weights, x))), x)
    adapted = flops(jax.grad(adapted_loss, (0, 1)), trainable, x)
    # Forward two products, backward four: 2 * tokens * rank * d each. Scaling and adding: a few
    # operations on each activation.
    factors = layers * (6 * 2 * tokens * rank * d + 6 * tokens * (d + rank))
    assert adapted - base <= factors
    assert adapted - base > factors / 3  # the factors' products are there


def test_tracing_a_decoder_costs_at_most_two_and_a_half_times_the_plain_function(getkey):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.RMSNorm()(x)
            q, k, v = (nn.DenseGeneral((2, 8), use_bias=False, name=n)(h) for n in "qkv")
            h = nn.dot_product_attention(q, k, v)
            x = x + nn.DenseGeneral(16, axis=(-2, -1), use_bias=False, name="o")(h)
            h = nn.RMSNorm()(x)
            gate, up = (nn.Dense(32, use_bias=False, name=n)(h) for n in ("gate", "up"))
            return x + nn.Dense(16, use_bias=False, name="down")(nn.silu(gate) * up)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(40, 16, name="embed")
            x = embed(tokens)
            for i in range(12):
                x = Block(name=f"layers_{i}")(x)
            return embed.attend(nn.RMSNorm()(x))

    model, tokens = Model(), jnp.arange(10).reshape(2, 5)
    params = model.init(getkey(), tokens)
    names = ("q", "k", "v", "o", "gate", "up", "down", "embed")
    config = jlora.LoraConfig(rank=2, targets=names)
    adapted = jlora.init(getkey(), params, config, fn=model.apply, args=(tokens,))

    def seconds_to_trace(make_fn, params):
        start = time.process_time()  # of this process: other work on the machine does not count
        jax.jit(make_fn()).trace(params, tokens)
        return time.process_time() - start

    def plain():
        return lambda params, tokens: model.apply(params, tokens)

    def through_adapt():
        return lambda params, tokens: jlora.adapt(plain())(params, tokens)

    rounds = [
        (seconds_to_trace(plain, params), seconds_to_trace(through_adapt, adapted))
        for _ in range(6)
    ]
    base, ours = (min(times) for times in zip(*rounds))
    assert ours <= 2.5 * base


def test_tracing_enters_the_function_once_and_each_jitted_part_once(getkey):
    entered = []

    @jax.jit
    def layer(w, x):
        entered.append(1)
        return jnp.tanh(x @ w)

    params = make_params(getkey, (D_IN, D_IN))
    jlora.adapt(lambda p, x: layer(p["w"], layer(p["w"], x)))(params, jnp.ones((2, D_IN)))
    assert len(entered) == 1


EMBEDDINGS = {
    "vmapped": lambda p, t: jax.vmap(lambda i: p["w"][i])(t),
    "scanned": lambda p, t: jax.lax.scan(lambda c, i: (c, p["w"][i]), 0, t)[1],
    "filled": lambda p, t: jnp.take(p["w"], t, axis=0, mode="fill", fill_value=5.0),
    "two axes at once": lambda p, t: p["w"][t % 50, t % 8],
}


@pytest.mark.parametrize("use", EMBEDDINGS)
def test_rows_of_a_table_come_from_rows_of_the_factors(use, getkey):
    params, tokens = make_params(getkey, (50, 8)), jnp.array([3, 60, 1])
    assert_adapted_equals_dense(EMBEDDINGS[use], params, tokens, on_unsupported="error")


def test_the_gradient_of_a_lookup_out_of_bounds_is_finite(getkey):
    params, tokens = make_params(getkey, (50, 8)), jnp.array([1, 2, 60])

    def masked(p, t):
        return jnp.where((t < 50)[:, None], jnp.take(p["w"], t, axis=0), 0)

    assert_adapted_equals_dense(masked, params, tokens, on_unsupported="error")


def test_a_cast_to_float8_is_that_of_the_sum(getkey):
    params, x = make_params(getkey), jnp.ones((2, D_IN))

    def fn(p, x):
        return x @ p["w"].astype(jnp.float8_e4m3fn).astype(jnp.float32)

    assert_adapted_equals_dense(fn, params, x, on_unsupported="allow", gradients=False)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_a_captured_weight_is_pointed_out_through_nested_functions(wrap, getkey):
    params, captured = make_params(getkey), jnp.ones((D_IN, D_OUT))
    fn = wrap(lambda params, x: x @ captured)
    with pytest.warns(UserWarning, match="closure"):
        jlora.adapt(fn)(params, jnp.ones((2, D_IN)))
    assert "no effect" in str(jlora.explain(fn, params, jnp.ones((2, D_IN))))


def test_half_a_tree_says_what_is_missing(getkey):
    params = make_params(getkey)
    for half in jlora.split(params, jlora.LoraConfig(targets=("w",))):
        with pytest.raises(ValueError, match=r"jlora\.combine"):
            jlora.adapt(lambda p, x: x @ p["w"])(half, jnp.ones((2, D_IN)))


def test_adapt_works_inside_a_shard_map_of_the_users(getkey):
    mesh = jax.make_mesh((4,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = make_params(getkey), jax.random.normal(getkey(), (2, D_IN))
    leaf, spec = params["w"], jax.P("t", None)
    specs = {"w": jlora.LoraArray(spec, spec, jax.P(), scaling=leaf.scaling)}
    run = jax.shard_map(
        jlora.adapt(lambda p, x: jax.lax.psum(x @ p["w"], "t"), on_unsupported="error"),
        mesh=mesh,
        in_specs=(specs, jax.P(None, "t")),
        out_specs=jax.P(),
    )
    np.testing.assert_allclose(run(params, x), x @ jlora.merge_params(leaf), rtol=1e-4, atol=1e-5)


def test_dropout_differs_between_uses_of_one_stack(getkey):
    w, x, key = jnp.ones((D_IN, D_IN)), jnp.ones((4, D_IN)), getkey()
    _, (first, second) = dropped_update(lambda p, x: (x @ p["w"], x @ p["w"]), w, x, key)
    assert not np.allclose(first, second)
