"""Leaves that stand for arrays, and what a rule sees of the equation that one takes part in.

`interpret.py` evaluates functions on such leaves; the modules below it define leaf classes and
their rules. A leaf without a rule for a primitive becomes its exact dense array there.
"""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
from jax.sharding import PartitionSpec

__all__ = [
    "ArrayLeaf",
    "Context",
    "Equation",
    "OnUnsupported",
    "apply_rule",
    "explicit_sharding",
    "half_of_a_tree",
    "is_array_leaf",
    "pass_barrier",
    "product_sides",
    "reshape_groups",
    "rule",
]

_LOG = logging.getLogger("jlora")

OnUnsupported = Literal["warn", "error", "allow"]


class ArrayLeaf:
    """A pytree that stands for one array inside a parameter tree.

    A subclass is a frozen dataclass registered as a pytree. It gives `shape`, `dtype` and
    `materialise`, and registers with `rule` what it can do better than being materialised.
    """

    way = "low-rank"  # how its rules serve an operation, in `explain`

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this leaf stands for."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """The dtype of the array that this leaf stands for."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The number of axes of the array that this leaf stands for."""
        return len(self.shape)

    def materialise(self) -> jax.Array:
        """The exact dense array."""
        raise NotImplementedError

    def placeholder(self) -> Any:
        """An array, or its shape, of the type that the function is traced for."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def enter(self, path: str) -> "ArrayLeaf":
        """The leaf as rules see it, for a leaf found at `path`."""
        raise NotImplementedError

    def name(self) -> str:
        """The path that messages call this leaf by."""
        raise NotImplementedError

    def names(self) -> tuple[str, ...]:
        """The paths of all weights in this leaf: several, once the function joined some."""
        return (self.name(),)

    def why_frozen(self, path: str) -> str | None:
        """Why a function may not differentiate with respect to this leaf; None where it may."""
        return None

    def unstack(self) -> tuple[Any, Callable[[Any], "ArrayLeaf"]] | None:
        """Cuts the leading axis for a scan: what to scan over, and the leaf of one slice of it.

        None where this leaf cannot be cut along its leading axis.
        """
        return None

    def stacked(self) -> "ArrayLeaf":
        """The leaf after a scan has stacked each of its arrays along a new leading axis."""
        return self

    def divisible(self, spec: PartitionSpec, mesh: Any) -> "ArrayLeaf | None":
        """The same leaf with arrays that a shard_map can cut as `spec` cuts what it stands for.

        None where there is no such form.
        """
        return self

    def specs(self, spec: PartitionSpec) -> "ArrayLeaf":
        """The same leaf with a PartitionSpec in place of each array, for an array cut by `spec`."""
        raise NotImplementedError

    def after_barrier(self) -> "ArrayLeaf":
        """The leaf behind an optimisation barrier, which gives every array of it a tangent."""
        return self

    def __jax_array__(self) -> jax.Array:
        raise TypeError(self._outside("reached a JAX function"))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(self._outside("was asked for as a NumPy array"))

    def __getattr__(self, name: str) -> Any:
        # Only for what the class lacks, or what a property of it failed to find.
        if name.startswith("_") or hasattr(type(self), name) or not hasattr(jax.Array, name):
            raise AttributeError(f"This {type(self).__name__} has no {name!r}.")
        raise AttributeError(self._outside(f"was asked for its {name!r}"))

    def _outside(self, event: str) -> str:
        return (
            f"A {type(self).__name__} of shape {self.shape} {event} outside jlora.adapt. Wrap the "
            "function that uses it, jlora.adapt(fn)(...), and pass the leaf as an argument instead "
            "of capturing it; or build plain arrays with jlora.merge_params."
        )


def _refuse(operator: str) -> Callable[..., Any]:
    def method(self: ArrayLeaf, *operands: Any) -> Any:
        raise TypeError(self._outside(f"met {operator}"))

    return method


_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "matmul": "@", "truediv": "/", "floordiv": "//", "mod": "%",
    "pow": "**", "getitem": "[]", "neg": "-",
}  # fmt: skip
for _name, _sign in _OPERATORS.items():
    setattr(ArrayLeaf, f"__{_name}__", _refuse(_sign))
    setattr(ArrayLeaf, f"__r{_name}__", _refuse(_sign))


def is_array_leaf(value: Any) -> bool:
    """Whether a value is a leaf that stands for an array."""
    return isinstance(value, ArrayLeaf)


@dataclasses.dataclass(frozen=True)
class Context:
    """What rules share while one function is evaluated.

    Attributes:
      on_unsupported: what to do where a leaf has no rule.
      key: for dropout, different in each iteration of a scan; None is no dropout.
      trips: how often the code under evaluation runs, as far as scans say.
      shares: whether what a `jax.checkpoint` computes again may be merged with equal parts of the
        gradient, as `prevent_cse=False` says.
      scope: the enclosing equations, which tell two runs of the same code apart.
      where: gives the line of the user's code that is under evaluation, as far as it is known.
      warned: what was already reported.
      counts: how often each leaf was counted.
      remarks: what to say once about all leaves that it is true of.
    """

    on_unsupported: OnUnsupported
    key: jax.Array | None
    trips: int = 1
    shares: bool = False
    scope: tuple[int, ...] = ()
    where: Callable[[], str] = lambda: ""
    warned: set[Any] = dataclasses.field(default_factory=set)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    remarks: dict[str, dict[str, None]] = dataclasses.field(default_factory=dict)

    def count(self, name: str) -> int:
        """How often this was called for `name` before: 0, 1, 2, ..."""
        self.counts[name] = self.counts.get(name, -1) + 1
        return self.counts[name]

    def materialise(self, leaf: ArrayLeaf, primitive: str) -> jax.Array:
        """The dense array of a leaf that `primitive` has no rule for, reported as asked."""
        message = (
            f"jlora has no low-rank rule for {primitive!r} on {leaf.name()!r} of shape "
            f"{leaf.shape}{self.where()}: its exact dense array is built there."
        )
        if self.on_unsupported == "error":
            raise NotImplementedError(
                f"{message} Pass on_unsupported='warn' or 'allow' to accept that, or leave this "
                "weight out of the targets."
            )
        if self.on_unsupported == "warn":
            self.warn_once(
                (leaf.name(), primitive),
                f"{message} The result is right; memory and time are those of the dense product. "
                "on_unsupported='allow' silences this, 'error' refuses it.",
            )
        return leaf.materialise()

    def warn_once(self, subject: Any, message: str) -> None:
        """Warns, but not twice about one subject."""
        if subject not in self.warned:
            self.warned.add(subject)
            warnings.warn(message, stacklevel=3)

    def remark(self, text: str, leaf: ArrayLeaf) -> None:
        """Notes what `log_remarks` will say of all leaves together."""
        self.remarks.setdefault(text, {})[leaf.name()] = None

    def log_remarks(self) -> None:
        """Says each remark once of the leaves that it is true of."""
        for text, names in self.remarks.items():
            subject = (text, tuple(names))
            if subject not in self.warned:
                self.warned.add(subject)
                shown = ", ".join(map(repr, list(names)[:4]))
                more = f" and {len(names) - 4} more" if len(names) > 4 else ""
                _LOG.info(text, f"{shown}{more}")

    def note(self, leaf: ArrayLeaf, primitive: str) -> None:
        """Called where a leaf's own rule turned it into a plain array."""

    def captured(self, leaf: ArrayLeaf) -> None:
        """Called for a leaf that is not read while the function captures an array like it."""
        self.warn_once(
            (leaf.name(), "closure"),
            f"{leaf.name()!r} of shape {leaf.shape} is passed to the function but not read by it, "
            "while the function captures an array of that shape in a closure: the captured weight "
            "is used without its adapter. Read the weight from the argument.",
        )


