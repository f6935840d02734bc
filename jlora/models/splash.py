"""Attention by JAX's splash kernels, for TPUs: scores never leave the chip's own memory.

The kernels are Pallas programs, which XLA cannot cut over devices by itself: on a mesh they run
under `shard_map`, each device on its own rows and heads.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AxisType, PartitionSpec

from jlora.models import remat

__all__ = ["attention", "unsupported"]

# The axes of a mesh that cut rows, and the one that cuts heads.
_ROWS = ("data", "fsdp")
_HEADS = "tensor"
_LANES = 128


class _Shape(NamedTuple):
    """All that the kernels are built from."""

    length: int
    heads: int
    window: int | None
    softcap: float | None
    interpret: bool


def unsupported(q: jax.Array, k: jax.Array, mesh: Any = None) -> str | None:
    """Why the kernels cannot take these shapes on this mesh, or None if they can.

    Args:
      q: `[batch length heads head_dim]`, an array or its shape.
      k: `[batch length kv_heads head_dim]`.
      mesh: as in `attention`.
    """
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its kernels take bfloat16 and float32, not {q.dtype}"
    if length % _LANES:
        return f"rows of {length} tokens are no multiple of {_LANES}"
    mesh = _mesh(mesh)
    if mesh.empty:
        # A program for several devices needs the mesh; of one that is traced for other hardware
        # than this machine's, nothing says for how many it is.
        if jax.default_backend() == "tpu" and jax.device_count() > 1:
            return "there are several devices and no mesh (set mesh: in a run, or see jax.set_mesh)"
        return None
    kinds = _kinds(mesh)
    if kinds - {AxisType.Auto} and kinds != {AxisType.Manual}:
        return "the mesh has Explicit axes, or some that are manual"
    if kinds != {AxisType.Auto}:
        return None
    if others := [n for n in mesh.axis_names if n not in (*_ROWS, _HEADS) and mesh.shape[n] > 1]:
        return f"the mesh has axes {others} besides {[*_ROWS, _HEADS]}"
    rows, parts = _count(mesh, _ROWS), _count(mesh, (_HEADS,))
    if batch % rows:
        return f"{batch} rows do not divide over the {rows} parts of {list(_ROWS)}"
    if heads % parts or (kv_heads % parts and parts % kv_heads):
        return f"{heads} and {kv_heads} heads do not divide over the {parts} parts of {_HEADS!r}"
    return None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    mesh: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention, as `causal_attention` has it, where `unsupported` gives None.

    Args:
      q: `[batch length heads head_dim]`.
      k: `[batch length kv_heads head_dim]`.
      v: like `k`.
      segment_ids: `Int32[batch length]`.
      window: tokens that a token sees, itself included.
      scale: of the scores.
      softcap: bounds them.
      mesh: with axes `data` and `fsdp` over rows and `tensor` over heads; by default that of
        `jax.set_mesh`.
      interpret: runs the kernels' programs in XLA, on any platform; slow, for tests.

    Returns:
      An array like `q`.
    """
    mesh = _mesh(mesh)
    parts = _count(mesh, (_HEADS,)) if _is_auto(mesh) else 1
    if k.shape[2] % parts:  # fewer heads of keys than parts: each part has the one that it needs
        k, v = (jnp.repeat(x, parts // k.shape[2], axis=2) for x in (k, v))
    length, heads = q.shape[1], q.shape[2] // parts
    shape = _Shape(length, heads, window, softcap, interpret)

    @jax.custom_vjp
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        return forward(q, k, v, ids)[0]

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> Any:
        run = functools.partial(_forward, shape, scale)
        out, normaliser = _on_mesh(run, mesh, "qkvi", "qn")(q, k, v, ids)
        # Named for the policies of `remat`: with both kept, the kernel is not run again.
        out = checkpoint_name(out, remat.ATTENTION)
        return out, (q, k, v, ids, out, checkpoint_name(normaliser, remat.ATTENTION))

    def backward(residuals: Any, slope: jax.Array) -> Any:
        run = functools.partial(_backward, shape, scale)
        return *_on_mesh(run, mesh, "qkviqnq", "qkv")(*residuals, slope), None

    attend.defvjp(forward, backward)
    return attend(q, k, v, segment_ids)


def _forward(
    shape: _Shape, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The output and the logarithm of each row's sum, `[batch heads length]`."""
    kernel = _kernel(shape, save_residuals=True)

    def row(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> Any:
        return kernel(q, k, v, None if ids is None else kernels.SegmentIds(ids, ids))

    out, (normaliser,) = jax.vmap(row)(_scaled(q, scale), _heads_first(k), _heads_first(v), ids)
    return jnp.swapaxes(out, 1, 2), normaliser


def _backward(shape: _Shape, scale: float, *args: Any) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v. JAX has no public name for the kernels' backward pass alone."""
    kernel = _kernel(shape, save_residuals=False)
    options = {k: v for k, v in kernel.kwargs.items() if k != "save_residuals"}

    def row(
        q: Any, k: Any, v: Any, ids: jax.Array | None, out: Any, normaliser: Any, slope: Any
    ) -> Any:
        segments = None if ids is None else kernels.SegmentIds(ids, ids)
        sinks = None
        residuals = (
            *(q, k, v, segments, sinks, out, normaliser),
            *(kernel.dq_mask_info, kernel.dkv_mask_info),
        )
        slopes = kernels._splash_attention_bwd(
            save_residuals=False, **options, res=residuals, do=slope
        )
        return slopes[3:6]

    q, k, v, ids, out, normaliser, slope = args
    dq, dk, dv = jax.vmap(row)(
        _scaled(q, scale),
        *(_heads_first(k), _heads_first(v), ids, _heads_first(out), normaliser),
        _heads_first(slope),
    )
    dq = (dq * scale).astype(q.dtype)
    return tuple(jnp.swapaxes(x, 1, 2) for x in (dq, dk, dv))


def _kernel(shape: _Shape, *, save_residuals: bool) -> Any:
    square = (shape.length, shape.length)
    if shape.window is None:
        mask = masks.CausalMask(square)
    else:
        mask = masks.LocalMask(square, (shape.window - 1, 0), offset=0)
    size = next(size for size in (512, 256, 128) if shape.length % size == 0)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * shape.heads),
        block_sizes=kernels.BlockSizes(size, size, size, size, size, size, size, size),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=save_residuals,
        attn_logits_soft_cap=shape.softcap,
        interpret=shape.interpret,
    )


def _scaled(q: jax.Array, scale: float) -> jax.Array:
    return _heads_first((q * scale).astype(q.dtype))


def _heads_first(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)


def _on_mesh(run: Callable[..., Any], mesh: Any, inputs: str, outputs: str) -> Callable[..., Any]:
    """`run` on each device's rows and heads; letters say where each array has them."""
    if not _is_auto(mesh):
        return run
    rows = tuple(name for name in _ROWS if name in mesh.shape)
    heads = _HEADS if _HEADS in mesh.shape else None
    wide = PartitionSpec(rows, None, heads, None)
    specs = {"i": PartitionSpec(rows, None), "n": PartitionSpec(rows, heads, None)}
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(specs.get(letter, wide) for letter in inputs),
        out_specs=tuple(specs.get(letter, wide) for letter in outputs),
        check_vma=False,
    )


def _mesh(given: Any) -> Any:
    context = jax.sharding.get_abstract_mesh()
    # Inside a shard_map only the context knows which axes are cut already.
    return context if given is None or AxisType.Manual in _kinds(context) else given


def _is_auto(mesh: Any) -> bool:
    """Whether XLA is to cut the program over more than one device."""
    return AxisType.Auto in _kinds(mesh)


def _kinds(mesh: Any) -> set[AxisType]:
    """The types of axes with more than one device."""
    named = zip(mesh.axis_names, mesh.axis_types)
    return {kind for name, kind in named if mesh.shape[name] > 1}


def _count(mesh: Any, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape.get(name, 1) for name in names)
