"""Where each array of an adapted tree lies on a mesh: adapters follow their weights.

A factor takes the placement of the axes that it shares with its weight: `a` those that meet the
input, `b` those of the output, both the stacked ones; the rank is replicated. So the products with
factors need no communication that the weight's own product does not need.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import tree
from jlora.leaf import is_array_leaf
from jlora.lora import LoraArray
from jlora.quant import QuantArray, placements
from jlora.rows import RowsArray
from jlora.tree import Pattern

__all__ = ["Rules", "follow", "shardings"]

Rules = Sequence[tuple[Pattern, PartitionSpec]]
_LOG = logging.getLogger("jlora")


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

    def place(path: str, leaf: Any) -> Any:
        shape = tuple(getattr(leaf, "shape", ()))
        spec = next((spec for pattern, spec in rules if tree.matches(pattern, path)), None)
        if spec is None:
            raise ValueError(
                f"No sharding rule matches {path!r} {list(shape)}; add one, or end the rules "
                "with ('*', PartitionSpec()) to replicate the rest."
            )
        return NamedSharding(mesh, _fit(path, shape, spec, mesh))

    base = tree.map_with_path(place, params, is_leaf=is_array_leaf)
    return follow(params, base, replicate=replicate)


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
