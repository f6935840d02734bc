"""A table of which some rows train: the vectors of new tokens, as PEFT's `trainable_token_indices`.

`RowsArray` stands for a weight with some rows of an axis replaced. Lookups and products take those
rows from where they train; nothing of the table's size is built, forward or backward.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora import tree
from jlora.leaf import (
    ArrayLeaf,
    Equation,
    explicit_sharding,
    half_of_a_tree,
    is_array_leaf,
    pass_barrier,
    product_sides,
    rule,
)
from jlora.lora_config import LoraConfig
from jlora.products import gather_axes

__all__ = ["RowsArray", "choose_rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowsArray(ArrayLeaf):
    """A matrix of which some rows (or columns) train; stands for `w.at[indices].set(rows)`.

    Attributes:
      w: `Float[*axes]` of two axes, frozen.
      rows: `Float[count other]`, trained; they start as those of `w`.
      indices: ascending, of the rows along `axis`.
      axis: of `w`: 0 for a table `[vocab d]`, 1 for a kernel `[d vocab]`.
      path: where the weight stands in its tree, while a function runs on it.
    """

    way = "rows apart"

    w: Any
    rows: Any
    indices: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(default=0, metadata={"static": True})
    path: str = dataclasses.field(default="", metadata={"static": True})

    @classmethod
    def start(cls, w: Any, dtype: Any, indices: Sequence[int], axis: int) -> Self:
        """With the rows that the weight has, in a dtype to train in."""
        order = tuple(sorted(indices))
        rows = jnp.moveaxis(w, axis, 0)[np.asarray(order)].astype(dtype)
        return cls(w, rows, order, axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        if self.w is None:
            raise half_of_a_tree("This RowsArray has no weight: its tree")
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.w.dtype

    def name(self) -> str:
        """The weight's path."""
        return self.path or type(self).__name__

    def placeholder(self) -> Any:
        """The weight itself, whose type has its placement on a mesh."""
        return self.w if isinstance(self.w, jax.Array) else super().placeholder()

    def enter(self, path: str) -> Self:
        """The leaf with its path."""
        if self.rows is None:
            raise half_of_a_tree(f"{path!r} has no rows in this tree, which")
        return dataclasses.replace(self, path=path)

    def materialise(self) -> jax.Array:
        """The weight with its rows in place, rounded to the weight's dtype."""
        rows = jnp.moveaxis(self.rows.astype(self.dtype), 0, self.axis)
        return self.w.at[self._place(self.axis, self.ndim)].set(rows)

    def labels(self) -> Self:
        """The same leaf with labels in the places of its arrays."""
        w = None if self.w is None else "frozen"
        return dataclasses.replace(self, w=w, rows=None if self.rows is None else "full")

    def specs(self, spec: PartitionSpec) -> Self:
        """The rows are whole along the axis that they are picked from."""
        places = [*spec, *[None] * (self.ndim - len(spec))]
        return dataclasses.replace(self, w=spec, rows=PartitionSpec(None, places[1 - self.axis]))

    def placements(self, sharding: NamedSharding) -> Self:
        """The same leaf with a sharding in place of each array, for a weight placed by one."""
        specs = self.specs(sharding.spec)
        place = lambda spec: NamedSharding(sharding.mesh, spec)  # noqa: E731
        return dataclasses.replace(specs, w=place(specs.w), rows=place(specs.rows))

    def _place(self, axis: int, ndim: int) -> tuple[Any, ...]:
        """The index of the rows in an array that has them along `axis`."""
        return (*[slice(None)] * axis, np.asarray(self.indices), *[slice(None)] * (ndim - axis - 1))

    def _moved(self, move: Callable[[Any], Any]) -> Self:
        return dataclasses.replace(self, w=move(self.w))


