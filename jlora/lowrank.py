"""A weight plus a low-rank product, as `adapt` carries it from the parameter tree to its use.

`LowRank` stands for `w + scaling * sum_r u[..., r] * v[..., r]`. Both factors have the axes of `w`
and a last one for the rank; a factor has size 1 along the axes that the other one owns. So whatever
moves the axes of `w` moves those of the factors alike, and a product with `w` becomes two small
ones, whichever axes it contracts: those are in `products.py`, the moves are here. `Factored` is
what has such moves, whatever it stands for: a variant with more factors inherits them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.leaf import (
    ArrayLeaf,
    Equation,
    explicit_sharding,
    is_array_leaf,
    pass_barrier,
    reshape_groups,
    rule,
)

__all__ = ["Factored", "LowRank", "contract", "spread_along"]


@dataclasses.dataclass(frozen=True)
class Factored(ArrayLeaf):
    """A weight and factors that share its axes, on their way through a function.

    Attributes:
      w: `Float[*axes]`, an array or a leaf of its own (quantised).
      u: `Float[*axes rank]`, with size 1 along axes that only `v` owns.
      v: `Float[*axes rank]`, with size 1 along axes that only `u` owns.
      scaling: of the product.
      dropout: the share of the product's inputs that a dropout key zeroes.
      path: where the weight stands in its tree.
      beside: the paths of further weights that the function joined with it.
    """

    factor_names: ClassVar[tuple[str, ...]] = ("u", "v")

    w: Any
    u: jax.Array
    v: jax.Array
    scaling: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    beside: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `w`."""
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of `w`."""
        return self.w.dtype

    def name(self) -> str:
        """The weight's path, or those of all that were joined."""
        return " + ".join(self.names())

    def names(self) -> tuple[str, ...]:
        """The weight's path, and the paths of those that it was joined with."""
        return (self.path, *self.beside)

    def factors(self) -> tuple[jax.Array, ...]:
        """The arrays that share the axes of `w`, each with one more axis."""
        return tuple(getattr(self, name) for name in self.factor_names)

    def moved(self, w: Any, move: Callable[[jax.Array], jax.Array]) -> Self:
        """The leaf with another `w`, and every factor moved alike."""
        return self.with_factors(w, [move(factor) for factor in self.factors()])

    def with_factors(self, w: Any, factors: Sequence[Any]) -> Self:
        """The leaf with another `w` and other factors, in the order of `factors`."""
        return dataclasses.replace(self, w=w, **dict(zip(self.factor_names, factors, strict=True)))

    def unstack(self) -> Any:
        """Scans over the axis that factors share or own; one that does not stays as it is."""
        if is_array_leaf(self.w):
            cut = self.w.unstack()
            if cut is None:
                return None
            scanned_w, rebuild_w = cut
        else:
            scanned_w, rebuild_w = self.w, lambda part: part
        length = self.shape[0]
        scanned = [f if f.shape[0] == length else None for f in self.factors()]

        def rebuild(parts: Any) -> Self:
            part_w, *factors = parts
            whole = self.factors()
            cut = [old[0] if part is None else part for part, old in zip(factors, whole)]
            return self.with_factors(rebuild_w(part_w), cut)

        return (scanned_w, *scanned), rebuild

    def divisible(self, spec: PartitionSpec, mesh: Any) -> Self | None:
        """With a base whose arrays can be cut."""
        if not is_array_leaf(self.w):
            return self
        w = self.w.divisible(spec, mesh)
        return None if w is None else dataclasses.replace(self, w=w)

    def specs(self, spec: PartitionSpec) -> Self:
        """Each factor is cut along the axes that it owns, as the weight is."""
        places = [*spec, *[None] * (self.ndim - len(spec))]
        factors = [
            PartitionSpec(
                *(place if size > 1 else None for place, size in zip(places, factor.shape))
            )
            for factor in self.factors()
        ]
        w = self.w.specs(spec) if is_array_leaf(self.w) else spec
        return self.with_factors(w, factors)

    def after_barrier(self) -> Self:
        """With a base that knows what it has no tangents for."""
        return (
            dataclasses.replace(self, w=self.w.after_barrier()) if is_array_leaf(self.w) else self
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Factored):
    """`w + scaling * sum_r u[..., r] * v[..., r]` on its way through a function."""

    def scaled(self, hidden: jax.Array, axes: Sequence[Any]) -> jax.Array:
        """What a product with one factor becomes before it meets the other one.

        Args:
          hidden: of axes that are named as in `contract`, `"rank"` among them.
          axes: their names.
        """
        return self.scaling * hidden

    def materialise(self) -> jax.Array:
        """`w` plus the product, computed in float32 (or wider) and rounded once."""
        base = self.w.materialise() if is_array_leaf(self.w) else self.w
        wide = jnp.promote_types(self.dtype, jnp.float32)
        axes = tuple(range(self.ndim))
        update = contract(
            self.u.astype(wide),
            (*axes, -1),
            self.v.astype(wide),
            (*axes, -1),
            axes,
            out_sharding=explicit_sharding(jax.typeof(base)),
            precision=lax.Precision.HIGHEST,
        )
        return (base.astype(wide) + self.scaling * update).astype(self.dtype)


