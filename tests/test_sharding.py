import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import sharding
from jlora.models import decoder

RULES = (
    ("*/up", P(None, "fsdp", "tensor")),
    ("*/down", P(None, "tensor", "fsdp")),
    ("embed", P("tensor", "fsdp")),
    ("*", P()),
)
CONFIG = jlora.LoraConfig(rank=2, targets=("up", "down", "embed"))
TOKENS = jnp.arange(32).reshape(8, 4) % 16


DECODER = decoder.DecoderConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_positions=64,
    qkv_bias=True,
    qk_norm=True,
)


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def forward(params, tokens):
    def layer(x, w):
        return x + jax.nn.silu(x @ w["up"]) @ w["down"], None

    x = params["embed"][tokens]
    return jax.lax.scan(layer, x, params["layers"])[0] @ params["embed"].T


def make_params(key):
    def normal(i, *shape):
        return 0.1 * jax.random.normal(jax.random.fold_in(key, i), shape)

    layers = {"up": normal(0, 3, 8, 16), "down": normal(1, 3, 16, 8)}
    return {"layers": layers, "embed": normal(2, 16, 8), "scale": normal(3, 8)}


def adapt_params(params):
    return jlora.init(jax.random.key(1), params, CONFIG, fn=forward, args=(TOKENS,))


def test_adapters_follow_their_weights(mesh):
    abstract = jax.eval_shape(adapt_params, make_params(jax.random.key(0)))
    placed = sharding.shardings(abstract, mesh, RULES)
    up = placed["layers"]["up"]
    assert (up.w.spec, up.a.spec, up.b.spec) == (
        P(None, "fsdp", "tensor"), P(None, "fsdp", None), P(None, None, "tensor"),
    )  # fmt: skip
    assert (placed["embed"].a.spec, placed["embed"].b.spec) == (P("tensor", None), P(None, "fsdp"))
    replicated = sharding.shardings(abstract, mesh, RULES, replicate=True)
    assert replicated["layers"]["up"].a.is_fully_replicated
    assert replicated["layers"]["up"].w.spec == P(None, "fsdp", "tensor")


def test_an_axis_that_does_not_divide_is_replicated_with_a_note(mesh, caplog):
    shape = jax.ShapeDtypeStruct((3, 8, 15), jnp.float32)
    with caplog.at_level(logging.WARNING, logger="jlora"):
        placed = sharding.shardings({"layers": {"up": shape}}, mesh, RULES)
    assert placed["layers"]["up"].spec == P(None, "fsdp", None)
    assert "15 does not divide" in caplog.text


def test_rules_that_do_not_fit_are_refused(mesh):
    tree = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    with pytest.raises(ValueError, match="No sharding rule matches 'w'"):
        sharding.shardings(tree, mesh, RULES[:3])
    with pytest.raises(ValueError, match="model"):
        sharding.shardings(tree, mesh, [("*", P("model"))])
    with pytest.raises(ValueError, match="more entries"):
        sharding.shardings(tree, mesh, [("*", P(None, None, "data"))])


def train(params, steps=4):
    tx = jlora.optimizer(optax.adam(0.05), CONFIG)
    run = jlora.adapt(forward, on_unsupported="error")
    trainable, frozen = jlora.split(params, CONFIG)

    @jax.jit
    def step(trainable, opt_state, tokens):
        def loss_fn(trainable):
            logits = run(jlora.combine(trainable, frozen), tokens)[:, :-1]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    opt_state, losses = tx.init(trainable), []
    for _ in range(steps):
        trainable, opt_state, loss = step(trainable, opt_state, TOKENS)
        losses.append(float(loss))
    return losses, trainable


def test_a_sharded_run_gives_the_losses_of_one_device(mesh):
    params = make_params(jax.random.key(0))
    wanted, _ = train(adapt_params(params))
    abstract = jax.eval_shape(adapt_params, params)
    placed = sharding.shardings(abstract, mesh, RULES)
    made = jax.jit(adapt_params, out_shardings=placed)(params)
    jax.tree.map(
        lambda x, s: None if x.sharding.is_equivalent_to(s, x.ndim) else pytest.fail(str(s)),
        made,
        placed,
    )
    for one, many in zip(jax.tree.leaves(adapt_params(params)), jax.tree.leaves(made)):
        np.testing.assert_array_equal(one, many)  # the same adapters on 1 and on 8 devices
    losses, trainable = train(made)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert losses[-1] < losses[0]
    assert isinstance(trainable["layers"]["up"].a.sharding, NamedSharding)


