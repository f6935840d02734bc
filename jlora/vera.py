"""VeRA (arXiv:2310.11454): two vectors train beside random projections that all weights share.

A leaf stands for `w + a * lambda_d @ b * lambda_b`. Of one random pair, `[largest d_in, rank]` and
`[rank, largest d_out]`, a leaf has the first rows and columns that it needs, once for all layers of
its stack. Nothing but the vectors trains, and no scaling is applied. On its way through a function
the four factors stay apart, so that no layer has projections of its own, and a product's derivative
along `lambda_d` is one along the rank.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jlora.leaf import Equation, apply_rule, half_of_a_tree, is_array_leaf, product_sides, rule
from jlora.lora import LoraArray, variant
from jlora.lora_config import Axis
from jlora.lowrank import Factored, LowRank, spread_along
from jlora.packed_products import PackedLowRank
from jlora.products import drop_out, name_axes, product, result_axes

__all__ = ["VeraArray"]

_D_INITIAL = 0.1  # of lambda_d: the paper's section 4 and PEFT's default


@variant("vera")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeraArray(LoraArray):
    """A weight with trained vectors around shared projections (VeRA, arXiv:2310.11454).

    It stands for `w + a * lambda_d @ b * lambda_b`; `scaling` is 1. Fields beside those of
    `LoraArray`, of which `a` `[*in rank]` and `b` `[rank *out]` are frozen and not stacked:

    Attributes:
      lambda_d: `Float[*stack rank]`, trained under the label `lora_a`; starts at 0.1.
      lambda_b: `Float[*stack *out]`, trained under the label `lora_b`; starts at zero.
    """

    kind: ClassVar[str] = "VeRA"
    stacking: ClassVar[str] = (
        "The projections a and b are shared by the layers of a stack: map or scan over the vectors "
        "and the weight alone, around jlora.adapt, and not over them."
    )
    any_rank: ClassVar[bool] = True
    arrays: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "a": ("frozen", ("in", "rank")),
        "b": ("frozen", ("rank", "out")),
        "lambda_d": ("lora_a", ("stack", "rank")),
        "lambda_b": ("lora_b", ("stack", "out")),
    }

    lambda_d: Any = None
    lambda_b: Any = None

    @classmethod
    def draw(
        cls,
        key: jax.Array,
        shapes: Mapping[str, tuple[int, tuple[int, ...], tuple[int, ...]]],
        roles: Mapping[str, tuple[Axis, ...]],
        dtype: str,
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Parts of one pair, uniform in `±sqrt(6 / fan)` as PEFT draws it.

        Parts of one shape are one array. The numbers are the same compiled or not: they are whole
        multiples of a power of two, rounded once.
        """
        own = {}
        for path, (_, a_shape, b_shape) in shapes.items():
            depth = roles[path].count("stack")
            own[path] = a_shape[depth:], b_shape[depth:]
        d_in = max(math.prod(a[:-1]) for a, _ in own.values())
        d_out = max(math.prod(b[1:]) for _, b in own.values())
        (rank,) = {a[-1] for a, _ in own.values()}
        a_key, b_key = jax.random.split(jax.random.fold_in(key, np.uint32(2310)))
        whole_a = _kaiming(a_key, (d_in, rank), d_in, dtype)
        whole_b = _kaiming(b_key, (rank, d_out), rank, dtype)
        a_parts = {a: whole_a[: math.prod(a[:-1])].reshape(a) for a, _ in own.values()}
        b_parts = {b: whole_b[:, : math.prod(b[1:])].reshape(b) for _, b in own.values()}
        return {path: (a_parts[a], b_parts[b]) for path, (a, b) in own.items()}

    @classmethod
    def start(cls, w: Any, a: Any, b: Any, **static: Any) -> Self:
        """With vectors that change nothing."""
        roles = static.get("axes", ("in", "out"))
        stack = [size for size, role in zip(w.shape, roles) if role == "stack"]
        lambda_d = jnp.full((*stack, a.shape[-1]), _D_INITIAL, a.dtype)
        lambda_b = jnp.zeros((*stack, *b.shape[1:]), b.dtype)
        static["scaling"] = 1.0
        return cls(w, a, b, **static, lambda_d=lambda_d, lambda_b=lambda_b)

    def product_factors(self) -> tuple[Any, Any]:
        """`a` and `b` with their vectors, stacked as those of `LoraArray`."""
        depth = self.roles.count("stack")
        d, g = self.lambda_d, self.lambda_b
        a = jnp.expand_dims(d, tuple(range(depth, depth + self.a.ndim - 1))) * self.a
        return a, jnp.expand_dims(g, depth) * self.b

    def low_rank(self, path: str) -> Any:
        """The weight and its four factors, each spread over the weight's axes."""
        if any(getattr(self, name) is None for name in self.arrays):
            raise half_of_a_tree(f"{path!r} has no whole adapter in this tree, which")
        self._check_shapes(path)
        depth = self.roles.count("stack")
        a = jnp.expand_dims(self.a, tuple(range(depth)))  # [1... *in rank]
        b = jnp.expand_dims(jnp.moveaxis(self.b, 0, -1), tuple(range(depth)))
        w = self.w.enter(path) if is_array_leaf(self.w) else self.w
        return Vera(
            w,
            self.spread(a, "in"),
            self.spread(b, "out"),
            scaling=1.0,
            dropout=self.dropout,
            path=path,
            d=self.spread(self.lambda_d, "rank"),
            g=self.spread(self.lambda_b[..., None], "out"),
        )