def choose_rows(
    leaves: Mapping[str, Any], config: LoraConfig, adapted: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """What `RowsArray.start` takes for each table of which some rows train."""
    chosen: dict[str, dict[str, Any]] = {}
    for pattern, numbers in config.rows:
        matched = [path for path in leaves if tree.matches(pattern, path)]
        if not matched:
            raise tree.unmatched("rows", pattern, leaves)
        for path in matched:
            leaf = leaves[path]
            if path in chosen or path in adapted or config.trains_whole(path):
                raise ValueError(f"{path!r} is in rows, and in targets, train or rows again.")
            if is_array_leaf(leaf) or getattr(leaf, "ndim", 0) != 2:
                raise ValueError(
                    f"rows names {path!r}, a {type(leaf).__name__} of shape "
                    f"{list(getattr(leaf, 'shape', ()))}; it must be a plain matrix."
                )
            axis = int(path.rpartition("/")[2] == "kernel")
            size = leaf.shape[axis]
            if max(numbers) >= size:
                raise ValueError(
                    f"rows for {path!r} names row {max(numbers)}, and it has {size}. For new "
                    "tokens, make room first: jlora.tokens.grow."
                )
            chosen[path] = {"indices": numbers, "axis": axis}
    return chosen


@rule(RowsArray, "convert_element_type")
def _convert_element_type(equation: Equation, leaf: RowsArray) -> Any:
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        return NotImplemented
    return leaf._moved(equation.bind)  # rows are rounded to the weight's dtype where they are used


@rule(RowsArray, "copy", "copy_p", "pvary", "name", "sharding_constraint")
def _of_the_weight_alone(equation: Equation, leaf: RowsArray) -> Any:
    return leaf._moved(equation.bind)


@rule(RowsArray, "optimization_barrier")
def _optimization_barrier(equation: Equation, *operands: Any) -> Any:
    return pass_barrier(equation, operands)


@rule(RowsArray, "transpose")
def _transpose(equation: Equation, leaf: RowsArray) -> Any:
    axis = tuple(equation.params["permutation"]).index(leaf.axis)
    return dataclasses.replace(leaf._moved(equation.bind), axis=axis)


@rule(RowsArray, "gather")
def _gather(equation: Equation, leaf: Any, indices: Any) -> Any:
    """Rows of the table, and of those that train where an index is one of theirs."""
    found = gather_axes(equation, leaf, indices) if isinstance(leaf, RowsArray) else None
    if found is None or found[0] != [leaf.axis] or equation.out.sharding is not None:
        return NotImplemented
    column = equation.params["dimension_numbers"].start_index_map.index(leaf.axis)
    asked = indices[..., column]
    if equation.params["mode"] == lax.GatherScatterMode.CLIP:
        asked = jnp.clip(asked, 0, leaf.shape[leaf.axis] - 1)
    own = jnp.asarray(leaf.indices, asked.dtype)
    place = jnp.minimum(jnp.searchsorted(own, asked), len(leaf.indices) - 1)
    mine = own[place] == asked
    rows = leaf.rows.astype(leaf.dtype)[place]  # [*indices other]
    _, axes, out_axes = found
    rows = rows.transpose([axes.index(axis) for axis in out_axes])
    is_index = [isinstance(axis, tuple) and axis[0] == "index" for axis in out_axes]
    mine = lax.expand_dims(mine, [i for i, index in enumerate(is_index) if not index])
    return jnp.where(mine, rows, equation.bind(leaf.w, indices))


@rule(RowsArray, "dot_general")
def _dot_general(equation: Equation, left: Any, right: Any) -> Any:
    """A product with the weight, and one with the change of the rows that is added to it."""
    leaf, x, (w_summed, batch), (x_summed, _) = product_sides(equation, left, right, RowsArray)
    if batch or len(w_summed) != 1 or explicit_sharding(jax.typeof(leaf.w)):
        return NotImplemented
    if is_array_leaf(x):
        x = equation.context.materialise(x, equation.name)

    def multiply(w: Any, x: Any) -> jax.Array:
        return equation.bind(*((w, x) if leaf is left else (x, w)))

    # The rows' change, not the rows: a fresh one is zero, and then no bit of the product changes.
    first = jnp.moveaxis(leaf.w, leaf.axis, 0)[np.asarray(leaf.indices)].astype(leaf.rows.dtype)
    change = (leaf.rows - lax.stop_gradient(first)).astype(leaf.dtype)
    change = jnp.moveaxis(change, 0, leaf.axis)
    base = multiply(leaf.w, x)
    if w_summed[0] == leaf.axis:  # the rows meet the input
        return base + multiply(change, x[leaf._place(x_summed[0], x.ndim)])
    place = leaf._place(0 if leaf is left else base.ndim - 1, base.ndim)
    own = multiply(change, x)
    return base.at[place].add(own, indices_are_sorted=True, unique_indices=True)