@pytest.mark.parametrize("spec", [P(None, "tensor"), P("tensor", None), P()])
def test_meshes_of_explicit_axes_and_an_asked_out_sharding(spec):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        w = jax.device_put(jax.random.normal(key, (16, 24)), NamedSharding(mesh, spec))
        x = jax.device_put(jax.random.normal(key, (8, 16)), NamedSharding(mesh, P("data")))
        fresh = jlora.init(key, {"w": w}, jlora.LoraConfig(rank=2, targets=("w",)))
        params = jax.device_put(fresh, sharding.follow(fresh, {"w": w.sharding}))

        def fn(params, x):
            h = jnp.einsum("bi,io->bo", x, params["w"], out_sharding=P("data", None))
            return h, x @ params["w"]

        for got, wanted in zip(jlora.adapt(fn, on_unsupported="error")(params, x), fn({"w": w}, x)):
            np.testing.assert_array_equal(got, wanted)
            assert got.sharding.is_equivalent_to(wanted.sharding, 2)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, None),
        ({"fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (2, 2, 2)),
        ({"data": 8}, (8, 1, 1)),
        ({"data": 3, "fsdp": -1}, None),
        ({"fsdp": 16}, None),
        ({"fsdp": 0}, None),
        ({"data": -1, "fsdp": -1}, None),
        ({"model": 8}, None),
    ],
)
def test_a_mesh_takes_all_devices_or_is_refused_with_sizes_that_would(sizes, shape):
    if shape is not None:
        mesh = sharding.make_mesh(sizes, jax.devices())
        assert mesh.devices.shape == shape
        assert mesh.axis_names == ("data", "fsdp", "tensor")
        return
    with pytest.raises(ValueError) as refused:
        sharding.make_mesh(sizes, jax.devices())
    if "does not fit" in str(refused.value):
        offered = str(refused.value).split("do: ")[1].rstrip(".").split("; ")
        for text in offered:
            pairs = (part.split(": ") for part in text.split(", "))
            sharding.make_mesh({name: int(size) for name, size in pairs}, jax.devices())


@dataclasses.dataclass(frozen=True)
class Device:
    """As a device of a pod of several slices tells of itself."""

    id: int
    slice_index: int
    platform: str = "none"
    device_kind: str = "none"


def test_slices_are_between_rows_of_data_and_then_of_fsdp_never_of_tensor():
    devices = [Device(i, i // 4) for i in range(16)]

    def slices(sizes):
        mesh = sharding.make_mesh(sizes, devices)
        return [[[d.slice_index for d in row] for row in plane] for plane in mesh.devices]

    assert slices({"data": 4, "fsdp": 2, "tensor": 2}) == [[[i, i], [i, i]] for i in range(4)]
    assert slices({"data": 2, "fsdp": 4, "tensor": 2}) == [
        [[0, 0], [0, 0], [1, 1], [1, 1]], [[2, 2], [2, 2], [3, 3], [3, 3]],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="in 4 slices"):
        sharding.make_mesh({"tensor": 8, "data": 2}, devices)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "post_norms": True, "mlp_bias": True, "o_bias": True},
        {"fused_projections": True},
        {"experts": decoder.Experts(count=4, per_token=2, renormalize=True)},
    ],
    ids=["untied", "biases", "fused", "experts"],
)
@pytest.mark.parametrize("fmt", [None, "nf4", "int8"])
def test_the_rules_of_the_decoder_cut_all_that_is_large(mesh, changes, fmt):
    config = dataclasses.replace(DECODER, **changes)
    params = decoder.param_shapes(config)

    def apply(params, tokens):
        return decoder.Decoder(config).apply({"params": params}, tokens)

    lora = jlora.LoraConfig(rank=2, targets=re.compile("_proj/kernel$"))
    seen = {"fn": apply, "args": (TOKENS,)}
    if fmt:
        params = jlora.quantize(params, fmt, targets=lora.targets, **seen)
    init = functools.partial(jlora.init, config=lora, **seen)
    params = jax.eval_shape(init, jax.random.key(0), params)
    placed = sharding.shardings(params, mesh, sharding.DECODER_RULES)
    large = 0
    for leaf, where in zip(jax.tree.leaves(params), jax.tree.leaves(placed)):
        parts = leaf.size // np.prod(where.shard_shape(leaf.shape))
        is_large = leaf.size > 8192
        assert parts == 4 or not is_large, (leaf.shape, where.spec)
        large += is_large
    assert large >= 4
