"""Causal attention with grouped heads: cuDNN's flash kernels on NVIDIA GPUs, elsewhere XLA.

The platform is chosen when a computation is lowered, so a program traced on one machine compiles
for another. Shapes: q is `[batch length heads head_dim]`, k and v have `kv_heads` in place of
`heads`; query head `i` reads key head `i // (heads // kv_heads)`. Keys are never repeated.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora.models import remat

__all__ = ["cached_attention", "causal_attention"]

# Finite, so that a row with every score masked gives numbers, not NaN; exp of it is exactly 0.
_MASKED = -1e30


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Attention of each token to itself and those before it, inside its own segment.

    Args:
      q: `[batch length heads head_dim]`.
      k: `[batch length kv_heads head_dim]`.
      v: like `k`.
      segment_ids: `Int32[batch length]`; tokens of different segments do not see each other.

    Returns:
      An array like `q`.
    """
    if not _cudnn_supports(q, k, segment_ids):
        return _xla(q, k, v, segment_ids)
    return jax.lax.platform_dependent(q, k, v, segment_ids, cuda=_cudnn, default=_xla)


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of new tokens to the slots of a cache.

    Args:
      q: `[batch length heads head_dim]`.
      k: `[batch kv_heads slots head_dim]`, as the cache keeps it.
      v: like `k`.
      mask: `Bool[batch length slots]`, True where a token sees a slot.

    Returns:
      An array like `q`.
    """
    blocks = [_attend(q[:, s:e], k, v, mask[:, s:e]) for s, e in _query_blocks(q.shape[1])]
    return jnp.concatenate(blocks, axis=1)


def _cudnn_supports(q: jax.Array, k: jax.Array, segment_ids: jax.Array | None) -> bool:
    """Whether cuDNN can take these shapes, were they lowered for an NVIDIA GPU."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if segment_ids is not None and q.shape[1] % 2:  # its backward pass wants an even length then
        return False
    if jax.default_backend() == "gpu":
        # jax does not check this one: the flash kernels need Ampere or newer.
        capability = getattr(jax.local_devices()[0], "compute_capability", "0.0")
        if float(capability) < 8.0:
            return False
    try:
        jax.eval_shape(_cudnn, q, k, k, segment_ids)
    except (NotImplementedError, RuntimeError, ValueError):
        return False  # jax documents that it raises where the shape, the dtype or cuDNN is missing
    return True


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    # cuDNN takes segments as a bias of one head's size; the kernel adds it block by block.
    mask = None if segment_ids is None else _same_segment(segment_ids, segment_ids)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    return checkpoint_name(_blockwise(q, k, v, segment_ids), remat.ATTENTION)


# Only q, k and v are kept for the backward pass, as by cuDNN: scores are computed again.
@jax.checkpoint
def _blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Attention one block of queries at a time, leaving out the keys after the block."""
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [batch kv_heads length head_dim]
    index = jnp.arange(q.shape[1])
    blocks = []
    for start, end in _query_blocks(q.shape[1]):
        mask = (index[start:end, None] >= index[:end])[None]  # [1 block end]
        if segment_ids is not None:
            mask &= _same_segment(segment_ids[:, start:end], segment_ids[:, :end])
        blocks.append(_attend(q[:, start:end], k[:, :, :end], v[:, :, :end], mask))
    return jnp.concatenate(blocks, axis=1)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    # Eight blocks leave out 7/16 of the scores; blocks under 64 rows are slow products on a CPU.
    size = max(64, -(-length // 8))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention of `[batch block heads head_dim]` to `[batch kv_heads slots head_dim]`."""
    batch, block, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    groups = heads // kv_heads
    # The heads that share a key are rows of one product: [batch kv_heads block*groups head_dim].
    q = jnp.swapaxes(q.reshape(batch, block, kv_heads, groups, head_dim), 1, 2)
    q = (q * head_dim**-0.5).reshape(batch, kv_heads, block * groups, head_dim)
    mask = jnp.broadcast_to(mask[:, :, None], (*mask.shape[:2], groups, slots))
    mask = mask.reshape(-1, 1, block * groups, slots)

    scores = jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkqs,bksd->bkqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    # Dividing the output costs head_dim divisions a row, dividing the weights would cost `slots`.
    out = (out / total).astype(v.dtype).reshape(batch, kv_heads, block, groups, head_dim)
    return jnp.swapaxes(out, 1, 2).reshape(batch, block, heads, head_dim)


def _same_segment(queries: jax.Array, keys: jax.Array) -> jax.Array:
    return queries[:, :, None] == keys[:, None, :]
