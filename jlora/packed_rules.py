"""What functions do with packed weights but multiply: moves are written down.

Layers of a stack, and rows of a table, are cut from the packed arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from jlora.leaf import Equation, is_array_leaf, pass_barrier, reshape_groups, rule
from jlora.packed import Move, Packed

__all__: list[str] = []  # importing this module registers its rules


@rule(Packed, "convert_element_type")
def _convert_element_type(equation: Equation, leaf: Packed) -> Any:
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return NotImplemented
    return _elementwise(leaf, lambda x: lax.convert_element_type(x, dtype), dtype)


def _elementwise(leaf: Packed, apply: Callable[[jax.Array], jax.Array], dtype: Any = None) -> Any:
    dtype = dtype or leaf.dtype

    def step(shape: tuple[int, ...]) -> Move:
        return Move(apply, shape, dtype, lambda: step(shape[1:]))

    return dataclasses.replace(leaf, moves=(*leaf.moves, step(leaf.shape)))


@rule(Packed, "pvary")
def _pvary(equation: Equation, leaf: Packed) -> Any:
    return _elementwise(leaf, equation.bind)


@rule(Packed, "reshard")
def _reshard(equation: Equation, leaf: Packed) -> Any:
    return leaf.with_move(equation.bind)


@rule(Packed, "copy", "copy_p", "stop_gradient", "name")
def _as_it_is(equation: Equation, leaf: Packed) -> Packed:
    return leaf  # it is frozen, and its arrays have placements of their own


@rule(Packed, "neg")
def _neg(equation: Equation, leaf: Packed) -> Any:
    return _elementwise(leaf, lax.neg)


@rule(Packed, "sharding_constraint")
def _sharding_constraint(equation: Equation, leaf: Packed) -> Packed:
    sharding = equation.params["sharding"]
    if leaf.moves or not isinstance(sharding, NamedSharding):
        return leaf  # where the packed arrays lie, the compiler moves what it must
    placed = lax.with_sharding_constraint(leaf.array, leaf.array.shardings(sharding))
    return dataclasses.replace(leaf, array=placed)


@rule(Packed, "optimization_barrier")
def _optimization_barrier(equation: Equation, *operands: Any) -> Any:
    return pass_barrier(equation, operands)


@rule(Packed, "mul", "div")
def _scale(equation: Equation, left: Any, right: Any) -> Any:
    leaf, factor = (left, right) if isinstance(left, Packed) else (right, left)
    if is_array_leaf(factor) or jnp.ndim(factor) or (equation.name == "div" and leaf is right):
        return NotImplemented
    apply = lax.div if equation.name == "div" else lax.mul

    def scaled(x: jax.Array, factor: Any) -> jax.Array:
        return apply(x, jnp.broadcast_to(jnp.asarray(factor, x.dtype), x.shape))

    def step(shape: tuple[int, ...]) -> Move:
        return Move(scaled, shape, leaf.dtype, lambda: step(shape[1:]), 1)

    return dataclasses.replace(
        leaf, operands=(*leaf.operands, factor), moves=(*leaf.moves, step(leaf.shape))
    )


@rule(Packed, "transpose")
def _transpose(equation: Equation, leaf: Packed) -> Any:
    def step(permutation: tuple[int, ...], old: tuple[int, ...]) -> Move:
        def of_slice() -> Move | None:
            if permutation[0] != 0:
                return None
            return step(tuple(axis - 1 for axis in permutation[1:]), old[1:])

        shape = tuple(old[axis] for axis in permutation)
        return Move(lambda x: x.transpose(permutation), shape, leaf.dtype, of_slice)

    move = step(tuple(equation.params["permutation"]), leaf.shape)
    return dataclasses.replace(leaf, moves=(*leaf.moves, move))


def _reshaped(leaf: Packed, new: Sequence[int]) -> Packed:
    def step(old: tuple[int, ...], new: tuple[int, ...]) -> Move:
        def of_slice() -> Move | None:
            groups = next(iter(reshape_groups(old, new)), None) if old and new else None
            return step(old[1:], new[1:]) if groups == ((0,), (0,)) else None

        return Move(lambda x: x.reshape(new), new, leaf.dtype, of_slice)

    return dataclasses.replace(leaf, moves=(*leaf.moves, step(leaf.shape, tuple(new))))


@rule(Packed, "reshape")
def _reshape(equation: Equation, leaf: Packed) -> Any:
    if equation.params["dimensions"] is not None:
        return NotImplemented
    return _reshaped(leaf, equation.params["new_sizes"])


@rule(Packed, "squeeze")
def _squeeze(equation: Equation, leaf: Packed) -> Any:
    gone = tuple(equation.params["dimensions"])
    if gone == (0,) and (layer := leaf.index_leading(lambda x: x[0], keep=0)):
        return layer
    return _reshaped(leaf, [n for axis, n in enumerate(leaf.shape) if axis not in gone])


@rule(Packed, "broadcast_in_dim")
def _broadcast_in_dim(equation: Equation, leaf: Any, *sizes: Any) -> Any:
    shape = equation.params["shape"]
    if not isinstance(leaf, Packed) or sizes or math.prod(shape) != math.prod(leaf.shape):
        return NotImplemented
    return _reshaped(leaf, shape)  # axes of size 1 are added, nothing is repeated


@rule(Packed, "slice")
def _slice(equation: Equation, leaf: Packed) -> Any:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * leaf.ndim
    return _cut(leaf, tuple(map(slice, starts, limits, strides)))


def _cut(leaf: Packed, places: tuple[slice, ...]) -> Packed:
    whole = [place == slice(0, n, 1) for place, n in zip(places, leaf.shape)]
    if all(whole[1:]) and (part := leaf.index_leading(lambda x: x[places[0]], keep=1)):
        return part

    def step(old: tuple[int, ...], places: tuple[slice, ...]) -> Move:
        def of_slice() -> Move | None:
            return step(old[1:], places[1:]) if places[0] == slice(0, old[0], 1) else None

        shape = tuple(len(range(*place.indices(n))) for place, n in zip(places, old))
        return Move(lambda x: x[places], shape, leaf.dtype, of_slice)

    return dataclasses.replace(leaf, moves=(*leaf.moves, step(leaf.shape, places)))


@rule(Packed, "split")
def _split(equation: Equation, leaf: Packed) -> Any:
    axis, parts, start = equation.params["axis"], [], 0
    for size in equation.params["sizes"]:
        places = [slice(0, n, 1) for n in leaf.shape]
        places[axis] = slice(start, start + size, 1)
        parts.append(_cut(leaf, tuple(places)))
        start += size
    return parts


@rule(Packed, "dynamic_slice")
def _dynamic_slice(equation: Equation, leaf: Any, *starts: Any) -> Any:
    if not isinstance(leaf, Packed):
        return NotImplemented
    sizes = equation.params["slice_sizes"]
    if sizes[1:] == leaf.shape[1:]:
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=starts[0],
                                slice_size=sizes[0], axis=0)  # fmt: skip
        if part := leaf.index_leading(cut, keep=1):
            return part
    return leaf.with_move(lambda x, *at: lax.dynamic_slice(x, at, sizes), *starts, shape=sizes)


@rule(Packed, "gather")
def _gather(equation: Equation, leaf: Any, indices: Any) -> Any:
    """Picks along the leading axis: rows of a table, or weights of a stack."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if not isinstance(leaf, Packed) or is_array_leaf(indices) or numbers.operand_batching_dims:
        return NotImplemented
    picks_leading = (
        tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(sizes) == (1, *leaf.shape[1:])
        and tuple(numbers.offset_dims)
        == tuple(range(indices.ndim - 1, indices.ndim - 2 + leaf.ndim))
    )
    if not picks_leading:
        return NotImplemented
    index = jnp.clip(indices[..., 0], 0, leaf.shape[0] - 1)
    fills = equation.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if leaf.array.axes == ("out", "in"):
        return _rows(equation, leaf, indices[..., 0], index, fills)
    if fills:
        return NotImplemented  # a stack has no weight to pick out of bounds
    return leaf.index_leading(lambda x: x[index], keep=index.ndim) or NotImplemented


def _rows(equation: Equation, leaf: Packed, index: jax.Array, safe: jax.Array, fills: bool) -> Any:
    """Rows of a table `[rows columns]`, unpacked alone."""
    moves = tuple(move.of_slice() for move in leaf.moves)
    if leaf.operands or any(move is None or len(move.shape) != 1 for move in moves):
        return NotImplemented
    rows = leaf.array.unpack_rows(safe)[..., : leaf.array.shape[1]]
    for move in moves:
        assert move is not None
        apply = move.apply
        for _ in range(index.ndim):
            apply = jax.vmap(apply)
        rows = apply(rows)
    if not fills:
        return rows
    inside = (index >= 0) & (index < leaf.shape[0])
    fill = equation.params["fill_value"]
    return jnp.where(inside[..., None], rows, jnp.nan if fill is None else fill).astype(rows.dtype)