def contract(
    x: jax.Array,
    x_axes: Sequence[Any],
    y: jax.Array,
    y_axes: Sequence[Any],
    out_axes: Sequence[Any],
    *,
    out_sharding: NamedSharding | None = None,
    **dot_options: Any,
) -> jax.Array:
    """A two-operand einsum over named axes in which size 1 stands for an axis not there.

    One `dot_general`, and a transpose only where neither order of the operands gives `out_axes`.
    An axis of `out_axes` that both operands lack has size 1 in the result. `out_sharding` is for a
    mesh of Explicit axes, on which a product that sums over a sharded axis must be placed.
    """
    x, x_axes = _drop_singletons(x, x_axes)
    y, y_axes = _drop_singletons(y, y_axes)
    x, x_axes = _sum_alone(x, x_axes, (*y_axes, *out_axes))
    y, y_axes = _sum_alone(y, y_axes, (*x_axes, *out_axes))
    wanted = [axis for axis in out_axes if axis in x_axes or axis in y_axes]
    batch = [axis for axis in wanted if axis in x_axes and axis in y_axes]
    summed = [axis for axis in x_axes if axis in y_axes and axis not in wanted]

    def order_of_result(first: list[Any], second: list[Any]) -> list[Any]:
        return [*batch, *(a for a in (*first, *second) if a in wanted and a not in batch)]

    if order_of_result(x_axes, y_axes) != wanted == order_of_result(y_axes, x_axes):
        x, x_axes, y, y_axes = y, y_axes, x, x_axes
    contracting, batching = (
        (tuple(map(x_axes.index, group)), tuple(map(y_axes.index, group)))
        for group in (summed, batch)
    )
    got = order_of_result(x_axes, y_axes)
    if out_sharding is not None:
        spec = dict(zip(out_axes, out_sharding.spec))
        asked = PartitionSpec(*(spec.get(axis) for axis in got))
        dot_options["out_sharding"] = NamedSharding(out_sharding.mesh, asked)
    product = lax.dot_general(x, y, (contracting, batching), **dot_options)
    if got != wanted:
        product = product.transpose([got.index(axis) for axis in wanted])
    if len(wanted) < len(out_axes):
        product = lax.expand_dims(
            product, [place for place, axis in enumerate(out_axes) if axis not in wanted]
        )
    return product


def spread_along(
    factor: jax.Array, factor_axes: Sequence[Any], axes: Sequence[Any], like: jax.Array
) -> jax.Array:
    """A factor in the order of an array's axes, with size 1 along those that it does not own.

    Args:
      factor: one or more axes; those of size 1 count as not owned.
      factor_axes: their names.
      axes: names of the result's axes, all that the factor owns among them.
      like: the array; on a mesh of Explicit axes the result lies as it does.
    """
    factor, owned = _drop_singletons(factor, factor_axes)
    factor = factor.transpose([owned.index(axis) for axis in axes if axis in owned])
    factor = lax.expand_dims(factor, [i for i, axis in enumerate(axes) if axis not in owned])
    sharding = explicit_sharding(jax.typeof(like))
    if sharding is not None:
        places = (p if n > 1 else None for p, n in zip(sharding.spec, factor.shape))
        factor = jax.reshard(factor, NamedSharding(sharding.mesh, PartitionSpec(*places)))
    return factor


def _drop_singletons(x: jax.Array, axes: Sequence[Any]) -> tuple[jax.Array, list[Any]]:
    single = [place for place, size in enumerate(x.shape) if size == 1]
    kept = [axis for place, axis in enumerate(axes) if place not in single]
    return lax.squeeze(x, single) if single else x, kept


