"""What starts from data are measured with: gradients that tell what a weight met in a function."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jlora.factors import sides, with_factors
from jlora.leaf import Equation, is_array_leaf, product_sides, rule
from jlora.lora import LoraArray, leaves_by_path
from jlora.lowrank import LowRank, contract
from jlora.products import (
    gather_axes,
    gather_rows,
    name_axes,
    ragged_axes,
    ragged_factors,
    ragged_rows,
)
from jlora.tree import map_with_path

__all__ = [
    "adapters_of",
    "check_finite",
    "check_met",
    "gradients_of",
    "moments_of",
    "stack_of",
    "stacked",
]

LossFn = Callable[[Any, Any], jax.Array]

_LEAVE_OUT = (
    "Leave it out: with exclude= of jlora.gptq.calibrate, or, for a start, of the targets "
    "(lora.exclude in a run)."
)


def adapters_of(params: Any) -> dict[str, LoraArray]:
    """The plain adapters of a tree, by path.

    Raises:
      ValueError: if there is none, or one of another kind.
    """
    leaves = leaves_by_path(params)
    found = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoraArray)}
    if not found:
        raise ValueError("This tree has no adapters to start. Call jlora.init first.")
    if other := next((path for path, leaf in found.items() if type(leaf) is not LoraArray), None):
        raise ValueError(f"{other!r} is {found[other].kind}; these starts are for LoRA alone.")
    return found


def _fields(leaf: LoraArray) -> dict[str, Any]:
    return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(LoraArray)}


def stack_of(leaf: LoraArray) -> tuple[int, ...]:
    """The sizes of the stacked axes."""
    return leaf.a.shape[: leaf.axes.count("stack")]


def stacked(leaf: LoraArray, side: int, width: int) -> tuple[int, ...]:
    """The shape of some columns for the inputs (side 0) or outputs (side 1) of each matrix."""
    return (*stack_of(leaf), sides(leaf)[side], width)


def gradients_of(
    params: Any, loss_fn: LossFn, batches: Sequence[Any], leaves: Mapping[str, LoraArray]
) -> Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """A function of `a` and `b`, one of them None for zero, to their gradients over all batches.

    Factors are `[*stack in k]` and `[*stack k out]`, and the scaling is 1.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("There are no batches to start from.")

    def loss(factors: Any, params: Any, batch: Any) -> jax.Array:
        def put(path: str, leaf: Any) -> Any:
            if path not in leaves:
                return leaf
            a, b = factors[path]
            like = leaves[path]
            plain = dataclasses.replace(like, w=leaf.w, scaling=1.0, dropout=0.0)
            return with_factors(plain, a, b)

        return loss_fn(map_with_path(put, params, is_leaf=is_array_leaf), batch)

    grad = jax.jit(jax.grad(loss))

    def gradients(ins: Any, outs: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        factors = {}
        for path, leaf in leaves.items():
            if outs is None:
                a = ins[path]
                factors[path] = (a, jnp.zeros(stacked(leaf, 1, a.shape[-1])).mT)
            else:
                b = outs[path]
                factors[path] = (jnp.zeros(stacked(leaf, 0, b.shape[-2])), b)
        total = functools.reduce(
            functools.partial(jax.tree.map, jnp.add),
            (grad(factors, params, batch) for batch in batches),
        )
        return {p: x[0] for p, x in total.items()}, {p: x[1] for p, x in total.items()}

    return gradients


def moments_of(
    params: Any,
    fn: Callable[..., Any],
    batches: Sequence[Any],
    leaves: Mapping[str, LoraArray],
    *,
    of: Literal["inputs", "squares", "directions"] = "inputs",
) -> Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Likewise, to `x.T @ x @ a` of each weight's inputs `x` and, for `b`, `sum(x**2)`.

    Of `"squares"`, for any `a` of one column, to the diagonal of `x.T @ x`. Of `"directions"`, each
    `x` in `x.T @ x` has the length 1.
    """
    kinds = {"inputs": _Watched, "squares": _WatchedSquares, "directions": _WatchedDirections}
    watched = {path: kinds[of](**_fields(leaf)) for path, leaf in leaves.items()}
    return gradients_of(params, lambda p, batch: _total(fn(p, batch)), batches, watched)


def check_finite(measured: Mapping[str, jax.Array], text: str) -> None:
    """Raises ValueError with the path of a weight of which something else was measured.

    Args:
      measured: by path; under `jit` nothing is looked at.
      text: the message, with a place for the path.
    """
    for path, x in measured.items():
        if _is_known(x) and not bool(jnp.isfinite(x).all()):
            raise ValueError(text.format(repr(path)))


def check_met(energy: Mapping[str, jax.Array]) -> None:
    """Raises ValueError where what `moments_of` gives for `b`, the inputs' energy, is no number."""
    check_finite(energy, "The inputs of {} hold NaN or infinite values.")
    for path, x in energy.items():
        if _is_known(x) and not bool(x.any()):
            raise ValueError(
                f"{path!r} met no inputs but zeros: no floating-point result of the function "
                f"depends on what it was multiplied with. {_LEAVE_OUT}"
            )


def _is_known(x: jax.Array) -> bool:
    return not isinstance(x, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def _total(results: Any) -> jax.Array:
    """Something that depends on all of the results."""
    floating = (x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating))
    return sum((jnp.sum(x.astype(jnp.float32)) for x in floating), jnp.float32(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Watching(LowRank):
    """A watched weight on its way through a function, which only rules that watch may use."""

    of: ClassVar[str] = "inputs"

    def materialise(self) -> jax.Array:
        """Raises ValueError: what meets a dense array is not seen."""
        raise ValueError(
            f"The inputs that {self.name()!r} meets cannot all be measured: the function uses it "
            f"otherwise than in products from its input side and lookups of its rows. {_LEAVE_OUT}"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WatchingSquares(_Watching):
    """A watched weight of which the inputs' squares are wanted, summed."""

    of: ClassVar[str] = "squares"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WatchingDirections(_Watching):
    """A watched weight whose inputs count with a length of 1."""

    of: ClassVar[str] = "directions"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Watched(LoraArray):
    """A weight whose gradients tell of its inputs: `x.T @ x @ a` for `a`, `sum(x**2)` for `b`."""

    inside: ClassVar[type[LowRank]] = _Watching

    def low_rank(self, path: str) -> LowRank:
        """The leaf as rules want it."""
        low = super().low_rank(path)
        w = low.w.materialise() if is_array_leaf(low.w) else low.w
        fields = {field.name: getattr(low, field.name) for field in dataclasses.fields(LowRank)}
        return self.inside(**{**fields, "w": w})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WatchedSquares(_Watched):
    """A weight whose gradient for a column `a` tells of its inputs' squares, summed."""

    inside: ClassVar[type[LowRank]] = _WatchingSquares


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WatchedDirections(_Watched):
    """A weight whose gradients tell of its inputs, each with a length of 1."""

    inside: ClassVar[type[LowRank]] = _WatchingDirections


@rule(_Watching, "dot_general")
def _watch_product(equation: Equation, left: Any, right: Any) -> Any:
    leaf, x, leaf_dims, x_dims = product_sides(equation, left, right, _Watching)
    if is_array_leaf(x):
        x = equation.context.materialise(x, equation.name)
    inputs, outputs, stack = _roles(leaf)
    summed = {*leaf_dims[0]}
    if not summed or inputs - summed or summed & outputs:
        leaf.materialise()
    leaf_axes, x_axes = name_axes(leaf, x, leaf_dims, x_dims)
    of_inputs = {leaf_axes[axis] for axis in inputs}
    seen, met = _seen_of(leaf, x, [axis for axis, n in enumerate(x_axes) if n in of_inputs])
    tokens = [axis for axis in x_axes if axis[0] == "x"]
    free = [*tokens, *(leaf_axes[axis] for axis in stack), "rank"]
    hidden = contract(met, x_axes, leaf.u, [*leaf_axes, "rank"], free)
    # Of the inputs' axes none is left where `v` has size 1: it is summed over, and a name of its
    # own stands there.
    kept = [axis if size > 1 else ("one", axis) for axis, size in zip(leaf_axes, leaf.v.shape)]
    ones = jnp.ones_like(leaf.v)
    energy = contract(jnp.square(seen), x_axes, ones, [*leaf_axes, "rank"], [*kept, "rank"])
    out = equation.bind(*((leaf.w, x) if leaf is left else (x, leaf.w)))
    return _with_report(out, leaf, hidden, energy)


@rule(_Watching, "ragged_dot_general")
def _watch_experts(equation: Equation, x: Any, leaf: Any, group_sizes: Any, *offset: Any) -> Any:
    if not isinstance(leaf, _Watching):
        return NotImplemented
    found = None if offset else ragged_axes(equation, x, leaf)
    if found is None or found[1] in _roles(leaf)[1]:
        return leaf.materialise()
    rows = ragged_rows(equation, x)
    seen, met = _seen_of(leaf, rows, [-1])
    hidden = jax.lax.ragged_dot(met, ragged_factors(leaf, *found)[0], group_sizes)
    ends = jnp.cumsum(group_sizes)
    groups = jnp.searchsorted(ends, jnp.arange(len(rows)), side="right")
    # Rows behind the last group meet no weight: their group is out of bounds and dropped.
    energy = jax.ops.segment_sum(jnp.square(seen).sum(-1), groups, num_segments=len(group_sizes))
    place = [1] * leaf.v.ndim
    place[found[0]] = -1
    return _with_report(equation.bind(x, leaf.w, group_sizes), leaf, hidden, energy.reshape(place))


@rule(_Watching, "gather")
def _watch_lookup(equation: Equation, leaf: Any, indices: Any) -> Any:
    """Rows are what an input of zeros and a one gives; layers of a stack are weights still."""
    found = gather_axes(equation, leaf, indices)
    if found is None:
        return leaf.materialise()
    indexed = found[0]
    inputs, outputs, _ = _roles(leaf)
    if not (inputs | outputs) & set(indexed):
        return NotImplemented  # as any adapter's
    if any(leaf.v.shape[axis] > 1 for axis in indexed):
        return leaf.materialise()
    hidden = gather_rows(equation, leaf.u, indices, indexed)
    count = jnp.asarray(math.prod(indices.shape[:-1]), leaf.u.dtype)
    return _with_report(equation.bind(leaf.w, indices), leaf, hidden, count)


@rule(_Watching, "conv_general_dilated")
def _refuse(equation: Equation, *operands: Any) -> Any:
    return next(x for x in operands if isinstance(x, _Watching)).materialise()


def _roles(leaf: _Watching) -> tuple[set[int], set[int], set[int]]:
    """The axes of inputs, of outputs and of the stack, by the factors that have them."""
    inputs, outputs = (
        {axis for axis, size in enumerate(factor.shape[:-1]) if size > 1}
        for factor in (leaf.u, leaf.v)
    )
    return inputs - outputs, outputs - inputs, inputs & outputs


def _seen_of(leaf: _Watching, x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """An input, whose elements lie along `axes`, and what its product with `u` is to be of."""
    seen = jax.lax.stop_gradient(x).astype(leaf.u.dtype)
    if leaf.of == "squares":
        return seen, jnp.square(seen)
    if leaf.of == "directions":
        length = jnp.sqrt(jnp.square(seen).sum(axes, keepdims=True))
        return seen, seen / jnp.where(length > 0, length, 1)
    return seen, seen


def _with_report(out: jax.Array, leaf: _Watching, hidden: jax.Array, energy: jax.Array) -> Any:
    told = jnp.ones_like(hidden) if leaf.of == "squares" else hidden
    energy = jnp.broadcast_to(energy, leaf.v.shape).astype(leaf.v.dtype)
    return out + _report(hidden, told, leaf.v, energy).astype(out.dtype)


@jax.custom_vjp
def _report(hidden: jax.Array, told: jax.Array, v: jax.Array, energy: jax.Array) -> jax.Array:
    """Zero, whose derivatives are what was seen."""
    return jnp.zeros(())


def _seen(hidden: jax.Array, told: jax.Array, v: jax.Array, energy: jax.Array) -> Any:
    return jnp.zeros(()), (told, energy)


def _told(seen: Any, _: jax.Array) -> Any:
    told, energy = seen
    return told, jnp.zeros_like(told), energy, jnp.zeros_like(energy)


_report.defvjp(_seen, _told)
