"""DoRA (arXiv:2402.09353): a low-rank update of a weight's direction, and a length for each output.

With `v = w + scaling * a @ b`, a leaf stands for `magnitude * v / |v|`, where `|v|` is the norm of
each output's weights. It is taken as a constant in the backward pass (section 4.3 of the paper, and
PEFT), and computed from

    |v|^2 = |w|^2 + 2 scaling * sum_r (w.T a) * b.T + scaling^2 * sum_r (b.T (a.T a)) * b.T

of which the first term is kept, so that nothing of the weight's size is built. The norm is that of
the whole weight and is known before the function runs; from there on it is one more factor,
`gain = magnitude / |v|`, that moves with the weight's output axes and scales a product's result.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.leaf import (
    Equation,
    apply_rule,
    explicit_sharding,
    half_of_a_tree,
    is_array_leaf,
    product_sides,
    rule,
)
from jlora.lora import LoraArray, variant
from jlora.lora_config import Axis
from jlora.lowrank import Factored, LowRank, contract, spread_along
from jlora.packed_products import PackedLowRank
from jlora.products import arrange, gather_axes, gather_rows

__all__ = ["DoraArray"]


@variant("dora")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoraArray(LoraArray):
    """A weight with a trained direction and length (DoRA, arXiv:2402.09353).

    It stands for `magnitude * v / |v|` with `v = w + scaling * a @ b`. The norm is over the axes
    that meet the input, and has no gradient.

    Attributes:
      magnitude: `Float[*stack *out]`, trained; starts as the norm of `w`.
      square: `Float[*stack *out]`, frozen: the squared norm of `w`, to be replaced with it.
    """

    kind: ClassVar[str] = "DoRA"
    arrays: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = LoraArray.arrays | {
        "magnitude": ("magnitude", ("stack", "out")),
        "square": ("frozen", ("stack", "out")),
    }

    magnitude: Any = None
    square: Any = None

    @classmethod
    def start(cls, w: Any, a: Any, b: Any, **static: Any) -> Self:
        """With the length that the weight has."""
        wide = jnp.promote_types(w.dtype, jnp.float32)
        entered = w.enter("") if is_array_leaf(w) else w
        square = _squares(entered, static.get("axes", ("in", "out")), wide)
        magnitude = jnp.sqrt(square).astype(jnp.promote_types(a.dtype, jnp.float32))
        return cls(w, a, b, **static, magnitude=magnitude, square=square)

    def enter(self, path: str) -> "Dora":
        """The leaf with its gain, which takes one small product with the whole weight."""
        low = self.low_rank(path)
        if self.magnitude is None or self.square is None:
            raise half_of_a_tree(f"{path!r} has no magnitude in this tree, which")
        norm = jnp.sqrt(self._squared_norm(low.w))
        gain = self.spread((self.magnitude / norm)[..., None], "out")  # [*axes 1]
        fields = {field.name: getattr(low, field.name) for field in dataclasses.fields(low)}
        return Dora(**fields, gain=gain)

    def _squared_norm(self, w: Any) -> jax.Array:
        """`|w + scaling * a @ b|^2` of each output, `[*stack *out]`, without its gradient."""
        wide = self.square.dtype
        # As products round them; the rounding of a weight's own dtype is not worth a wider product.
        a, b = (lax.stop_gradient(x).astype(self.dtype) for x in (self.a, self.b))
        axes = _Axes(self.roles)
        cross = _cross(w, self.roles, a, wide)  # [*stack rank *out]
        a, b = a.astype(wide), b.astype(wide)
        left, right = [*axes.stack, *axes.inputs, "rank"], [*axes.stack, *axes.inputs, "other"]
        gram = contract(
            a, left, a, right, [*axes.stack, "rank", "other"], precision=lax.Precision.HIGHEST,
            out_sharding=_placement(a, [*axes.stack, "in", "rank"], [*axes.stack, "rank", "other"]),
        )  # fmt: skip
        b_axes = [*axes.stack, "other", *axes.outputs]
        wanted = [*axes.stack, "rank", *axes.outputs]
        inner = contract(
            gram, [*axes.stack, "rank", "other"], b, b_axes, wanted,
            precision=lax.Precision.HIGHEST, out_sharding=_placement(b, wanted, wanted),
        )  # fmt: skip
        update = (2 * self.scaling * cross + self.scaling**2 * inner) * b
        total = lax.stop_gradient(self.square) + update.sum(len(axes.stack))
        return lax.stop_gradient(jnp.maximum(total, jnp.finfo(wide).tiny))

    def materialise(self) -> jax.Array:
        """The dense weight in float32, of its own exact norm, rounded once to the dtype of `w`."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        low = self.low_rank("")
        base = low.w.materialise() if is_array_leaf(low.w) else low.w
        direction = LowRank(
            base.astype(wide), low.u, low.v, scaling=low.scaling, dropout=0.0, path=""
        ).materialise()
        inputs = tuple(_Axes(self.roles).inputs)
        squares = jnp.square(lax.stop_gradient(direction)).sum(inputs, keepdims=True)
        norm = jnp.sqrt(jnp.maximum(squares, jnp.finfo(wide).tiny))
        magnitude = self.spread(self.magnitude[..., None], "out")[..., 0]
        return (magnitude / norm * direction).astype(self.dtype)

    def apply(self, w: np.ndarray, update: np.ndarray) -> np.ndarray:
        """What the leaf would stand for with this weight and this `scaling * a @ b`."""
        direction = w + update
        inputs = tuple(_Axes(self.roles).inputs)
        norm = np.sqrt(np.square(direction).sum(inputs, keepdims=True))
        magnitude = np.asarray(self.spread(self.magnitude[..., None], "out")[..., 0], w.dtype)
        return magnitude * direction / np.maximum(norm, np.finfo(w.dtype).tiny)