@dataclasses.dataclass(frozen=True)
class Equation:
    """One equation of a jaxpr, as rules see it.

    Attributes:
      name: of the primitive, e.g. `dot_general`.
      params: of the primitive.
      out: shape and dtype of the (first) result, and its sharding on a mesh of Explicit axes.
      context: shared by the whole evaluation.
      identity: tells this equation from every other one of the evaluation.
    """

    name: str
    params: dict[str, Any]
    out: jax.ShapeDtypeStruct
    context: Context
    identity: tuple[int, ...]
    primitive: Any

    def bind(self, *operands: Any) -> Any:
        """Runs this equation's primitive, with its parameters, on other operands."""
        return self.bind_as(self.params, *operands)

    def bind_as(self, params: dict[str, Any], *operands: Any) -> Any:
        """Runs this equation's primitive with other parameters."""
        if any(map(is_array_leaf, operands)):
            return apply_rule(dataclasses.replace(self, params=params), operands)
        return self.primitive.bind(*operands, **self.primitive.get_bind_params(params))


Rule = Callable[..., Any]
_RULES: dict[tuple[type, str], Rule] = {}


def rule(leaf_type: type[ArrayLeaf], *primitives: str) -> Callable[[Rule], Rule]:
    """Registers `fn(equation, *operands)` for equations in which a leaf of this class takes part.

    The rule returns the result (an array, a leaf, or a sequence for primitives with several
    results), or NotImplemented where it cannot do better than the dense array.
    """

    def register(fn: Rule) -> Rule:
        for primitive in primitives:
            _RULES[leaf_type, primitive] = fn
        return fn

    return register