def _sum_alone(
    x: jax.Array, axes: Sequence[Any], elsewhere: Sequence[Any]
) -> tuple[jax.Array, list[Any]]:
    alone = [place for place, axis in enumerate(axes) if axis not in elsewhere]
    kept = [axis for axis in axes if axis in elsewhere]
    return x.sum(alone) if alone else x, kept


@rule(Factored, "convert_element_type")
def _convert_element_type(equation: Equation, leaf: Factored) -> Any:
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        return NotImplemented  # fewer bits quantise the sum, not its parts
    # The factors are rounded to the weight's dtype where they are used, once.
    return dataclasses.replace(leaf, w=equation.bind(leaf.w))


@rule(Factored, "reshard")
def _reshard(equation: Equation, leaf: Factored) -> Any:
    wanted = equation.params["dst_sharding"]  # maybe on the same mesh with other types of axes
    specs: Any = leaf.specs(wanted.spec).factors()
    factors = [
        equation.bind_as(equation.params | {"dst_sharding": NamedSharding(wanted.mesh, spec)}, x)
        for x, spec in zip(leaf.factors(), specs)
    ]
    return leaf.with_factors(equation.bind(leaf.w), factors)


@rule(Factored, "pvary", "name")
def _of_the_weight_alone(equation: Equation, leaf: Factored) -> Any:
    # The factors are small, have placements of their own, and products make up for it.
    return dataclasses.replace(leaf, w=equation.bind(leaf.w))


@rule(Factored, "split")
def _split(equation: Equation, leaf: Factored) -> Any:
    sizes, axis = equation.params["sizes"], equation.params["axis"]

    def cut(factor: jax.Array) -> list[jax.Array]:
        if factor.shape[axis] == 1:
            return [factor] * len(sizes)
        return list(lax.split(factor, sizes, axis))

    parts = zip(equation.bind(leaf.w), *map(cut, leaf.factors()))
    return [leaf.with_factors(w, factors) for w, *factors in parts]


@rule(Factored, "unstack")
def _unstack(equation: Equation, leaf: Factored) -> Any:
    axis = equation.params["axis"]

    def cut(factor: jax.Array) -> Sequence[jax.Array]:
        if factor.shape[axis] == 1:
            return [lax.squeeze(factor, (axis,))] * leaf.shape[axis]
        return jnp.unstack(factor, axis=axis)

    parts = zip(equation.bind(leaf.w), *map(cut, leaf.factors()))
    return [leaf.with_factors(w, factors) for w, *factors in parts]


@rule(Factored, "copy", "copy_p", "stop_gradient")
def _pass_through(equation: Equation, leaf: Factored) -> Any:
    return leaf.moved(equation.bind(leaf.w), equation.bind)


@rule(Factored, "neg")
def _neg(equation: Equation, leaf: Factored) -> Any:
    return dataclasses.replace(leaf, w=equation.bind(leaf.w), u=equation.bind(leaf.u))


@rule(Factored, "optimization_barrier")
def _optimization_barrier(equation: Equation, *operands: Any) -> Any:
    return pass_barrier(equation, operands)


@rule(Factored, "mul", "div")
def _scale(equation: Equation, left: Any, right: Any) -> Any:
    leaf, factor = (left, right) if isinstance(left, Factored) else (right, left)
    if is_array_leaf(factor) or jnp.ndim(factor) or (equation.name == "div" and leaf is right):
        return NotImplemented
    w = equation.bind(*((leaf.w, right) if leaf is left else (left, leaf.w)))
    factor = jnp.asarray(factor, leaf.u.dtype)
    u = leaf.u / factor if equation.name == "div" else leaf.u * factor
    return dataclasses.replace(leaf, w=w, u=u)


@rule(Factored, "transpose")
def _transpose(equation: Equation, leaf: Factored) -> Any:
    permutation = (*equation.params["permutation"], leaf.ndim)
    return leaf.moved(equation.bind(leaf.w), lambda factor: factor.transpose(permutation))


@rule(Factored, "squeeze")
def _squeeze(equation: Equation, leaf: Factored) -> Any:
    gone = equation.params["dimensions"]
    return leaf.moved(equation.bind(leaf.w), lambda factor: lax.squeeze(factor, gone))


