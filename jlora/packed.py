"""A weight that is stored in fewer bits, as `adapt` carries it from the parameter tree to its use.

`Packed` holds the stored arrays and the moves (casts, transposes, reshapes, ...) that the function
made so far. A product builds the dense weight when it needs it, forward, and again backward:
between the two only the packed arrays live. Layers of a stack are cut from the packed arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.leaf import ArrayLeaf, Equation, is_array_leaf, reshape_groups, rule
from jlora.lora_config import Axis

__all__ = ["Packed", "QuantArray", "matrices_to_weight", "weight_to_matrices"]


@dataclasses.dataclass(frozen=True)
class QuantArray(ArrayLeaf):
    """A frozen weight stored in fewer bits: matrices of rows `out` and columns `in`.

    The columns are the axes that products contract, flattened, and the rows those that remain, so
    that scales belong to rows and blocks run along what is summed. All arrays have the stacked axes
    in front.

    Attributes:
      codes: `[*stack rows columns]`, or fewer columns where several share a byte.
      axes: the role of each axis of the weight: `"stack"`, `"in"` or `"out"`.
      sizes: of the axes after the first of each role `in` and `out`; 0 for all others, whose sizes
        are those of the arrays.
      dtype_name: of the weight that this stands for.
      padding: columns that were added to fill the last block.
    """

    codes: Any
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype_name: str = dataclasses.field(metadata={"static": True})
    padding: int = dataclasses.field(metadata={"static": True})

    way = "dequantised there"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        if self.codes is None:
            raise ValueError(
                f"This {type(self).__name__} holds no codes: its tree is one half of jlora.split. "
                "Join the halves with jlora.combine(trainable, frozen)."
            )
        stack = iter(self.codes.shape[:-2])
        whole = {"out": self.codes.shape[-2], "in": self.num_columns()}
        known = {"out": 1, "in": 1}
        for role, size in zip(self.axes, self.sizes):
            if size:
                known[role] *= size
        return tuple(
            next(stack) if role == "stack" else size or whole[role] // known[role]
            for role, size in zip(self.axes, self.sizes)
        )

    @property
    def dtype(self) -> Any:
        """The dtype of the weight that this stands for."""
        return jnp.dtype(self.dtype_name)

    @property
    def num_stacked(self) -> int:
        """How many axes are stacked."""
        return self.axes.count("stack")

    def num_columns(self) -> int:
        """The columns of one matrix, without padding."""
        return self.codes.shape[-1] - self.padding

    def num_units(self) -> int:
        """The parts of a row that share nothing: blocks, or columns."""
        return self.codes.shape[-1]

    def unpack(self) -> jax.Array:
        """The dense matrices `[*stack rows columns]`, padding included, in the weight's dtype."""
        raise NotImplementedError

    def unpack_rows(self, rows: jax.Array) -> jax.Array:
        """Some rows of one matrix: `[*rows columns]`, padding included."""
        raise NotImplementedError

    def pack_like(self, w: jax.Array) -> "QuantArray":
        """Another weight of this shape in this format."""
        raise NotImplementedError

    def name(self) -> str:
        """What messages call a leaf that is in no tree."""
        return type(self).__name__

    def enter(self, path: str) -> "Packed":
        """The leaf as rules want it, for a leaf found at `path`."""
        return Packed(self, (), (), path)

    def materialise(self) -> jax.Array:
        """The dense weight."""
        return matrices_to_weight(self.unpack(), self.shape, self.axes)

    def divisible(self) -> "QuantArray":
        """The leaf in a form whose arrays can be cut into parts that stand alone."""
        return self

    def specs(self, spec: PartitionSpec) -> Any:
        """The same leaf with a PartitionSpec in place of each array, for a weight cut by `spec`.

        Rows and columns can be cut along the first axis of each. Padded columns and the second
        level of scales, which runs on from row to row, stay whole.
        """
        places = [*spec, *[None] * (len(self.axes) - len(spec))]
        stack = [place for place, role in zip(places, self.axes) if role == "stack"]
        rows, columns = (
            next((p for p, r, n in zip(places, self.axes, self.sizes) if r == role and not n), None)
            for role in ("out", "in")
        )
        return self._specs(stack, rows, None if self.padding else columns)

    def _specs(self, stack: list[Any], rows: Any, columns: Any) -> Any:
        raise NotImplementedError


