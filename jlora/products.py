"""Products with a weight that carries a low-rank update: two small ones beside the weight's own.

Each rule runs the function's own operation on the bare weight and adds the update, which meets the
input one factor at a time. Nothing of the weight's size is built.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.leaf import (
    ArrayLeaf,
    Context,
    Equation,
    explicit_sharding,
    is_array_leaf,
    product_sides,
    rule,
)
from jlora.lowrank import Factored, LowRank, contract

__all__ = [
    "arrange",
    "drop_out",
    "gather_axes",
    "gather_rows",
    "name_axes",
    "product",
    "ragged_axes",
    "ragged_factors",
    "ragged_rows",
    "result_axes",
]  # importing this module registers its rules

_Leaf = TypeVar("_Leaf", bound=Factored)


def product(
    x: jax.Array,
    x_axes: Sequence[Any],
    leaf: LowRank,
    leaf_axes: Sequence[Any],
    out_axes: Sequence[Any],
    out: jax.ShapeDtypeStruct,
    precision: Any = None,
) -> jax.Array:
    """`scaling * (x . u) . v` for any contraction of `x` with the weight.

    Args:
      x: the input.
      x_axes: names of its axes, from `name_axes`.
      leaf: the weight and its factors; `LowRank.scaled` is applied between the two.
      leaf_axes: names of its axes.
      out_axes: names of the result's axes.
      out: shape, dtype and sharding of the result.
      precision: of the products.
    """
    alone = [axis for axis in x_axes if axis not in leaf_axes]
    count = len(alone)
    leads = list(x_axes[:count]) == alone == list(out_axes[:count])
    if count > 1 and leads and out.sharding is None and jax.default_backend() == "cpu":
        # For the gradient of a factor, XLA's CPU backend transposes what it sums over if that is
        # more than one axis, and computes what made it in that order: up to a third of a step.
        one = jax.ShapeDtypeStruct((math.prod(x.shape[:count]), *out.shape[count:]), out.dtype)
        x = x.reshape(-1, *x.shape[count:])
        x_axes, out_axes = ["row", *x_axes[count:]], ["row", *out_axes[count:]]
        rows = product(x, x_axes, leaf, leaf_axes, out_axes, one, precision)
        return rows.reshape(out.shape)
    rank = "rank"
    factors = [(f.astype(leaf.dtype), [*leaf_axes, rank]) for f in (leaf.u, leaf.v)]
    sizes = dict(zip(leaf_axes, leaf.shape)) | dict(zip(x_axes, x.shape))
    sizes[rank] = leaf.u.shape[-1]

    def axes_between(first: Any, second: Any) -> list[Any]:
        present = [*x_axes, *(axis for axis in _owned(*first) if axis not in x_axes)]
        later = {rank, *out_axes, *_owned(*second)}
        return [axis for axis in present if axis in later and axis != rank] + [rank]

    first, second = min(
        (factors, factors[::-1]),
        key=lambda order: math.prod(sizes[axis] for axis in axes_between(*order)),
    )
    between = axes_between(first, second)
    placed = _placement(out.sharding, between, (x, x_axes), first)
    hidden = contract(x, x_axes, *first, between, out_sharding=placed, precision=precision)
    update = contract(
        leaf.scaled(hidden, between),
        between,
        *second,
        out_axes,
        out_sharding=out.sharding,
        precision=precision,
        preferred_element_type=out.dtype,
    )
    return jnp.broadcast_to(update, out.shape).astype(out.dtype)


def _placement(
    out_sharding: NamedSharding | None, axes: Sequence[Any], *operands: tuple[Any, Sequence[Any]]
) -> NamedSharding | None:
    """Where a product on a mesh of Explicit axes is put: where its operands have its axes."""
    if out_sharding is None:
        return None
    places: dict[Any, Any] = {}
    taken: set[str] = set()
    for operand, operand_axes in operands:
        for axis, place in zip(operand_axes, jax.typeof(operand).sharding.spec):
            names = {place} if isinstance(place, str) else set(place or ())
            if axis in axes and axis not in places and names and not names & taken:
                places[axis] = place
                taken |= names
    spec = PartitionSpec(*(places.get(axis) for axis in axes))
    return NamedSharding(out_sharding.mesh, spec)


def _owned(factor: jax.Array, axes: Sequence[Any]) -> list[Any]:
    return [axis for axis, size in zip(axes, factor.shape) if size > 1]


@rule(LowRank, "dot_general")
def _dot_general(equation: Equation, left: Any, right: Any) -> Any:
    context = equation.context
    leaf, x, leaf_dims, x_dims = product_sides(equation, left, right, LowRank)
    if is_array_leaf(x):
        x = context.materialise(x, equation.name)
    if not leaf_dims[0]:
        return NotImplemented  # an outer product is as large as anything dense
    leaf_axes, x_axes = name_axes(leaf, x, leaf_dims, x_dims)
    sides = (leaf_axes, x_axes) if leaf is left else (x_axes, leaf_axes)
    out_axes = result_axes(*sides, [leaf_axes[axis] for axis in leaf_dims[1]])
    base = equation.bind(*((leaf.w, x) if leaf is left else (x, leaf.w)))
    x, leaf = drop_out(x, leaf, context)
    return base + product(
        x,
        x_axes,
        leaf,
        leaf_axes,
        out_axes,
        equation.out,
        equation.params["precision"],
    )


def name_axes(
    leaf: LowRank, x: jax.Array, leaf_dims: Iterable[Any], x_dims: Iterable[Any]
) -> tuple[list[Any], list[Any]]:
    """Names for the axes of both sides of a product, the same where axes meet; for `contract`."""
    leaf_axes: list[Any] = [("w", axis) for axis in range(leaf.ndim)]
    x_axes: list[Any] = [("x", axis) for axis in range(x.ndim)]
    for x_group, leaf_group in zip(x_dims, leaf_dims):
        for x_axis, leaf_axis in zip(x_group, leaf_group):
            x_axes[x_axis] = leaf_axes[leaf_axis]
    return leaf_axes, x_axes


def result_axes(left: Sequence[Any], right: Sequence[Any], batch: Sequence[Any]) -> list[Any]:
    """The axes of a `dot_general`, by the names that `name_axes` gives those of its sides."""
    left_free = [axis for axis in left if axis not in right]
    return [*batch, *left_free, *(axis for axis in right if axis not in left)]


def drop_out(x: jax.Array, leaf: _Leaf, context: Context) -> tuple[jax.Array, _Leaf]:
    """Zeroes a share of the product's inputs and scales up the rest, as PEFT does."""
    if leaf.dropout == 0:
        return x, leaf
    if context.key is None:
        context.remark(_DROPOUT_IS_OFF, leaf)
        return x, _warn_of_training(leaf, context)
    key = context.key
    if explicit_sharding(jax.typeof(key)) and not explicit_sharding(jax.typeof(x)):
        key = jax.reshard(key, PartitionSpec())  # x is inside jax.sharding.auto_axes
    key = jax.random.fold_in(key, np.uint32(zlib.crc32(leaf.name().encode())))
    key = jax.random.fold_in(key, context.count(leaf.name()))  # each use has a mask of its own
    for axis in sorted(getattr(jax.typeof(x), "vma", ())):  # and each shard, inside shard_map
        key = jax.random.fold_in(key, lax.axis_index(axis))
    kept = jax.random.bernoulli(key, 1 - leaf.dropout, x.shape)
    return jnp.where(kept, x / (1 - leaf.dropout), 0).astype(x.dtype), leaf


