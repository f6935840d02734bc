import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_close, is_lora, randomise

import jlora
from jlora import nf4, variants

RANK = 4
ROLES = {
    "matrix": ("in", "out"),
    "stack": ("stack", "in", "out"),
    "heads": ("in", "out", "out"),
    "merged": ("in", "in", "out"),
    "experts": ("stack", "out", "stack", "in"),
}
SHAPES = {
    "matrix": (64, 48),
    "stack": (3, 64, 40),
    "heads": (64, 4, 10),
    "merged": (4, 16, 40),
    "experts": (2, 40, 3, 64),
}


def make(
    fmt=None,
    alpha=8,
    dtype=jnp.float32,
    init="default",
    names=tuple(SHAPES),
    settings=None,
    **options,
):
    """Weights whose singular values fall, the adapted tree, and its config."""
    params = {}
    for i, name in enumerate(names):
        w = jax.random.normal(jax.random.key(i), SHAPES[name])
        params[name] = (w * jnp.linspace(2, 0.1, w.shape[-1])).astype(dtype)
    axes = {name: ROLES[name] for name in names}
    base = jlora.quantize(params, fmt, targets=names, axes=axes) if fmt else params
    config = jlora.LoraConfig(rank=RANK, alpha=alpha, targets=names, axes=axes, init=init)
    config = dataclasses.replace(config, **settings or {})
    adapted = jlora.init(jax.random.key(9), base, config, base=params if fmt else None, **options)
    return params, adapted, config


def matrices(w, roles):
    """`[stack, in, out]`, by numpy."""
    order = [i for role in ("stack", "in", "out") for i, r in enumerate(roles) if r == role]
    sizes = {role: 1 for role in ("stack", "in", "out")}
    for size, role in zip(w.shape, roles):
        sizes[role] *= size
    return np.asarray(w, np.float64).transpose(order).reshape(*sizes.values())


def update(leaf):
    a = np.asarray(leaf.a, np.float64).reshape(-1, np.prod(_sizes(leaf, "in")), leaf.rank)
    b = np.asarray(leaf.b, np.float64).reshape(-1, leaf.rank, np.prod(_sizes(leaf, "out")))
    return leaf.scaling * a @ b


def _sizes(leaf, wanted):
    return [size for size, role in zip(leaf.shape, leaf.axes) if role == wanted]


def best(w, rank=RANK):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def total_error(params, adapted):
    """`|w - (q + scaling a b)|` over all weights."""
    merged = jlora.merge_params(adapted, dtype=jnp.float32)
    return sum(float(jnp.linalg.norm((merged[k] - params[k]).ravel()) ** 2) for k in params) ** 0.5


@pytest.mark.parametrize("alpha", [4, 32])
def test_pissa_takes_the_best_update_out_of_the_base(alpha):
    params, adapted, _ = make(alpha=alpha, init="pissa")
    for name, leaf in adapted.items():
        wanted = best(matrices(params[name], leaf.axes))
        np.testing.assert_allclose(update(leaf), wanted, rtol=1e-3, atol=2e-4, err_msg=name)
        residual = matrices(leaf.w, leaf.axes)
        np.testing.assert_allclose(
            residual, matrices(params[name], leaf.axes) - wanted, rtol=1e-3, atol=2e-4
        )
        norms = [np.linalg.norm(x) for x in (leaf.a, leaf.b)]
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)  # shared out evenly


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_a_fresh_pissa_stands_for_the_original_weights(dtype, limit):
    params, adapted, config = make(dtype=dtype, init="pissa")
    merged = jlora.merge_params(adapted)
    for name in params:
        assert adapted[name].w.dtype == dtype
        scale = float(jnp.abs(params[name]).max())
        difference = jnp.abs(merged[name].astype(jnp.float32) - params[name].astype(jnp.float32))
        assert float(difference.max()) <= limit * scale
    x = jax.random.normal(jax.random.key(0), (5, 64), dtype)
    got = jlora.adapt(jnp.matmul)(x, adapted["matrix"])
    assert_close(got, x @ params["matrix"], 4 * limit)
    trainable, frozen = jlora.split(adapted, config)
    chex.assert_trees_all_equal(jlora.combine(trainable, frozen), adapted)


