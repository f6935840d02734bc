"""Keys and values of the tokens that a decoder has seen."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlora.models.decoder_config import DecoderConfig

__all__ = ["Cache", "init_cache", "masks", "update"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "valid", "index"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far. All rows of a batch fill the same slots.

    Attributes:
      keys: `[layers batch kv_heads slots head_dim]`, rotated.
      values: like `keys`.
      valid: `Bool[batch slots]`, False in slots that are empty or hold padding.
      index: `Int32[]`, the next free slot.
    """

    keys: jax.Array
    values: jax.Array
    valid: jax.Array
    index: jax.Array


def init_cache(config: DecoderConfig, batch_size: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache.

    Args:
      config: of the decoder.
      batch_size: rows.
      length: slots, for prompts (padding included) and new tokens together.
      dtype: of keys and values, `config.dtype` by default.
    """
    shape = (config.num_layers, batch_size, config.num_kv_heads, length, config.head_dim)
    dtype = jnp.dtype(dtype or config.dtype)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        valid=jnp.zeros((batch_size, length), bool),
        index=jnp.zeros((), jnp.int32),
    )


def masks(
    valid: jax.Array, index: jax.Array, length: int, window: int | None
) -> tuple[jax.Array, jax.Array | None]:
    """Which slots each of `length` new tokens sees, in full layers and in sliding ones.

    Args:
      valid: `Bool[batch slots]`, new tokens included.
      index: the slot of the first new token.
      length: new tokens.
      window: tokens that a sliding layer sees, itself included, or None.

    Returns:
      Two of `Bool[batch length slots]`; the second is None without a window.
    """
    slots = jnp.arange(valid.shape[1])
    causal = slots <= index + jnp.arange(length)[:, None]  # [length slots]
    full = causal & valid[:, None]
    if window is None:
        return full, None
    # The window counts tokens, and padding between two calls is none.
    count = jnp.cumsum(valid, axis=-1, dtype=jnp.int32)
    newest = jax.lax.dynamic_slice_in_dim(count, index, length, axis=1)
    return full, full & (newest[:, :, None] - count[:, None] < window)


def update(
    cache: tuple[jax.Array, jax.Array, jax.Array], k: jax.Array, v: jax.Array, index: Any
) -> tuple[Any, jax.Array, jax.Array]:
    """Writes one layer's new keys and values.

    Args:
      cache: keys and values of all layers, and the number of the layer.
      k: `[batch length kv_heads head_dim]`, rotated.
      v: like `k`.
      index: the slot of the first of them.

    Returns:
      The cache for the next layer, and this layer's keys and values in it.
    """
    keys, values, layer = cache

    def put(whole: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.swapaxes(new, 1, 2).astype(whole.dtype)[
            None
        ]  # [1 batch kv_heads length head_dim]
        return jax.lax.dynamic_update_slice(whole, new, (layer, 0, 0, index, 0))

    keys, values = put(keys, k), put(values, v)
    k, v = (jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False) for whole in (keys, values))
    return (keys, values, layer + 1), k, v