def _kaiming(key: jax.Array, shape: tuple[int, ...], fan: int, dtype: str) -> jax.Array:
    bound = np.float32(math.sqrt(6 / fan))
    return (bound * jax.random.uniform(key, shape, jnp.float32, -1, 1)).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vera(Factored):
    """`w + g * sum_r d[..., r] * u[..., r] * v[..., r]` on its way through a function.

    Attributes:
      d: `Float[*axes rank]`, with size 1 along axes that are not stacked.
      g: `Float[*axes 1]`, with size 1 along the axes that meet the input.
    """

    factor_names: ClassVar[tuple[str, ...]] = ("u", "v", "d", "g")

    d: Any = dataclasses.field(kw_only=True)
    g: Any = dataclasses.field(kw_only=True)

    def folded(self) -> LowRank:
        """The same with two factors, which are larger where layers are stacked."""
        kind = PackedLowRank if is_array_leaf(self.w) else LowRank
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(LowRank)}
        return kind(**{**fields, "u": self.u * self.d, "v": self.v * self.g})

    def materialise(self) -> jax.Array:
        """`w` plus the product, computed in float32 (or wider) and rounded once."""
        return self.folded().materialise()


@dataclasses.dataclass(frozen=True)
class _Between(LowRank):
    """`u` and `v` with what is multiplied between the two: `d`, whose axes are `d_axes`."""

    d: Any = dataclasses.field(kw_only=True)
    d_axes: Any = dataclasses.field(kw_only=True)

    def scaled(self, hidden: jax.Array, axes: Any) -> jax.Array:
        """`hidden * d`."""
        return (hidden * spread_along(self.d, self.d_axes, axes, hidden)).astype(hidden.dtype)


@rule(Vera, "dot_general")
def _dot_general(equation: Equation, left: Any, right: Any) -> Any:
    """The weight's own product, and one with each factor in turn."""
    leaf, x, leaf_dims, x_dims = product_sides(equation, left, right, Vera)
    if is_array_leaf(x):
        x = equation.context.materialise(x, equation.name)
    summed, batch = leaf_dims
    stacked, scaled = (
        [axis for axis in range(leaf.ndim) if factor.shape[axis] > 1] for factor in (leaf.d, leaf.g)
    )
    own = [axis for axis in scaled if axis not in batch]
    before = bool(own) and set(own) <= set(summed)
    if not summed or set(stacked) - set(batch) or (not before and set(own) & set(summed)):
        operands = (leaf.folded(), x) if leaf is left else (x, leaf.folded())
        return apply_rule(equation, operands)
    leaf_axes, x_axes = name_axes(leaf, x, leaf_dims, x_dims)
    sides = (leaf_axes, x_axes) if leaf is left else (x_axes, leaf_axes)
    out_axes = result_axes(*sides, [leaf_axes[axis] for axis in batch])
    base = equation.bind(*((leaf.w, x) if leaf is left else (x, leaf.w)))
    x, leaf = drop_out(x, leaf, equation.context)
    g_axes = [*leaf_axes, "one"]
    if before:
        x = (x * spread_along(leaf.g, g_axes, x_axes, x)).astype(x.dtype)
    fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(LowRank)}
    between = _Between(**fields, d=leaf.d, d_axes=[*leaf_axes, "rank"])
    precision = equation.params["precision"]
    update = product(x, x_axes, between, leaf_axes, out_axes, equation.out, precision)
    if not before:
        update = (update * spread_along(leaf.g, g_axes, out_axes, update)).astype(update.dtype)
    return base + update


@rule(Vera, "gather", "conv_general_dilated", "ragged_dot_general", "concatenate", "stack")
def _with_two_factors(equation: Equation, *operands: Any) -> Any:
    """What LoRA does."""
    return apply_rule(equation, [x.folded() if isinstance(x, Vera) else x for x in operands])
