import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import is_lora, randomise

import jlora


def fn(params, x):
    h = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["layers"])[0]
    return jnp.einsum("bi,hoi->bho", h, params["head"]).reshape(len(x), -1)


X = jax.random.normal(jax.random.key(5), (6, 64))


def make(dtype=jnp.bfloat16, fmt="nf4", scale=0.3):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "layers": (0.2 * jax.random.normal(keys[0], (3, 64, 64))).astype(dtype),
        "head": (0.2 * jax.random.normal(keys[1], (2, 9, 64))).astype(dtype),
        "bias": jnp.ones(3, dtype),
    }
    base = jlora.quantize(params, fmt, fn=fn, args=(X,)) if fmt else params
    config = jlora.LoraConfig(rank=2, alpha=2, targets=("all-linear",))
    adapted = jlora.init(jax.random.key(1), base, config, fn=fn, args=(X,))
    return params, randomise(adapted, jax.random.key(2), scale)


def figures(base, update, source, merged, change):
    """By definition, of a base and its update, and what they are merged and packed into."""
    norm = np.linalg.norm
    return {
        "update": norm(update) / norm(base),
        "rounding": norm(merged - source - update) / norm(source + update),
        "erased": 1 - np.vdot(change, update) / np.vdot(update, update),
        "noise": norm(change - update) / norm(update),
        "shift": norm(source - base) / norm(update),
    }


def exact(leaf, w):
    a, b = np.asarray(leaf.a, np.float64), np.asarray(leaf.b, np.float64)
    spec = {("stack", "in", "out"): "sir,sro->sio", ("out", "out", "in"): "ir,rho->hoi"}[leaf.axes]
    return np.asarray(w, np.float64), leaf.scaling * np.einsum(spec, a, b)


@pytest.mark.parametrize("name", ["layers", "head"])
def test_each_figure_is_its_definition_over_the_whole_stack(name):
    original, params = make()
    rows = {row.path: row for row in jlora.merge_error(params, base=original).rows}
    assert set(rows) == {"layers", "head"}
    row, leaf = rows[name], params[name]
    base, update = exact(leaf, jlora.dequantize(leaf.w))
    source = np.asarray(original[name], np.float64)
    on_source = dataclasses.replace(leaf, w=original[name])
    merged = np.asarray(jlora.merge_params(on_source), np.float64)
    requantised = jlora.merge_params(leaf, requantize=True)
    change = np.asarray(jlora.dequantize(requantised), np.float64) - base
    wanted = figures(base, update, source, merged, change)
    if name == "layers":
        norm = np.linalg.norm
        of_layers = [norm(m - w - u) / norm(w + u) for m, w, u in zip(merged, source, update)]
        wanted["worst"] = max(of_layers)
    for figure, value in wanted.items():
        np.testing.assert_allclose(getattr(row, figure), value, rtol=1e-6, err_msg=figure)
    assert 2**-11 < row.rounding < 2**-8  # bfloat16 has eight bits


def test_requantising_erases_small_updates_and_keeps_large_ones():
    (small,) = {r.erased for r in jlora.merge_error(make(scale=1e-4)[1]).rows if r.path == "layers"}
    (large,) = {r.erased for r in jlora.merge_error(make(scale=1.0)[1]).rows if r.path == "layers"}
    assert small > 0.3
    assert abs(large) < 0.1


def test_logits_are_those_of_each_way_of_merging():
    original, params = make(jnp.float32, scale=0.1)
    errors = jlora.merge_error(params, base=original, fn=fn, args=(X,))
    by_way = {row.way: row for row in errors.logits}
    assert list(by_way) == ["dequantised", "original", "requantised"]
    assert by_way["dequantised"].largest < 1e-5
    assert by_way["dequantised"].divergence < 1e-9
    assert by_way["requantised"].largest > 1e-3
    assert by_way["original"].divergence > 1e-6
    wanted = jlora.adapt(fn)(params, X)
    got = jlora.adapt(fn)(jlora.merge_params(params, requantize=True), X)
    row = by_way["requantised"]
    np.testing.assert_allclose(row.largest, jnp.abs(got - wanted).max(), rtol=1e-3)
    np.testing.assert_allclose(row.mean, jnp.abs(got - wanted).mean(), rtol=1e-3)
    p, q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(got)
    np.testing.assert_allclose(
        row.divergence, (jnp.exp(p) * (p - q)).sum(-1).mean(), rtol=1e-3, atol=1e-6
    )
    text = str(errors)
    for word in ("layers", "head", "erased", "requantised", "divergence"):
        assert word in text


