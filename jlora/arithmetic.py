"""Adapter arithmetic: scaled, summed, combined, resized and extracted updates.

Functions of whole trees from `jlora.init` that give a tree of the first one's structure over the
first one's base. Only factors are computed with, so a base may be quantised. The combinations are
those of PEFT 0.21.2's `add_weighted_adapter`, each matrix of a stack for itself.

Exact sums and singular values need no matrix of the weight's size: the singular values of `a @ b`
are those of a small core between the QR decompositions of `a` and `b`. Bringing the sum of two
adapters of rank 16 on a 4096 x 4096 weight to rank 16 takes 0.07 s of CPU time, the SVD of the
dense sum 66 s (float32, two x86-64 cores).
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.alignment import adapters_of, align
from jlora.extraction import ExtractedWeight, Extraction, extract
from jlora.factors import (
    DENSE_RECIPES,
    RECIPES,
    Recipe,
    concatenate,
    matrices,
    mix,
    mix_factors,
    mix_updates,
    reference,
    sides,
    truncate,
    with_factors,
)
from jlora.leaf import is_array_leaf
from jlora.lora import LoraArray, LoraConfig

__all__ = [
    "COMBINATIONS",
    "ExtractedWeight",
    "Extraction",
    "add",
    "convert",
    "extract",
    "scale",
    "to_rank",
    "weighted",
]

COMBINATIONS = ("cat", "svd", *RECIPES, *DENSE_RECIPES)


def scale(params: Any, factor: Any) -> Any:
    """Multiplies every update by a number; 0 gives the base, -1 the opposite.

    The number goes into `a`, so the tree keeps its structure and compiled functions serve.

    Args:
      params: a tree with adapters.
      factor: a number, which may be traced.
    """
    adapters = adapters_of("The tree", params)

    def multiply(path: str, leaf: Any) -> Any:
        if path not in adapters:
            return leaf
        wide = jnp.promote_types(leaf.a.dtype, jnp.float32)
        return dataclasses.replace(leaf, a=(leaf.a.astype(wide) * factor).astype(leaf.a.dtype))

    return tree.map_with_path(multiply, params, is_leaf=is_array_leaf)


def add(*trees: Any) -> Any:
    """The exact sum of all updates, by concatenated ranks: the ranks add up.

    Raises:
      ValueError: as `weighted`.
    """
    return weighted(trees, (1.0,) * len(trees))


def weighted(
    trees: Sequence[Any],
    weights: Sequence[Any],
    *,
    combination: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    key: jax.Array | None = None,
) -> Any:
    """Combines adapters as PEFT's `add_weighted_adapter` does; `u_i = scaling_i * a_i @ b_i`.

    - `"cat"`: `sum_i w_i u_i`, exactly. The ranks add up.
    - `"svd"`: its best approximation of rank `rank`, exact where `rank` is the sum of ranks.
    - `"linear"`: `(sum_i c_i a_i) @ (sum_i |c_i| b_i)` with `c_i^2 = w_i scaling_i`. It is not the
      sum of the updates: it has cross terms `a_i @ b_j`.
    - `"ties"` (arXiv:2306.01708): of each factor the `density` share of largest entries, of those
      the ones of the majority's sign, averaged. `"magnitude_prune"` stops after the first step.
    - `"dare_linear"`, `"dare_ties"` (arXiv:2311.03099): a random `density` share of entries,
      divided by it, then as `"linear"` or `"ties"`.
    - `"ties_svd"`, `"magnitude_prune_svd"`, `"dare_linear_svd"`, `"dare_ties_svd"`: the same on
      the updates, then their best approximation of rank `rank`. Dropping entries of an update
      leaves nothing of its rank, so these alone build dense float32 matrices, as many as there are
      trees, of one matrix of a stack at a time.

    Args:
      trees: with adapters on the same weights over the same base. All but `"cat"`, `"svd"` and
        `"*_svd"` need the same rank of all at each weight.
      weights: one number a tree, of either sign; they may be traced.
      combination: one of `COMBINATIONS`.
      rank: of the result, for `"svd"` and `"*_svd"`; by default the largest of the trees' at each
        weight (PEFT takes the largest `r` of the configs for all).
      density: the share of entries to keep, above 0 and at most 1; `int(density * size)` of the
        largest. For all that prune.
      majority_sign_method: `"total"` weighs a sign with the entry, `"frequency"` counts signs.
      key: for the random choice of `"dare_*"`; each weight's own is derived from its path.

    Returns:
      A tree over the base of the first, with its scalings (PEFT's result has scaling 1, and the
      same update) and dropout, in the widest dtype of the factors; computed in float32.

    Raises:
      ValueError: if trees differ in leaves, targets, shapes or base, have no adapters, or an
        option is missing, out of range or not for this combination.
      NotImplementedError: for adapters that are not plain LoRA.
    """
    _check_options(trees, weights, combination, rank, density, majority_sign_method, key)
    aligned = align(trees)

    def combine(path: str, leaf: Any) -> Any:
        if path not in aligned:
            return leaf
        leaves = aligned[path]
        plan = _Plan(
            combination,
            _chosen_rank(path, leaves, combination, rank),
            1.0 if density is None else density,
            majority_sign_method == "total",
        )
        own = None if key is None else jax.random.fold_in(key, _number(path))
        bare = [dataclasses.replace(leaf, w=None) for leaf in leaves]
        return dataclasses.replace(_combine(bare, list(weights), own, plan), w=leaf.w)

    return tree.map_with_path(combine, trees[0], is_leaf=is_array_leaf)


def to_rank(params: Any, rank: int, *, key: jax.Array | None = None) -> Any:
    """Gives every adapter one rank: the best approximation below its own, the same update above.

    Args:
      params: a tree with adapters.
      rank: of all of them. What is added to reach it has `b` zero.
      key: draws what is added to `a` as `init` does, so that it trains. Without, it is zero, and
        stays so: right for serving.

    Raises:
      ValueError: if a weight is too small for the rank, or there are no adapters.
    """
    if not isinstance(rank, int | np.integer) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}.")
    adapters = adapters_of("The tree", params)

    def resize(path: str, leaf: Any) -> Any:
        return _resize(path, leaf, rank, key) if path in adapters else leaf

    return tree.map_with_path(resize, params, is_leaf=is_array_leaf)


def convert(params: Any, config: LoraConfig, *, key: jax.Array | None = None) -> Any:
    """Gives every adapter the rank, scaling, dropout and dtype that a config says.

    The updates stay the same, so this goes from LoRA's scaling to that of rsLoRA and back, and
    makes of any combination a tree that `jlora.init` with the config might have made.

    Args:
      params: a tree with adapters.
      config: whose targets name the weights that have them.
      key: as in `to_rank`, for ranks that grow. One that shrinks is the best approximation.

    Raises:
      ValueError: if the targets do not fit the adapters, or a weight is too small for its rank.
    """
    adapters = adapters_of("The tree", params)
    _check_targets(adapters, config)

    def change(path: str, leaf: Any) -> Any:
        if path not in adapters:
            return leaf
        scaling = config.scaling_of(path)
        leaf = _resize(path, leaf, config.rank_of(path), key)
        a, b = matrices(leaf)
        if scaling != leaf.scaling:
            share = math.sqrt(abs(leaf.scaling) / scaling)
            a, b = a * math.copysign(share, leaf.scaling), b * share
        leaf = with_factors(leaf, a.astype(config.dtype), b.astype(config.dtype))
        return dataclasses.replace(leaf, scaling=scaling, dropout=config.dropout)

    return tree.map_with_path(change, params, is_leaf=is_array_leaf)


def _check_targets(adapters: Mapping[str, LoraArray], config: LoraConfig) -> None:
    for pattern in config.targets:
        if pattern != "all-linear" and not any(tree.matches(pattern, path) for path in adapters):
            raise tree.unmatched("target", pattern, adapters)
    for path in adapters:
        named = any(p == "all-linear" or tree.matches(p, path) for p in config.targets)
        if not named or any(tree.matches(pattern, path) for pattern in config.exclude):
            raise ValueError(f"There is an adapter at {path!r}, which the config does not target.")


def _check_options(
    trees: Sequence[Any],
    weights: Sequence[Any],
    combination: str,
    rank: int | None,
    density: float | None,
    majority_sign_method: str,
    key: jax.Array | None,
) -> None:
    """Refuses options that are missing, out of range or without meaning for the combination."""
    if combination not in COMBINATIONS:
        raise ValueError(f"combination must be one of {COMBINATIONS}, got {combination!r}.")
    if not trees or len(weights) != len(trees):
        raise ValueError(
            f"There must be a weight for each tree: {len(trees)} trees, {len(weights)} weights."
        )
    if rank is not None and not combination.endswith("svd"):
        raise ValueError(
            f"rank is for 'svd' and '*_svd'; the rank of {combination!r} follows from the trees. "
            "Leave it out, and use jlora.arithmetic.to_rank on the result."
        )
    if rank is not None and (not isinstance(rank, int | np.integer) or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}.")
    recipe = (RECIPES | DENSE_RECIPES).get(combination, Recipe())
    if recipe.prune is None and density is not None:
        raise ValueError(f"{combination!r} drops no entries: leave density out.")
    if recipe.prune is not None and (density is None or not 0 < density <= 1):
        raise ValueError(
            f"{combination!r} needs density, the share of entries to keep, above 0 and at most 1; "
            f"got {density!r}."
        )
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(
            f"majority_sign_method must be 'total' or 'frequency', got {majority_sign_method!r}."
        )
    if (recipe.prune == "random") != (key is not None):
        needs = "drops entries at random and needs a key" if key is None else "takes no key"
        raise ValueError(f"{combination!r} {needs}.")


def _chosen_rank(path: str, leaves: Sequence[LoraArray], combination: str, rank: int | None) -> int:
    """The rank of the result at one weight."""
    ranks = [leaf.rank for leaf in leaves]
    if combination == "cat":
        return sum(ranks)
    if combination in RECIPES:
        if len(set(ranks)) > 1:
            raise ValueError(
                f"{combination!r} needs equal ranks, and {path!r} has {ranks}. Use 'cat' or 'svd', "
                "or bring the trees to one rank with jlora.arithmetic.to_rank."
            )
        return ranks[0]
    limits = {"its smaller side": min(sides(leaves[0]))}
    if combination == "svd":
        limits["the sum of the trees' ranks"] = sum(ranks)
    what = min(limits, key=lambda name: limits[name])
    chosen = min(limits[what], max(ranks)) if rank is None else rank
    if chosen > limits[what]:
        raise ValueError(f"rank {rank} is too large for {path!r}: {what} is {limits[what]}.")
    return chosen


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is the same for all entries of a weight's factors."""

    combination: str
    rank: int
    density: float
    by_size: bool