_DROPOUT_IS_OFF = (
    "Dropout is off for %s: adapt got no dropout_key. That is right for evaluation; to train, call "
    "jlora.adapt(fn, dropout_key=key) with a fresh key each step."
)


def _warn_of_training(leaf: _Leaf, context: Context) -> _Leaf:
    """The leaf, with a warning as soon as its factors are differentiated without dropout."""

    @jax.custom_jvp
    def watched(factor: jax.Array) -> jax.Array:
        return factor

    @watched.defjvp
    def differentiate(primals: Any, tangents: Any) -> Any:
        context.warn_once(
            "training without dropout",
            f"{leaf.name()!r} was made with dropout={leaf.dropout}, and its adapter is being "
            "trained without: adapt got no dropout_key. Pass a fresh key each step, "
            "jlora.adapt(fn, dropout_key=key), or make the adapters with dropout=0.",
        )
        return primals[0], tangents[0]

    return leaf.with_factors(leaf.w, [watched(factor) for factor in leaf.factors()])


@rule(LowRank, "gather")
def _gather(equation: Equation, leaf: Any, indices: Any) -> Any:
    """Rows of the weight (an embedding, one layer of a stack) from rows of its factors."""
    found = gather_axes(equation, leaf, indices) if isinstance(leaf, LowRank) else None
    if found is None:
        return NotImplemented
    indexed, axes, out_axes = found
    kept = [axis for axis in range(leaf.ndim) if axis not in indexed]
    u, v = (gather_rows(equation, f, indices, indexed) for f in (leaf.u, leaf.v))
    base = equation.bind(leaf.w, indices)
    if all(any(f.shape[axis] > 1 for axis in kept) for f in (leaf.u, leaf.v)):
        # Weights picked from a stack are weights still; the picks become axes that both own.
        u, v = (arrange(factor, axes, out_axes) for factor in (u, v))
        return dataclasses.replace(leaf, w=base, u=u, v=v)
    update = contract(
        leaf.scaling * u.astype(leaf.dtype),
        [*axes, "rank"],
        v.astype(leaf.dtype),
        [*axes, "rank"],
        out_axes,
        out_sharding=equation.out.sharding,
        preferred_element_type=equation.out.dtype,
    )
    return base + jnp.broadcast_to(update, equation.out.shape).astype(equation.out.dtype)


