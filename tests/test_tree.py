import re

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jlora
from jlora import tree


def test_paths_read_the_same_in_every_library():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="linear")(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)

    x = jnp.ones((1, 3))
    linen = Linen().init(jax.random.key(0), x)
    haiku = hk.transform(lambda x: hk.Linear(2, name="linear")(x)).init(jax.random.key(0), x)
    assert tree.leaf_paths(linen) == ["linear/bias", "linear/kernel"]
    assert tree.leaf_paths(linen["params"]) == ["linear/bias", "linear/kernel"]
    assert tree.leaf_paths(nnx.state(Nnx(nnx.Rngs(0)))) == ["linear/bias", "linear/kernel"]
    assert tree.leaf_paths(haiku) == ["linear/b", "linear/w"]


def test_paths_of_equinox_lists_and_partitioned_linen():
    mlp = eqx.nn.MLP(2, 2, 4, depth=1, key=jax.random.key(0))
    paths = tree.leaf_paths(eqx.filter(mlp, eqx.is_array))
    assert paths[:2] == ["layers/0/weight", "layers/0/bias"]
    assert tree.leaf_paths({"a": [1, {"b": 2}]}) == ["a/0", "a/1/b"]
    boxed = {"params": {"kernel": nn.Partitioned(jnp.ones(2), names=("x",))}}
    assert tree.leaf_paths(boxed) == ["kernel"]


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("q_proj", "layers/q_proj/kernel", True),
        ("q_proj", "layers/xq_proj/kernel", False),
        ("proj", "layers/q_proj/kernel", False),
        ("*/q_proj/*", "layers/self_attn/q_proj/kernel", True),
        ("*/q_proj", "layers/q_proj/kernel", False),
        ("layers/*/kernel", "layers/0/up/kernel", True),
        ("*_proj*", "layers/q_proj/kernel", True),
        ("Layers/*", "layers/0", False),
        (re.compile(r"layers/[02]/"), "layers/2/kernel", True),
        (re.compile(r"layers/[02]/"), "layers/1/kernel", False),
        (re.compile(r"^up"), "layers/up", False),
    ],
)
def test_patterns_match_segments_globs_and_regexes(pattern, path, expected):
    assert tree.matches(pattern, path) is expected


def test_an_unmatched_pattern_shows_near_paths():
    error = tree.unmatched("target", "q_porj", ["layers/q_proj/kernel", "norm/scale"])
    assert "'q_porj'" in str(error)
    assert str(error).index("layers/q_proj/kernel") < str(error).index("norm/scale")


def test_combine_refuses_two_values_for_one_leaf():
    assert jlora.combine({"a": 1, "b": None}, {"a": None, "b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="'a'"):
        jlora.combine({"a": 1}, {"a": 2})


def test_a_field_called_value_keeps_its_name_beside_others():
    class Attention(eqx.Module):
        query: jax.Array
        value: jax.Array

    assert tree.leaf_paths({"a": Attention(jnp.ones(1), jnp.ones(1))}) == ["a/query", "a/value"]