class _Axes:
    """The axes of a weight by their roles."""

    def __init__(self, roles: Sequence[Axis]):
        self.stack, self.inputs, self.outputs = (
            [axis for axis, role in enumerate(roles) if role == wanted]
            for wanted in ("stack", "in", "out")
        )


def _squares(w: Any, roles: Sequence[Axis], wide: Any) -> jax.Array:
    """`|w|^2` of each output, `[*stack *out]`; a stored stack is restored layer by layer."""

    def square(w: jax.Array) -> jax.Array:
        axes = _Axes(roles)
        summed = jnp.square(w.astype(wide)).sum(tuple(axes.inputs))
        kept = [axis for axis in range(len(roles)) if axis not in axes.inputs]
        return summed.transpose([kept.index(axis) for axis in (*axes.stack, *axes.outputs)])

    if not is_array_leaf(w):
        return jax.jit(square)(w)
    if roles[0] == "stack" and (cut := w.unstack()):
        scanned, rebuild = cut
        return lax.map(lambda parts: _squares(rebuild(parts), roles[1:], wide), scanned)
    return jax.jit(square)(w.materialise())


def _cross(w: Any, roles: Sequence[Axis], a: jax.Array, wide: Any) -> jax.Array:
    """`w.T @ a`, as `[*stack rank *out]`; a stored stack is restored layer by layer."""
    if is_array_leaf(w):
        if roles[0] == "stack" and (cut := w.unstack()):
            scanned, rebuild = cut
            return lax.map(
                lambda parts: _cross(rebuild(parts[0]), roles[1:], parts[1], wide), (scanned, a)
            )
        w = w.materialise()
    axes = _Axes(roles)
    wanted = [*axes.stack, "rank", *axes.outputs]
    return contract(
        a,
        [*axes.stack, *axes.inputs, "rank"],
        w,
        list(range(len(roles))),
        wanted,
        out_sharding=_placement(w, list(range(len(roles))), wanted),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=wide,
    )