def test_the_randomised_decomposition_is_near_the_exact_one():
    _, exact, _ = make(init="pissa")
    _, near, _ = make(init="pissa_niter_16")
    _, far, _ = make(init="pissa_niter_0")
    for name in exact:
        wanted = update(exact[name])
        error = [np.linalg.norm(update(tree[name]) - wanted) for tree in (near, far)]
        assert error[0] < 1e-3 * np.linalg.norm(wanted)
        assert error[0] < error[1]


def test_converted_to_plain_lora_it_is_the_trained_weight_on_the_original_one():
    params, initial, config = make(init="pissa")
    trained = randomise(initial, jax.random.key(3))
    plain, plain_config = variants.to_plain_lora(initial, trained, config)
    assert (plain_config.rank, plain_config.alpha, plain_config.init) == (8, 16, "default")
    assert plain_config.scaling_of("matrix") == config.scaling_of("matrix")
    stabilized = dataclasses.replace(config, rank_stabilized=True)
    again = variants.to_plain_lora(initial, trained, stabilized)[1]
    np.testing.assert_allclose(again.scaling_of("matrix"), stabilized.scaling_of("matrix"))
    settings = dict(rank=4, alpha=32, rank_stabilized=True, rank_pattern={"matrix": 2})
    _, initial, uneven = make(init="pissa", settings=settings)
    exact, of_exact = variants.to_plain_lora(initial, initial, uneven)
    for name, leaf in exact.items():  # to the last bit, or an export would name it as an exception
        assert leaf.scaling == of_exact.scaling_of(name)
    for name, leaf in plain.items():
        assert leaf.rank == 2 * RANK
        assert_close(leaf.w, params[name], 1e-6)
    on_originals = {k: dataclasses.replace(leaf, w=params[k]) for k, leaf in plain.items()}
    assert_close(jlora.merge_params(on_originals), jlora.merge_params(trained), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_started_from_the_weights_a_quantised_base_is_nearer_to_them(fmt):
    params, plain, _ = make(fmt)
    errors = {"default": total_error(params, plain)}
    for init in ("pissa", "loftq", "loftq_iter_5"):
        _, adapted, _ = make(fmt, init=init)
        assert jax.tree.structure(adapted) == jax.tree.structure(plain)
        chex.assert_trees_all_equal_shapes_and_dtypes(adapted, plain)
        errors[init] = total_error(params, adapted)
    assert errors["loftq"] < 0.95 * errors["default"]
    assert errors["loftq_iter_5"] < errors["loftq"]
    assert errors["pissa"] < 0.95 * errors["default"]


def test_more_iterations_leave_less_error():
    params, plain, _ = make("nf4", names=("stack",))
    for start in (
        lambda n: variants.loftq(plain, params, iterations=n),
        lambda n: variants.pissa(plain, base=params, iterations=n),
    ):
        errors = [total_error(params, start(n)) for n in (1, 2, 5, 10)]
        assert errors[-1] < errors[0]
        assert all(later < 1.01 * earlier for earlier, later in itertools.pairwise(errors))


def test_loftq_is_the_algorithm_of_the_paper_on_this_nf4():
    params, plain, _ = make("nf4", names=("matrix",))
    w = np.asarray(params["matrix"])
    fitted = np.zeros_like(w)

    def quantise(x):  # by blocks along the contracted axis, as it is stored
        codes, absmax = nf4.pack(jnp.asarray(x.T))
        absmax = nf4.restore(*nf4.compress(absmax))
        return np.asarray(nf4.unpack(codes, absmax, jnp.float32)).T

    for n in (1, 2, 3):
        q = quantise((w - fitted).astype(np.float32))
        fitted = best(w - q)
        leaf = variants.loftq(plain, params, iterations=n)["matrix"]
        got = np.linalg.norm(w - q - update(leaf)[0])
        np.testing.assert_allclose(got, np.linalg.norm(w - q - fitted), rtol=2e-3)
        same = np.isclose(jlora.dequantize(leaf.w), q, atol=1e-5).mean()
        assert same > 0.99  # a value next to a threshold may take the other code


@pytest.mark.parametrize("fmt", [None, "int8"])
def test_olora_takes_a_basis_out_of_the_base(fmt):
    params, adapted, _ = make(fmt, init="olora")
    for name, leaf in adapted.items():
        b = np.asarray(leaf.b, np.float64).reshape(-1, RANK, np.prod(_sizes(leaf, "out")))
        gram = np.einsum("lro,lso->lrs", b, b)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(RANK), gram.shape), atol=1e-5)
        got = jlora.merge_params(leaf, dtype=jnp.float32)
        limit = 1e-5 if fmt is None else 0.05
        np.testing.assert_allclose(got, params[name], atol=limit * float(jnp.abs(leaf.a).max()))


