import json
import logging
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import randomise

import jlora


def make_tree(dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(1), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, dtype)

    return {
        "params": {
            "embed": {"embedding": normal(30, 8)},
            "layers": [
                {
                    "q_proj": {"kernel": normal(8, 8), "bias": normal(8)},
                    "norm": {"scale": normal(8)},
                },
                {
                    "q_proj": {"kernel": normal(8, 8), "bias": normal(8)},
                    "norm": {"scale": normal(8)},
                },
            ],
            "steps": jnp.zeros((), jnp.int32),
        }
    }


def test_chosen_weights_become_lora_arrays_and_nothing_else_changes():
    params = make_tree()
    config = jlora.LoraConfig(rank=2, alpha=8, targets=("q_proj",))
    adapted = jlora.init(jax.random.key(0), params, config)
    leaf = adapted["params"]["layers"][0]["q_proj"]["kernel"]
    assert isinstance(leaf, jlora.LoraArray)
    assert (leaf.a.shape, leaf.b.shape, leaf.scaling) == ((8, 2), (2, 8), 4.0)
    assert leaf.w is params["params"]["layers"][0]["q_proj"]["kernel"]
    assert not np.any(leaf.b)
    assert np.all(np.abs(leaf.a) <= 8**-0.5)
    assert adapted["params"]["layers"][0]["q_proj"]["bias"] is not None
    chex.assert_trees_all_equal(jlora.merge_params(adapted), params)


def test_adapters_do_not_depend_on_order_of_targets_or_on_other_leaves():
    config = jlora.LoraConfig(rank=2, targets=("q_proj", "embed"))
    swapped = jlora.LoraConfig(rank=2, targets=("embed", "q_proj"))
    key, params = jax.random.key(3), make_tree()
    first = jlora.init(key, params, config)
    chex.assert_trees_all_equal(first, jlora.init(key, params, swapped))
    params["params"]["another"] = {"kernel": jnp.ones((3, 3))}
    more = jlora.init(key, params, config)
    del more["params"]["another"]
    chex.assert_trees_all_equal(first, more)
    layers = first["params"]["layers"]
    assert not np.allclose(layers[0]["q_proj"]["kernel"].a, layers[1]["q_proj"]["kernel"].a)


def test_init_works_on_shapes_and_under_jit():
    config = jlora.LoraConfig(rank=2, targets=("q_proj",))
    key, params = jax.random.key(0), make_tree()
    eager = jlora.init(key, params, config)
    jitted = jax.jit(lambda params: jlora.init(key, params, config))(params)
    chex.assert_trees_all_equal(eager, jitted)
    shapes = jax.eval_shape(lambda: params)
    abstract = jlora.init(key, shapes, config)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, eager)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))


def test_every_role_has_its_place_in_the_factors():
    w = jnp.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    roles = ("out", "stack", "in", "out")
    config = jlora.LoraConfig(rank=2, targets=("w",), axes={"w": roles})
    leaf = randomise(jlora.init(jax.random.key(0), {"w": w}, config), jax.random.key(1))["w"]
    assert (leaf.a.shape, leaf.b.shape) == ((3, 4, 2), (3, 2, 2, 5))
    update = jnp.einsum("sir,srop->osip", leaf.a, leaf.b)
    merged = jlora.merge_params(leaf)
    np.testing.assert_allclose(merged, w + leaf.scaling * update, rtol=1e-5, atol=1e-5)


def test_merging_rounds_once_and_never_drifts():
    params = make_tree(jnp.bfloat16)
    config = jlora.LoraConfig(rank=2, targets=("q_proj",))
    adapted = randomise(jlora.init(jax.random.key(0), params, config), jax.random.key(1))
    leaf = adapted["params"]["layers"][0]["q_proj"]["kernel"]
    exact = np.asarray(leaf.w, np.float64) + leaf.scaling * (
        np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64)
    )
    merged = jlora.merge_params(leaf)
    assert merged.dtype == jnp.bfloat16
    error = np.abs(np.asarray(merged, np.float64) - exact)
    assert np.all(error <= np.abs(exact) * 2**-8 + 1e-6)  # half a unit of bfloat16's 8 bits
    for _ in range(3):
        chex.assert_trees_all_equal(jlora.merge_params(leaf), merged)
    wide = jlora.merge_params(leaf, dtype=jnp.float32)
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-5)