def weight_to_matrices(w: jax.Array, axes: Sequence[Axis]) -> jax.Array:
    """`[*axes]` to `[*stack rows columns]`."""
    order = [axis for role in ("stack", "out", "in") for axis, r in enumerate(axes) if r == role]
    stack = [w.shape[axis] for axis in order[: axes.count("stack")]]
    rows = math.prod(size for size, role in zip(w.shape, axes) if role == "out")
    return w.transpose(order).reshape(*stack, rows, -1)


def matrices_to_weight(
    matrices: jax.Array, shape: Sequence[int], axes: Sequence[Axis]
) -> jax.Array:
    """`[*stack rows columns]`, with padding columns at the end of rows, to `[*axes]`."""
    columns = math.prod(size for size, role in zip(shape, axes) if role == "in")
    order = [axis for role in ("stack", "out", "in") for axis, r in enumerate(axes) if r == role]
    moved = matrices[..., :columns].reshape([shape[axis] for axis in order])
    return moved.transpose([order.index(axis) for axis in range(len(order))])


@dataclasses.dataclass(frozen=True, eq=False)
class _Move:
    """A step from the stored weight to what the function holds now.

    Attributes:
      apply: the step, on the dense array and further operands.
      shape: of the result.
      dtype: of the result.
      of_slice: the same step for one slice along the leading axis; None where there is none.
      num_operands: the further operands.
    """

    apply: Callable[..., jax.Array]
    shape: tuple[int, ...]
    dtype: Any
    of_slice: Callable[[], "_Move | None"]
    num_operands: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed(ArrayLeaf):
    """A stored weight on its way through a function.

    Attributes:
      array: as it is stored.
      operands: further operands of the moves, in their order.
      moves: from the stored weight to what this stands for.
      path: where the weight stands in its tree.
    """

    array: QuantArray
    operands: tuple[Any, ...]
    moves: tuple[_Move, ...] = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        return self.moves[-1].shape if self.moves else self.array.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the array that this stands for."""
        return self.moves[-1].dtype if self.moves else self.array.dtype

    def name(self) -> str:
        """The weight's path."""
        return self.path

    def materialise(self) -> jax.Array:
        """The dense array."""
        return self.dense(_frozen(self))

    def dense(self, array: QuantArray) -> jax.Array:
        """The dense array, from other stored arrays of the same kind."""
        return self._moved(array.materialise())

    def no_gradient(self) -> TypeError:
        """The error for whoever differentiates with respect to this leaf."""
        return TypeError(
            f"{self.path!r} is quantised ({type(self.array).__name__}) and frozen: it has no "
            "gradient. Differentiate with respect to the trainable tree of jlora.split only."
        )

    def _moved(self, dense: jax.Array) -> jax.Array:
        operands = iter(self.operands)
        for move in self.moves:
            dense = move.apply(dense, *(next(operands) for _ in range(move.num_operands)))
        return dense

    def with_move(self, apply: Callable[..., jax.Array], *operands: Any, **kept: Any) -> "Packed":
        """The leaf one move further."""
        shape = tuple(kept.get("shape", self.shape))
        of_slice = kept.get("of_slice", lambda: None)
        move = _Move(apply, shape, kept.get("dtype", self.dtype), of_slice, len(operands))
        return dataclasses.replace(
            self, operands=(*self.operands, *operands), moves=(*self.moves, move)
        )

    def moves_of_slice(self) -> tuple[_Move, ...] | None:
        """The moves of one slice along the leading axis; None where it cannot be cut first."""
        if not self.array.axes or self.array.axes[0] != "stack":
            return None
        moves = tuple(move.of_slice() for move in self.moves)
        return None if None in moves else moves  # pyright: ignore[reportReturnType]

    def index_leading(self, fn: Callable[[Any], Any], *, keep: int) -> "Packed | None":
        """The leaf after `fn` has replaced the leading, stacked axis of each array by others."""
        moves = self.moves_of_slice()
        if moves is None or (keep and moves):
            return None
        stack: tuple[Axis, ...] = ("stack",) * keep
        axes = (*stack, *self.array.axes[1:])
        array = jax.tree.map(fn, self.array)
        array = dataclasses.replace(array, axes=axes, sizes=(0,) * keep + self.array.sizes[1:])
        return dataclasses.replace(self, array=array, moves=moves)

    def unstack(self) -> Any:
        """Scans over the stacked axis of the packed arrays."""
        if self.moves_of_slice() is None:
            return None

        def rebuild(part: Any) -> "Packed | None":
            parts = iter(jax.tree.leaves(part))
            return self.index_leading(lambda _: next(parts), keep=0)

        return jax.tree.leaves(self.array), rebuild

    def divisible(self) -> "Packed":
        """The leaf in a form whose arrays can be cut like the weight."""
        if self.moves:
            raise NotImplementedError(
                f"{self.path!r} is quantised and was moved before a shard_map; move it inside."
            )
        return dataclasses.replace(self, array=self.array.divisible())

    def specs(self, spec: PartitionSpec) -> "Packed":
        """The packed arrays are cut as the weight is."""
        return dataclasses.replace(self, array=self.array.specs(spec))


