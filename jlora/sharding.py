"""Meshes, and where each array of an adapted tree lies on them: adapters follow their weights.

A factor takes the placement of the axes that it shares with its weight: `a` those that meet the
input, `b` those of the output, both the stacked ones; the rank is replicated. So the products with
factors need no communication that the weight's own product does not need.

Nothing here looks for devices: they are given, so that the same rules serve this machine and one
that a program is only compiled for.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora import tree
from jlora.leaf import is_array_leaf
from jlora.lora import LoraArray
from jlora.packed import num_parts
from jlora.quant import QuantArray, placements
from jlora.rows import RowsArray
from jlora.tree import Pattern

__all__ = [
    "AXES",
    "DECODER_RULES",
    "Activations",
    "Rules",
    "axis_sizes",
    "batch_sharding",
    "follow",
    "make_mesh",
    "placement",
    "shardings",
]

Rules = Sequence[tuple[Pattern, PartitionSpec]]
_LOG = logging.getLogger("jlora")

# Rows of a batch are cut over the first two, weights over the last two.
AXES = ("data", "fsdp", "tensor")

# For the paths of `models/decoder.py`. A projection whose results are heads or hidden units is cut
# by them over `tensor`, the one that takes them in by its input, so that between the two nothing is
# exchanged; the other axis is cut over `fsdp`.
DECODER_RULES: Rules = (
    ("*layers/mlp/experts/gate_up_proj/kernel", PartitionSpec(None, None, "fsdp", "tensor")),
    ("*layers/mlp/experts/down_proj/kernel", PartitionSpec(None, None, "tensor", "fsdp")),
    ("*layers/mlp/gate/kernel", PartitionSpec(None, "fsdp", None)),
    (re.compile(r"(^|/)(o|down)_proj/kernel$"), PartitionSpec(None, "tensor", "fsdp")),
    (re.compile(r"_proj/kernel$"), PartitionSpec(None, "fsdp", "tensor")),
    (re.compile(r"(^|/)(o|down)_proj/bias$"), PartitionSpec()),
    (re.compile(r"_proj/bias$"), PartitionSpec(None, "tensor")),
    ("*embed_tokens/embedding", PartitionSpec("tensor", "fsdp")),
    ("*lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (re.compile(r"(^|/)\w*norm/scale$"), PartitionSpec()),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh of all given devices with the axes `data`, `fsdp` and `tensor`, of Auto type.

    Neighbours on `tensor` are nearest in the network. Of several slices, whose `slice_index`
    differs, the network between them carries `data` first, then `fsdp`, and never `tensor`.

    Args:
      sizes: devices along each axis; at most one is -1, which takes what the others leave. An axis
        that is not named has size 1.
      devices: of this process, of all processes, or of a topology that is only compiled for.

    Raises:
      ValueError: if the sizes do not fit the devices; says which would.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = axis_sizes(sizes, len(devices), slices)
    between = _between_slices(shape, slices)
    if slices == 1 or between is None:
        array = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    else:
        within = [size // parts for size, parts in zip(shape, between)]
        array = mesh_utils.create_hybrid_device_mesh(
            within, between, list(devices), allow_split_physical_axes=True
        )
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Rows of a batch cut over `data` and `fsdp`; `leading` axes before the rows stay whole."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, AXES[:2]))


@dataclasses.dataclass(frozen=True)
class Activations:
    """Where a decoder's activations lie on a mesh: what `Decoder(config, place)` takes as `place`.

    Rows are cut over `data` and `fsdp`, heads, hidden units and the vocabulary over `tensor`. So is
    the length of the stream between layers, which is what the backward pass keeps of each layer:
    norms and sums are then computed once, and what was a sum over `tensor` is half as much to send.

    Attributes:
      mesh: from `make_mesh`.
      sequence: False leaves the length whole everywhere.
    """

    mesh: Mesh
    sequence: bool = True

    def spec(self, kind: str, shape: Sequence[int]) -> PartitionSpec:
        """The PartitionSpec of activations; an axis that the devices do not divide stays whole.

        Args:
          kind: `"stream"` and `"inputs"` are `[batch length d]`, between layers and as projections
            take them; `"heads"` `[batch length heads head_dim]`, `"units"` `[batch length units]`,
            `"logits"` `[batch ... vocab]`. `"columns"` and `"rows"` are kernels `[... d_in d_out]`
            as products take them, with the axis cut that counts heads or units.
          shape: of the array.
        """
        places: list[Any] = [AXES[:2], *[None] * (len(shape) - 1)]
        match kind:
            case "columns":
                places = [None] * (len(shape) - 1) + ["tensor"]
            case "rows":
                places = [None] * (len(shape) - 2) + ["tensor", None]
            case "stream":
                places[1] = "tensor" if self.sequence else None
            case "heads":
                places[-2] = "tensor"
            case "units" | "logits":
                places[-1] = "tensor"
        parts = (num_parts(place, self.mesh) for place in places)
        return PartitionSpec(
            *(None if size % n else place for place, size, n in zip(places, shape, parts))
        )

    def __call__(self, x: jax.Array, kind: str) -> jax.Array:
        """`x`, held to its place."""
        sharding = NamedSharding(self.mesh, self.spec(kind, x.shape))
        return jax.lax.with_sharding_constraint(x, sharding)


def axis_sizes(sizes: Mapping[str, int], count: int, slices: int = 1) -> tuple[int, ...]:
    """The size of each axis of a mesh, with -1 resolved.

    Args:
      sizes: as in `make_mesh`.
      count: of all devices.
      slices: that they are in.

    Raises:
      ValueError: if the sizes do not fit the devices; says which would.
    """
    asked = [sizes.get(name, 1) for name in AXES]
    shown = ", ".join(f"{name}: {size}" for name, size in zip(AXES, asked))
    if unknown := sorted(set(sizes) - set(AXES)):
        raise ValueError(f"A mesh has the axes {', '.join(AXES)}; got {', '.join(unknown)}.")
    if any(size < 1 and size != -1 for size in asked) or asked.count(-1) > 1:
        raise ValueError(
            f"mesh ({shown}): each size is at least 1, and one of them may be -1 for the devices "
            "that the others leave."
        )
    given = math.prod(size for size in asked if size != -1)
    free = count // given if count % given == 0 else 0
    resolved = tuple(free if size == -1 else size for size in asked)
    if math.prod(resolved) == count and _between_slices(resolved, slices) is not None:
        return resolved
    found = f"{count} devices" + (f" in {slices} slices" if slices > 1 else "")
    why = ""
    if math.prod(resolved) == count:
        why = " (the axes data and fsdp go between slices, so the slices must divide them)"
    fitting = [shape for shape in _factorings(count) if _between_slices(shape, slices) is not None]
    fitting.sort(key=lambda shape: (_distance(shape, asked), -shape[1], shape))
    near = "; ".join(", ".join(map("{}: {}".format, AXES, shape)) for shape in fitting[:5])
    raise ValueError(f"mesh ({shown}) does not fit {found}{why}. Sizes that do: {near}.")


def _factorings(count: int) -> list[tuple[int, int, int]]:
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    return [(a, b, count // a // b) for a in divisors for b in divisors if count // a % b == 0]


def _distance(shape: Sequence[int], asked: Sequence[int]) -> float:
    """How far a shape is from what was asked for, where something was."""
    return sum(abs(math.log2(size / wanted)) for size, wanted in zip(shape, asked) if wanted > 0)


def _between_slices(shape: Sequence[int], slices: int) -> list[int] | None:
    """How many parts of each axis are in different slices; None if slices do not divide them."""
    between = []
    for size in shape[:2]:
        between.append(math.gcd(size, slices))
        slices //= between[-1]
    return [*between, 1] if slices == 1 else None


def shardings(params: Any, mesh: Mesh, rules: Rules, *, replicate: bool = False) -> Any:
    """A NamedSharding for each array of a tree, from ordered rules over the weights' paths.

    Args:
      params: arrays or `ShapeDtypeStruct`s, adapted or not; nothing is moved.
      mesh: the devices.
      rules: pairs of a pattern and the PartitionSpec of the leaves that it matches; the first match
        counts. End with `("*", PartitionSpec())` to replicate the rest.
      replicate: put adapters on every device instead of beside their weights.

    Returns:
      A tree of the same structure. An axis that its mesh axes do not divide is replicated, and the
      log says so.

    Raises:
      ValueError: if a leaf matches no rule, or a spec names an axis that the mesh does not have.
    """

    place = placement(mesh, rules)
    base = tree.map_with_path(
        lambda path, leaf: place(path, tuple(getattr(leaf, "shape", ()))),
        params,
        is_leaf=is_array_leaf,
    )
    return follow(params, base, replicate=replicate)


def placement(mesh: Mesh, rules: Rules) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The NamedSharding of a weight by its path and shape, as `models.load` takes it.

    The function raises and warns as `shardings` does.
    """

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next((spec for pattern, spec in rules if tree.matches(pattern, path)), None)
        if spec is None:
            raise ValueError(
                f"No sharding rule matches {path!r} {list(shape)}; add one, or end the rules "
                "with ('*', PartitionSpec()) to replicate the rest."
            )
        return NamedSharding(mesh, _fit(path, shape, spec, mesh))

    return place