def test_split_and_combine_are_inverse_and_labels_name_every_array():
    params = make_tree()
    config = jlora.LoraConfig(rank=2, targets=("q_proj",), train=("norm", "*/embedding"))
    adapted = jlora.init(jax.random.key(0), params, config)
    trainable, frozen = jlora.split(adapted, config)
    chex.assert_trees_all_equal(jlora.combine(trainable, frozen), adapted)
    assert len(jax.tree.leaves(trainable)) == 4 + 2 + 1
    assert len(jax.tree.leaves(frozen)) == 2 + 2 + 1
    names = jlora.labels(adapted, config)["params"]
    assert jax.tree.leaves(names["layers"][0]["q_proj"]["kernel"]) == ["frozen", "lora_a", "lora_b"]
    assert names["layers"][1]["norm"]["scale"] == "full"
    assert names["steps"] == "frozen"
    assert set(jax.tree.leaves(jlora.labels(trainable, config))) == {"lora_a", "lora_b", "full"}


def test_gradients_exist_for_the_trainable_tree_alone():
    config = jlora.LoraConfig(rank=2, targets=("w",))
    params = jlora.init(jax.random.key(0), {"w": jnp.ones((300, 200)), "v": jnp.ones(7)}, config)
    trainable, frozen = jlora.split(params, config)
    forward = jlora.adapt(lambda p, x: (x @ p["w"]).sum() + p["v"].sum())
    grads = jax.grad(lambda t: forward(jlora.combine(t, frozen), jnp.ones((5, 300))))(trainable)
    assert sum(x.size for x in jax.tree.leaves(grads)) == 2 * (300 + 200)


def test_config_is_hashable_and_goes_through_json():
    config = jlora.LoraConfig(
        rank=4,
        targets=("q_proj", re.compile(r"layers/[01]/", re.IGNORECASE)),
        rank_pattern={"v_proj": 2, re.compile("down"): 8},
        alpha_pattern={"v_proj": 1.5},
        axes={"w": ("stack", "in", "out")},
        rank_stabilized=True,
    )
    again = jlora.LoraConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    with pytest.raises(ValueError, match="rnak"):
        jlora.LoraConfig.from_json(json.dumps({"rnak": 3}))


def test_patterns_set_ranks_and_alphas():
    params = {"q_proj": jnp.ones((8, 8)), "v_proj": jnp.ones((8, 8))}
    config = jlora.LoraConfig(
        rank=4, alpha=8, targets=("q_proj", "v_proj"), rank_pattern={"v_proj": 2}
    )
    adapted = jlora.init(jax.random.key(0), params, config)
    assert (adapted["q_proj"].rank, adapted["q_proj"].scaling) == (4, 2.0)
    assert (adapted["v_proj"].rank, adapted["v_proj"].scaling) == (2, 4.0)
    stabilized = jlora.LoraConfig(rank=4, alpha=8, rank_stabilized=True)
    assert stabilized.scaling_of("q_proj") == 4.0