def _frozen(leaf: Packed) -> QuantArray:
    """The stored arrays, behind an error for whoever differentiates with respect to them."""

    @jax.custom_jvp
    def identity(x: jax.Array) -> jax.Array:
        return x

    @identity.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise leaf.no_gradient()

    return jax.tree.map(
        lambda x: identity(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, leaf.array
    )


@rule(Packed, "convert_element_type")
def _convert_element_type(equation: Equation, leaf: Packed) -> Any:
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return NotImplemented
    return _elementwise(leaf, lambda x: lax.convert_element_type(x, dtype), dtype)


def _elementwise(leaf: Packed, apply: Callable[[jax.Array], jax.Array], dtype: Any = None) -> Any:
    dtype = dtype or leaf.dtype

    def step(shape: tuple[int, ...]) -> _Move:
        return _Move(apply, shape, dtype, lambda: step(shape[1:]))

    return dataclasses.replace(leaf, moves=(*leaf.moves, step(leaf.shape)))


@rule(Packed, "copy", "copy_p", "stop_gradient", "name", "pvary", "reshard")
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
    placed = jax.tree.map(
        lambda x, spec: lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec)),
        leaf.array,
        leaf.array.specs(sharding.spec),
    )
    return dataclasses.replace(leaf, array=placed)


@rule(Packed, "optimization_barrier")
def _optimization_barrier(equation: Equation, *operands: Any) -> Any:
    flat, treedef = jax.tree.flatten(list(operands))
    return jax.tree.unflatten(treedef, equation.bind(*flat))


@rule(Packed, "mul", "div")
def _scale(equation: Equation, left: Any, right: Any) -> Any:
    leaf, factor = (left, right) if isinstance(left, Packed) else (right, left)
    if is_array_leaf(factor) or jnp.ndim(factor) or (equation.name == "div" and leaf is right):
        return NotImplemented
    apply = lax.div if equation.name == "div" else lax.mul

    def scaled(x: jax.Array, factor: Any) -> jax.Array:
        return apply(x, jnp.broadcast_to(jnp.asarray(factor, x.dtype), x.shape))

    def step(shape: tuple[int, ...]) -> _Move:
        return _Move(scaled, shape, leaf.dtype, lambda: step(shape[1:]), 1)

    return dataclasses.replace(
        leaf, operands=(*leaf.operands, factor), moves=(*leaf.moves, step(leaf.shape))
    )


@rule(Packed, "transpose")
def _transpose(equation: Equation, leaf: Packed) -> Any:
    def step(permutation: tuple[int, ...], old: tuple[int, ...]) -> _Move:
        def of_slice() -> _Move | None:
            if permutation[0] != 0:
                return None
            return step(tuple(axis - 1 for axis in permutation[1:]), old[1:])

        shape = tuple(old[axis] for axis in permutation)
        return _Move(lambda x: x.transpose(permutation), shape, leaf.dtype, of_slice)

    move = step(tuple(equation.params["permutation"]), leaf.shape)
    return dataclasses.replace(leaf, moves=(*leaf.moves, move))


def _reshaped(leaf: Packed, new: Sequence[int]) -> Packed:
    def step(old: tuple[int, ...], new: tuple[int, ...]) -> _Move:
        def of_slice() -> _Move | None:
            groups = next(iter(reshape_groups(old, new)), None) if old and new else None
            return step(old[1:], new[1:]) if groups == ((0,), (0,)) else None

        return _Move(lambda x: x.reshape(new), new, leaf.dtype, of_slice)

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

    def step(old: tuple[int, ...], places: tuple[slice, ...]) -> _Move:
        def of_slice() -> _Move | None:
            return step(old[1:], places[1:]) if places[0] == slice(0, old[0], 1) else None

        shape = tuple(len(range(*place.indices(n))) for place, n in zip(places, old))
        return _Move(lambda x: x[places], shape, leaf.dtype, of_slice)

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
    rows = _frozen(leaf).unpack_rows(safe)[..., : leaf.array.shape[1]]
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
