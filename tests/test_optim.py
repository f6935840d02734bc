import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora


@pytest.fixture
def setup():
    config = jlora.LoraConfig(rank=2, targets=("w",), train=("bias",))
    params = {"w": jnp.ones((6, 4)), "bias": jnp.zeros(4), "norm": jnp.ones(4)}
    return jlora.init(jax.random.key(0), params, config), config


def ones_like(tree):
    return jax.tree.map(jnp.ones_like, tree)


def test_frozen_leaves_never_move_and_have_no_moments(setup):
    params, config = setup
    tx = jlora.optimizer(optax.adamw(0.1), config)
    state = tx.init(params)
    updates, state = tx.update(ones_like(params), state, params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["w"].w, params["w"].w)
    np.testing.assert_array_equal(moved["norm"], params["norm"])
    assert np.all(moved["w"].a != params["w"].a)
    assert np.all(moved["bias"] != params["bias"])
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert moments == 2 * (6 * 2 + 2 * 4 + 4)


def test_the_trainable_tree_alone_gives_the_same_updates(setup):
    params, config = setup
    tx = jlora.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), config)
    trainable, _ = jlora.split(params, config)
    whole, _ = tx.update(ones_like(params), tx.init(params), params)
    cut, _ = tx.update(ones_like(trainable), tx.init(trainable), trainable)
    np.testing.assert_array_equal(whole["w"].b, cut["w"].b)
    assert cut["norm"] is None


def test_a_global_norm_clip_sees_everything_that_trains(setup):
    params, config = setup
    tx = jlora.optimizer(optax.clip_by_global_norm(1.0), config)
    trainable, _ = jlora.split(params, config)
    updates, _ = tx.update(ones_like(trainable), tx.init(trainable), trainable)
    np.testing.assert_allclose(optax.global_norm(updates), 1.0, rtol=1e-6)


def test_each_label_can_have_its_own_transformation(setup):
    params, config = setup
    trainable, _ = jlora.split(params, config)
    tx = jlora.optimizer(
        {"lora_a": optax.sgd(1.0), "lora_b": optax.sgd(10.0), "full": optax.sgd(0.0)}, config
    )
    updates, _ = tx.update(ones_like(trainable), tx.init(trainable), trainable)
    assert np.all(updates["w"].a == -1)
    assert np.all(updates["w"].b == -10)
    assert np.all(updates["bias"] == 0)


def test_labels_that_are_unknown_or_have_no_transformation_are_refused(setup):
    params, config = setup
    with pytest.raises(ValueError, match="lora_c"):
        jlora.optimizer({"lora_c": optax.sgd(1.0)}, config)
    with pytest.raises(ValueError, match=r"\['full', 'lora_b'\]"):
        jlora.optimizer({"lora_a": optax.sgd(1.0)}, config).init(params)


def test_lora_plus_trains_b_faster_by_the_ratio(setup):
    params, config = setup
    trainable, _ = jlora.split(params, config)
    for rate in (0.5, lambda step: 0.5):
        tx = jlora.lora_plus(optax.sgd, rate, config, ratio=16)
        updates, _ = tx.update(ones_like(trainable), tx.init(trainable), trainable)
        assert np.all(updates["w"].a == -0.5)
        assert np.all(updates["w"].b == -8)
        assert np.all(updates["bias"] == -0.5)
    with pytest.raises(ValueError, match="at least 1"):
        jlora.lora_plus(optax.sgd, 1.0, config, ratio=0.5)


def test_lora_fa_steps_the_product_along_the_projected_dense_gradient():
    config = jlora.LoraConfig(rank=2, alpha=6, targets=("w",), axes={"w": ("stack", "in", "out")})
    key = jax.random.key(0)
    params = jlora.init(key, {"w": jnp.ones((3, 6, 4))}, config)
    trainable, _ = jlora.split(params, config)
    dense = jax.random.normal(key, (3, 6, 4))  # the gradient of the dense weight
    a, scaling = trainable["w"].a, trainable["w"].scaling
    grads = ones_like(trainable)
    grads["w"] = jlora.LoraArray(
        None, grads["w"].a, scaling * jnp.einsum("sir,sio->sro", a, dense),
        scaling=scaling, axes=trainable["w"].axes,
    )  # fmt: skip
    tx = jlora.lora_fa(optax.sgd(1.0), config)
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    assert not np.any(updates["w"].a)
    stepped = scaling * jnp.einsum("sir,sro->sio", a, updates["w"].b)
    projector = jnp.einsum("sir,srj->sij", a, jnp.linalg.pinv(a))
    np.testing.assert_allclose(stepped, -projector @ dense, rtol=1e-4, atol=1e-5)


def test_lora_fa_takes_the_steps_of_pefts_optimizer(monkeypatch):
    torch = pytest.importorskip("torch", reason="the reference is PEFT on PyTorch")
    peft = pytest.importorskip("peft", reason="the reference is PEFT on PyTorch")
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # else it rounds to bfloat16
    torch.manual_seed(0)
    rank, alpha, rate = 3, 6, 0.05
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Tanh(),
                                torch.nn.Linear(5, 4, bias=False))  # fmt: skip
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0", "2"])
    model = peft.get_peft_model(model, settings)
    optimizer = create_lorafa_optimizer(model, r=rank, lora_alpha=alpha, lr=rate)
    for group in optimizer.param_groups:
        group["eps"] = 1e-12  # PEFT adds it before the bias correction, optax after it
    layers = [model.base_model.model[i] for i in (0, 2)]

    def read(tensor):
        return jnp.asarray(tensor.detach().numpy().T)

    config = jlora.LoraConfig(rank=rank, alpha=alpha, targets=("0", "1"))
    params = [
        jlora.LoraArray(
            read(layer.base_layer.weight),
            read(layer.lora_A["default"].weight),
            read(layer.lora_B["default"].weight),
            scaling=alpha / rank,
        )
        for layer in layers
    ]
    trainable, frozen = jlora.split(params, config)
    tx = jlora.lora_fa(optax.adamw(rate, eps=1e-12, weight_decay=0.0), config)
    state = tx.init(trainable)
    forward = jlora.adapt(lambda p, x: jnp.tanh(x @ p[0]) @ p[1])
    for step in range(5):
        x = np.random.default_rng(step).normal(size=(7, 6)).astype(np.float32)
        optimizer.zero_grad()
        (model(torch.from_numpy(x)) ** 2).mean().backward()
        optimizer.step()
        grads = jax.grad(
            lambda t: jnp.mean(forward(jlora.combine(t, frozen), x) ** 2)  # noqa: B023
        )(trainable)
        updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        for leaf, layer in zip(trainable, layers):
            np.testing.assert_array_equal(leaf.a, read(layer.lora_A["default"].weight))
            # Adam divides by the gradients' own size, which amplifies float32's rounding.
            np.testing.assert_allclose(
                leaf.b, read(layer.lora_B["default"].weight), rtol=2e-3, atol=2e-5
            )
    assert np.abs(trainable[0].b).max() > 3 * rate  # it moved