def test_olora_is_pefts():
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("peft")
    params, adapted, _ = make(init="olora", names=("matrix",))
    linear = torch.nn.Linear(*SHAPES["matrix"], bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(np.array(params["matrix"]).T))
    settings = dict(r=RANK, lora_alpha=8, target_modules=["0"], init_lora_weights="olora")
    model = reference.get_peft_model(torch.nn.Sequential(linear), reference.LoraConfig(**settings))
    layer, leaf = model.base_model.model[0], adapted["matrix"]
    a, b = (x["default"].weight.detach().numpy() for x in (layer.lora_A, layer.lora_B))
    np.testing.assert_allclose(leaf.a @ leaf.b, (b @ a).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.abs(leaf.a), np.abs(a.T), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(leaf.w, layer.base_layer.weight.detach().numpy().T, atol=1e-4)


def test_it_works_under_jit_on_shapes_and_in_json():
    params, adapted, config = make(init="pissa", names=("stack",))
    again = jlora.LoraConfig.from_json(config.to_json())
    assert again == config

    def start(params):
        return jlora.init(jax.random.key(9), params, config)

    assert_close(jax.jit(start)(params), adapted, 1e-4)
    abstract = start(jax.eval_shape(lambda: params))
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, adapted)
    assert is_lora(abstract["stack"])


def test_mistakes_get_one_clear_message():
    params, plain, config = make("nf4", names=("matrix",))
    for init in ("pisa", "pissa_niter_", "loftq_iter_x"):
        wrong = dataclasses.replace(config, init=init)
        with pytest.raises(ValueError, match="init must be 'default' or match"):
            jlora.init(jax.random.key(0), params, wrong)
    loftq = dataclasses.replace(config, init="loftq")
    with pytest.raises(ValueError, match="no weight with an adapter is quantised"):
        jlora.init(jax.random.key(0), params, loftq, base=params)
    with pytest.raises(ValueError, match="pass base="):
        variants.loftq(plain, None)
    with pytest.raises(ValueError, match="base has no weight of shape"):
        variants.loftq(plain, {"matrix": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="iterations must be"):
        variants.loftq(plain, params, iterations=0)
    with pytest.raises(ValueError, match="needs a key"):
        variants.pissa(plain, base=params, niter=4)
    with pytest.raises(ValueError, match="no adapters"):
        variants.pissa(params)
    with pytest.raises(ValueError, match="'matrix' is quantised"):
        variants.to_plain_lora(plain, plain, config)


def test_peft_gets_no_adapter_of_a_changed_base(tmp_path):
    _, adapted, config = make(init="pissa", names=("matrix",))
    with pytest.raises(ValueError, match=r"changed the base.*to_plain_lora"):
        jlora.peft.save(tmp_path, adapted, config)