def test_a_plain_base_has_one_way_and_nothing_to_erase():
    errors = jlora.merge_error(make(fmt=None)[1], fn=fn, args=(X.astype(jnp.bfloat16),))
    assert [row.way for row in errors.logits] == ["merged"]
    assert all(row.erased is None and row.noise is None for row in errors.rows)
    assert all(2**-11 < row.rounding < 2**-8 for row in errors.rows)


def test_a_fresh_adapter_costs_nothing():
    _, params = make(scale=0.0)
    assert all(row.update == row.rounding == 0 for row in jlora.merge_error(params).rows)


def test_trees_that_do_not_fit_are_refused():
    original, params = make()
    with pytest.raises(ValueError, match="no adapters"):
        jlora.merge_error(original)
    with pytest.raises(ValueError, match=r"base has no weight of shape .* at 'head'"):
        jlora.merge_error(params, base=original | {"head": jnp.ones((9, 2, 64))})


@pytest.mark.parametrize(("fmt", "limit"), [("nf4", 0.1), ("int8", 0.01), ("float8", 0.03)])
def test_merging_packs_again_what_was_packed(fmt, limit):
    _, params = make(fmt=fmt)
    dense, packed = jlora.merge_params(params), jlora.merge_params(params, requantize=True)
    for name in ("layers", "head"):
        assert type(packed[name]) is type(params[name].w)
        assert (packed[name].shape, packed[name].dtype) == (dense[name].shape, jnp.bfloat16)
        target = np.add(*exact(params[name], jlora.dequantize(params[name].w)))
        error = np.asarray(jlora.dequantize(packed[name]), np.float64) - target
        assert np.linalg.norm(error) < limit * np.linalg.norm(target)
    assert not any(is_lora(leaf) for leaf in jax.tree.leaves(dense, is_leaf=is_lora))
    wide = jlora.merge_params(params, dtype=jnp.float32)
    assert all(wide[name].dtype == jnp.float32 for name in ("layers", "head"))
    with pytest.raises(ValueError, match="leave dtype out"):
        jlora.merge_params(params, dtype=jnp.float32, requantize=True)


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_where_the_init_changed_the_base_the_figures_are_of_what_was_trained(init):
    original = {"w": (0.2 * jax.random.normal(jax.random.key(0), (3, 64, 64))).astype(jnp.bfloat16)}
    axes = {"w": ("stack", "in", "out")}
    packed = jlora.quantize(original, "nf4", axes=axes)
    config = jlora.LoraConfig(rank=2, alpha=2, targets="w", axes=axes, init=init)
    start = jlora.init(jax.random.key(1), packed, config, base=original)
    leaf = start["w"]
    moved = dataclasses.replace(
        leaf,
        a=leaf.a + 0.3 * jax.random.normal(jax.random.key(2), leaf.a.shape),
        b=leaf.b + 0.3 * jax.random.normal(jax.random.key(3), leaf.b.shape),
    )
    plain, _ = jlora.variants.to_plain_lora(start, {"w": moved}, config, base=original)

    def sample(params, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["w"])[0]

    error = jlora.merge_error({"w": moved}, base=plain, fn=sample, args=(X,))
    (row,) = error.rows
    base, update = exact(moved, jlora.dequantize(moved.w))
    begun = base + exact(leaf, 0.0)[1]
    trained = base + update
    learned = trained - begun
    merged = np.asarray(jlora.merge_params(plain)["w"], np.float64)
    again = jlora.dequantize(jlora.merge_params(moved, requantize=True))
    change = np.asarray(again, np.float64) - begun
    source = np.asarray(original["w"], np.float64)
    wanted = figures(begun, learned, source, merged, change)
    for name, value in wanted.items():
        assert getattr(row, name) == pytest.approx(value, rel=1e-4), name
    by_way = {x.way: x for x in error.logits}
    got = jlora.adapt(sample)(jlora.merge_params(plain), X) - jlora.adapt(sample)({"w": moved}, X)
    assert by_way["original"].largest == pytest.approx(float(jnp.abs(got).max()), rel=1e-4)
