"""Meshes of Explicit axes, on which a placement is part of an array's type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from laws import assert_adapted_equals_dense, randomise

import jlora
from jlora import sharding

MATRIX, STACK, HEADS = ("in", "out"), ("stack", "in", "out"), ("in", "out", "out")


def tokens_of(x):
    return (jnp.abs(x[:, 0]) * 3).astype(int)


# From its name: the function, the weight's shape, roles and placement, and the input's placement.
USES = {
    "nothing contracted is sharded": (
        lambda p, x: x @ p["w"],
        (8, 16), MATRIX, P(None, "tensor"), P("data"),
    ),
    "a sharded contraction": (
        lambda p, x: jnp.einsum("bi,io->bo", x, p["w"], out_sharding=P("data", "tensor")),
        (8, 16), MATRIX, P("fsdp", "tensor"), P("data", "fsdp"),
    ),
    "rows and columns on one mesh axis": (
        lambda p, x: jnp.einsum("bi,io->bo", x, p["w"], out_sharding=P("data", None)),
        (8, 16), MATRIX, P("tensor", "data"), P("data", "tensor"),
    ),
    "only the weight is sharded": (
        lambda p, x: jnp.einsum("bi,io->bo", x, p["w"], out_sharding=P("data", "tensor")),
        (8, 16), MATRIX, P("fsdp", "tensor"), P("data"),
    ),
    "the weight on the left": (
        lambda p, x: jnp.einsum("oi,bi->bo", p["w"], x, out_sharding=P("data", "tensor")),
        (16, 8), ("out", "in"), P("tensor", "fsdp"), P("data", "fsdp"),
    ),
    "transposed": (
        lambda p, x: jnp.matmul(x, p["w"].T, out_sharding=P("data")),
        (16, 8), ("out", "in"), P("tensor", "fsdp"), P("data", "fsdp"),
    ),
    "heads": (
        lambda p, x: jnp.einsum(
            "bd,dhk->bhk", x,
            jnp.reshape(p["w"], (8, 4, 6), out_sharding=P("fsdp", "tensor", None)),
            out_sharding=P("data", "tensor", None),
        ),
        (8, 24), MATRIX, P("fsdp", "tensor"), P("data", "fsdp"),
    ),
    "experts": (
        lambda p, x: jnp.einsum("bd,edf->ebf", x, p["w"], out_sharding=P("data")),
        (4, 8, 6), STACK, P("data", "fsdp", "tensor"), P(None, "fsdp"),
    ),
    "a checkpointed scan": (
        lambda p, x: jax.lax.scan(
            jax.checkpoint(
                lambda c, w: (jnp.tanh(jnp.matmul(c, w, out_sharding=P("data", "fsdp"))), None)
            ),
            x, p["w"],
        )[0],
        (3, 8, 8), STACK, P(None, "fsdp", "tensor"), P("data", "fsdp"),
    ),
    "an embedding that asks for its placement, and its tied head": (
        lambda p, x: jnp.matmul(
            p["w"].at[tokens_of(x)].get(out_sharding=P("data", None)), p["w"].T,
            out_sharding=P("data", "tensor"),
        ),
        (8, 16), MATRIX, P("tensor", "fsdp"), P("data"),
    ),
    "an embedding": (
        lambda p, x: p["w"][tokens_of(x)],
        (8, 16), MATRIX, P(None, "fsdp"), P(),
    ),
    "moved first": (
        lambda p, x: x @ jax.reshard(p["w"], P(None, None)),
        (8, 16), MATRIX, P("fsdp", "tensor"), P("data"),
    ),
    "automatic inside": (
        lambda p, x: jax.sharding.auto_axes(
            lambda w, x: jnp.tanh(x @ w), out_sharding=P("data", "tensor")
        )(p["w"], x),
        (8, 16), MATRIX, P("fsdp", "tensor"), P("data", "fsdp"),
    ),
    "manual inside": (
        lambda p, x: jax.shard_map(
            lambda w, x: jax.lax.psum(x @ w, "fsdp"),
            in_specs=(P("fsdp", "tensor"), P("data", "fsdp")),
            out_specs=P("data", "tensor"),
        )(p["w"], x),
        (8, 16), MATRIX, P("fsdp", "tensor"), P("data", "fsdp"),
    ),
    "dense": (
        lambda p, x: jnp.matmul(x, jnp.tanh(p["w"]), out_sharding=P("data", "tensor")),
        (8, 16), MATRIX, P("fsdp", "tensor"), P("data", "fsdp"),
    ),
}  # fmt: skip


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        yield mesh


def place(mesh, use, replicate, dropout=0.0):
    _, shape, roles, spec, x_spec = USES[use]
    config = jlora.LoraConfig(rank=2, alpha=3, targets=("w",), axes={"w": roles}, dropout=dropout)
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, shape)}
    params = randomise(jlora.init(key, params, config), key)
    base = {"w": NamedSharding(mesh, spec)}
    params = jax.device_put(params, sharding.follow(params, base, replicate=replicate))
    x = jax.device_put(jax.random.normal(key, (8, 8)), NamedSharding(mesh, x_spec))
    return params, x


@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("use", USES)
def test_adapted_equals_dense_and_lies_where_it_lies(use, replicate, mesh):
    fn = USES[use][0]
    params, x = place(mesh, use, replicate)
    policy = "allow" if use == "dense" else "error"
    assert_adapted_equals_dense(fn, params, x, rtol=2e-5, on_unsupported=policy)
    got = jlora.adapt(fn, on_unsupported=policy)(params, x)
    wanted = fn({"w": params["w"].w}, x)
    assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)


@pytest.mark.parametrize("use", ["a sharded contraction", "automatic inside", "manual inside"])
def test_dropout_works(use, mesh):
    fn = USES[use][0]
    params, x = place(mesh, use, False, dropout=0.5)
    whole = jlora.adapt(fn, on_unsupported="error")(params, x)
    dropped = jlora.adapt(fn, dropout_key=jax.random.key(1), on_unsupported="error")(params, x)
    assert not np.allclose(whole, dropped)


def test_experts_on_sorted_rows(mesh):
    params = {"w": jax.random.normal(jax.random.key(0), (4, 8, 6))}
    config = jlora.LoraConfig(rank=2, targets=("w",), axes={"w": STACK})
    params = randomise(jlora.init(jax.random.key(0), params, config), jax.random.key(1))
    sizes = jnp.array([3, 0, 1, 4], jnp.int32)

    def fn(params, x):  # forward only: JAX itself has no gradient of this with an out_sharding
        return jax.lax.ragged_dot(x, params["w"], sizes, out_sharding=P())

    x = jax.random.normal(jax.random.key(2), (8, 8))
    assert_adapted_equals_dense(fn, params, x, gradients=False, on_unsupported="error")
