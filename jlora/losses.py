"""The cross-entropy of next tokens, also without ever holding the logits of all of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["cross_entropy", "head_cross_entropy"]


def cross_entropy(
    logits: jax.Array, targets: jax.Array, loss_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums the cross-entropy over the targets that count, in float32.

    Args:
      logits: `Float[*batch vocab]`.
      targets: `Int[*batch]`.
      loss_mask: `Float[*batch]` or `Bool[*batch]`, the weight of each target.

    Returns:
      The summed loss in nats, and the sum of the weights; their quotient is the mean loss.
    """
    weights = loss_mask.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    # where, not a product: a target that does not count must not turn an infinite loss into NaN
    return jnp.sum(jnp.where(weights > 0, losses * weights, 0.0)), jnp.sum(weights)


def _cross_entropy_slope(logits: jax.Array, targets: jax.Array, loss_mask: jax.Array) -> jax.Array:
    """The gradient of `cross_entropy`'s sum, as one elementwise expression of the logits."""
    logits = logits.astype(jnp.float32)
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_target = is_target == targets[..., None]
    weights = loss_mask.astype(jnp.float32)[..., None]
    return jnp.where(weights > 0, (jax.nn.softmax(logits) - is_target) * weights, 0.0)


def head_cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    *,
    chunk_tokens: int = 1024,
    head_is_frozen: bool = False,
    narrow_head: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy(head(hidden), ...)` that never holds all logits.

    The positions that count are moved to the front of each row, and rows go through `head` chunk by
    chunk. A frozen head skips the chunks in which nothing counts, so prompt tokens cost it nothing.

    Args:
      head: from hidden states `[batch n d]` to logits `[batch n vocab]`.
      hidden: `Float[batch length d]`.
      targets: `Int[batch length]`.
      loss_mask: `Float[batch length]` or `Bool[batch length]`.
      chunk_tokens: tokens that go through `head` together.
      head_is_frozen: promises that no gradient is asked for through what `head` closes over or of
        `loss_mask`, and no second derivative. The gradient of `hidden` is then taken on the way
        forward.
      narrow_head: `head` with logits in the dtype of `hidden`. The gradient of a frozen head then
        goes back through this one, rounded to that dtype: float32 logits would make its product,
        and a copy of the head, float32.

    Returns:
      As `cross_entropy` does.
    """
    rows, length = targets.shape
    width = min(length, max(1, chunk_tokens // rows))
    loss_mask = loss_mask.astype(jnp.float32)
    order = jnp.argsort(loss_mask <= 0, axis=1, stable=True)

    def chunked(x: jax.Array) -> jax.Array:  # [chunks batch width ...]
        index = order.reshape(order.shape + (1,) * (x.ndim - 2))
        x = jnp.take_along_axis(x, index, axis=1)
        x = jnp.pad(x, [(0, 0), (0, -length % width)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, width, *x.shape[2:]), 1, 0)

    def chunk_loss(hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> Any:
        return cross_entropy(head(hidden), targets, mask)

    def nothing(like: Callable[..., Any], *args: Any) -> Any:
        # Zeros that vary over the same axes of a shard_map as the result does.
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(like, *args))

    @jax.checkpoint
    def add_chunk(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        return total + chunk_loss(*chunk)[0], None

    def add_frozen_chunk(total: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
        def compute() -> tuple[jax.Array, jax.Array]:
            states, *rest = chunk
            logits = head(states)
            back = jax.vjp(narrow_head or head, states)[1]
            slope = _cross_entropy_slope(logits, *rest)
            slope = slope.astype(logits.dtype if narrow_head is None else states.dtype)
            return cross_entropy(logits, *rest)[0], back(slope)[0]

        # Not differentiated: a branch would hand out the whole head as what its gradient needs.
        loss, slope = jax.lax.cond(jnp.any(chunk[2] > 0), compute, lambda: nothing(compute))
        return total + loss, slope

    states = chunked(hidden)
    chunks = states, chunked(targets), chunked(loss_mask)
    zero, _ = nothing(chunk_loss, *(x[0] for x in chunks))
    if not head_is_frozen:
        return jax.lax.scan(add_chunk, zero, chunks)[0], jnp.sum(loss_mask)
    # Where the loss varies over more axes than the states, the slope is of each device's own loss.
    states = jnp.where(zero == 0, states, 0)
    still = jax.lax.stop_gradient((states, *chunks[1:]))
    total, slopes = jax.lax.scan(add_frozen_chunk, zero, still)
    return _with_slope(total, states, slopes), jnp.sum(loss_mask)


@jax.custom_jvp
def _with_slope(value: jax.Array, x: jax.Array, slope: jax.Array) -> jax.Array:
    """`value`, whose gradient along `x` is `slope`; the way forward computes nothing of it."""
    return value


@_with_slope.defjvp
def _slope_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    value, _, slope = primals
    of_value, of_x, _ = tangents
    return value, of_value + jnp.sum(of_x.astype(jnp.float32) * slope.astype(jnp.float32))
