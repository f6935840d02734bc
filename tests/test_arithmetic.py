"""Adapter arithmetic: laws, conversion, extraction and mistakes."""

import dataclasses
import functools
import logging
import pathlib
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import arrays_of_size, assert_close, is_lora

import jlora
from jlora import arithmetic

RANK = 3
ROLES = {
    "matrix": ("in", "out"),
    "stack": ("stack", "in", "out"),
    "merged": ("in", "out", "in", "out"),
    "experts": ("stack", "out", "stack", "in"),
}
SHAPES = {
    "matrix": (64, 24),
    "stack": (3, 64, 20),
    "merged": (4, 3, 16, 4),
    "experts": (2, 20, 3, 64),
}


@functools.cache
def fresh(names, fmt, config):
    """A tree of random weights with new adapters; the same object for all who ask for the same."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(0, 1, SHAPES[name]), jnp.float32) for name in SHAPES}
    params = {name: params[name] for name in names}
    packed = jlora.quantize(params, fmt, targets=names, axes=config.axes) if fmt else params
    return jlora.init(jax.random.key(9), packed | {"norm": jnp.ones(8)}, config)


def make(
    seed=0, *, fmt=None, rank=RANK, alpha=6, dtype="float32", names=("merged", "experts"), **options
):
    """A tree over one base, whatever the seed of its adapters, neither factor of which is zero."""
    axes = {name: ROLES[name] for name in names}
    config = jlora.LoraConfig(
        rank=rank, alpha=alpha, targets=names, axes=axes, dtype=dtype, **options
    )
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if not is_lora(leaf):
            return leaf
        a, b = (rng.normal(0, scale, x.shape) for scale, x in ((1 / 8, leaf.a), (1, leaf.b)))
        return dataclasses.replace(leaf, a=jnp.asarray(a, dtype), b=jnp.asarray(b, dtype))

    return jax.tree.map(draw, fresh(names, fmt, config), is_leaf=is_lora), config


def base_of(params):
    return jax.tree.map(lambda x: x.w if is_lora(x) else x, params, is_leaf=is_lora)


def updates(params):
    """What each adapter adds, `[stack, in, out]` in float64 by numpy."""
    found = {}
    for path, leaf in jlora.lora.leaves_by_path(params).items():
        if is_lora(leaf):
            sizes = {
                role: int(np.prod([n for n, r in zip(leaf.shape, leaf.axes) if r == role]))
                for role in ("in", "out")
            }
            a = np.asarray(leaf.a, np.float64).reshape(-1, sizes["in"], leaf.rank)
            b = np.asarray(leaf.b, np.float64).reshape(-1, leaf.rank, sizes["out"])
            found[path] = leaf.scaling * a @ b
    return found


def close(got, wanted, rtol=1e-5):
    assert got.keys() == wanted.keys()
    for path, x in wanted.items():
        np.testing.assert_allclose(
            got[path], x, rtol=rtol, atol=rtol * np.abs(x).max(), err_msg=path
        )


def best(update, rank):
    u, s, v = np.linalg.svd(update, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


# Laws


@pytest.mark.parametrize("fmt", [None, "nf4"])
def test_the_sum_is_the_sum_of_the_updates_over_the_first_base(fmt):
    one, _ = make(1, fmt=fmt)
    two, _ = make(2, fmt=fmt, rank=5, alpha=20)
    total = arithmetic.add(one, two, one)
    first, second = updates(one), updates(two)
    close(updates(total), {k: 2 * first[k] + second[k] for k in first}, 1e-6)
    for path, leaf in one.items():
        if is_lora(leaf):
            assert total[path].w is leaf.w
            assert total[path].rank == 2 * RANK + 5
            assert total[path].axes == leaf.axes
    assert total["norm"] is one["norm"]
    x = jax.random.normal(jax.random.key(0), (5, 64))
    output = jlora.adapt(lambda p, x: jnp.einsum("bi,loji->bloj", x, p["experts"]))
    base = output(arithmetic.scale(one, 0), x)
    summed = [output(tree, x) - base for tree in (one, two, one)]
    assert_close(output(total, x) - base, sum(summed), 2e-5)


def test_adapters_of_one_scaling_are_summed_without_rounding():
    one, _ = make(1, dtype="bfloat16")
    two, _ = make(2, dtype="bfloat16")
    leaf = arithmetic.add(one, two)["experts"]
    np.testing.assert_array_equal(leaf.a, jnp.concatenate([one["experts"].a, two["experts"].a], -1))
    np.testing.assert_array_equal(leaf.b, jnp.concatenate([one["experts"].b, two["experts"].b], -2))
    assert leaf.scaling == one["experts"].scaling


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=3), st.sampled_from(["cat", "svd"])
)
def test_weights_of_either_sign_count_as_they_stand(weights, combination):
    trees = [make(i, alpha=3 * i + 3, names=("merged",))[0] for i in range(len(weights))]
    ranks = RANK * len(trees)
    rank = {"rank": ranks} if combination == "svd" else {}
    got = arithmetic.weighted(trees, weights, combination=combination, **rank)
    wanted = sum(w * updates(tree)["merged"] for w, tree in zip(weights, trees))
    np.testing.assert_allclose(updates(got)["merged"], wanted, atol=2e-5)
    assert got["merged"].rank == ranks


def test_scaled_by_nothing_it_is_the_base_and_it_takes_a_traced_number():
    params, _ = make()
    base = base_of(params)
    chex.assert_trees_all_equal(jlora.merge_params(arithmetic.scale(params, 0)), base)
    scaled = jax.jit(arithmetic.scale)(params, -1.5)
    assert jax.tree.structure(scaled) == jax.tree.structure(params)
    close(updates(scaled), {k: -1.5 * u for k, u in updates(params).items()})
    gone = arithmetic.add(params, arithmetic.scale(params, -1))
    assert_close(jlora.merge_params(gone), base, 1e-6)


def test_the_factored_svd_is_the_dense_one():
    trees = [make(i, rank=2 + i, alpha=4 * i + 4)[0] for i in range(3)]
    weights = (0.7, -0.4, 1.3)
    total = {
        k: sum(w * updates(tree)[k] for w, tree in zip(weights, trees)) for k in updates(trees[0])
    }
    combine = lambda trees, rank: arithmetic.weighted(  # noqa: E731
        trees, weights, combination="svd", rank=rank
    )
    for rank in (4, 9):
        combined = combine(trees, rank)
        close(updates(combined), {k: best(u, rank) for k, u in total.items()})
        for path, u in total.items():
            got = np.linalg.svd(updates(combined)[path], compute_uv=False)[..., :rank]
            wanted = np.linalg.svd(u, compute_uv=False)[..., :rank]
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * wanted.max())
            assert combined[path].rank == rank
    default = arithmetic.weighted(trees, weights, combination="svd")
    assert {leaf.rank for leaf in default.values() if is_lora(leaf)} == {4}
    jitted = jax.jit(combine, static_argnums=1)([{"merged": t["merged"]} for t in trees], 4)
    close(updates(jitted), {"merged": best(total["merged"], 4)})


@pytest.mark.parametrize("combination", ["cat", "svd", "linear", "ties", "dare_ties", "to_rank"])
def test_no_array_of_the_weights_size_is_built(combination):
    trees = [make(i, names=("matrix", "stack"))[0] for i in range(2)]
    options = {"density": 0.5} if "ties" in combination else {}
    if "dare" in combination:
        options["key"] = jax.random.key(0)

    def combine(*trees):
        if combination == "to_rank":
            return arithmetic.to_rank(arithmetic.add(*trees), 2)
        return arithmetic.weighted(trees, (1, 2), combination=combination, **options)

    assert arrays_of_size(combine, *trees, size=64 * 20) == []
    dense = lambda *trees: arithmetic.weighted(  # noqa: E731
        trees, (1, 2), combination="ties_svd", density=0.5
    )
    assert arrays_of_size(dense, *trees, size=64 * 20)  # the check finds what there is


def test_random_dropping_keeps_entries_divided_by_the_density_and_the_mean():
    names = ("stack",)
    params, _ = make(names=names)
    draws = [
        arithmetic.weighted([params], [1], combination="dare_linear", density=0.25, key=key)
        for key in jax.random.split(jax.random.key(1), 64)
    ]
    for name in names:
        stacked = np.stack([draw[name].a for draw in draws])
        kept = stacked != 0
        np.testing.assert_allclose(kept.mean(), 0.25, atol=0.01)
        whole = np.broadcast_to(params[name].a / 0.25, stacked.shape)
        np.testing.assert_allclose(stacked[kept], whole[kept], rtol=1e-5)
        assert (kept[0] != kept[1]).any()
        assert (draws[0][name].b != 0).mean() < 0.5
    again = arithmetic.weighted(
        [params], [1], combination="dare_linear", density=0.25,
        key=jax.random.split(jax.random.key(1), 64)[0],
    )  # fmt: skip
    chex.assert_trees_all_equal(again, draws[0])


@pytest.mark.parametrize(
    "pair", [("ties", "dare_ties"), ("linear", "dare_linear"), ("linear", "magnitude_prune")]
)
def test_where_nothing_is_dropped_the_ways_of_dropping_agree(pair):
    trees = [make(i, alpha=3 + i)[0] for i in range(3)]
    results = []
    for name in pair:
        options = {} if name == "linear" else {"density": 1.0}
        if "dare" in name:
            options["key"] = jax.random.key(0)
        results.append(arithmetic.weighted(trees, (1, -0.5, 2), combination=name, **options))
    chex.assert_trees_all_equal(*results)


def test_a_stack_is_combined_matrix_by_matrix():
    trees = [make(i, names=("experts", "stack"))[0] for i in range(2)]
    for name, options in (("ties", {}), ("ties_svd", {"rank": 4}), ("magnitude_prune", {})):
        combine = lambda trees: arithmetic.weighted(  # noqa: E731
            trees,
            (0.5, 2),
            combination=name,  # noqa: B023
            density=0.3,
            **options,  # noqa: B023
        )
        whole = updates(combine(trees))
        layers = [
            [
                {"stack": dataclasses.replace(t["stack"], w=t["stack"].w[i], a=t["stack"].a[i],
                                              b=t["stack"].b[i], axes=("in", "out"))}
                for t in trees
            ]
            for i in range(3)
        ]  # fmt: skip
        alone = [updates(combine(layer))["stack"][0] for layer in layers]
        np.testing.assert_allclose(whole["stack"], np.stack(alone), rtol=1e-4, atol=1e-5)
        assert whole["experts"].shape == (6, 64, 20)


# Conversion


def test_a_rank_is_cut_to_the_best_or_filled_with_what_changes_nothing():
    params, _ = make()
    wanted = updates(params)
    close(updates(arithmetic.to_rank(params, 2)), {k: best(u, 2) for k, u in wanted.items()})
    chex.assert_trees_all_equal(arithmetic.to_rank(params, RANK), params)
    padded = arithmetic.to_rank(params, 7)
    close(updates(padded), wanted, 1e-7)
    assert all(leaf.rank == 7 for leaf in padded.values() if is_lora(leaf))
    assert not padded["experts"].a[..., RANK:].any()
    grown = arithmetic.to_rank(params, 7, key=jax.random.key(0))
    close(updates(grown), wanted, 1e-7)
    for leaf in grown.values():
        if is_lora(leaf):
            added = jnp.abs(leaf.a[..., RANK:])
            assert 0.9 / 8 < added.max() <= 1 / 8  # d_in is 64 for all
    back = arithmetic.to_rank(arithmetic.add(params, params), RANK)
    close(updates(back), {k: 2 * u for k, u in wanted.items()})


def test_scalings_are_converted_and_the_update_stays():
    params, config = make(alpha=6)
    stabilized = dataclasses.replace(config, rank_stabilized=True)
    there = arithmetic.convert(params, stabilized)
    close(updates(there), updates(params))
    wanted = jlora.init(jax.random.key(0), base_of(params), stabilized)
    assert jax.tree.structure(there) == jax.tree.structure(wanted)
    assert there["experts"].scaling == stabilized.scaling_of("experts") != params["experts"].scaling
    close(updates(arithmetic.convert(there, config)), updates(params))
    chex.assert_trees_all_equal(arithmetic.convert(params, config), params)
    negative = jax.tree.map(
        lambda x: dataclasses.replace(x, scaling=-0.7) if is_lora(x) else x, params, is_leaf=is_lora
    )
    close(updates(arithmetic.convert(negative, config)), updates(negative))


def test_a_combination_becomes_what_a_config_describes():
    one, config = make(1)
    two, _ = make(2)
    other = dataclasses.replace(
        config,
        rank=6,
        rank_pattern={"merged": 4},
        alpha_pattern={"experts": 1.0},
        dropout=0.1,
        dtype="bfloat16",
    )
    got = arithmetic.convert(arithmetic.add(one, two), other)
    wanted = jlora.init(jax.random.key(0), base_of(one), other)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    total = updates(arithmetic.add(one, two))
    total["merged"] = best(total["merged"], 4)
    for path, u in updates(got).items():  # bfloat16 has 8 bits
        assert np.linalg.norm(u - total[path]) < 2**-7 * np.linalg.norm(total[path])


def test_the_page_runs_and_what_it_saves_is_read_back(tmp_path, monkeypatch, capsys):
    from test_peft import adapted, tiny

    page = pathlib.Path(__file__).parents[1] / "docs" / "arithmetic.md"
    model, base = tiny()
    config = jlora.LoraConfig(rank=16, alpha=16, targets=("gate_proj",))
    maths, code = (adapted(model, base, config, seed=seed) for seed in (2, 3))
    names = {"jlora": jlora, "maths": maths, "code": code, "config": config, "base": base}
    names |= {"tuned": jlora.merge_params(maths), "tokens": np.zeros((1, 4), np.int32)}
    apply = lambda params, tokens: model.apply({"params": params}, tokens)  # noqa: E731
    names["model"] = types.SimpleNamespace(apply=apply)
    monkeypatch.chdir(tmp_path)
    text = page.read_text().replace("both, 64)", "both, 24)")  # the model is 24 wide
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert "captured" in capsys.readouterr().out
    assert names["report"].rows[0].captured > 0.999
    close(updates(names["served"]), updates(names["both"]))
    loaded, read = jlora.peft.load(tmp_path / "both", base)
    chex.assert_trees_all_equal(loaded, names["both"])
    assert (read.rank, read.alpha) == (32, 32)


# Extraction


def tuned_pair(**options):
    """A base, the same with updates of rank 3 merged into it, those updates, and their config."""
    adapted, config = make(names=("matrix", "experts"), **options)
    base = base_of(adapted)
    return base, jlora.merge_params(adapted), updates(adapted), config


@pytest.mark.parametrize("niter", [None, 2])
def test_an_adapter_is_extracted_from_two_checkpoints(niter):
    base, tuned, wanted, config = tuned_pair()
    options = {} if niter is None else {"niter": niter, "key": jax.random.key(3)}
    got, report = arithmetic.extract(base, tuned, config, **options)
    close(updates(got), wanted, 2e-5)
    assert_close(jlora.merge_params(got), tuned, 1e-5)
    assert [row.path for row in report.rows] == ["experts", "matrix"]
    assert all(row.captured > 1 - 1e-6 and row.rank == RANK for row in report.rows)
    assert report.left_out == ()


def test_what_a_smaller_rank_captures_is_reported():
    base, tuned, wanted, config = tuned_pair()
    small = dataclasses.replace(config, rank=1, rank_pattern={"experts": 2}, rank_stabilized=True)
    got, report = arithmetic.extract(base, tuned, small)
    for row in report.rows:
        rank = small.rank_of(row.path)
        nearest = best(wanted[row.path], rank)
        np.testing.assert_allclose(
            updates(got)[row.path], nearest, atol=1e-4 * np.abs(nearest).max()
        )
        share = np.sum(nearest**2) / np.sum(wanted[row.path] ** 2)
        np.testing.assert_allclose(row.captured, share, rtol=1e-4)
        change = np.linalg.norm(wanted[row.path]) / np.linalg.norm(base[row.path].ravel())
        np.testing.assert_allclose(row.change, change, rtol=1e-4)
        assert row.path in str(report)
    same, report = arithmetic.extract(base, base, config)
    assert_close(jlora.merge_params(same), base, 1e-7)
    assert all(row.change == 0 and row.captured == 1 for row in report.rows)


def test_leaves_trained_whole_are_taken_over_and_others_are_named(caplog):
    base, tuned, _, config = tuned_pair()
    tuned = tuned | {"norm": 2 * tuned["norm"]}
    with caplog.at_level(logging.WARNING, "jlora"):
        got, report = arithmetic.extract(base, tuned, config)
    assert report.left_out == ("norm",)
    assert "norm" in caplog.text
    assert "norm" in str(report)
    assert got["norm"] is base["norm"]
    whole = dataclasses.replace(config, train=("norm",))
    got, report = arithmetic.extract(base, tuned, whole)
    assert got["norm"] is tuned["norm"]
    assert report.left_out == ()


def test_over_a_quantised_base_the_adapter_holds_its_error_too():
    base, tuned, _, _ = tuned_pair()
    axes = {"experts": ROLES["experts"]}
    packed = jlora.quantize(base, "nf4", targets=("experts",), axes=axes)
    full = jlora.LoraConfig(rank=20, targets=("experts",), axes=axes)
    got, report = arithmetic.extract(packed, tuned, full)
    assert report.rows[0].captured > 1 - 1e-5
    assert_close(jlora.merge_params(got)["experts"], tuned["experts"], 2e-5)
    assert got["experts"].w is packed["experts"]
    assert report.left_out == ("matrix",)


# Mistakes


def test_trees_that_do_not_fit_get_one_clear_message():
    one, config = make(names=("matrix", "stack"))
    bare = base_of(one)
    fewer = one | {"stack": bare["stack"]}
    packed = make(names=("matrix", "stack"), fmt="int8")[0]
    turned = one | {"stack": dataclasses.replace(one["stack"], axes=("stack", "out", "in"))}
    moved = one | {"matrix": dataclasses.replace(one["matrix"], w=one["matrix"].w + 1)}
    half = jlora.split(one, config)[0]
    wider = one | {"matrix": make(names=("merged",))[0]["merged"]}
    for other, message in {
        "no adapters": (bare, "Tree 1 has no adapters"),
        "targets": (fewer, r"different adapters: \['stack'\] in tree 0 alone"),
        "leaves": (one | {"more": jnp.ones(1)}, r"different leaves.*\['more'\] in tree 1"),
        "shape": (wider, r"differ in the shape of 'matrix': \(64, 24\) and \(4, 3, 16, 4\)"),
        "axes": (turned, "differ in the axes of 'stack'"),
        "format": (packed, "differ in the base of 'matrix'"),
        "base": (moved, r"differ in the values of 'matrix'.*to_plain_lora"),
        "whole": (one | {"norm": jnp.zeros(8)}, r"values of 'norm'.*trained whole"),
        "half": (half, "one half of a split"),
    }.values():
        with pytest.raises(ValueError, match=message):
            arithmetic.add(one, other)
    with pytest.raises(ValueError, match="has no adapters"):
        arithmetic.scale(bare, 2)
    chex.assert_trees_all_equal(
        arithmetic.add(one, jax.tree.map(jnp.array, one)), arithmetic.add(one, one)
    )  # an equal base is the same base

    class Other(jlora.LoraArray):
        pass

    fields = {f.name: getattr(one["matrix"], f.name) for f in dataclasses.fields(one["matrix"])}
    with pytest.raises(NotImplementedError, match="'matrix' is a Other"):
        arithmetic.scale({"matrix": Other(**fields)}, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combination": "sum"}, "combination must be one of"),
        ({"weights": (1,)}, "2 trees, 1 weights"),
        ({"combination": "svd", "rank": 7}, "rank 7 is too large for 'matrix'.*ranks is 6"),
        ({"combination": "ties_svd", "rank": 25, "density": 1}, "smaller side is 24"),
        ({"combination": "svd", "rank": 0}, "rank must be"),
        ({"combination": "linear", "rank": 3}, "'linear' follows from the trees"),
        ({"combination": "ties"}, "'ties' needs density.*None"),
        ({"combination": "ties", "density": 0}, "above 0"),
        ({"combination": "dare_ties", "density": 1.1, "key": 0}, "at most 1"),
        ({"combination": "linear", "density": 0.5}, "leave density out"),
        ({"combination": "dare_linear", "density": 0.5}, "needs a key"),
        ({"combination": "ties", "density": 0.5, "key": 0}, "takes no key"),
        ({"combination": "ties", "density": 0.5, "majority_sign_method": "x"}, "'frequency'"),
    ],
)
def test_wrong_options_get_one_clear_message(options, message):
    trees = [make(i, names=("matrix",))[0] for i in range(2)]
    with pytest.raises(ValueError, match=message):
        arithmetic.weighted(trees, **{"weights": (1, 2), **options})


def test_other_mistakes_get_one_clear_message():
    one, config = make(names=("matrix", "stack"))
    two, _ = make(names=("matrix", "stack"), rank=2)
    with pytest.raises(ValueError, match=r"'linear' needs equal ranks.*\[3, 2\].*to_rank"):
        arithmetic.weighted((one, two), (1, 1), combination="linear")
    with pytest.raises(ValueError, match="0 trees"):
        arithmetic.add()
    with pytest.raises(ValueError, match="rank 21 is too large for 'stack'"):
        arithmetic.to_rank(one, 21)
    with pytest.raises(ValueError, match="rank must be"):
        arithmetic.to_rank(one, 0)
    with pytest.raises(ValueError, match="does not target"):
        arithmetic.convert(one, dataclasses.replace(config, targets=("matrix",)))
    with pytest.raises(ValueError, match="No leaf matches target 'up'"):
        arithmetic.convert(one, dataclasses.replace(config, targets=("matrix", "stack", "up")))
    base = jlora.merge_params(one)
    for tuned, message in (
        (base | {"norm": jnp.ones(9)}, r"'norm' has shape \(8,\) in base and \(9,\)"),
        ({"norm": jnp.ones(8)}, r"different leaves: \['matrix', 'stack'\] in base alone"),
        (one, "'matrix' already has an adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            arithmetic.extract(base, tuned, config)
    with pytest.raises(ValueError, match="needs a key"):
        arithmetic.extract(base, base, config, niter=2)
    with pytest.raises(ValueError, match="changes the base"):
        arithmetic.extract(base, base, dataclasses.replace(config, init="pissa"))