def gather_axes(
    equation: Equation, leaf: ArrayLeaf, indices: Any
) -> tuple[list[int], list[Any], list[Any]] | None:
    """The axes that a gather indexes, those of gathered factors and of its result; None if none.

    Only a gather of single rows, whole along every other axis, is told by its axes.
    """
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if is_array_leaf(indices) or numbers.operand_batching_dims:
        return None
    whole = [axis for axis in range(leaf.ndim) if sizes[axis] == leaf.shape[axis]]
    indexed = [a for a in numbers.start_index_map if a not in whole or leaf.shape[a] == 1]
    in_bounds = equation.params["mode"] in _NEVER_OUT_OF_BOUNDS
    taken_whole = any(axis not in indexed for axis in numbers.start_index_map)
    if taken_whole and not in_bounds:
        return None  # the index into such an axis may be out of bounds
    kept = [axis for axis in range(leaf.ndim) if axis not in indexed]
    if any(sizes[axis] != 1 for axis in indexed) or any(axis not in whole for axis in kept):
        return None
    num_batch = indices.ndim - 1
    offsets = iter(a for a in range(leaf.ndim) if a not in numbers.collapsed_slice_dims)
    batch = iter(range(num_batch))
    out_axes = [
        ("w", next(offsets)) if place in numbers.offset_dims else ("index", next(batch))
        for place in range(len(equation.out.shape))
    ]
    axes = [*(("index", i) for i in range(num_batch)), *(("w", a) for a in kept)]
    return indexed, axes, out_axes


_NEVER_OUT_OF_BOUNDS = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def arrange(factor: jax.Array, axes: Sequence[Any], out_axes: Sequence[Any]) -> jax.Array:
    """`[*axes rank]` to `[*out_axes rank]`, with size 1 where the factor lacks an axis."""
    present = [axis for axis in out_axes if axis in axes]
    factor = factor.transpose(*(axes.index(axis) for axis in present), len(axes))
    missing = [place for place, axis in enumerate(out_axes) if axis not in axes]
    return lax.expand_dims(factor, missing)


def gather_rows(
    equation: Equation, factor: jax.Array, indices: jax.Array, indexed: Sequence[int]
) -> jax.Array:
    """Indexes the axes that a factor owns: `[*indices, *other axes, rank]`, size 1 if none."""
    numbers = equation.params["dimension_numbers"]
    num_batch = indices.ndim - 1
    axes = [axis for axis in indexed if factor.shape[axis] > 1]
    dropped = [axis for axis in indexed if axis not in axes]
    factor = lax.squeeze(factor, dropped)
    if not axes:
        return lax.expand_dims(factor, range(num_batch))
    places = tuple(axis - sum(other < axis for other in dropped) for axis in axes)
    columns = np.asarray([numbers.start_index_map.index(axis) for axis in axes])
    return lax.gather(
        factor,
        indices if len(columns) == indices.shape[-1] else indices[..., columns],
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(num_batch, num_batch + factor.ndim - len(places))),
            collapsed_slice_dims=tuple(sorted(places)),
            start_index_map=places,
        ),
        tuple(1 if axis in places else size for axis, size in enumerate(factor.shape)),
        mode=equation.params["mode"],
        fill_value=0,  # out of bounds the weight's own rows hold the fill; the update adds nothing
    )