@functools.partial(jax.jit, static_argnums=3)  # one program for all weights of one shape
def _combine(
    leaves: Sequence[LoraArray], weights: Sequence[Any], key: jax.Array | None, plan: _Plan
) -> LoraArray:
    recipe = (RECIPES | DENSE_RECIPES).get(plan.combination, Recipe())
    mixer = functools.partial(
        mix, key=key, recipe=recipe, density=plan.density, by_size=plan.by_size
    )
    if plan.combination == "cat":
        a, b = concatenate(leaves, weights)
    elif plan.combination == "svd":
        a, b = truncate(*concatenate(leaves, weights), plan.rank)
    elif plan.combination in RECIPES:
        a, b = mix_factors(leaves, weights, mixer)
    else:
        a, b = mix_updates(leaves, weights, mixer, plan.rank)
    dtype = jnp.result_type(*(x.dtype for leaf in leaves for x in (leaf.a, leaf.b)))
    mixed = with_factors(leaves[0], a.astype(dtype), b.astype(dtype))
    return dataclasses.replace(mixed, scaling=reference(leaves[0]))


def _resize(path: str, leaf: LoraArray, rank: int, key: jax.Array | None) -> LoraArray:
    d_in, d_out = sides(leaf)
    if rank > min(d_in, d_out):
        raise ValueError(
            f"rank {rank} is too large for {path!r}, which maps {d_in} inputs to {d_out} outputs."
        )
    if rank == leaf.rank:
        return leaf
    own = None if key is None else jax.random.fold_in(key, _number(path))
    bare = dataclasses.replace(leaf, w=None)
    return dataclasses.replace(_with_rank(bare, own, rank), w=leaf.w)


@functools.partial(jax.jit, static_argnums=2)
def _with_rank(leaf: LoraArray, key: jax.Array | None, rank: int) -> LoraArray:
    a, b = matrices(leaf)
    if rank < leaf.rank:
        a, b = truncate(a, b, rank)
    else:
        new, bound = (*a.shape[:-1], rank - leaf.rank), a.shape[-2] ** -0.5
        fresh = jnp.zeros(new) if key is None else jax.random.uniform(key, new, minval=-1) * bound
        a = jnp.concatenate([a, fresh.astype(a.dtype)], -1)
        b = jnp.concatenate([b, jnp.zeros((*b.shape[:-2], new[-1], b.shape[-1]), b.dtype)], -2)
    return with_factors(leaf, a.astype(leaf.a.dtype), b.astype(leaf.b.dtype))


def _number(path: str) -> np.uint32:
    return np.uint32(zlib.crc32(path.encode()))