def test_all_linear_takes_what_the_function_multiplies_with():
    params = {"w": jnp.ones((8, 8)), "stack_of_biases": jnp.ones((8, 8)), "table": jnp.ones((9, 8))}

    def fn(params, tokens):
        x = params["table"][tokens] @ params["w"]
        return jax.lax.scan(lambda c, b: (c + b, None), x, params["stack_of_biases"])[0]

    args = (jax.ShapeDtypeStruct((5,), jnp.int32),)
    adapted = jlora.init(jax.random.key(0), params, jlora.LoraConfig(rank=2), fn=fn, args=args)
    kinds = {path: type(leaf).__name__ for path, leaf in adapted.items()}
    assert kinds["w"] == "LoraArray"
    assert kinds["stack_of_biases"] != "LoraArray"
    assert kinds["table"] != "LoraArray"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("q_porj",)}, "q_porj.*layers/0/q_proj/kernel"),
        ({"targets": ("q_proj",), "exclude": ("nothing",)}, "exclude 'nothing'"),
        ({"targets": ("q_proj",), "exclude": ("layers",)}, "leaves nothing"),
        ({"targets": ("q_proj",), "train": ("nrom",)}, "train 'nrom'"),
        ({"targets": ("q_proj",), "train": ("*/kernel",)}, "both in targets and in train"),
        ({"targets": ("q_proj",), "train": ("steps",)}, "int32"),
        ({"targets": ("q_proj",), "rank_pattern": {"v_proj": 2}}, "rank_pattern 'v_proj'"),
        (
            {"targets": ("q_proj",), "rank_pattern": {"q_proj": 2, "*/0/*": 3}},
            "rank_pattern gives 'layers/0/q_proj/kernel' different values",
        ),
        ({"targets": ("norm",)}, "does not fit"),
        ({"targets": ("steps",)}, "does not fit"),
        ({"targets": ("all-linear",)}, "pass fn="),
        ({"targets": ("q_proj",), "rank": 9}, "rank 9 is too large"),
        (
            {"targets": ("q_proj",), "axes": {"q_proj": ("stack", "in", "out")}},
            "names 3 axes for.*k",
        ),
    ],
)
def test_mistakes_get_one_clear_message(options, message):
    config = jlora.LoraConfig(**{"rank": 2, **options})
    with pytest.raises(ValueError, match=message):
        jlora.init(jax.random.key(0), make_tree(), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"alpha": 0.0}, "alpha must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"dtype": "int8"}, "floating"),
        ({"axes": {"w": ("in", "rows")}}, "'stack', 'in' or 'out'"),
    ],
)
def test_impossible_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jlora.LoraConfig(**options)


def test_axes_given_for_a_segment_are_those_of_its_weight():
    params = {"q_proj": {"kernel": jnp.ones((3, 8, 8)), "bias": jnp.ones((3, 8))}}
    axes = {"q_proj": ("stack", "in", "out")}
    config = jlora.LoraConfig(rank=2, targets=("q_proj",), axes=axes)
    adapted = jlora.init(jax.random.key(0), params, config)
    assert isinstance(adapted["q_proj"]["kernel"], jlora.LoraArray)
    assert isinstance(adapted["q_proj"]["bias"], jax.Array)


def test_args_of_the_function_come_in_a_tuple():
    config = jlora.LoraConfig(rank=2)
    with pytest.raises(ValueError, match=r"args=\(x,\)"):
        jlora.init(
            jax.random.key(0),
            {"w": jnp.ones((8, 8))},
            config,
            fn=lambda params, x: x @ params["w"],
            args=jnp.ones((4, 8)),
        )


def test_ambiguous_axes_empty_trees_and_second_adapters_are_refused():
    config = jlora.LoraConfig(rank=2, targets=("w",))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="ambiguous"):
        jlora.init(key, {"w": jnp.ones((3, 8, 8))}, config)
    with pytest.raises(ValueError, match="no leaves"):
        jlora.init(key, {}, config)
    adapted = jlora.init(key, {"w": jnp.ones((8, 8))}, config)
    with pytest.raises(ValueError, match="already has an adapter"):
        jlora.init(key, adapted, config)
    with pytest.raises(ValueError, match=r"jlora\.init"):
        jlora.split({"w": jnp.ones((8, 8))}, config)


def test_init_logs_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="jlora"):
        jlora.init(jax.random.key(0), make_tree(), jlora.LoraConfig(rank=2, targets=("q_proj",)))
    assert len(caplog.records) == 1
    assert "2 weights: 64 trainable parameters" in caplog.text


