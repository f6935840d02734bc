"""Products with a stored weight: dense while they run, forward and again backward.

The derivative of a product is written out, so that the backward pass restores the weight from the
packed arrays instead of keeping it. It restores with scales behind a barrier: the compiler would
else take the two for one and keep the dense weight in between. The codes go without, or a loop over
layers would copy each layer's. Where a `jax.checkpoint(prevent_cse=False)` computes the product
again right before, which is how loops over layers have it, one dense weight serves both.

Backward, a low-rank update that is as wide as the result of a large product rides along in that
product: with the dense weight at hand, `a` is appended to it. Forward it does not: the product
`[x, h] @ [w; b]` may be summed in another order than `x @ w`, so a fresh adapter would change it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jlora.leaf import Equation, is_array_leaf, rule
from jlora.lowrank import LowRank
from jlora.packed import Packed, QuantArray

__all__ = ["PackedLowRank"]

_WIDE = 2  # times the other side: from there on, riding along costs less than it saves


@rule(Packed, "dot_general", "conv_general_dilated", "ragged_dot_general")
def _product(equation: Equation, *operands: Any) -> Any:
    """A product with the dense weight, which the backward pass builds again."""
    places = [place for place, x in enumerate(operands) if is_array_leaf(x)]
    if len(places) > 1:
        return NotImplemented  # the other operand is a leaf too, with rules of its own
    place = places[0]
    x, *rest = (x for index, x in enumerate(operands) if index != place)

    def multiply(dense: jax.Array, x: jax.Array, *rest: Any) -> jax.Array:
        others = (x, *rest)
        return equation.bind(*others[:place], dense, *others[place:])

    shares = equation.context.shares
    return _call(operands[place], multiply, multiply, x, *rest, shares=shares)


def _call(
    leaf: Packed,
    multiply: Callable[..., jax.Array],
    along_x: Callable[..., jax.Array],
    x: jax.Array,
    *rest: Any,
    shares: bool,
    along_rest: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """`multiply(dense, x, *rest)`, with its derivatives given.

    Args:
      leaf: what becomes `dense`.
      multiply: linear in `x`.
      along_x: `(dense, dx, *rest)` to the derivative along `x`.
      x: the input.
      rest: other operands.
      shares: whether the backward pass may use the dense weight of what is computed again.
      along_rest: `(x, *rest, *tangents)` to the derivative along the rest, which does without
        `dense`.
    """

    if leaf.operands:  # which may have derivatives of their own

        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
        def differentiable(leaf: Packed, x: jax.Array, rest: Sequence[Any]) -> jax.Array:
            return multiply(leaf.dense(leaf.array), x, *rest)

        return differentiable(leaf, x, rest)

    @jax.custom_jvp
    def call(leaf: Packed, x: jax.Array, *rest: Any) -> jax.Array:
        return multiply(leaf.dense(leaf.array), x, *rest)

    # What this takes is all that the backward pass keeps.
    @functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False
    )
    def again(leaf: Packed, dx: jax.Array, rest: Sequence[Any]) -> jax.Array:
        array = leaf.array if shares else _apart(leaf.array)
        return along_x(leaf.dense(array), dx, *rest)

    def jvp(primals: Any, tangents: Any) -> Any:
        (leaf, x, *rest), (_, dx, *of_rest) = primals, tangents  # a packed leaf has none
        out = call(leaf, x, *rest)
        moved = jnp.zeros_like(out)
        if not _is_zero(dx):
            moved = again(leaf, dx, rest)
        if along_rest is not None and not all(map(_is_zero, of_rest)):
            moved = moved + along_rest(x, *rest, *map(_instantiate, of_rest))
        return out, moved

    call.defjvp(jvp, symbolic_zeros=True)
    return call(leaf, x, *rest)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _instantiate(tangent: Any) -> jax.Array:
    return jnp.zeros(tangent.shape, tangent.dtype) if _is_zero(tangent) else tangent


def _apart(array: QuantArray) -> QuantArray:
    """The same arrays, with a barrier before all but the codes."""
    scales, treedef = jax.tree.flatten(dataclasses.replace(array, codes=None))
    apart = treedef.unflatten(lax.optimization_barrier(scales))
    return dataclasses.replace(apart, codes=array.codes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedLowRank(LowRank):
    """A stored weight with a low-rank update: where it pays, one product does for both."""


@rule(PackedLowRank, "dot_general")
def _riding_along(equation: Equation, x: Any, leaf: Any) -> Any:
    """`x @ w + scaling * (x @ u) @ v` for a matrix with a wide input."""
    if not isinstance(leaf, PackedLowRank) or not _is_plain(equation, x, leaf):
        return NotImplemented
    columns, rows = leaf.shape
    if columns < _WIDE * rows:
        return NotImplemented
    a, b = leaf.u[:, 0, :].astype(leaf.dtype), leaf.v[0].T.astype(leaf.dtype)
    scaling, out_dtype = leaf.scaling, equation.out.dtype

    def multiply(dense: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return equation.bind(x, dense) + (scaling * (x @ a) @ b).astype(out_dtype)

    def along_x(dense: jax.Array, dx: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        # Backward this is `[dy, dh] @ [w, a].T`, without a result as wide as x for the update.
        both = equation.bind(dx, jnp.concatenate([dense, a], axis=1))
        hidden = scaling * both[..., rows:].astype(b.dtype)
        return both[..., :rows] + (hidden @ b).astype(out_dtype)

    def along_factors(x: jax.Array, a: jax.Array, b: jax.Array, da: Any, db: Any) -> jax.Array:
        return (scaling * ((x @ da) @ b + (x @ a) @ db)).astype(out_dtype)

    shares = equation.context.shares
    return _call(leaf.w, multiply, along_x, x, a, b, shares=shares, along_rest=along_factors)


def _is_plain(equation: Equation, x: Any, leaf: PackedLowRank) -> bool:
    """Whether this is `x @ w` with a matrix whose factors own one axis each, without dropout."""
    (x_summed, w_summed), (x_batch, _) = equation.params["dimension_numbers"]
    return (
        isinstance(leaf.w, Packed)
        and not is_array_leaf(x)
        and leaf.ndim == 2
        and (tuple(x_summed), tuple(w_summed), tuple(x_batch)) == ((x.ndim - 1,), (0,), ())
        and leaf.u.shape[:2] == (leaf.shape[0], 1)
        and leaf.v.shape[:2] == (1, leaf.shape[1])
        and x.dtype == leaf.dtype
        and equation.params.get("out_sharding") is None
        and leaf.dropout == 0
    )
