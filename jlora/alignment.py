"""Which trees have adapters that can be computed with together, and what is wrong with others."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jlora.leaf import ArrayLeaf
from jlora.lora import LoraArray, leaves_by_path
from jlora.quant import QuantArray

__all__ = ["adapters_of", "align", "same_values"]


def adapters_of(name: str, params: Any) -> dict[str, LoraArray]:
    """The adapters of a tree by path, all of them whole and plain."""
    adapters = {}
    for path, leaf in leaves_by_path(params).items():
        if type(leaf) is LoraArray:
            if leaf.w is None or leaf.a is None or leaf.b is None:
                raise ValueError(
                    f"The adapter at {path!r} is one half of a split; give the whole tree, "
                    "jlora.combine(trainable, frozen)."
                )
            adapters[path] = leaf
        elif isinstance(leaf, ArrayLeaf) and not isinstance(leaf, QuantArray):
            raise NotImplementedError(
                f"{path!r} is a {type(leaf).__name__}, whose update is no product of two factors "
                "alone; arithmetic is for LoraArray. Merge it with jlora.merge_params instead."
            )
    if not adapters:
        raise ValueError(f"{name} has no adapters. jlora.init or jlora.peft.load puts them there.")
    return adapters


def align(trees: Sequence[Any]) -> dict[str, list[LoraArray]]:
    """The adapters of all trees by path, where the trees may be combined."""
    first = leaves_by_path(trees[0])
    aligned = {path: [leaf] for path, leaf in adapters_of("Tree 0", trees[0]).items()}
    for index, other in enumerate(trees[1:], 1):
        leaves, adapters = leaves_by_path(other), adapters_of(f"Tree {index}", other)
        for what, own, others in (("leaves", first, leaves), ("adapters", aligned, adapters)):
            if own.keys() != others.keys():
                raise ValueError(
                    f"Trees 0 and {index} have different {what}: "
                    f"{sorted(own.keys() - others.keys())} in tree 0 alone, "
                    f"{sorted(others.keys() - own.keys())} in tree {index} alone."
                )
        for path, leaf in leaves.items():
            _check_leaf(path, index, first[path], leaf)
        for path, leaf in adapters.items():
            aligned[path].append(leaf)
    return aligned


def _check_leaf(path: str, index: int, first: Any, other: Any) -> None:
    adapted = isinstance(first, LoraArray)
    base, others = (x.w if adapted else x for x in (first, other))
    for what, x, y in (
        ("shape", getattr(first, "shape", None), getattr(other, "shape", None)),
        ("axes", getattr(first, "axes", None), getattr(other, "axes", None)),
        ("base", jax.tree.structure(base), jax.tree.structure(others)),
    ):
        if x != y:
            raise ValueError(f"Trees 0 and {index} differ in the {what} of {path!r}: {x} and {y}.")
    if not same_values(base, others):
        advice = (
            "Adapters add up over one base only; one that changed its base (PiSSA) is converted "
            "by jlora.variants.to_plain_lora."
            if adapted
            else "Leaves trained whole cannot be combined: give all trees the ones to keep."
        )
        raise ValueError(f"Trees 0 and {index} differ in the values of {path!r}. {advice}")


def same_values(x: Any, y: Any) -> bool:
    """Whether two leaves hold the same; traced ones are taken to."""
    return all(map(_same, jax.tree.leaves(x), jax.tree.leaves(y)))


def _same(x: Any, y: Any) -> bool:
    if x is y or isinstance(x, jax.core.Tracer) or isinstance(y, jax.core.Tracer):
        return True
    if not hasattr(x, "dtype") or not hasattr(y, "dtype"):
        return x == y
    return x.shape == y.shape and x.dtype == y.dtype and bool(_equal(x, y))


@jax.jit
def _equal(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.all((x == y) | ((x != x) & (y != y)))  # a NaN is the same as a NaN