def follow(params: Any, base: Any, *, replicate: bool = False) -> Any:
    """Extends the shardings of a base to the adapters in its tree.

    Args:
      params: a tree from `jlora.init`, of arrays or of `ShapeDtypeStruct`s.
      base: the NamedSharding of each weight, in a tree of the base's structure.
      replicate: put adapters on every device instead of beside their weights.

    Returns:
      A tree of the structure of `params`, with a NamedSharding for each array. Use it as
      `jax.jit(init, out_shardings=...)` to make the adapters where they belong.
    """

    def extend(leaf: Any, sharding: NamedSharding) -> Any:
        if not isinstance(leaf, LoraArray | QuantArray | RowsArray):
            return jax.tree.map(lambda _: sharding, leaf)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(f"Adapters follow NamedShardings of the base, got a {sharding}.")
        if isinstance(leaf, QuantArray):
            return placements(leaf, sharding)
        if isinstance(leaf, RowsArray):
            return leaf.placements(sharding)
        roles = leaf.roles
        places = [*sharding.spec, *[None] * (len(roles) - len(sharding.spec))]

        def cut(role: str) -> list[Any]:
            if role == "rank":
                return [None]
            return [None if replicate else p for p, r in zip(places, roles) if r == role]

        w = placements(leaf.w, sharding) if isinstance(leaf.w, QuantArray) else sharding
        placed = {}
        for name in leaf.present():
            spec = PartitionSpec(*(place for role in leaf.arrays[name][1] for place in cut(role)))
            placed[name] = NamedSharding(sharding.mesh, spec)
        return dataclasses.replace(leaf, w=w, **placed)

    return jax.tree.map(extend, params, base, is_leaf=is_array_leaf)


def _fit(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    if len(spec) > len(shape):
        raise ValueError(f"{spec} has more entries than {path!r} {list(shape)} has axes.")
    fitted = []
    for axis, (size, place) in enumerate(zip(shape, spec)):
        if place is PartitionSpec.UNCONSTRAINED:
            fitted.append(place)
            continue
        names = (place,) if isinstance(place, str) else tuple(place or ())
        if unknown := [name for name in names if name not in mesh.shape]:
            raise ValueError(
                f"{spec} for {path!r} names {unknown}; the mesh has axes {tuple(mesh.shape)}."
            )
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            _LOG.warning(
                "Axis %d of %r %s is replicated: %d does not divide by the %d parts of %s.",
                axis, path, list(shape), size, parts, names,
            )  # fmt: skip
            place = None
        fitted.append(place)
    return PartitionSpec(*fitted)