def test_summary_counts_parameters_and_bytes():
    params = make_tree(jnp.bfloat16)
    config = jlora.LoraConfig(rank=2, targets=("q_proj",), train=("norm",))
    adapted = jlora.init(jax.random.key(0), params, config)
    table = jlora.summary(adapted, config)
    assert table.trainable == 2 * (8 * 2 + 2 * 8) + 2 * 8
    assert table.frozen == 30 * 8 + 2 * (64 + 8) + 1
    assert table.trainable_bytes == 64 * 4 + 16 * 2
    assert "layers/1/q_proj/kernel" in str(table)
    assert "rank 2" in str(table)
    assert "%" in str(table).splitlines()[-1]


def test_a_target_inside_a_custom_gradient_is_adapted_although_its_use_is_opaque():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    params = {
        "opaque": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
        "plain": {"kernel": jnp.ones((4, 4))},
    }

    def fn(params, x):
        h = product(x, params["opaque"]["kernel"]) + params["opaque"]["bias"]
        return h @ params["plain"]["kernel"]

    config = jlora.LoraConfig(rank=2, targets=("*/kernel",))
    adapted = jlora.init(jax.random.key(0), params, config, fn=fn, args=(jnp.ones((2, 4)),))
    assert isinstance(adapted["opaque"]["kernel"], jlora.LoraArray)
    assert isinstance(adapted["plain"]["kernel"], jlora.LoraArray)


def test_leaves_that_share_a_path_are_refused():
    params = {"params": {"w": jnp.ones((4, 4))}, "w": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match="share the paths"):
        jlora.init(jax.random.key(0), params, jlora.LoraConfig(rank=2, targets=("w",)))


@pytest.mark.parametrize("field", ["targets", "train"])
def test_leaves_that_are_no_arrays_are_refused_by_name(field):
    params = {"w": jnp.ones((4, 4)), "scale": 1.0}
    config = jlora.LoraConfig(**{"rank": 2, "targets": ("w",), field: ("scale",)})
    with pytest.raises(ValueError, match=r"'scale'.*float"):
        jlora.init(jax.random.key(0), params, config)


def test_a_vmap_or_a_scan_outside_takes_the_stacked_axis(getkey):
    params = {"w": jax.random.normal(getkey(), (3, 8, 8))}
    config = jlora.LoraConfig(rank=2, targets=("w",), axes={"w": ("stack", "in", "out")})
    params = randomise(jlora.init(getkey(), params, config), getkey())
    dense, x = jlora.merge_params(params), jax.random.normal(getkey(), (5, 8))

    def layer(x, params):
        return jnp.tanh(x @ params["w"]), None

    adapted = jlora.adapt(layer)
    chex.assert_trees_all_close(
        jax.lax.scan(adapted, x, params), jax.lax.scan(layer, x, dense), rtol=1e-5, atol=1e-5
    )
    chex.assert_trees_all_close(
        jax.vmap(adapted, (None, 0))(x, params),
        jax.vmap(layer, (None, 0))(x, dense),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_vmapped_init_makes_a_stack(getkey):
    config = jlora.LoraConfig(rank=2, targets=("w",))
    weights = jax.random.normal(getkey(), (3, 8, 6))
    params = jax.vmap(lambda key, w: jlora.init(key, {"w": w}, config))(
        jax.random.split(getkey(), 3), weights
    )
    params = randomise(params, getkey())
    merged = jlora.merge_params(params)
    chex.assert_trees_all_close(merged, jax.vmap(jlora.merge_params)(params), rtol=1e-6, atol=1e-6)
    x = jax.random.normal(getkey(), (5, 8))
    adapted = jlora.adapt(lambda params, x: jnp.einsum("bi,lio->lbo", x, params["w"]))(params, x)
    wanted = jnp.einsum("bi,lio->lbo", x, merged["w"])
    chex.assert_trees_all_close(adapted, wanted, rtol=1e-5, atol=1e-5)


def test_stacked_adapters_on_one_weight_say_how_to_map_over_them():
    leaf = jlora.LoraArray(jnp.ones((8, 6)), jnp.ones((3, 8, 2)), jnp.ones((3, 2, 6)), scaling=1.0)
    with pytest.raises(ValueError, match=r"'w' do not fit together.*jax\.vmap"):
        jlora.adapt(lambda params: params["w"] @ jnp.ones(6))({"w": leaf})
