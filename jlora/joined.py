"""Weights that a function joins itself: a fused q, k, v, or a stack of layers made on the way.

Weights side by side (`concatenate`) become one `LowRank` over all their ranks, in which each factor
along the joined axis is zero beside its own weight. Weights on top of each other (`stack`, or
`concatenate` along an axis that both factors own) share one rank. Nothing of the joined weight's
size is built.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.leaf import Equation, rule
from jlora.lowrank import LowRank

__all__: list[str] = []  # importing this module registers its rules

_Factors = tuple[jax.Array, jax.Array]


@rule(LowRank, "concatenate")
def _concatenate(equation: Equation, *parts: Any) -> Any:
    axis = equation.params["dimension"]
    factors = [(part.u, part.v) if isinstance(part, LowRank) else None for part in parts]
    return _join(equation, parts, factors, [part.shape[axis] for part in parts], axis)


@rule(LowRank, "stack")
def _stack(equation: Equation, *parts: Any) -> Any:
    axis = equation.params["axis"]
    factors = [
        (lax.expand_dims(part.u, (axis,)), lax.expand_dims(part.v, (axis,)))
        if isinstance(part, LowRank)
        else None
        for part in parts
    ]
    return _join(equation, parts, factors, [1] * len(parts), axis)


def _join(
    equation: Equation,
    parts: Sequence[Any],
    factors: Sequence[_Factors | None],
    sizes: Sequence[int],
    axis: int,
) -> Any:
    """One leaf for all parts, from their factors, None for a plain array, and sizes."""
    first, *others = leaves = [part for part in parts if isinstance(part, LowRank)]
    if any(leaf.dropout != first.dropout for leaf in others):
        return NotImplemented
    aligned = _align(factors, axis, [part.scaling / first.scaling for part in leaves])
    if aligned is None:
        return NotImplemented
    owned = [
        any(pair is not None and pair[side].shape[axis] > 1 for pair in aligned) for side in (0, 1)
    ]
    for pair, size in zip(aligned, sizes):
        if pair is not None and size > 1 and [f.shape[axis] > 1 for f in pair] != owned:
            return NotImplemented
    joined = []
    for side in (0, 1):
        pieces = [None if pair is None else pair[side] for pair in aligned]
        if owned[0] == owned[1]:
            joined.append(_on_one_rank(pieces, sizes, axis))
        else:
            joined.append(_side_by_side(pieces, sizes, axis if owned[side] else None))
    u, v = joined
    w = equation.bind(*(part.w if isinstance(part, LowRank) else part for part in parts))
    beside = tuple(name for leaf in leaves for name in leaf.names())[1:]
    return dataclasses.replace(first, w=w, u=u, v=v, beside=beside)


def _align(
    factors: Sequence[_Factors | None], axis: int, scales: Sequence[float]
) -> list[_Factors | None] | None:
    """The factors, scaled, each pair in the order in which all own the same axes; None if none."""

    def shape(factor: jax.Array) -> list[int]:
        return [size for place, size in enumerate(factor.shape[:-1]) if place != axis]

    aligned: list[_Factors | None] = []
    remaining = iter(scales)
    wanted = next([*map(shape, pair)] for pair in factors if pair is not None)
    for pair in factors:
        if pair is None:
            aligned.append(None)
            continue
        u, v = pair
        u = u * next(remaining)
        fitting = [order for order in ((u, v), (v, u)) if [*map(shape, order)] == wanted]
        if not fitting:
            return None
        aligned.append(fitting[0])
    return aligned


def _on_one_rank(pieces: Sequence[jax.Array | None], sizes: Sequence[int], axis: int) -> jax.Array:
    """Joins factors that all own the axis along it; zero for a plain array."""
    present = [piece for piece in pieces if piece is not None]
    rank = max(piece.shape[-1] for piece in present)
    like = present[0]
    filled = []
    for piece, size in zip(pieces, sizes):
        shape = (*like.shape[:axis], size, *like.shape[axis + 1 : -1], 0)
        piece = jnp.zeros(shape, like.dtype) if piece is None else piece
        filled.append(_pad(piece, -1, 0, rank - piece.shape[-1]))
    return jnp.concatenate(filled, axis)


def _side_by_side(
    pieces: Sequence[jax.Array | None], sizes: Sequence[int], axis: int | None
) -> jax.Array:
    """Joins factors along the rank; along an axis that they own, each is zero but in its place."""
    before, placed = 0, []
    for piece, size in zip(pieces, sizes):
        if piece is not None:
            after = sum(sizes) - before - size
            placed.append(piece if axis is None else _pad(piece, axis, before, after))
        before += size
    return jnp.concatenate(placed, -1)


def _pad(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (before, after, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), padding)
