"""Attention on TPUs: the kernels give what XLA's path does, and are chosen when lowered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jlora
from jlora.models import attention, decoder, splash

CONFIG = decoder.DecoderConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=16,
)  # fmt: skip
ROWS = PartitionSpec(("data", "fsdp"))


def mesh_of(sizes, devices=None, kind=AxisType.Auto):
    devices = np.array(jax.devices() if devices is None else devices).reshape(sizes)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)


def arrays(getkey, batch, length, heads, kv_heads, head_dim=16, dtype=jnp.float32):
    def draw(heads):
        return jax.random.normal(getkey(), (batch, length, heads, head_dim), dtype)

    ids = jnp.sort(jax.random.randint(getkey(), (batch, length), 0, 3), axis=1)
    return (draw(heads), draw(kv_heads), draw(kv_heads)), draw(heads), ids


def compare(qkv, slope, ids, tolerance, mesh=None, **options):
    scale = options.pop("scale", qkv[0].shape[-1] ** -0.5)
    options = {"segment_ids": ids, "scale": scale, **options}
    kernel = functools.partial(splash.attention, interpret=True, mesh=mesh, **options)
    expected, expected_back = jax.vjp(
        jax.jit(functools.partial(attention.causal_attention, **options)), *qkv
    )
    out, back = jax.vjp(jax.jit(kernel), *qkv)
    for one, other in zip((out, *back(slope)), (expected, *expected_back(slope)), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.abs(one).max() > 0.1
        np.testing.assert_allclose(one, other, atol=tolerance)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "segments", "options"),
    [
        (4, 2, False, {}),
        (2, 2, True, {"window": 100}),
        (2, 1, True, {"softcap": 2.0, "scale": 0.5}),
    ],
)
def test_kernels_give_what_xla_gives(getkey, heads, kv_heads, segments, options):
    """Three blocks of 128 a side, so that whole, partial and skipped blocks are there."""
    qkv, slope, ids = arrays(getkey, 1, 384, heads, kv_heads)
    compare(qkv, slope, ids if segments else None, 2e-5, **options)


def test_kernels_take_bfloat16(getkey):
    qkv, slope, ids = arrays(getkey, 1, 128, 2, 1, dtype=jnp.bfloat16)
    compare(qkv, slope, ids, 0.1)  # gradients of up to 8, of which bfloat16 has 8 bits


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["heads-cut", "fewer-heads-than-parts"])
def test_on_a_mesh_each_device_has_its_rows_and_heads(getkey, kv_heads):
    mesh = mesh_of((2, 2, 2))
    qkv, slope, ids = arrays(getkey, 4, 128, 4, kv_heads)
    compare(qkv, slope, ids, 2e-5, mesh=mesh)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(splash.attention, scale=1.0, interpret=True))
        assert "shard_map" in str(jax.make_jaxpr(run)(*qkv, ids))


def lowered(fn, *args, platform="tpu"):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def count_kernels(text):
    return text.count("tpu_custom_call")


def test_the_platform_is_chosen_when_a_program_is_lowered(getkey):
    qkv, _, ids = arrays(getkey, 1, 128, 2, 1)

    def loss(*qkv):
        return attention.causal_attention(*qkv, segment_ids=ids).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    assert count_kernels(lowered(gradient, *qkv)) == 3  # forward, and backward of q and of k and v
    assert count_kernels(lowered(gradient, *qkv, platform="cpu")) == 0
    # what only XLA's path can do on this machine still works
    tangent = jax.jvp(attention.causal_attention, qkv, qkv)[1]
    rows = jax.vmap(attention.causal_attention)(*(x[:, None] for x in qkv))
    assert tangent.shape == rows[:, 0].shape == qkv[0].shape


@pytest.mark.parametrize(("policy", "kernels"), [("none", 3), ("full", 4), ("attention", 3)])
def test_the_forward_kernel_runs_again_only_where_asked(policy, kernels):
    config = dataclasses.replace(CONFIG, remat=policy)
    model = decoder.Decoder(config)
    tokens = jnp.zeros((1, 128), jnp.int32)

    def loss(params):
        return model.apply({"params": params}, tokens).sum()

    text = lowered(jax.grad(loss), decoder.param_shapes(config))
    assert count_kernels(text) == kernels


def test_adapters_leave_the_kernels_alone(getkey):
    model = decoder.Decoder(CONFIG)
    tokens = jax.random.randint(getkey(), (1, 128), 0, 32)
    base = model.init(getkey(), tokens)["params"]
    config = jlora.LoraConfig(rank=2, targets="all-linear")
    params = jlora.init(getkey(), base, config, fn=lambda p, t: model.apply({"params": p}, t),
                        args=(tokens,))  # fmt: skip
    adapted = jlora.adapt(lambda p, t: model.apply({"params": p}, t), on_unsupported="error")
    gradient = jax.grad(lambda p, t: adapted(p, t).sum())
    assert count_kernels(lowered(gradient, params, tokens)) == 3
    dense = model.apply({"params": base}, tokens)
    np.testing.assert_allclose(adapted(params, tokens), dense, atol=1e-5)


def test_what_the_kernels_cannot_do_has_a_reason_and_runs_on_xla(getkey):
    def shapes(batch, length, heads, kv_heads, dtype=jnp.float32):
        return (
            jax.ShapeDtypeStruct((batch, length, heads, 16), dtype),
            jax.ShapeDtypeStruct((batch, length, kv_heads, 16), dtype),
        )

    mesh = mesh_of((2, 2, 2))
    assert splash.unsupported(*shapes(4, 128, 4, 2), mesh) is None
    assert "multiple of 128" in splash.unsupported(*shapes(4, 100, 4, 2))
    assert "float16" in splash.unsupported(*shapes(4, 128, 4, 2, jnp.float16))
    assert "rows" in splash.unsupported(*shapes(2, 128, 4, 2), mesh)
    assert "heads" in splash.unsupported(*shapes(4, 128, 3, 1), mesh)
    assert "Explicit" in splash.unsupported(
        *shapes(4, 128, 4, 2), mesh_of((2, 2, 2), kind=AxisType.Explicit)
    )
    qkv, _, _ = arrays(getkey, 1, 100, 2, 1)
    assert count_kernels(lowered(attention.causal_attention, *qkv)) == 0


@pytest.mark.parametrize(
    ("topology", "sizes", "head_dim", "options"),
    [
        ("v5e:2x4", (1, 4, 2), 64, {}),
        ("v5p:2x2x2", (2, 2, 2), 128, {"window": 200}),
        ("v6e:2x4", (1, 2, 4), 256, {"softcap": 50.0}),
    ],
)
def test_compiles_for_a_tpu(topology, sizes, head_dim, options):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = mesh_of(sizes, devices)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, ROWS))

    qkv = shape(8, 512, 8, head_dim), shape(8, 512, 2, head_dim), shape(8, 512, 2, head_dim)

    def loss(q, k, v, ids):
        out = attention.causal_attention(q, k, v, segment_ids=ids, mesh=mesh, **options)
        return out.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(
            *qkv, shape(8, 512, dtype=jnp.int32)
        )
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
