"""How a function uses each array of its parameters, read off its jaxpr.

A weight's role is not its number of dimensions: `[12, 512, 512]` is a stack of matrices under
`scan`, a convolution elsewhere, and `[12, 512]` a stack of biases. `find_weights` runs the function
abstractly on probes that remember which of a weight's axes they still show, and writes down what
each product contracts. It needs no rule per model and, on `ShapeDtypeStruct`s, no memory.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.interpret import evaluate
from jlora.leaf import ArrayLeaf, Context, Equation, is_array_leaf, reshape_groups, rule

__all__ = ["Explanation", "Kind", "WeightUse", "explain", "find_weights"]

Kind = Literal[
    "product", "embedding", "convolution", "experts", "elementwise", "other", "unused", "captured"
]


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """How a function uses one array.

    Attributes:
      path: of the array in its tree.
      shape: of the array.
      kind: `embedding` where rows are gathered; `product`, `convolution` or `experts` (a ragged
        product) where every use is one; `elementwise` where it is also or only added, multiplied
        and the like; `other` for any other use; `unused` where nothing reads it; `captured` where
        moreover the function captures an array just like it.
      contracted: the axes that meet the input: summed in a product, indexed in an embedding.
      free: the axes that remain in the product's result.
      stacked: the axes that a scan, a slice or a batched product runs over.
      multiply_adds: of the products with it, in one call.
      share: of the multiply-adds with all arrays of the tree, between 0 and 1.
      primitives: the names of the operations that read it, in order of use.
    """

    path: str
    shape: tuple[int, ...]
    kind: Kind
    contracted: tuple[int, ...] = ()
    free: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()
    multiply_adds: int = 0
    share: float = 0.0
    primitives: tuple[str, ...] = ()


def find_weights(fn: Callable[..., Any], params: Any, *args: Any) -> dict[str, WeightUse]:
    """Reads off how `fn(params, *args)` uses each array of `params`.

    A table read row by row in a loop does not count as an embedding: its jaxpr is that of a stack
    of biases read layer by layer. To adapt it, give its `axes`.

    Args:
      fn: a function of a parameter tree and further arguments.
      params: arrays or `ShapeDtypeStruct`s; nothing is computed with them.
      args: arrays or `ShapeDtypeStruct`s, and whatever else `fn` takes.

    Returns:
      From the path of each array, in the tree's order, to its use.

    >>> params = {"w": jnp.ones((3, 4))}
    >>> find_weights(lambda p, x: x @ p["w"], params, jnp.ones((2, 3)))["w"].contracted
    (0,)
    """
    uses: dict[Any, _Use] = {}
    sink = _Sink(uses)
    params = jax.tree.map(_as_shape, params, is_leaf=is_array_leaf)
    arrays, rebuild = _arrays_of((params, *args))

    def run(arrays: list[Any]) -> list[jax.Array]:
        filled, *rest = rebuild(arrays)
        probes = jax.tree.map(lambda leaf: _probe(leaf, sink), filled)
        out = evaluate(fn, (probes, *rest), _Recorder("allow", None, uses=uses))
        return [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    jax.eval_shape(run, arrays)
    by_path: dict[str, list[_Use]] = {}
    for use in uses.values():
        by_path.setdefault(use.path, []).append(use)
    named = zip(tree.leaf_paths(params), jax.tree.leaves(params))
    paths = {path: leaf for path, leaf in named if _is_array(leaf)}
    total = sum(use.multiply_adds for use in uses.values())
    return {
        path: _summarise(path, tuple(leaf.shape), by_path.get(path, []), total)
        for path, leaf in paths.items()
    }


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _as_shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_array(leaf) else leaf


def _arrays_of(values: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays among the leaves, as shapes, and how to put others in their place."""
    leaves, treedef = jax.tree.flatten(values)

    def rebuild(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        filled = [next(remaining) if _is_array(leaf) else leaf for leaf in leaves]
        return jax.tree.unflatten(treedef, filled)

    return [_as_shape(leaf) for leaf in leaves if _is_array(leaf)], rebuild


def _probe(leaf: Any, sink: "_Sink") -> Any:
    if not _is_array(leaf):
        return leaf
    return _Probe(leaf, (), tuple((axis,) for axis in range(leaf.ndim)), sink)


@dataclasses.dataclass(frozen=True)
class _Use:
    path: str
    primitive: str
    kind: Kind
    contracted: tuple[int, ...] = ()
    free: tuple[int, ...] = ()
    multiply_adds: int = 0
    still_a_weight: bool = False  # gathered from a stack, and then used as the rest of it is


@dataclasses.dataclass(frozen=True, eq=False)
class _Sink:
    """Where probes write; compared by identity, so that it can be part of a tree's structure."""

    uses: dict[Any, _Use]


_ELEMENTWISE = ("add", "add_any", "sub", "mul", "div", "max", "min", "broadcast_in_dim")


@dataclasses.dataclass(frozen=True)
class _Recorder(Context):
    """A context that writes down the uses for which probes have no rule."""

    uses: dict[Any, _Use] = dataclasses.field(default_factory=dict)

    def materialise(self, leaf: ArrayLeaf, primitive: str) -> jax.Array:
        kind: Kind = "elementwise" if primitive in _ELEMENTWISE else "other"
        for name in leaf.names():
            self.uses[name, self.scope, primitive] = _Use(name, primitive, kind)
        return leaf.materialise()

    def captured(self, leaf: ArrayLeaf) -> None:
        self.uses[leaf.name(), "captured"] = _Use(leaf.name(), "closure", "captured")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Probe(ArrayLeaf):
    """A weight that remembers which of its own axes each axis that it shows came from.

    `weights` are its path and its share of the array: several, once the function joined some.
    """

    array: jax.Array
    weights: tuple[tuple[str, float], ...] = dataclasses.field(metadata={"static": True})
    axes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    sink: _Sink = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def materialise(self) -> jax.Array:
        return self.array

    def enter(self, path: str) -> "_Probe":
        return dataclasses.replace(self, weights=((path, 1.0),))

    def name(self) -> str:
        return " + ".join(self.names())

    def names(self) -> tuple[str, ...]:
        return tuple(path for path, _ in self.weights)

    def unstack(self) -> Any:
        return self.array, lambda part: dataclasses.replace(self, array=part, axes=self.axes[1:])

    def stacked(self) -> "_Probe":
        return dataclasses.replace(self, axes=((), *self.axes))

    def specs(self, spec: jax.sharding.PartitionSpec) -> "_Probe":
        return dataclasses.replace(self, array=spec)

    def original(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted({origin for axis in axes for origin in self.axes[axis]}))

    def record(
        self,
        equation: Equation,
        kind: Kind,
        contracted: Sequence[int],
        free: Sequence[int],
        multiply_adds: int,
        still_a_weight: bool = False,
    ) -> None:
        contracted = self.original(contracted)
        free = tuple(axis for axis in self.original(free) if axis not in contracted)
        for path, share in self.weights:
            self.sink.uses[path, equation.identity] = _Use(
                path,
                equation.name,
                kind,
                contracted,
                free,
                round(multiply_adds * share) * equation.context.trips,
                still_a_weight,
            )


def _summarise(path: str, shape: tuple[int, ...], uses: Sequence[_Use], total: int) -> WeightUse:
    kinds: list[Kind] = [
        use.kind for use in uses if not (use.kind == "embedding" and use.still_a_weight)
    ]
    if not kinds:  # rows gathered from it are all that is left of its uses
        kinds = [use.kind for use in uses]
    kind: Kind = "embedding" if "embedding" in kinds else kinds[0] if kinds else "unused"
    for mixed in ("elementwise", "other"):
        if kind != "embedding" and mixed in kinds:
            kind = mixed
    with_axes = [use for use in uses if use.contracted]
    shown = next((use for use in with_axes if use.kind == kind), None)
    if shown is None and with_axes:
        shown = next((use for use in with_axes if not use.still_a_weight), with_axes[0])
    multiply_adds = sum(use.multiply_adds for use in uses)
    roles = dict.fromkeys(("contracted", "free", "stacked"), ())
    if shown is not None:
        used = (*shown.contracted, *shown.free)
        stacked = tuple(axis for axis in range(len(shape)) if axis not in used)
        roles = {"contracted": shown.contracted, "free": shown.free, "stacked": stacked}
    return WeightUse(
        path,
        shape,
        kind,
        **roles,
        multiply_adds=multiply_adds,
        share=multiply_adds / total if total else 0.0,
        primitives=tuple(dict.fromkeys(use.primitive for use in uses)),
    )


@rule(_Probe, "dot_general")
def _dot_general(equation: Equation, left: Any, right: Any) -> Any:
    (left_summed, right_summed), (left_batch, right_batch) = equation.params["dimension_numbers"]
    sides = ((left, left_summed, left_batch), (right, right_summed, right_batch))
    for operand, summed, batch in sides:
        if isinstance(operand, _Probe):
            free = [a for a in range(operand.ndim) if a not in summed and a not in batch]
            contracted_size = math.prod(operand.shape[axis] for axis in summed)
            multiply_adds = math.prod(equation.out.shape) * contracted_size
            operand.record(equation, "product", summed, free, multiply_adds)
    return equation.bind(*(x.array if isinstance(x, _Probe) else x for x in (left, right)))


@rule(_Probe, "conv_general_dilated")
def _convolution(equation: Equation, x: Any, kernel: Any) -> Any:
    if not isinstance(kernel, _Probe) or isinstance(x, _Probe):
        return NotImplemented
    out_axis, *summed = equation.params["dimension_numbers"].rhs_spec
    window = math.prod(kernel.shape[axis] for axis in summed)
    multiply_adds = math.prod(equation.out.shape) * window
    kernel.record(equation, "convolution", summed, [out_axis], multiply_adds)
    return equation.bind(x, kernel.array)


@rule(_Probe, "ragged_dot_general")
def _ragged_dot(equation: Equation, x: Any, probe: Any, *rest: Any) -> Any:
    if not isinstance(probe, _Probe) or isinstance(x, _Probe):
        return NotImplemented
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, summed), _ = numbers.dot_dimension_numbers
    free = [a for a in range(probe.ndim) if a not in (*summed, *numbers.rhs_group_dimensions)]
    contracted_size = math.prod(probe.shape[axis] for axis in summed)
    multiply_adds = math.prod(equation.out.shape) * contracted_size
    probe.record(equation, "experts", summed, free, multiply_adds)
    return equation.bind(x, probe.array, *rest)