def apply_rule(equation: Equation, operands: Sequence[Any]) -> Any:
    """Runs an equation by the rule of its first leaf that has one, or on the dense arrays."""
    for leaf in filter(is_array_leaf, operands):
        for leaf_type in type(leaf).__mro__:
            if found := _RULES.get((leaf_type, equation.name)):
                result = found(equation, *operands)
                if result is not NotImplemented:
                    results = result if isinstance(result, list | tuple) else [result]
                    if not any(map(is_array_leaf, results)):
                        equation.context.note(leaf, equation.name)
                    return result
    return equation.bind(
        *(
            equation.context.materialise(operand, equation.name)
            if is_array_leaf(operand)
            else operand
            for operand in operands
        )
    )


def explicit_sharding(array_type: Any) -> jax.sharding.NamedSharding | None:
    """The sharding that is part of an array's type, on a mesh of Explicit axes; else None."""
    sharding = getattr(array_type, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None


def pass_barrier(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """One barrier over every part of the leaves, so that all of them still wait for each other."""
    flat, treedef = jax.tree.flatten(list(operands))
    results = jax.tree.unflatten(treedef, equation.bind(*flat))
    return [result.after_barrier() if is_array_leaf(result) else result for result in results]


def product_sides(
    equation: Equation, left: Any, right: Any, kind: type[ArrayLeaf]
) -> tuple[Any, Any, tuple[Sequence[int], ...], tuple[Sequence[int], ...]]:
    """Of a `dot_general`: the leaf of a kind, the other operand, (summed, batch) axes of each."""
    (left_summed, right_summed), (left_batch, right_batch) = equation.params["dimension_numbers"]
    sides = (left, (left_summed, left_batch)), (right, (right_summed, right_batch))
    (leaf, leaf_dims), (x, x_dims) = sides if isinstance(left, kind) else sides[::-1]
    return leaf, x, leaf_dims, x_dims


def half_of_a_tree(lack: str) -> ValueError:
    """The error for a leaf that lacks what is in the other half of its tree."""
    return ValueError(
        f"{lack} is one half of jlora.split. Join the halves with jlora.combine(trainable, frozen)."
    )


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The least groups of axes, old and new, that a reshape maps onto each other.

    >>> list(reshape_groups((2, 6, 5), (2, 3, 2, 5)))
    [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]
    """
    i = j = 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        left = right = 1
        while True:
            if i < len(old) and (left <= right or j == len(new)):
                left, i = left * old[i], i + 1
            elif j < len(new):
                right, j = right * new[j], j + 1
            if left == right and i > first_i and j > first_j:
                break
            if i == len(old) and j == len(new):
                break
        yield tuple(range(first_i, i)), tuple(range(first_j, j))
