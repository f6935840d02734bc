"""Causal attention with grouped heads: cuDNN's kernels on NVIDIA GPUs, splash on TPUs, else XLA.

The platform is chosen when a computation is lowered, so a program traced on one machine compiles
for another. Shapes: q is `[batch length heads head_dim]`, k and v have `kv_heads` in place of
`heads`; query head `i` reads key head `i // (heads // kv_heads)`. Keys are never repeated.
"""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora.models import remat, splash

__all__ = ["KERNELS", "cached_attention", "causal_attention", "without_kernels"]

# Of each platform that has some, by the name under which computations are lowered for it.
KERNELS = {"cuda": "cudnn", "tpu": "splash"}

# Finite, so that a row with every score masked gives numbers, not NaN; exp of it is exactly 0.
_MASKED = -1e30


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mesh: Any = None,
) -> jax.Array:
    """Attention of each token to itself and those before it, inside its own segment.

    Args:
      q: `[batch length heads head_dim]`.
      k: `[batch length kv_heads head_dim]`.
      v: like `k`.
      segment_ids: `Int32[batch length]`; tokens of different segments do not see each other.
      window: how many tokens a token sees, itself included; None for all.
      scale: of the scores; by default the inverse square root of `head_dim`.
      softcap: scores become `softcap * tanh(scores / softcap)`; None leaves them.
      mesh: what a TPU's kernels run on: axes `data` and `fsdp` over rows and `tensor` over heads;
        by default that of `jax.set_mesh`.

    Returns:
      An array like `q`.
    """
    options = _Options(window, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    xla = functools.partial(_xla, options=options)
    kernels: dict[str, Any] = {
        "cuda": functools.partial(_cudnn, options=options),
        "tpu": functools.partial(splash.attention, mesh=mesh, **options._asdict()),
    }
    seen = {"segment_ids": segment_ids, "window": window, "softcap": softcap, "mesh": mesh}
    reasons = {platform: without_kernels(platform, q, k, **seen) for platform in kernels}
    if jax.default_backend() == "tpu" and reasons["tpu"] is not None:
        _say_once(f"Attention runs without the TPU's kernels: {reasons['tpu']}.")
    usable = {name: kernel for name, kernel in kernels.items() if reasons[name] is None}
    if not usable:
        return xla(q, k, v, segment_ids)
    return jax.lax.platform_dependent(q, k, v, segment_ids, **usable, default=xla)


def without_kernels(
    platform: str,
    q: Any,
    k: Any,
    *,
    segment_ids: Any = None,
    window: int | None = None,
    softcap: float | None = None,
    mesh: Any = None,
) -> str | None:
    """Why `causal_attention` runs as plain XLA on a platform, or None where `KERNELS` run.

    Args:
      platform: a key of `KERNELS`.
      q: as in `causal_attention`; like the rest, an array or its shape.
      k: likewise.
      segment_ids: likewise.
      window: likewise.
      softcap: likewise.
      mesh: likewise.
    """
    if platform == "tpu":
        return splash.unsupported(q, k, mesh)
    return _cudnn_unsupported(q, k, segment_ids, _Options(window, 1.0, softcap))


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of new tokens to the slots of a cache.

    Args:
      q: `[batch length heads head_dim]`.
      k: `[batch kv_heads slots head_dim]`, as the cache keeps it.
      v: like `k`.
      mask: `Bool[batch length slots]`, True where a token sees a slot.
      scale: as in `causal_attention`.
      softcap: likewise.

    Returns:
      An array like `q`.
    """
    options = _Options(None, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    blocks = [_attend(q[:, s:e], k, v, mask[:, s:e], options) for s, e in _query_blocks(q.shape[1])]
    return jnp.concatenate(blocks, axis=1)


class _Options(NamedTuple):
    window: int | None
    scale: float
    softcap: float | None


@functools.cache
def _say_once(text: str) -> None:
    logging.getLogger("jlora").warning(text)


def _cudnn_unsupported(q: Any, k: Any, segment_ids: Any, options: _Options) -> str | None:
    """Why cuDNN cannot take these shapes, were they lowered for an NVIDIA GPU."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's kernels take bfloat16 and float16, not {q.dtype}"
    if options.softcap is not None:
        return "cuDNN's kernels have no soft cap"
    if segment_ids is not None and q.shape[1] % 2:
        return f"cuDNN's backward pass wants an even length with segments, not {q.shape[1]}"
    if jax.default_backend() == "gpu":
        # jax does not check this one: the flash kernels need Ampere or newer.
        capability = getattr(jax.local_devices()[0], "compute_capability", "0.0")
        if float(capability) < 8.0:
            return f"cuDNN's kernels need compute capability 8.0, and this GPU has {capability}"
    try:
        jax.eval_shape(functools.partial(_cudnn, options=options), q, k, k, segment_ids)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        # jax documents that it raises where the shape, the dtype or cuDNN is missing
        return str(error).split("\n")[0].rstrip(".")
    return None


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, options: _Options
) -> jax.Array:
    window = None if options.window is None else (options.window - 1, 0)
    mask = None
    if segment_ids is not None:
        # cuDNN takes segments as a bias of one head's size; the kernel adds it block by block. The
        # bias holds the window too: whether cuDNN's own window goes with a bias is not documented.
        mask = _same_segment(segment_ids, segment_ids)
        if options.window is not None:
            index = jnp.arange(q.shape[1])
            mask &= index[:, None] - index < options.window
        mask, window = mask[:, None], None
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=True,
        scale=options.scale,
        local_window_size=window,
        implementation="cudnn",
    )


def _xla(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, options: _Options
) -> jax.Array:
    # Only q, k and v are kept for the backward pass, as by cuDNN: scores are computed again.
    blockwise = jax.checkpoint(functools.partial(_blockwise, options=options))
    return checkpoint_name(blockwise(q, k, v, segment_ids), remat.ATTENTION)


def _blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, options: _Options
) -> jax.Array:
    """Attention one block of queries at a time, leaving out the keys that no query in it sees."""
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [batch kv_heads length head_dim]
    index = jnp.arange(q.shape[1])
    blocks = []
    for start, end in _query_blocks(q.shape[1]):
        first = 0 if options.window is None else max(0, start - options.window + 1)
        behind = index[start:end, None] - index[first:end]
        mask = behind >= 0 if options.window is None else (behind >= 0) & (behind < options.window)
        mask = mask[None]  # [1 block keys]
        if segment_ids is not None:
            mask &= _same_segment(segment_ids[:, start:end], segment_ids[:, first:end])
        blocks.append(
            _attend(q[:, start:end], k[:, :, first:end], v[:, :, first:end], mask, options)
        )
    return jnp.concatenate(blocks, axis=1)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    # Eight blocks leave out 7/16 of the scores; blocks under 64 rows are slow products on a CPU.
    size = max(64, -(-length // 8))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, options: _Options
) -> jax.Array:
    """Softmax attention of `[batch block heads head_dim]` to `[batch kv_heads slots head_dim]`."""
    batch, block, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    groups = heads // kv_heads
    # The heads that share a key are rows of one product: [batch kv_heads block*groups head_dim].
    q = jnp.swapaxes(q.reshape(batch, block, kv_heads, groups, head_dim), 1, 2)
    q = (q * options.scale).reshape(batch, kv_heads, block * groups, head_dim)
    mask = jnp.broadcast_to(mask[:, :, None], (*mask.shape[:2], groups, slots))
    mask = mask.reshape(-1, 1, block * groups, slots)

    scores = jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32)
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
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
