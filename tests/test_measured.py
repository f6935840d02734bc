"""Starts that are measured on data: against dense decompositions, on all kinds of weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_close, is_lora

import jlora
from jlora import measured

AXES = {"stack": ("stack", "in", "out"), "heads": ("in", "out", "out")}
CONFIG = jlora.LoraConfig(rank=3, alpha=6, targets=("first", "stack", "heads"), axes=AXES)


def model(params, x):
    x = jnp.tanh(x @ params["first"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
    return jnp.einsum("bi,ihk->bhk", x, params["heads"])


def make(fmt=None):
    shapes = {"first": (20, 24), "stack": (2, 24, 24), "heads": (24, 4, 5)}
    base = {
        name: jax.random.normal(jax.random.key(i), shape) / 4
        for i, (name, shape) in enumerate(shapes.items())
    }
    plain = jlora.quantize(base, fmt, targets=tuple(base), axes=AXES) if fmt else base
    # Inputs whose energy falls, so that there is something to find.
    scale = 2.0 ** -jnp.arange(20) * 4
    batches = [jax.random.normal(jax.random.key(7 + i), (64, 20)) * scale for i in range(2)]
    return plain, jlora.init(jax.random.key(3), plain, CONFIG), batches


def loss(params, batch):
    return jnp.mean(jnp.square(jlora.adapt(model)(params, batch) - 1))


def dense_gradients(base, batches):
    grad = jax.grad(lambda p, x: jnp.mean(jnp.square(model(p, x) - 1)))
    return jax.tree.map(lambda *xs: sum(xs), *(grad(base, batch) for batch in batches))


def spans_alike(a, b, tolerance=1e-3):
    """Whether columns of two matrices span the same space."""
    a, b = (np.linalg.qr(np.asarray(x, np.float64))[0] for x in (a, b))
    return np.linalg.norm(a - b @ (b.T @ a)) < tolerance


@pytest.mark.parametrize("fmt", [None, "int8"])
def test_lora_ga_is_the_papers_start(fmt):
    base, params, batches = make(fmt)
    dense = jlora.dequantize(base)
    started, config = measured.lora_ga(
        jax.random.key(0), params, CONFIG, loss, batches, iterations=8
    )
    assert config.init == "lora_ga"
    gradients = dense_gradients(dense, batches)
    for name, leaf in started.items():
        sides = (-1, *((24, 24) if name == "stack" else (leaf.shape[0], np.prod(leaf.shape[1:]))))
        for g, a, b in zip(
            gradients[name].reshape(sides),
            leaf.a.reshape(-1, sides[1], 3),
            leaf.b.reshape(-1, 3, sides[2]),
        ):
            u, _, v = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
            size = sides[2] ** 0.25 / 4
            assert spans_alike(a, u[:, :3], 2e-2)
            assert_close(jnp.linalg.norm(a, axis=0), jnp.full(3, size), 1e-4)
            assert spans_alike(b.T, v[3:6].T, 0.2)
    x = batches[0]
    limit = 1e-5 if fmt is None else 0.05
    assert_close(jlora.adapt(model)(started, x), model(dense, x), limit)


def test_lora_ga_moves_as_full_training_would():
    """The first step's update of the weight is nearer to the gradient than from a default start."""
    base, params, batches = make()
    started, _ = measured.lora_ga(jax.random.key(0), params, CONFIG, loss, batches)
    want = dense_gradients(base, batches)

    def alignment(tree):
        trainable, frozen = jlora.split(tree, CONFIG)
        grads = jax.grad(lambda t: sum(loss(jlora.combine(t, frozen), x) for x in batches))(
            trainable
        )
        moved = jax.tree.map(lambda t, g: t - 1e-4 * g, trainable, grads)
        after = jlora.merge_params(jlora.combine(moved, frozen))
        before = jlora.merge_params(tree)
        step = [np.ravel(after[n] - before[n]) for n in base]
        dense = [-np.ravel(want[n]) for n in base]
        step, dense = map(np.concatenate, (step, dense))
        return step @ dense / np.linalg.norm(step) / np.linalg.norm(dense)

    assert alignment(started) > alignment(params) + 0.2


