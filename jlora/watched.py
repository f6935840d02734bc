"""What starts from data are measured with: gradients that tell what a weight met in a function."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.factors import with_factors
from jlora.leaf import Equation, is_array_leaf, product_sides, rule
from jlora.lora import LoraArray, leaves_by_path
from jlora.lowrank import LowRank, contract
from jlora.products import name_axes
from jlora.tree import map_with_path

__all__ = ["adapters_of", "gradients_of", "moments_of", "sides_of", "stack_of", "stacked"]

LossFn = Callable[[Any, Any], jax.Array]


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


def sides_of(leaf: LoraArray) -> tuple[int, int]:
    """Inputs and outputs of one matrix of a stack."""
    stack = len(stack_of(leaf))
    return math.prod(leaf.a.shape[stack:-1]), math.prod(leaf.b.shape[stack + 1 :])


def stacked(leaf: LoraArray, side: int, width: int) -> tuple[int, ...]:
    """The shape of some columns for the inputs (side 0) or outputs (side 1) of each matrix."""
    return (*stack_of(leaf), sides_of(leaf)[side], width)


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
    squares: bool = False,
) -> Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Likewise, to `x.T @ x @ a` of each weight's inputs `x` and, for `b`, `sum(x**2)`.

    With `squares`, for any `a` of one column, to the diagonal of `x.T @ x`.
    """
    kind = _WatchedSquares if squares else _Watched
    watched = {path: kind(**_fields(leaf)) for path, leaf in leaves.items()}
    return gradients_of(params, lambda p, batch: _total(fn(p, batch)), batches, watched)


def _total(results: Any) -> jax.Array:
    """Something that depends on all of the results."""
    floating = (x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating))
    return sum((jnp.sum(x.astype(jnp.float32)) for x in floating), jnp.float32(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Watching(LowRank):
    """A watched weight on its way through a function."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WatchingSquares(_Watching):
    """Likewise."""


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


@rule(_Watching, "dot_general")
def _watch(equation: Equation, left: Any, right: Any) -> Any:
    leaf, x, leaf_dims, x_dims = product_sides(equation, left, right, _Watching)
    if is_array_leaf(x):
        return NotImplemented
    leaf_axes, x_axes = name_axes(leaf, x, leaf_dims, x_dims)
    free = [axis for axis in x_axes if axis[0] == "x" or leaf.v.shape[axis[1]] > 1]
    seen = jax.lax.stop_gradient(x).astype(leaf.u.dtype)
    squares = jnp.square(seen)
    only_squares = isinstance(leaf, _WatchingSquares)
    met = squares if only_squares else seen
    hidden = contract(met, x_axes, leaf.u, [*leaf_axes, "rank"], [*free, "rank"])
    told = jnp.ones_like(hidden) if only_squares else hidden
    nothing = _report(hidden, told, leaf.v, jnp.sum(squares))
    out = equation.bind(*((leaf.w, x) if leaf is left else (x, leaf.w)))
    return out + nothing.astype(out.dtype)


@jax.custom_vjp
def _report(hidden: jax.Array, told: jax.Array, v: jax.Array, energy: jax.Array) -> jax.Array:
    """Zero, whose derivatives are what was seen."""
    return jnp.zeros(())


def _seen(hidden: jax.Array, told: jax.Array, v: jax.Array, energy: jax.Array) -> Any:
    return jnp.zeros(()), (told, v, energy)


def _told(seen: Any, _: jax.Array) -> Any:
    told, v, energy = seen
    spread = jnp.broadcast_to(energy, v.shape).astype(v.dtype)
    return told, jnp.zeros_like(told), spread, jnp.zeros_like(energy)


_report.defvjp(_seen, _told)
