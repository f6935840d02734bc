"""What other JAX LoRA libraries stop at, or skip without a word; each must work here.

The cases are those of lorax, qwix, quax, Keras and tunix as they behave on current JAX.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from laws import assert_adapted_equals_dense, is_lora, randomise

import jlora

DIM = 8
X = jax.random.normal(jax.random.key(5), (4, DIM))


def adapters_in(params):
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_lora) if is_lora(leaf)]


def adapt_all(fn, params, targets, *args):
    config = jlora.LoraConfig(rank=2, alpha=1, targets=targets)
    fresh = jlora.init(jax.random.key(1), params, config, fn=fn, args=args or (X,))
    return randomise(fresh, jax.random.key(2), scale=0.1)


def check(fn, params, targets, *args, rtol=1e-4, **options):
    adapted = adapt_all(fn, params, targets, *args)
    options = {"on_unsupported": "error", **options}
    assert_adapted_equals_dense(fn, adapted, *(args or (X,)), rtol=rtol, **options)
    return adapters_in(adapted)


# lorax


def test_a_stack_is_no_convolution_and_a_stacked_bias_no_matrix():
    params = {"w": jnp.ones((5, DIM, DIM)) / DIM, "b": jnp.ones((5, DIM))}

    def fn(params, x):
        def layer(x, p):
            return jnp.tanh(x @ p["w"] + p["b"]), None

        return jax.lax.scan(layer, x, params)[0]

    (leaf,) = check(fn, params, ("all-linear",))
    assert (leaf.a.shape, leaf.b.shape) == ((5, DIM, 2), (5, 2, DIM))


# qwix


def test_linen_einsum_with_a_raw_parameter():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (DIM, 2, 3))
            return nn.Einsum((2, 3, DIM), "...hk,hkd->...d")(jnp.einsum("bd,dhk->bhk", x, w))

    model = Model()
    assert len(check(model.apply, model.init(jax.random.key(0), X), ("all-linear",))) == 2


def test_nnx_scan_over_stacked_layers_with_remat():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(DIM, DIM, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.linear(x))

    make = nnx.vmap(lambda key: Block(nnx.Rngs(key)), in_axes=0, out_axes=0)
    graph, params = nnx.split(make(jax.random.split(jax.random.key(0), 3)))

    def fn(params, x):
        run = nnx.scan(
            nnx.remat(lambda block, x: block(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
        )
        return run(nnx.merge(graph, params), x)

    (leaf,) = check(fn, params, ("linear",))
    assert leaf.axes == ("stack", "in", "out")


def test_checkpoint_with_the_module_closed_over():
    graph, params, rest = nnx.split(nnx.Linear(DIM, DIM, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def fn(params, x):
        module = nnx.merge(graph, params, rest)
        return jax.checkpoint(lambda x: jnp.tanh(module(x)))(x)

    check(fn, params, ("kernel",))


def test_grouped_convolution():
    model = nn.Conv(12, (3, 3), feature_group_count=4)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, DIM))
    (leaf,) = check(model.apply, model.init(jax.random.key(1), x), ("kernel",), x)
    assert leaf.axes == ("in", "in", "in", "out")


def test_three_operand_einsum():
    params = {"w": jax.random.normal(jax.random.key(0), (DIM, 6))}

    def fn(params, x):
        return jnp.einsum("bd,df,b->bf", x, params["w"], jnp.arange(4.0))

    check(fn, params, ("w",))


def test_ragged_dot_of_experts():
    params = {"experts": jax.random.normal(jax.random.key(0), (3, DIM, 5))}
    sizes = jnp.array([1, 0, 3], jnp.int32)

    def fn(params, x, sizes):
        return jax.lax.ragged_dot(x, params["experts"], sizes)

    (leaf,) = check(fn, params, ("experts",), X, sizes)
    assert leaf.axes == ("stack", "in", "out")


def test_an_unadapted_checkpoint_takes_adapters():
    model = nn.Dense(5)
    check(model.apply, model.init(jax.random.key(0), X), ("kernel",))


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="No leaf matches target 'kernal'"):
        jlora.init(jax.random.key(0), {"kernel": X}, jlora.LoraConfig(rank=2, targets=("kernal",)))


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_embedding_lookup_and_tied_head(library):
    tokens = jnp.array([[0, 3, 1], [2, 2, 5]])
    if library == "linen":

        class Model(nn.Module):
            @nn.compact
            def __call__(self, tokens):
                embed = nn.Embed(7, DIM, name="embed")
                return embed.attend(jnp.tanh(embed(tokens)))

        fn, params = Model().apply, Model().init(jax.random.key(0), tokens)
    else:
        graph, params = nnx.split(nnx.Embed(7, DIM, rngs=nnx.Rngs(0)))

        def fn(params, tokens):
            embed = nnx.merge(graph, params)
            return embed.attend(jnp.tanh(embed(tokens)))

    (leaf,) = check(fn, params, ("embedding",), tokens)
    assert leaf.axes == ("in", "out")


SILENT = {
    "left operand of einsum": lambda p, x: jnp.einsum("fd,bd->bf", p["w"], x),
    "transposed": lambda p, x: x @ p["w"].T,
    "doubled": lambda p, x: x @ (p["w"].T * 2),
    "cast": lambda p, x: x @ p["w"].T.astype(jnp.float32),
}


@pytest.mark.parametrize("use", SILENT)
def test_uses_that_others_skip_silently(use):
    check(SILENT[use], {"w": jax.random.normal(jax.random.key(0), (5, DIM))}, ("w",))


def test_a_weight_inside_a_custom_vjp():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (3 * g @ r[1].T, r[0].T @ g))
    params = {"w": jax.random.normal(jax.random.key(0), (DIM, 5))}
    config = jlora.LoraConfig(rank=2, targets=("w",))
    leaf = randomise(jlora.init(jax.random.key(1), params, config), jax.random.key(2))
    with pytest.warns(UserWarning, match="custom_vjp"):
        assert_adapted_equals_dense(lambda p, x: product(x, p["w"]), leaf, X, rtol=1e-4)


def test_another_method_and_a_submodule_are_adapted_too():
    class Model(nn.Module):
        def setup(self):
            self.dense = nn.Dense(DIM)

        def __call__(self, x):
            return self.dense(x)

        def encode(self, x):
            return jnp.tanh(self.dense(x))

    model = Model()
    params = model.init(jax.random.key(0), X)
    adapted = adapt_all(model.apply, params, ("kernel",))
    for fn in (
        lambda p, x: model.apply(p, x, method="encode"),
        lambda p, x: nn.Dense(DIM).apply({"params": p["params"]["dense"]}, x),
    ):
        assert_adapted_equals_dense(fn, adapted, X, rtol=1e-4, on_unsupported="error")


def test_a_second_adapter_does_not_drop_the_first():
    params = {"w": jnp.ones((DIM, DIM)), "v": jnp.ones((DIM, DIM))}

    def fn(params, x):
        return x @ params["w"] @ params["v"]

    first = adapt_all(fn, params, ("w",))
    both = jlora.init(jax.random.key(7), first, jlora.LoraConfig(rank=2, targets=("v",)))
    np.testing.assert_allclose(
        jlora.adapt(fn)(both, X), jlora.adapt(fn)(first, X), rtol=1e-6, atol=1e-6
    )
    with pytest.raises(ValueError, match="already has an adapter"):
        jlora.init(jax.random.key(7), first, jlora.LoraConfig(rank=2, targets=("w",)))


def test_dropout_is_off_without_a_key():
    params = {"w": jax.random.normal(jax.random.key(0), (DIM, 5))}
    config = jlora.LoraConfig(rank=2, targets=("w",), dropout=0.9)
    leaf = randomise(jlora.init(jax.random.key(1), params, config), jax.random.key(2))
    with pytest.warns(UserWarning, match="trained without"):
        assert_adapted_equals_dense(lambda p, x: x @ p["w"], leaf, X)


# quax


QUAX = {
    "checkpoint": lambda p, x: jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]))(x),
    "gather": lambda p, x: jnp.take(p["w"], jnp.array([1, 0]), axis=0) * x[0, :5].sum(),
    "transpose": lambda p, x: (p["w"].T @ x.T).T,
    "bfloat16": lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
    "three axes": lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(DIM, 5, 1)),
    "shard_map": lambda p, x: jax.shard_map(
        jnp.matmul,
        mesh=jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()),
        out_specs=jax.sharding.PartitionSpec("x"),
    )(x, p["w"]),
}


@pytest.mark.parametrize("use", QUAX)
def test_what_quax_refuses(use):
    params = {"w": jax.random.normal(jax.random.key(0), (DIM, 5))}
    check(QUAX[use], params, ("w",), rtol=3e-2 if use == "bfloat16" else 1e-4)


# Keras, tunix, optax


def test_alpha_counts_and_attention_takes_adapters():
    model = nn.MultiHeadDotProductAttention(2, qkv_features=DIM)
    x = jax.random.normal(jax.random.key(0), (2, 3, DIM))
    params = model.init(jax.random.key(1), x)
    leaves = check(model.apply, params, ("query", "key", "value", "out"), x)
    assert len(leaves) == 4
    assert all(leaf.scaling == 0.5 for leaf in leaves)


def test_frozen_weights_do_not_move_under_a_masked_optimizer():
    # optax.masked passes the gradients of masked-out leaves through as updates.
    config = jlora.LoraConfig(rank=2, targets=("w",))
    params = jlora.init(jax.random.key(0), {"w": jnp.ones((4, 4)), "v": jnp.ones(4)}, config)
    tx = jlora.optimizer(optax.adam(1.0), config)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert not np.any(updates["v"])
    assert not np.any(updates["w"].w)