def test_its_adapter_goes_back_to_the_original_weights():
    base, params, batches = make()
    started, config = measured.lora_ga(jax.random.key(0), params, CONFIG, loss, batches)
    with pytest.raises(ValueError, match="to_plain_lora"):
        jlora.peft.save("nowhere", started, config)
    with pytest.raises(ValueError, match=r"call jlora\.init with init='default'"):
        jlora.init(jax.random.key(0), base, config)
    moved = jax.tree.map(lambda x: dataclasses.replace(x, b=x.b + 0.1), started, is_leaf=is_lora)
    plain, read = jlora.variants.to_plain_lora(started, moved, config)
    assert read.init == "default"
    assert_close(jlora.merge_params(plain), jlora.merge_params(moved), 1e-5)
    assert_close({name: leaf.w for name, leaf in plain.items()}, base, 1e-5)


def inputs_of(base, x):
    """What each weight multiplies, by layers."""
    first = jnp.tanh(x @ base["first"])
    second = jnp.tanh(first @ base["stack"][0])
    return {"first": [x], "stack": [first, second], "heads": [jnp.tanh(second @ base["stack"][1])]}


@pytest.mark.parametrize("fmt", [None, "nf4"])
def test_eva_takes_the_inputs_leading_directions(fmt):
    base, params, batches = make(fmt)
    dense = jlora.dequantize(base)
    started, config = measured.eva(
        jax.random.key(0), params, CONFIG, jlora.adapt(model), batches, iterations=8
    )
    x = jnp.concatenate(batches)
    seen = inputs_of(dense, x)
    shares = {}
    for name, layers in seen.items():
        spectra = []
        for i, layer in enumerate(layers):
            _, s, v = np.linalg.svd(np.asarray(layer, np.float64), full_matrices=False)
            spectra.append(s**2 / np.sum(s**2))
            leaf = started[name]
            if is_lora(leaf):
                a = leaf.a[i] if name == "stack" else leaf.a
                assert spans_alike(a, v[: leaf.rank].T, 2e-2), name
                assert_close(a.T @ a, jnp.eye(leaf.rank), 1e-4)
        shares[name] = np.mean(spectra, 0)[:6]
    # Ranks are where the shares are, with as many in all (a layer of the stack counts for itself).
    ranks = {name: leaf.rank if is_lora(leaf) else 0 for name, leaf in started.items()}
    assert ranks["first"] + 2 * ranks["stack"] + ranks["heads"] <= 12
    assert ranks["first"] + 2 * ranks["stack"] + ranks["heads"] >= 11
    assert max(ranks.values()) <= 6
    taken = min(shares[n][r - 1] for n, r in ranks.items() if r)
    left = max((shares[n][r] for n, r in ranks.items() if r < 6), default=0)
    assert taken >= left * 0.999 or ranks["stack"] < 6
    np.testing.assert_array_equal(jlora.adapt(model)(started, x), jlora.adapt(model)(params, x))
    assert all(leaf.scaling == 2 for leaf in started.values() if is_lora(leaf))
    again = jlora.init(jax.random.key(3), base, config)
    assert jax.tree.structure(again) == jax.tree.structure(started)
    assert [y.shape for y in jax.tree.leaves(again)] == [y.shape for y in jax.tree.leaves(started)]


def test_mistakes_are_told():
    base, params, batches = make()
    with pytest.raises(ValueError, match="no adapters"):
        measured.lora_ga(jax.random.key(0), base, CONFIG, loss, batches)
    with pytest.raises(ValueError, match="no batches"):
        measured.eva(jax.random.key(0), params, CONFIG, jlora.adapt(model), [])
    with pytest.raises(ValueError, match="rho must be at least 1"):
        measured.eva(jax.random.key(0), params, CONFIG, jlora.adapt(model), batches, rho=0.5)
    wide = dataclasses.replace(CONFIG, rank=11)
    with pytest.raises(ValueError, match="Lower its rank to 10"):
        measured.lora_ga(
            jax.random.key(0), jlora.init(jax.random.key(0), base, wide), wide, loss, batches
        )
    dora = dataclasses.replace(CONFIG, variant="dora")
    with pytest.raises(ValueError, match="is DoRA; these starts are for LoRA alone"):
        measured.eva(
            jax.random.key(0), jlora.init(jax.random.key(0), base, dora), dora, model, batches
        )
