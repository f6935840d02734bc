"""A weight that is stored in fewer bits, as `adapt` carries it from the parameter tree to its use.

`Packed` holds the stored arrays and the moves (casts, transposes, reshapes, ...) that the function
made so far. What uses do with it is in `packed_rules.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.leaf import ArrayLeaf, half_of_a_tree
from jlora.lora_config import Axis

__all__ = [
    "Move",
    "Packed",
    "QuantArray",
    "frozen",
    "matrices_to_weight",
    "num_parts",
    "weight_to_matrices",
]


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

    format: ClassVar[str]  # as `quantize` calls it

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
            raise half_of_a_tree(f"This {type(self).__name__} holds no codes: its tree")
        axes, sizes = self._roles()
        stack = iter(self.codes.shape[:-2])
        whole = {"out": self.codes.shape[-2], "in": self.num_columns()}
        known = {"out": 1, "in": 1}
        for role, size in zip(axes, sizes):
            if size:
                known[role] *= size
        return tuple(
            next(stack) if role == "stack" else size or whole[role] // known[role]
            for role, size in zip(axes, sizes)
        )

    def _roles(self) -> tuple[tuple[Axis, ...], tuple[int, ...]]:
        """`axes` and `sizes` as the arrays have them: a `vmap` or `scan` outside takes or adds."""
        more = self.codes.ndim - 2 - self.num_stacked
        gone = max(0, -more)
        if set(self.axes[:gone]) - {"stack"}:
            raise ValueError(
                f"A {type(self).__name__} of axes {self.axes} has codes of {self.codes.ndim} axes: "
                "map over leading, stacked axes only."
            )
        stack: tuple[Axis, ...] = ("stack",) * more
        return (*stack, *self.axes[gone:]), (0,) * more + self.sizes[gone:]

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

    def why_frozen(self, path: str) -> str:
        """It is stored in too few bits for a step of training."""
        weight = repr(path) if path else f"A weight of shape {self.shape}"
        return (
            f"{weight} is quantised ({self.format}) and frozen: it has no gradient. Train adapters "
            "on top of it: jlora.init, then differentiate with respect to the trainable tree of "
            "jlora.split, outside of jlora.adapt. Or restore it first, with jlora.dequantize."
        )

    def enter(self, path: str) -> "Packed":
        """The leaf as rules want it, for a leaf found at `path`."""
        axes, sizes = self._roles()
        return Packed(frozen(dataclasses.replace(self, axes=axes, sizes=sizes), path), (), (), path)

    def materialise(self) -> jax.Array:
        """The dense weight."""
        array = frozen(self, "")
        return matrices_to_weight(array.unpack(), array.shape, array._roles()[0])

    def divisible(self) -> "QuantArray":
        """The leaf in a form whose arrays can be cut into parts that stand alone."""
        return self

    def uncut_axes(self, spec: PartitionSpec, mesh: Any) -> tuple[int, ...]:
        """The axes that `spec` cuts where the stored arrays have no place to cut.

        Rows and columns can be cut along the first axis of each, columns between blocks.
        """
        uncut = []
        for axis, (place, role) in enumerate(zip(spec, self.axes)):
            parts = num_parts(place, mesh)
            is_first = role == "stack" or self.axes.index(role) == axis
            within_blocks = role == "in" and (self.padding or self.num_units() % parts)
            if parts > 1 and (not is_first or within_blocks):
                uncut.append(axis)
        return tuple(uncut)

    def shardings(self, sharding: NamedSharding) -> Any:
        """The same leaf with the placement of each array, for a weight placed by `sharding`."""
        uncut = self.uncut_axes(sharding.spec, sharding.mesh)
        places = (None if axis in uncut else p for axis, p in enumerate(sharding.spec))
        specs = self.specs(PartitionSpec(*places))
        return jax.tree.map(lambda _, spec: NamedSharding(sharding.mesh, spec), self, specs)

    def specs(self, spec: PartitionSpec) -> Any:
        """The same leaf with a PartitionSpec in place of each array, for a weight cut by `spec`.

        The second level of scales, which runs on from row to row, stays whole.
        """
        places = [*spec, *[None] * (len(self.axes) - len(spec))]
        stack = [place for place, role in zip(places, self.axes) if role == "stack"]
        rows, columns = (
            next((p for p, r, n in zip(places, self.axes, self.sizes) if r == role and not n), None)
            for role in ("out", "in")
        )
        return self._specs(stack, rows, columns)

    def _specs(self, stack: list[Any], rows: Any, columns: Any) -> Any:
        raise NotImplementedError


def num_parts(place: Any, mesh: Any) -> int:
    """Into how many parts an entry of a PartitionSpec cuts an axis."""
    if place is None or place is PartitionSpec.UNCONSTRAINED:
        return 1
    return math.prod(mesh.shape[name] for name in ((place,) if isinstance(place, str) else place))


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
class Move:
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
    of_slice: Callable[[], "Move | None"]
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
    moves: tuple[Move, ...] = dataclasses.field(metadata={"static": True})
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
        return self.dense(self.array)

    def dense(self, array: QuantArray) -> jax.Array:
        """The dense array, from other stored arrays of the same kind."""
        dense, operands = array.materialise(), iter(self.operands)
        for move in self.moves:
            dense = move.apply(dense, *(next(operands) for _ in range(move.num_operands)))
        return dense

    def with_move(self, apply: Callable[..., jax.Array], *operands: Any, **kept: Any) -> "Packed":
        """The leaf one move further."""
        shape = tuple(kept.get("shape", self.shape))
        of_slice = kept.get("of_slice", lambda: None)
        move = Move(apply, shape, kept.get("dtype", self.dtype), of_slice, len(operands))
        return dataclasses.replace(
            self, operands=(*self.operands, *operands), moves=(*self.moves, move)
        )

    def moves_of_slice(self) -> tuple[Move, ...] | None:
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

    def divisible(self, spec: PartitionSpec, mesh: Any) -> "Packed | None":
        """The leaf in a form whose arrays can be cut like the weight."""
        if self.moves or self.array.uncut_axes(spec, mesh):
            return None
        return dataclasses.replace(self, array=self.array.divisible())

    def specs(self, spec: PartitionSpec) -> "Packed":
        """The packed arrays are cut as the weight is."""
        return dataclasses.replace(self, array=self.array.specs(spec))

    def after_barrier(self) -> "Packed":
        """The packed arrays have no tangents, whatever the barrier gave them."""
        return dataclasses.replace(self, array=jax.tree.map(lax.stop_gradient, self.array))


def frozen(array: QuantArray, path: str) -> QuantArray:
    """The stored arrays, behind an error for whoever differentiates with respect to them."""

    @jax.custom_jvp
    def identity(x: jax.Array) -> jax.Array:
        return x

    @identity.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise TypeError(array.why_frozen(path))

    return jax.tree.map(
        lambda x: identity(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, array
    )