def _placement(x: jax.Array, axes: Sequence[Any], wanted: Sequence[Any]) -> NamedSharding | None:
    """On a mesh of Explicit axes, where a result with axes of `x` lies that they agree on."""
    sharding = explicit_sharding(jax.typeof(x))
    if sharding is None:
        return None
    places = dict(zip(axes, sharding.spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*(places.get(axis) for axis in wanted)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dora(Factored):
    """`gain * (w + scaling * sum_r u[..., r] * v[..., r])` on its way through a function.

    Attributes:
      gain: `Float[*axes 1]`, with size 1 along the axes that meet the input.
    """

    factor_names: ClassVar[tuple[str, ...]] = ("u", "v", "gain")

    gain: Any = dataclasses.field(kw_only=True)

    def low(self) -> LowRank:
        """The leaf without its gain."""
        kind = PackedLowRank if is_array_leaf(self.w) else LowRank
        names = [field.name for field in dataclasses.fields(LowRank)]
        return kind(**{name: getattr(self, name) for name in names})

    def materialise(self) -> jax.Array:
        """The dense array, rounded once."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        low = self.low()
        base = low.w.materialise() if is_array_leaf(low.w) else low.w
        plain = LowRank(base.astype(wide), low.u, low.v, scaling=low.scaling, dropout=0.0, path="")
        return (self.gain[..., 0] * plain.materialise()).astype(self.dtype)

    def owned(self) -> list[int]:
        """The axes along which the gain is not the same everywhere."""
        return [axis for axis in range(self.ndim) if self.gain.shape[axis] > 1]

    def gain_along(self, axes: Sequence[Any], like: jax.Array) -> jax.Array:
        """The gain over an array whose axes are the leaf's own, by number, or others."""
        return spread_along(self.gain, [*range(self.ndim), "none"], axes, like)


def _times(gain: jax.Array, x: jax.Array) -> jax.Array:
    return (gain * x).astype(x.dtype)


@rule(Dora, "dot_general")
def _dot_general(equation: Equation, left: Any, right: Any) -> Any:
    """The product without the gain, which scales its result, or else the input."""
    leaf, x, (summed, batch), (x_summed, x_batch) = product_sides(equation, left, right, Dora)
    if is_array_leaf(x):
        x = equation.context.materialise(x, equation.name)
    owned = leaf.owned()
    after = not any(axis in summed for axis in owned)
    if not after:
        if not all(axis in summed or axis in batch for axis in owned):
            return NotImplemented  # the gain is no product of one along the input and a rest
        places = dict(zip((*x_summed, *x_batch), (*summed, *batch)))
        x = _times(leaf.gain_along([places.get(axis, "x") for axis in range(x.ndim)], x), x)
    operands = (leaf.low(), x) if leaf is left else (x, leaf.low())
    product = apply_rule(equation, operands)
    if not after:
        return product
    free = [axis for axis in range(leaf.ndim) if axis not in (*summed, *batch)]
    others = ["x"] * (x.ndim - len(x_summed) - len(x_batch))
    axes = [*batch, *free, *others] if leaf is left else [*batch, *others, *free]
    return _times(leaf.gain_along(axes, product), product)


@rule(Dora, "gather")
def _gather(equation: Equation, leaf: Any, indices: Any) -> Any:
    """Rows of the weight, scaled by the gain of the axes that remain, or weights of a stack."""
    found = gather_axes(equation, leaf, indices) if isinstance(leaf, Dora) else None
    fills = equation.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    fill = equation.params["fill_value"]
    if found is None or (fills and fill is not None and fill == fill and fill != 0):
        return NotImplemented  # out of bounds is what is filled in, not that times the gain
    indexed, axes, out_axes = found
    gain = arrange(gather_rows(equation, leaf.gain, indices, indexed), axes, out_axes)
    rows = apply_rule(equation, (leaf.low(), indices))
    if isinstance(rows, LowRank):
        return _with_gain(leaf, rows, gain)
    return _times(gain[..., 0], rows)


def _with_gain(leaf: Dora, low: LowRank, gain: jax.Array) -> Dora:
    factors = {"w": low.w, "u": low.u, "v": low.v, "gain": gain}
    return dataclasses.replace(leaf, **factors, scaling=low.scaling, beside=low.beside)


@rule(Dora, "conv_general_dilated")
def _convolution(equation: Equation, x: Any, leaf: Any) -> Any:
    """A convolution without the gain, which scales its output channels."""
    numbers = equation.params["dimension_numbers"]
    if is_array_leaf(x) or leaf.owned() not in ([], [numbers.rhs_spec[0]]):
        return NotImplemented
    result = apply_rule(equation, (x, leaf.low()))
    axes: list[Any] = ["x"] * result.ndim
    axes[numbers.out_spec[1]] = numbers.rhs_spec[0]
    return _times(leaf.gain_along(axes, result), result)


@rule(Dora, "concatenate", "stack")
def _join(equation: Equation, *parts: Any) -> Any:
    """One leaf for all parts, where the gain of each owns the joined axis; 1 for a plain array."""
    stacked = equation.name == "stack"
    axis = equation.params["axis" if stacked else "dimension"]
    gains = []
    for part in parts:
        gain = part.gain if isinstance(part, Dora) else jnp.ones((1,) * (len(part.shape) + 1))
        gain = lax.expand_dims(gain, (axis,)) if stacked else gain
        size = 1 if stacked else part.shape[axis]
        if isinstance(part, Dora) and gain.shape[axis] != size:
            return NotImplemented
        gains.append((gain, size))
    whole = np.max([gain.shape for gain, _ in gains], axis=0)
    filled = [
        jnp.broadcast_to(gain, (*whole[:axis], size, *whole[axis + 1 :])) for gain, size in gains
    ]
    low = apply_rule(equation, [part.low() if isinstance(part, Dora) else part for part in parts])
    gain = jnp.concatenate(filled, axis)
    if isinstance(low, LowRank):
        return _with_gain(next(part for part in parts if isinstance(part, Dora)), low, gain)
    return _times(gain[..., 0], low)


@rule(Dora, "ragged_dot_general")
def _ragged_dot(equation: Equation, x: Any, leaf: Any, group_sizes: Any, *offset: Any) -> Any:
    """Experts on sorted rows: each row is scaled by the gain of its group."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (x_summed, w_summed), (x_batch, _) = numbers.dot_dimension_numbers
    ragged = tuple(numbers.lhs_ragged_dimensions)
    if is_array_leaf(x) or offset or x_batch or leaf.ndim != 3 or ragged == tuple(x_summed):
        return NotImplemented
    (group,), (summed,) = numbers.rhs_group_dimensions, w_summed
    (free,) = {0, 1, 2} - {group, summed}
    if summed in leaf.owned():
        return NotImplemented
    result = apply_rule(equation, (x, leaf.low(), group_sizes))
    gain = leaf.gain[..., 0].transpose(group, summed, free)
    gain = jnp.broadcast_to(gain, (leaf.shape[group], 1, leaf.shape[free]))
    ones = jnp.ones((result.shape[0], 1), gain.dtype)
    rows = lax.ragged_dot(ones, gain, group_sizes, precision=lax.Precision.HIGHEST)
    return _times(rows, result)