@rule(LowRank, "conv_general_dilated")
def _convolution(equation: Equation, x: Any, leaf: Any) -> Any:
    """A convolution with `u` into the rank, then a product over channels with `v`."""
    params = equation.params
    out_axis, in_axis, *spatial = params["dimension_numbers"].rhs_spec
    groups = params["feature_group_count"]
    if is_array_leaf(x) or params["batch_group_count"] != 1:
        return NotImplemented
    if leaf.u.shape[out_axis] > 1:
        leaf = dataclasses.replace(leaf, u=leaf.v, v=leaf.u)
    if leaf.u.shape[out_axis] > 1 or any(leaf.v.shape[axis] > 1 for axis in (in_axis, *spatial)):
        return NotImplemented  # the factors are not those of input and output
    base = equation.bind(x, leaf.w)
    x, leaf = drop_out(x, leaf, equation.context)
    u, v = leaf.u.astype(leaf.dtype), leaf.v.astype(leaf.dtype)
    rank = u.shape[-1]
    kernel = jnp.moveaxis(lax.squeeze(u, (out_axis,)), -1, out_axis)
    kernel = jnp.concatenate([kernel] * groups, out_axis)  # every group has its own rank inputs
    options: Any = params | {"preferred_element_type": None}
    hidden = lax.conv_general_dilated(x, kernel, **options)
    channel = params["dimension_numbers"].out_spec[1]
    by_group = (*hidden.shape[:channel], groups, rank, *hidden.shape[channel + 1 :])
    v = v.reshape(groups, -1, rank)  # [groups out/groups rank]
    axes = list(range(hidden.ndim))
    before, after = axes[:channel], axes[channel + 1 :]
    update = contract(
        leaf.scaling * hidden.reshape(by_group),
        [*before, "group", "rank", *after],
        v,
        ["group", "out", "rank"],
        [*before, "group", "out", *after],
        precision=_first_precision(params["precision"]),
        preferred_element_type=equation.out.dtype,
    )
    spread = (*by_group[:channel], *v.shape[:2], *by_group[channel + 2 :])
    update = jnp.broadcast_to(update, spread)
    return base + update.reshape(equation.out.shape).astype(equation.out.dtype)


def _first_precision(precision: Any) -> Any:
    return precision[0] if isinstance(precision, tuple) else precision


@rule(LowRank, "ragged_dot_general")
def _ragged_dot(equation: Equation, x: Any, leaf: Any, group_sizes: Any, *offset: Any) -> Any:
    """Experts on sorted rows: the rows of each group meet that group's factors."""
    found = None if offset else ragged_axes(equation, x, leaf)
    if found is None:
        return NotImplemented
    base = equation.bind(x, leaf.w, group_sizes)
    x, leaf = drop_out(x, leaf, equation.context)
    u, v = ragged_factors(leaf, *found)
    rows = ragged_rows(equation, x)
    precision = equation.params["precision"]
    axes = ["group", "in", "rank"]
    placed = _placement(equation.out.sharding, ["row", "rank"], (rows, ["row", "in"]), (u, axes))
    hidden = lax.ragged_dot(rows, u, group_sizes, precision=precision, out_sharding=placed)
    update = lax.ragged_dot(
        leaf.scaling * hidden,
        v,
        group_sizes,
        precision=precision,
        preferred_element_type=equation.out.dtype,
        out_sharding=equation.out.sharding,
    )
    return base + update.astype(equation.out.dtype)


def ragged_axes(equation: Equation, x: Any, leaf: Any) -> tuple[int, int, int] | None:
    """A leaf's axes of groups, inputs and outputs in a `ragged_dot_general`.

    None where the operands are others than experts on rows, one factor of each side.
    """
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (x_summed, w_summed), (x_batch, _) = numbers.dot_dimension_numbers
    if (
        is_array_leaf(x)
        or x_batch
        or len(w_summed) != 1
        or leaf.ndim != 3
        or x.ndim != 2
        or tuple(numbers.lhs_ragged_dimensions) == tuple(x_summed)
    ):
        return None
    (group,), (summed,) = numbers.rhs_group_dimensions, w_summed
    (free,) = {0, 1, 2} - {group, summed}
    u, v = (leaf.v, leaf.u) if leaf.v.shape[summed] > 1 else (leaf.u, leaf.v)
    return None if u.shape[free] > 1 or v.shape[summed] > 1 else (group, summed, free)


def ragged_rows(equation: Equation, x: jax.Array) -> jax.Array:
    """The input of a `ragged_dot_general` as `[rows in]`."""
    summed, _ = equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0]
    return x if tuple(summed) == (1,) else x.T


def ragged_factors(
    leaf: LowRank, group: int, summed: int, free: int
) -> tuple[jax.Array, jax.Array]:
    """The factors as `[groups in rank]` and `[groups rank out]`, by the axes of `ragged_axes`."""
    u, v = leaf.u.astype(leaf.dtype), leaf.v.astype(leaf.dtype)
    if v.shape[summed] > 1:
        u, v = v, u
    num_groups, rank = leaf.shape[group], u.shape[-1]
    u = u.transpose(group, summed, 3, free).reshape(u.shape[group], -1, rank)
    v = v.transpose(group, summed, 3, free).reshape(v.shape[group], rank, -1)
    u, v = (jnp.broadcast_to(f, (num_groups, *f.shape[1:])) for f in (u, v))
    u = jnp.broadcast_to(u, (num_groups, leaf.shape[summed], rank))
    return u, jnp.broadcast_to(v, (num_groups, rank, leaf.shape[free]))
