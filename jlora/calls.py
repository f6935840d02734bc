"""A call of a function, taken apart into what JAX traces and what is part of the program."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jlora import tree
from jlora.leaf import ArrayLeaf, is_array_leaf

__all__ = ["Constant", "Static", "argument_paths", "is_dynamic", "is_output", "separate"]


def separate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple["Static", list[Any]]:
    """The arguments' structure with what is no array, and their arrays and leaves, else None."""
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_array_leaf)
    dynamic = [leaf if is_dynamic(leaf) else None for leaf in leaves]
    static = [None if is_dynamic(leaf) else leaf for leaf in leaves]
    return Static(treedef, tuple(static)), dynamic


def is_dynamic(leaf: Any) -> bool:
    """Whether an argument is traced: an array, or a leaf that stands for one."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | ArrayLeaf | jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Static:
    """The structure of a call and its arguments that are no arrays, as a cache key."""

    treedef: Any
    leaves: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        # True == 1 == 1.0, but a function may tell them apart.
        return (
            isinstance(other, Static)
            and self.treedef == other.treedef
            and len(self.leaves) == len(other.leaves)
            and all(type(x) is type(y) and x == y for x, y in zip(self.leaves, other.leaves))
        )

    def __hash__(self) -> int:
        return hash((self.treedef, self.leaves))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Constant:
    """A result that is no array, on its way through `jit`."""

    value: Any


def argument_paths(static: Static) -> list[str]:
    """The path of each argument leaf inside its own argument."""
    indices = jax.tree.unflatten(static.treedef, range(static.treedef.num_leaves))
    flat, _ = jax.tree_util.tree_flatten_with_path(indices)
    groups: dict[Any, list[Any]] = {}
    for key_path, _ in flat:  # (args or kwargs), which argument, then the path inside it
        groups.setdefault(key_path[:2], []).append(key_path[2:])
    return [path for key_paths in groups.values() for path in tree.path_strings(key_paths)]


def is_output(leaf: Any) -> bool:
    """Whether a result is an array to JAX."""
    return is_dynamic(leaf) or isinstance(leaf, bool | int | float | complex)
