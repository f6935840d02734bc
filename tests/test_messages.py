"""What a user reads when something is off: one message, with the leaf, the place and what to do."""

import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jlora

KEY = jax.random.key(0)
X = jnp.ones((2, 4))


def make(**options):
    config = jlora.LoraConfig(**{"rank": 2, "targets": ("q", "v"), **options})
    params = {"q": jnp.ones((4, 4)), "v": jnp.ones((4, 4)), "norm": jnp.ones(4)}
    return jlora.init(KEY, params, config), config


def product(params, x):
    return x @ params["q"] + x @ params["v"]


OUTSIDE = {
    "T": lambda leaf: leaf.T,
    "reshape": lambda leaf: leaf.reshape(2, 8),
    "sum": lambda leaf: leaf.sum(),
    "index": lambda leaf: leaf[0],
    "unpack": lambda leaf: list(leaf),
    "add": lambda leaf: leaf + 1,
    "add to a number": lambda leaf: 1.0 + leaf,
    "negate": lambda leaf: -leaf,
    "multiply": lambda leaf: leaf @ X.T,
    "multiply from the left": lambda leaf: X @ leaf,
    "multiply NumPy's": lambda leaf: np.ones((2, 4)) @ leaf,
    "to NumPy": np.asarray,
    "to JAX": jnp.asarray,
    "JAX function": jnp.sum,
}


@pytest.mark.parametrize("use", OUTSIDE)
def test_a_leaf_outside_adapt_says_what_to_do(use):
    leaf = make()[0]["q"]
    with pytest.raises((TypeError, AttributeError), match=r"LoraArray of shape \(4, 4\).*outside"):
        OUTSIDE[use](leaf)


def test_a_leaf_has_no_attributes_that_nobody_knows():
    leaf = make()[0]["q"]
    assert not hasattr(leaf, "T")
    with pytest.raises(AttributeError, match="has no 'colour'"):
        _ = leaf.colour


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_arguments_of_init_in_another_order_are_refused(order):
    arguments = (KEY, {"w": jnp.ones((4, 4))}, jlora.LoraConfig(rank=2, targets=("w",)))
    with pytest.raises(ValueError, match="in this order"):
        jlora.init(*(arguments[i] for i in order))
    jlora.init(jax.random.PRNGKey(0), *arguments[1:])  # raw keys are keys, too


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("q",)}, r"differ at 'v'.*LoraArray.*float32\[4, 4\]"),
        ({"alpha": 3.0}, r"differ at 'q'.*scaling=16.0.*scaling=1.5"),
        ({"dropout": 0.1}, r"differ at 'q'.*dropout=0.0.*dropout=0.1"),
        ({"train": ("norm",)}, None),
    ],
)
def test_halves_of_other_configs_are_refused_where_they_differ(options, message):
    trainable, frozen = jlora.split(*make())
    other_trainable, other_frozen = jlora.split(*make(**options))
    if message is not None:
        with pytest.raises(ValueError, match=f"{message}.*one config"):
            jlora.combine(trainable, other_frozen)
    with pytest.raises(ValueError, match="one config"):
        jlora.combine(other_trainable, frozen)


def test_trees_that_differ_deep_inside_are_told_apart_there():
    one = {"a": [1, {"b": 2, "c": 3}], "d": None}
    with pytest.raises(ValueError, match=r"differ at 'a/1': dict with \['b', 'c'\] against dict"):
        jlora.combine(one, {"a": [None, {"b": None}], "d": 1})
    with pytest.raises(ValueError, match="differ at 'the top'"):
        jlora.combine([1, 2], (None, None))


def caught(run):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in found]


def test_a_warning_names_the_users_own_line():
    def fn(params, x):
        return x @ jnp.sort(params["q"])  # jnp.sort is jitted: the line is that of its caller

    (message,) = caught(lambda: jlora.adapt(fn)(make()[0], X))
    line = fn.__code__.co_firstlineno + 1
    assert f"'q' of shape (4, 4) in {__file__}:{line} (" in message

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(4))(x)

    params = Model().init(KEY, X)
    adapted = jlora.init(KEY, params, jlora.LoraConfig(rank=2, targets=("kernel",)))
    messages = caught(lambda: jlora.adapt(Model().apply)(adapted, X))
    assert messages
    assert all("Dense_0/kernel" in message and __file__ in message for message in messages)


def test_evaluation_without_a_key_is_noted_once_for_all_leaves(caplog):
    params, _ = make(dropout=0.1)
    forward = jlora.adapt(product)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="jlora"):
        assert caught(lambda: [forward(params, jnp.ones((n, 4))) for n in (1, 2, 2, 3)]) == []
        jlora.explain(product, params, X)
        jlora.adapt(product, dropout_key=KEY)(params, X)
    (record,) = caplog.records
    assert record.getMessage().startswith("Dropout is off for 'q', 'v': adapt got no dropout_key")


@pytest.mark.parametrize("order", ["grad", "grad of jit", "jit of grad"])
def test_training_without_a_key_warns_once(order):
    params, config = make(dropout=0.1)
    trainable, frozen = jlora.split(params, config)
    forward = jlora.adapt(product)

    def loss(trainable):
        return forward(jlora.combine(trainable, frozen), X).sum()

    run = {
        "grad": jax.grad(loss),
        "grad of jit": jax.grad(jax.jit(loss)),
        "jit of grad": jax.jit(jax.grad(loss)),
    }[order]
    messages = caught(lambda: [run(trainable) for _ in range(3)])
    assert len(messages) == 1
    assert "made with dropout=0.1" in messages[0]
    assert "dropout_key" in messages[0]


def test_gradients_of_inputs_and_a_given_key_do_not_warn():
    params, config = make(dropout=0.1)
    trainable, frozen = jlora.split(params, config)
    forward = jlora.adapt(product)
    assert caught(lambda: jax.grad(lambda x: forward(params, x).sum())(X)) == []

    def loss(trainable, key):
        run = jlora.adapt(product, dropout_key=key)
        return run(jlora.combine(trainable, frozen), X).sum()

    assert caught(lambda: jax.jit(jax.grad(loss))(trainable, KEY)) == []


def test_a_callback_on_a_weight_gets_the_dense_one():
    seen = []

    def fn(params, x):
        jax.debug.callback(seen.append, params["q"])
        return x @ params["q"]

    params, _ = make()
    messages = caught(lambda: jax.block_until_ready(jlora.adapt(fn)(params, X)))
    jax.effects_barrier()
    assert "debug_callback" in messages[0]
    np.testing.assert_array_equal(seen[0], jlora.merge_params(params["q"]))