@rule(Factored, "reshape")
def _reshape(equation: Equation, leaf: Factored) -> Any:
    new_sizes = equation.params["new_sizes"]
    if equation.params["dimensions"] is not None:
        return NotImplemented
    factors = []
    for factor in leaf.factors():
        shape = _reshaped_factor(factor.shape[:-1], leaf.shape, new_sizes)
        if shape is None:
            return NotImplemented
        sharding = _owned_sharding(equation.params["sharding"], shape)
        factors.append(lax.reshape(factor, (*shape, factor.shape[-1]), out_sharding=sharding))
    return leaf.with_factors(equation.bind(leaf.w), factors)


def _reshaped_factor(
    factor: Sequence[int], old: Sequence[int], new: Sequence[int]
) -> list[int] | None:
    """A factor's shape after a reshape of its weight; None where it owns half of a merged axis."""
    shape = [1] * len(new)
    for old_axes, new_axes in reshape_groups(old, new):
        owned = [factor[axis] > 1 for axis in old_axes if old[axis] > 1]
        if any(owned) and not all(owned):
            return None
        if any(owned):
            for axis in new_axes:
                shape[axis] = new[axis]
    return shape


def _owned_sharding(sharding: NamedSharding | None, shape: Sequence[int]) -> NamedSharding | None:
    """The weight's sharding as far as it is about the axes that a factor owns."""
    if sharding is None:
        return None
    spec = (place if size > 1 else None for place, size in zip(sharding.spec, shape))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec, None))


@rule(Factored, "slice")
def _slice(equation: Equation, leaf: Factored) -> Any:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * leaf.ndim

    def cut(factor: jax.Array) -> jax.Array:
        places = (
            slice(start, limit, stride) if size > 1 else slice(None)
            for size, start, limit, stride in zip(factor.shape, starts, limits, strides)
        )
        return factor[tuple(places)]

    return leaf.moved(equation.bind(leaf.w), cut)


@rule(Factored, "dynamic_slice")
def _dynamic_slice(equation: Equation, leaf: Any, *starts: Any) -> Any:
    if not isinstance(leaf, Factored):
        return NotImplemented

    def cut(factor: jax.Array) -> jax.Array:
        for axis, (start, size) in enumerate(zip(starts, equation.params["slice_sizes"])):
            if factor.shape[axis] > 1:
                factor = lax.dynamic_slice_in_dim(factor, start, size, axis)
        return factor

    part = leaf.moved(equation.bind(leaf.w, *starts), cut)
    # One row of a table is an activation, as small as it gets.
    is_row = any(math.prod(factor.shape[:-1]) == 1 for factor in (part.u, part.v))
    return part.materialise() if is_row else part


@rule(Factored, "broadcast_in_dim")
def _broadcast_in_dim(equation: Equation, leaf: Any, *sizes: Any) -> Any:
    if not isinstance(leaf, Factored) or sizes:
        return NotImplemented
    shape, places = equation.params["shape"], equation.params["broadcast_dimensions"]
    placed = dict(zip(places, range(leaf.ndim)))

    def spread(factor: jax.Array, *, fill: bool) -> jax.Array:
        target = [factor.shape[placed[axis]] if axis in placed else 1 for axis in range(len(shape))]
        if fill:
            # One factor holds the copies along an axis that the weight is repeated over.
            for axis, size in enumerate(shape):
                repeated = axis not in placed or leaf.shape[placed[axis]] == 1
                target[axis] = size if repeated else target[axis]
        rank = len(shape)
        return lax.broadcast_in_dim(
            factor,
            (*target, factor.shape[-1]),
            (*places, rank),
            out_sharding=_owned_sharding(equation.params["sharding"], target),
        )

    factors = [spread(f, fill=name == "v") for f, name in zip(leaf.factors(), leaf.factor_names)]
    return leaf.with_factors(equation.bind(leaf.w), factors)


@rule(Factored, "rev")
def _rev(equation: Equation, leaf: Factored) -> Any:
    return leaf.moved(equation.bind(leaf.w), equation.bind)  # an axis of size 1 is itself


@rule(Factored, "sharding_constraint")
def _sharding_constraint(equation: Equation, leaf: Factored) -> Any:
    # The factors are small: they stay where they are, and the compiler moves what it must.
    return dataclasses.replace(leaf, w=equation.bind(leaf.w))