@rule(_Probe, "gather")
def _gather(equation: Equation, probe: Any, indices: Any) -> Any:
    if not isinstance(probe, _Probe) or isinstance(indices, _Probe):
        return NotImplemented
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    indexed = [a for a in numbers.start_index_map if sizes[a] < probe.shape[a]]
    indexed = indexed or list(numbers.start_index_map)
    free = [axis for axis in range(probe.ndim) if axis not in indexed]
    still_a_weight = len(free) > 1
    probe.record(equation, "embedding", indexed, free, 0, still_a_weight)
    array = equation.bind(probe.array, indices)
    if not still_a_weight or numbers.operand_batching_dims:
        return array
    shown = iter(axis for axis in range(probe.ndim) if axis not in numbers.collapsed_slice_dims)
    axes = tuple(
        probe.axes[next(shown)] if place in numbers.offset_dims else ()
        for place in range(array.ndim)
    )
    return dataclasses.replace(probe, array=array, axes=axes)


@rule(_Probe, "convert_element_type")
def _convert_element_type(equation: Equation, probe: _Probe) -> Any:
    array = equation.bind(probe.array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return NotImplemented
    return dataclasses.replace(probe, array=array)


@rule(
    _Probe,
    *("copy", "copy_p", "stop_gradient", "pvary", "neg", "sharding_constraint", "slice"),
    *("reshard", "name", "rev"),
)  # fmt: skip
def _keeps_axes(equation: Equation, probe: _Probe) -> Any:
    return dataclasses.replace(probe, array=equation.bind(probe.array))


@rule(_Probe, "split")
def _split(equation: Equation, probe: _Probe) -> Any:
    return [dataclasses.replace(probe, array=part) for part in equation.bind(probe.array)]


@rule(_Probe, "concatenate", "stack")
def _join(equation: Equation, *parts: Any) -> Any:
    first, *others = probes = [part for part in parts if isinstance(part, _Probe)]
    if any(probe.axes != first.axes for probe in others):
        return NotImplemented
    array = equation.bind(*(part.array if isinstance(part, _Probe) else part for part in parts))
    weights = tuple(
        (path, share * math.prod(probe.shape) / math.prod(array.shape))
        for probe in probes
        for path, share in probe.weights
    )
    axes = list(first.axes)
    if equation.name == "stack":
        axes.insert(equation.params["axis"], ())
    return dataclasses.replace(first, array=array, weights=weights, axes=tuple(axes))


@rule(_Probe, "unstack")
def _unstack(equation: Equation, probe: _Probe) -> Any:
    axis = equation.params["axis"]
    axes = (*probe.axes[:axis], *probe.axes[axis + 1 :])
    return [
        dataclasses.replace(probe, array=part, axes=axes) for part in equation.bind(probe.array)
    ]


@rule(_Probe, "dynamic_slice")
def _dynamic_slice(equation: Equation, probe: Any, *starts: Any) -> Any:
    if not isinstance(probe, _Probe):
        return NotImplemented
    return dataclasses.replace(probe, array=equation.bind(probe.array, *starts))


@rule(_Probe, "optimization_barrier")
def _optimization_barrier(equation: Equation, *operands: Any) -> Any:
    flat, treedef = jax.tree.flatten(list(operands))
    return jax.tree.unflatten(treedef, equation.bind(*flat))


@rule(_Probe, "mul", "div")
def _scale(equation: Equation, left: Any, right: Any) -> Any:
    probe, factor = (left, right) if isinstance(left, _Probe) else (right, left)
    if isinstance(factor, _Probe) or jnp.ndim(factor):
        return NotImplemented
    array = equation.bind(*(x.array if x is probe else x for x in (left, right)))
    return dataclasses.replace(probe, array=array)


@rule(_Probe, "transpose")
def _transpose(equation: Equation, probe: _Probe) -> Any:
    axes = tuple(probe.axes[axis] for axis in equation.params["permutation"])
    return dataclasses.replace(probe, array=equation.bind(probe.array), axes=axes)


@rule(_Probe, "squeeze")
def _squeeze(equation: Equation, probe: _Probe) -> Any:
    gone = equation.params["dimensions"]
    axes = tuple(origin for axis, origin in enumerate(probe.axes) if axis not in gone)
    return dataclasses.replace(probe, array=equation.bind(probe.array), axes=axes)


@rule(_Probe, "reshape")
def _reshape(equation: Equation, probe: _Probe) -> Any:
    array = equation.bind(probe.array)
    axes: list[tuple[int, ...]] = [()] * array.ndim
    for old_axes, new_axes in reshape_groups(probe.shape, array.shape):
        origins = tuple(
            origin for axis in old_axes if probe.shape[axis] > 1 for origin in probe.axes[axis]
        )
        for axis in new_axes:
            axes[axis] = origins
    return dataclasses.replace(probe, array=array, axes=tuple(axes))


@rule(_Probe, "broadcast_in_dim")
def _broadcast_in_dim(equation: Equation, probe: Any, *sizes: Any) -> Any:
    if not isinstance(probe, _Probe) or sizes:
        return NotImplemented
    array = equation.bind(probe.array)
    places = dict(zip(equation.params["broadcast_dimensions"], probe.axes))
    axes = tuple(places.get(axis, ()) for axis in range(array.ndim))
    return dataclasses.replace(probe, array=array, axes=axes)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which path each use of each adapted leaf takes; `str` gives the table.

    Attributes:
      low_rank: from the leaf's path to the operations that meet its factors, or, of a quantised
        leaf without an adapter, its packed arrays.
      dense: from the leaf's path to the operations that its exact dense array is built for.
      captured: paths that are not read while the function captures an array like them.
      ways: what the operations of `low_rank` do with the leaf of each path.
    """

    low_rank: dict[str, tuple[str, ...]]
    dense: dict[str, tuple[str, ...]]
    captured: tuple[str, ...] = ()
    ways: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        width = max([*map(len, self.low_rank), 4])
        lines = []
        for path in self.low_rank:
            uses = [f"{primitive}: {self.ways[path]}" for primitive in self.low_rank[path]]
            uses += [f"{primitive}: dense, no low-rank rule here" for primitive in self.dense[path]]
            if path in self.captured:
                uses.append("captured in a closure instead: its adapter has no effect")
            lines.append(f"{path.ljust(width)}  {'; '.join(uses) or 'not used'}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Explainer(Context):
    """A context that writes down which path each use takes."""

    low_rank: dict[str, dict[str, None]] = dataclasses.field(default_factory=dict)
    dense: dict[str, dict[str, None]] = dataclasses.field(default_factory=dict)
    missed: list[str] = dataclasses.field(default_factory=list)

    def materialise(self, leaf: ArrayLeaf, primitive: str) -> jax.Array:
        for name in leaf.names():
            self.dense.setdefault(name, {})[primitive] = None
        return leaf.materialise()

    def note(self, leaf: ArrayLeaf, primitive: str) -> None:
        for name in leaf.names():
            self.low_rank.setdefault(name, {})[primitive] = None

    def captured(self, leaf: ArrayLeaf) -> None:
        self.missed.append(leaf.name())


def explain(fn: Callable[..., Any], params: Any, *args: Any) -> Explanation:
    """Says, before anything runs, what `jlora.adapt(fn)(params, *args)` does with each leaf.

    Args:
      fn: the function that would be adapted.
      params: a tree from `jlora.init`, of arrays or of `ShapeDtypeStruct`s.
      args: arrays or `ShapeDtypeStruct`s, and whatever else `fn` takes.
    """
    recorder = _Explainer("allow", None)
    arrays, rebuild = _arrays_of((params, *args))

    def run(arrays: list[Any]) -> list[jax.Array]:
        out = evaluate(fn, rebuild(arrays), recorder)
        return [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    jax.eval_shape(run, arrays)
    leaves = jax.tree.leaves(params, is_leaf=is_array_leaf)
    named = zip(tree.leaf_paths(params, is_leaf=is_array_leaf), leaves)
    ways = {path: leaf.way for path, leaf in named if is_array_leaf(leaf)}
    return Explanation(
        {path: tuple(recorder.low_rank.get(path, ())) for path in ways},
        {path: tuple(recorder.dense.get(path, ())) for path in ways},
        tuple(recorder.missed),
        ways,
    )
