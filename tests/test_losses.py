"""The cross-entropy, of all logits and by chunks of the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import losses


def test_cross_entropy_is_the_negative_log_probability_of_what_counts(getkey):
    logits = jax.random.normal(getkey(), (2, 3, 7))
    targets = jnp.array([[1, 2, 3], [4, 5, 6]])
    mask = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    total, count = losses.cross_entropy(logits, targets, mask)
    log_p = np.take_along_axis(
        np.array(jax.nn.log_softmax(logits)), np.array(targets)[..., None], 2
    )
    np.testing.assert_allclose(total, -(log_p[..., 0] * mask).sum(), rtol=1e-6)
    assert count == 3


def test_cross_entropy_is_float32_whatever_the_logits(getkey):
    logits = jax.random.normal(getkey(), (1, 4, 9)).astype(jnp.bfloat16)
    total, _ = losses.cross_entropy(logits, jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4)))
    assert total.dtype == jnp.float32


def test_an_infinite_loss_outside_the_mask_does_not_spoil_the_sum():
    logits = jnp.array([[[0.0, -jnp.inf], [0.0, 0.0]]])
    total, _ = losses.cross_entropy(logits, jnp.array([[1, 1]]), jnp.array([[0.0, 1.0]]))
    np.testing.assert_allclose(total, np.log(2), rtol=1e-6)


def assert_same_loss_and_gradients(given, wanted, hidden, w, *, frozen):
    """Of sum, count and gradients; of a frozen head those of the states alone."""
    for_what = 0 if frozen else (0, 1)
    (got, got_count), got_grads = jax.jit(
        jax.value_and_grad(given, argnums=for_what, has_aux=True)
    )(hidden, w)
    (expected, count), grads = jax.value_and_grad(wanted, argnums=for_what, has_aux=True)(hidden, w)
    assert got_count == count
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_infinite_state_outside_the_mask_does_not_spoil_the_chunks(getkey, frozen):
    w = jax.random.normal(getkey(), (4, 13))
    hidden = jax.random.normal(getkey(), (1, 6, 4)).at[0, 4].set(jnp.inf)
    targets, mask = jnp.zeros((1, 6), jnp.int32), jnp.ones((1, 6)).at[0, 4].set(0)

    def loss(hidden):
        return losses.head_cross_entropy(
            lambda h: h @ w, hidden, targets, mask, chunk_tokens=2, head_is_frozen=frozen
        )[0]

    assert jnp.isfinite(loss(hidden))


@pytest.mark.parametrize("chunk_tokens", [1, 16, 1000])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("frozen", "narrow"), [(False, False), (True, False), (True, True)])
def test_the_loss_by_chunks_equals_the_loss_of_all_logits(
    getkey, chunk_tokens, share, frozen, narrow
):
    hidden = jax.random.normal(getkey(), (3, 11, 4))
    w = jax.random.normal(getkey(), (4, 13))
    targets = jax.random.randint(getkey(), (3, 11), 0, 13)
    mask = (jax.random.uniform(getkey(), (3, 11)) < share).astype(jnp.float32)

    def chunked(hidden, w):
        return losses.head_cross_entropy(
            lambda h: h @ w,
            hidden,
            targets,
            mask,
            chunk_tokens=chunk_tokens,
            head_is_frozen=frozen,
            narrow_head=(lambda h: h @ w) if narrow else None,
        )

    def whole(hidden, w):
        return losses.cross_entropy(hidden @ w, targets, mask)

    assert_same_loss_and_gradients(chunked, whole, hidden, w, frozen=frozen)


@pytest.mark.parametrize("sharded_head", [False, True])
@pytest.mark.parametrize(("frozen", "narrow"), [(False, False), (True, False), (True, True)])
def test_the_loss_by_chunks_works_in_a_shard_map(getkey, frozen, narrow, sharded_head):
    """With the axes that each value varies over checked, as shard_map does by default."""
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(auto, auto))
    hidden = jax.random.normal(getkey(), (8, 11, 4))
    w = jax.random.normal(getkey(), (4, 12))
    targets = jax.random.randint(getkey(), (8, 11), 0, 12)
    mask = (jax.random.uniform(getkey(), (8, 11)) < 0.3).astype(jnp.float32).at[:4].set(0)

    def whole(hidden, w):
        return losses.cross_entropy(hidden @ w, targets, mask)

    def chunked(hidden, w, targets, mask):
        def head(h):
            # With some columns of the kernel on each device, every one gathers all logits.
            return jax.lax.all_gather(h @ w, "model", axis=2, tiled=True) if sharded_head else h @ w

        loss, count = losses.head_cross_entropy(
            head, hidden, targets, mask, chunk_tokens=6, head_is_frozen=frozen,
            narrow_head=head if narrow else None,
        )  # fmt: skip
        if sharded_head:  # both devices computed the same
            loss = jax.lax.psum(loss, "model") / 2
        return jax.lax.psum((loss, count), "data")

    rows, kernel = jax.P("data"), jax.P(None, "model" if sharded_head else None)
    mapped = jax.shard_map(
        chunked, mesh=mesh, in_specs=(rows, kernel, rows, rows), out_specs=jax.P()
    )

    def sharded(hidden, w):
        return mapped(hidden, w, targets, mask)

    assert_same_loss_and_gradients(sharded, whole, hidden, w, frozen=frozen)
