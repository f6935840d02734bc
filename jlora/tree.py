"""Leaf paths of any parameter tree, patterns over them, and joining two trees.

A path reads `layers/self_attn/q_proj/kernel` whatever the tree was built with: Flax Linen
(`['params']` dropped), NNX and partitioned Linen (`.value` dropped), Haiku, Equinox (`.layers[0]`),
dataclasses, lists and plain dicts.
"""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

__all__ = [
    "Pattern",
    "combine",
    "leaf_paths",
    "map_with_path",
    "matches",
    "path_strings",
    "unmatched",
]

Pattern = str | re.Pattern[str]

_WRAPPERS = frozenset({"value", "raw_value"})


def path_strings(key_paths: Sequence[Sequence[Any]]) -> list[str]:
    """Joins the key paths of a tree to strings such as `layers/0/attn/kernel`.

    A leading `params` is left out, and so is an attribute that only wraps an array (`.value` of an
    NNX variable or a partitioned Linen parameter), so that one model gives the same paths in every
    library.
    """
    children: dict[tuple[Any, ...], set[Any]] = {}
    for key_path in key_paths:
        if key_path:
            children.setdefault(tuple(key_path[:-1]), set()).add(key_path[-1])
    return [
        _join(key_path, wrapped=len(children.get(tuple(key_path[:-1]), ())) == 1)
        for key_path in key_paths
    ]


def _join(key_path: Sequence[Any], *, wrapped: bool) -> str:
    segments = [_segment(key) for key in key_path]
    if wrapped and len(segments) > 1 and _wraps(key_path[-1]):
        segments = segments[:-1]
    return "/".join(segments[1:] if segments[0:1] == ["params"] else segments)


def _wraps(key: Any) -> bool:
    match key:
        case jax.tree_util.GetAttrKey(name=name):
            return name in _WRAPPERS
        case jax.tree_util.FlattenedIndexKey(key=index):
            return index == 0
    return False


def _segment(key: Any) -> str:
    match key:
        case jax.tree_util.DictKey(key=name) | jax.tree_util.GetAttrKey(name=name):
            return str(name)
        case jax.tree_util.SequenceKey(idx=index):
            return str(index)
        case jax.tree_util.FlattenedIndexKey(key=index):
            return str(index)
    return str(key)


def leaf_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """The path of every leaf, in the order of `jax.tree.leaves`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return path_strings([key_path for key_path, _ in flat])


def map_with_path(
    fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """`jax.tree.map` whose function also gets the leaf's path: `fn(path, leaf, *others)`."""

    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    others = [treedef.flatten_up_to(other) for other in rest]
    paths = leaf_paths(tree, is_leaf)
    return jax.tree.unflatten(treedef, [fn(*row) for row in zip(paths, leaves, *others)])


def matches(pattern: Pattern, path: str) -> bool:
    """Whether a pattern names a path.

    Args:
      pattern: a compiled regex is searched in the path; a string with `/` or `*` is a glob over the
        whole path (`*` also spans `/`); any other string names one segment exactly.
      path: as `leaf_paths` gives it.
    """
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    if "/" in pattern or "*" in pattern:
        return fnmatch.fnmatchcase(path, pattern)
    return pattern in path.split("/")


def unmatched(what: str, pattern: Pattern, paths: Iterable[str]) -> ValueError:
    """The error for a pattern that names none of `paths`, with the paths nearest to it."""
    shown = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    paths = sorted(set(paths))
    near = _nearest(shown, paths)
    listed = ", ".join(repr(path) for path in near) if near else "none: the tree has no leaves"
    return ValueError(
        f"No leaf matches {what} {shown!r}. Paths near it: {listed}. A pattern without '/' or '*' "
        "names one path segment exactly, one with them is a glob over the whole path, and "
        "re.compile(...) is a regex searched in the path."
    )


def _nearest(shown: str, paths: list[str], count: int = 6) -> list[str]:
    wanted = shown.strip("*/").split("/")[-1].strip("*") or shown

    def closeness(path: str) -> float:
        segments = [*path.split("/"), path]
        return max(difflib.SequenceMatcher(None, wanted, segment).ratio() for segment in segments)

    return sorted(paths, key=lambda path: (-closeness(path), path))[:count]


def combine(*trees: Any) -> Any:
    """Joins trees of one structure that have `None` in each other's holes.

    Raises:
      ValueError: if two trees hold the same leaf, or their structures differ.
    """
    flat = [jax.tree.flatten(tree, is_leaf=_is_hole) for tree in trees]
    treedef = flat[0][1]
    if any(other != treedef for _, other in flat):
        path, nodes = _first_difference(trees)
        raise ValueError(
            f"The trees differ at {'/'.join(map(_segment, path)) or 'the top'!r}: "
            f"{' against '.join(map(_describe, nodes))}. combine joins the halves that jlora.split "
            "cut from one tree with one config."
        )
    joined = []
    for index, leaves in enumerate(zip(*(leaves for leaves, _ in flat))):
        present = [leaf for leaf in leaves if leaf is not None]
        if len(present) > 1:
            raise ValueError(
                f"Several trees hold a leaf at {leaf_paths(trees[0], _is_hole)[index]!r}. combine "
                "joins the halves that jlora.split cut from one tree with one config."
            )
        joined.append(present[0] if present else None)
    return jax.tree.unflatten(treedef, joined)


def _is_hole(leaf: Any) -> bool:
    return leaf is None


def _first_difference(nodes: Sequence[Any]) -> tuple[tuple[Any, ...], Sequence[Any]]:
    """The key path of the first node at which trees differ, and what each of them has there."""

    def children(node: Any) -> tuple[list[Any], Any]:
        return jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is None or x is not node
        )

    below, treedefs = zip(*map(children, nodes))
    if all(treedef == treedefs[0] for treedef in treedefs):
        for branch in zip(*below):
            inner = [node for _, node in branch]
            structures = {jax.tree.structure(node, is_leaf=_is_hole) for node in inner}
            if len(structures) > 1:
                path, found = _first_difference(inner)
                return (*branch[0][0], *path), found
    return (), nodes


def _describe(node: Any) -> str:
    name = type(node).__name__
    if dataclasses.is_dataclass(node):
        static = (f for f in dataclasses.fields(node) if f.metadata.get("static"))
        return f"{name}({', '.join(f'{f.name}={getattr(node, f.name)!r}' for f in static)})"
    if hasattr(node, "dtype") and hasattr(node, "shape"):
        return f"{node.dtype}{list(node.shape)}"
    return f"{name} with {sorted(map(str, node))}" if isinstance(node, dict) else name
