"""NF4 rounded to a weight's outputs: GPTQ (arXiv:2210.17323) on a tree that `quantize` packed.

Rounding each element to its nearest code keeps the weight; what a layer gives depends on how its
inputs go together. GPTQ rounds one input's elements after the other and lets the inputs that are
still to come make up for the error so far. The format stays what it was, and so do the scales.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import nf4
from jlora.leaf import is_array_leaf
from jlora.lora import LoraArray, LoraConfig, init
from jlora.packed import weight_to_matrices
from jlora.quant import NF4Array
from jlora.targets import leaves_by_path
from jlora.tree import Pattern, map_with_path, matches, unmatched
from jlora.watched import adapters_of, check_met, moments_of, stacked

__all__ = ["calibrate"]

_ROOM = 2**29  # bytes for columns of moments on the device


def calibrate(
    packed: Any,
    fn: Callable[..., Any],
    batches: Sequence[Any],
    *,
    base: Any,
    exclude: Pattern | Sequence[Pattern] = (),
    damping: float = 0.01,
    columns: int | None = None,
) -> Any:
    """Rounds NF4 weights again, so that what they give for the batches' inputs changes least.

    With the moments `H` of a weight's inputs, GPTQ (arXiv:2210.17323) takes one input after the
    other: its elements are rounded to the nearest code of their block, and the elements of later
    inputs move by what makes `sum(|x (w - q)|**2 / |x|**2)` least. Inputs are those in the function
    on `base`. The paper does not divide by `|x|**2`; here each input counts with its direction
    alone, `H = sum(x.T x / |x|**2)`, so that a few long ones do not decide, as they may in a
    language model's later layers. Where a function cuts a weight along its inputs, those of the
    parts count as unrelated.

    Args:
      packed: a tree from `jlora.quantize` with weights in NF4, before `jlora.init`.
      fn: `fn(params, batch)`, of any floating-point result; goes through `jlora.adapt`.
      batches: a few, of some thousand tokens together: several times a weight's inputs, or its
        rounding fits the batches and nothing else. All tokens count, padding too.
      base: the weights before they were quantised, a tree of the same structure.
      exclude: patterns of NF4 weights to leave as they are, such as those of which `fn` sees no
        inputs, and embeddings, whose rows are looked up whole.
      damping: what is added to the diagonal of `H`, relative to its mean.
      columns: of each weight's `H` that are measured at once; each such part takes a pass over the
        batches. By default as many as take 0.5 GiB, all weights together.

    Returns:
      The tree with other codes in its NF4 weights, and nothing else changed. Memory: `H` of all
      weights, float32 `[*stack inputs inputs]`, in the host's; on the device `columns` columns of
      it, a few times, and then a copy of one stacked weight, and of one matrix `H` and some copies
      in float32.

    Raises:
      ValueError: if no weight is in NF4, there are no batches, `base` does not fit, an argument is
        out of its range, a pattern of `exclude` names no weight in NF4, or a weight's inputs cannot
        be measured: it is used otherwise than in products from its input side and lookups of its
        rows, meets nothing but zeros, or NaN, or `damping` is too small for them in float32.
    """
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be above 0 and finite, got {damping!r}.")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns!r}.")
    leaves, batches = _leaves(packed, base, exclude), list(batches)
    moments = _moments(base, fn, batches, leaves, columns)
    originals = leaves_by_path(base)
    codes = {
        path: _round_stack(path, leaf, originals[path], moments[path], damping)
        for path, leaf in leaves.items()
    }

    def put(path: str, leaf: Any) -> Any:
        return dataclasses.replace(leaf, codes=codes[path]) if path in codes else leaf

    return map_with_path(put, packed, is_leaf=is_array_leaf)


def _leaves(packed: Any, base: Any, exclude: Pattern | Sequence[Pattern]) -> dict[str, NF4Array]:
    """The weights to round, by path."""
    patterns = LoraConfig(exclude=exclude).exclude  # pyright: ignore[reportArgumentType]
    found, originals = leaves_by_path(packed), leaves_by_path(base)
    if path := next((p for p, leaf in found.items() if isinstance(leaf, LoraArray)), None):
        raise ValueError(
            f"{path!r} has an adapter already. Calibrate what jlora.quantize gives, and put "
            "adapters on top afterwards."
        )
    leaves = {path: leaf for path, leaf in found.items() if isinstance(leaf, NF4Array)}
    for pattern in patterns:
        if leaves and not any(matches(pattern, path) for path in leaves):
            raise unmatched("exclude", pattern, leaves)
    leaves = {p: leaf for p, leaf in leaves.items() if not any(matches(x, p) for x in patterns)}
    if not leaves:
        raise ValueError("Nothing to round: no weight of this tree, but for `exclude`, is in NF4.")
    for path, leaf in leaves.items():
        original = originals.get(path)
        if is_array_leaf(original) or getattr(original, "shape", None) != leaf.shape:
            raise ValueError(
                f"base has no plain weight of shape {leaf.shape} at {path!r}: pass the weights as "
                "they were before jlora.quantize."
            )
    return leaves


def _moments(
    base: Any,
    fn: Callable[..., Any],
    batches: Sequence[Any],
    leaves: dict[str, NF4Array],
    columns: int | None,
) -> dict[str, np.ndarray]:
    """`sum(x.T x / |x|**2)` of each weight's inputs, `Float32[*stack inputs inputs]`."""
    exact = {path: re.compile(f"^{re.escape(path)}$") for path in leaves}
    axes = {exact[path]: leaf.axes for path, leaf in leaves.items()}
    params = init(jax.random.key(0), base, LoraConfig(1, targets=tuple(axes), axes=axes))
    watched = adapters_of(params)
    one = sum(4 * math.prod(stacked(leaf, 0, 1)) for leaf in watched.values())  # bytes a column
    inputs = {path: stacked(leaf, 0, 1)[-2] for path, leaf in watched.items()}
    widest = max(inputs.values())
    columns = min(columns or max(1, _ROOM // one), widest)
    result = {
        path: np.empty(stacked(leaf, 0, inputs[path]), np.float32) for path, leaf in watched.items()
    }
    left: dict[str, LoraArray] = {}
    for start in range(0, widest, columns):
        wider = {path: leaf for path, leaf in watched.items() if inputs[path] > start}
        if wider.keys() != left.keys():
            left, gradients = wider, moments_of(params, fn, batches, wider, of="directions")
        unit = {
            path: jnp.broadcast_to(
                jnp.eye(inputs[path], columns, -start), stacked(leaf, 0, columns)
            )
            for path, leaf in left.items()
        }
        moments, energy = gradients(unit, None)
        check_met(energy)
        for path, found in moments.items():
            part = result[path][..., start : start + columns]
            part[...] = found[..., : part.shape[-1]]
    return result


def _round_stack(
    path: str, leaf: NF4Array, original: jax.Array, moments: np.ndarray, damping: float
) -> jax.Array:
    """The codes of a weight, rounded one matrix of the stack after the other."""
    matrices = weight_to_matrices(jnp.asarray(original), leaf.axes)
    scales = leaf.block_scales()
    codes = np.empty(leaf.codes.shape, np.uint8)
    for at in np.ndindex(matrices.shape[:-2]):
        found, is_finite = _round(matrices[at], scales[at], moments[at], damping, leaf.dtype_name)
        if not is_finite:
            raise ValueError(
                f"The moments of the inputs of {path!r} have no Cholesky factor in float32 with "
                f"damping={damping}: raise it, for instance to 0.01, or measure on more tokens."
            )
        codes[at] = found
    return jnp.asarray(codes)


@functools.partial(jax.jit, static_argnames="dtype_name")
def _round(
    w: jax.Array, scales: jax.Array, moments: jax.Array, damping: float, dtype_name: str
) -> tuple[jax.Array, jax.Array]:
    """The codes of one matrix, `UInt8[rows columns/2]`, and whether its moments could be used.

    Args:
      w: `[rows inputs]`.
      scales: `Float32[rows blocks]`.
      moments: `Float32[inputs inputs]`.
      damping: as in `calibrate`.
      dtype_name: of what the codes stand for.
    """
    inputs, size = w.shape[1], scales.shape[1] * nf4.BLOCK
    padding = size - inputs
    factor = jnp.pad(_factor(moments, damping), ((0, padding), (0, padding)))
    factor += jnp.diag(jnp.pad(jnp.zeros(inputs), (0, padding), constant_values=1))
    w = jnp.pad(w.astype(jnp.float32).T, ((0, padding), (0, 0)))  # [columns rows]

    def block(index: jax.Array, state: tuple[jax.Array, jax.Array]) -> Any:
        w, codes = state
        start = index * nf4.BLOCK
        own = jax.lax.dynamic_slice_in_dim(w, start, nf4.BLOCK)
        rows = jax.lax.dynamic_slice_in_dim(factor, start, nf4.BLOCK)
        square = jax.lax.dynamic_slice_in_dim(rows, start, nf4.BLOCK, axis=1)
        scale = jax.lax.dynamic_index_in_dim(scales, index, axis=1, keepdims=False)

        def column(i: jax.Array, state: Any) -> Any:
            own, errors, codes = state
            found = nf4.nearest(own[i] / jnp.where(scale > 0, scale, 1))
            # As it is restored: without the barrier a compiler may leave both casts out.
            value = (jnp.asarray(nf4.CODE)[found] * scale).astype(dtype_name)
            value = jax.lax.optimization_barrier(value).astype(jnp.float32)
            error = (own[i] - value) / square[i, i]
            own -= square[i][:, None] * error  # nothing of earlier columns: `square` is upper
            return own, errors.at[i].set(error), codes.at[i].set(found)

        empty = jnp.zeros_like(own), jnp.zeros(own.shape, jnp.uint8)
        _, errors, found = jax.lax.fori_loop(0, nf4.BLOCK, column, (own, *empty))
        later = jnp.arange(size) >= start + nf4.BLOCK
        w -= jnp.matmul(jnp.where(later, rows, 0).T, errors, precision="highest")
        return w, jax.lax.dynamic_update_slice_in_dim(codes, found, start, 0)

    codes = jnp.zeros(w.shape, jnp.uint8)
    _, codes = jax.lax.fori_loop(0, size // nf4.BLOCK, block, (w, codes))
    return nf4.pair(codes.T), jnp.isfinite(factor).all()


def _factor(moments: jax.Array, damping: float) -> jax.Array:
    """The upper triangular `u` with `u.T @ u` the inverse of the damped moments."""
    mean = jnp.trace(moments) / len(moments)
    # An expert that met nothing has no moments: its elements are rounded each for itself.
    damped = moments + jnp.where(mean > 0, damping * mean, 1) * jnp.eye(len(moments))
    # From the last input to the first, the Cholesky factor of the moments is that of the inverse.
    lower = jnp.linalg.cholesky(((damped + damped.T) / 2)[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(moments)), lower=True)
    return inverse[::-1, ::-1]
