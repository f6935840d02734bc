"""Which weights of a tree a config names, and the role of each of their axes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.leaf import is_array_leaf
from jlora.lora_config import Axis, LoraConfig, first_match
from jlora.tree import Pattern
from jlora.usage import WeightUse

__all__ = ["choose", "leaves_by_path"]


def choose(
    leaves: Mapping[str, Any], config: LoraConfig, uses: Mapping[str, WeightUse] | None
) -> dict[str, tuple[Axis, ...]]:
    """The weights that `config` targets, each with the role of its axes.

    Args:
      leaves: every leaf of a tree by its path.
      config: with targets, exclude and axes.
      uses: what `find_weights` said, or None where no function is given.

    Raises:
      ValueError: if a pattern matches nothing, a target is no weight, or its axes are unknown.
    """
    return {path: _roles(path, leaves[path], config, uses) for path in
            _chosen_paths(leaves, config, uses)}  # fmt: skip


def leaves_by_path(params: Any) -> dict[str, Any]:
    """Every leaf of a tree by its path; an adapted or quantised weight is one leaf."""
    leaves = jax.tree.leaves(params, is_leaf=is_array_leaf)
    if not leaves:
        raise ValueError("The parameter tree has no leaves.")
    paths = tree.leaf_paths(params, is_leaf=is_array_leaf)
    if len(set(paths)) < len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"Several leaves of the tree share the paths {twice}; rename them.")
    return dict(zip(paths, leaves))


def _chosen_paths(
    leaves: Mapping[str, Any], config: LoraConfig, uses: Mapping[str, WeightUse] | None
) -> list[str]:
    excluded = {
        path for path in leaves for pattern in config.exclude if tree.matches(pattern, path)
    }
    for pattern in config.exclude:
        if not any(tree.matches(pattern, path) for path in leaves):
            raise tree.unmatched("exclude", pattern, leaves)
    chosen = []
    for pattern in config.targets:
        if pattern == "all-linear":
            if uses is None:
                raise ValueError(
                    "targets='all-linear' is read off the function that uses the weights: pass "
                    "fn= and args= to init, or name the weights in targets."
                )
            found = [path for path, use in uses.items() if use.kind == "product"]
        else:
            found = [path for path in leaves if tree.matches(pattern, path)]
        weights = [path for path in found if _is_weight(path, leaves[path], config, uses)]
        if not weights:
            if found:
                raise ValueError(_no_weight(pattern, found, leaves, uses))
            if pattern == "all-linear":
                raise ValueError("targets='all-linear' found nothing: fn multiplies with no leaf.")
            raise tree.unmatched("target", pattern, leaves)
        chosen += [path for path in weights if path not in excluded]
    if not chosen:
        raise ValueError(f"exclude={config.exclude} leaves nothing of targets={config.targets}.")
    chosen = list(dict.fromkeys(chosen))
    for field in ("rank_pattern", "alpha_pattern", "axes"):
        _check_values(field, getattr(config, field), chosen)
    return chosen


def _check_values(field: str, pairs: Sequence[tuple[Pattern, Any]], chosen: Sequence[str]) -> None:
    """Each pattern names an adapted weight, and no two give one weight different values."""
    for pattern, _ in pairs:
        if not any(tree.matches(pattern, path) for path in chosen):
            raise tree.unmatched(field, pattern, chosen)
    for path in chosen:
        given = [(pattern, value) for pattern, value in pairs if tree.matches(pattern, path)]
        if len({value for _, value in given}) > 1:
            raise ValueError(
                f"{field} gives {path!r} different values: {given}. Make the patterns narrower."
            )


def _is_weight(
    path: str, leaf: Any, config: LoraConfig, uses: Mapping[str, WeightUse] | None
) -> bool:
    """Whether a leaf that a target matches is a weight, not a bias or a norm beside one."""
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    is_bias = path.split("/")[-1] in ("bias", "scale")
    roles = first_match(config.axes, path, None)
    if roles and not (is_bias and len(roles) != leaf.ndim):  # a segment takes biases along
        return True
    if uses is not None:
        use = uses[path]
        if (use.contracted and use.free) or use.kind != "other":
            return bool(use.contracted and use.free)
        # What reads it cannot be looked into (a custom gradient, a kernel): judge by its shape.
    return leaf.ndim >= 2 and not is_bias


def _no_weight(pattern: Pattern, found: Sequence[str], leaves: Mapping[str, Any], uses: Any) -> str:
    def describe(path: str) -> str:
        leaf = leaves[path]
        use = (uses or {}).get(path)
        used = f", used as {use.kind} by {use.primitives}" if use else ""
        shape = list(getattr(leaf, "shape", ()))
        return f"{path!r} ({getattr(leaf, 'dtype', type(leaf).__name__)}{shape}{used})"

    return (
        f"Target {pattern!r} matches only leaves that a low-rank update does not fit: "
        f"{', '.join(describe(path) for path in found[:6])}. Targets are floating-point weights of "
        "matrix products and embeddings; put leaves to train whole into train=, or name the axes "
        "of a weight that is made from another array, axes={pattern: ('in', 'out')}."
    )


def _roles(
    path: str, leaf: Any, config: LoraConfig, uses: Mapping[str, WeightUse] | None
) -> tuple[Axis, ...]:
    """The role of each axis of a weight: as configured, as used, or `[in, out]` for a matrix."""
    roles: Any = first_match(config.axes, path, None)
    use = uses[path] if uses is not None else None
    if roles is None and use is not None and use.contracted and use.free:
        roles = tuple(
            "in" if axis in use.contracted else "out" if axis in use.free else "stack"
            for axis in range(leaf.ndim)
        )
    if roles is None and leaf.ndim == 2:
        roles = ("in", "out")
    if roles is None:
        raise ValueError(
            f"The axes of {path!r} {list(leaf.shape)} are ambiguous: which meet the input, which "
            "the output, and which are a stack? Pass fn= and args=, so that they are read off its "
            f"use, or axes={{{path!r}: ('stack', 'in', 'out')}} or the like."
        )
    if len(roles) != leaf.ndim:
        raise ValueError(f"config.axes names {len(roles)} axes for {path!r} {list(leaf.shape)}.")
    return roles
