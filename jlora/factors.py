"""The factors of adapters as matrices, and what makes one pair of them out of several.

A pair stands for its product `a @ b`, and nothing here but `mix_updates` builds one: the singular
values of `a @ b` are those of a small core between the QR decompositions of `a` and `b`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jlora.lora import LoraArray

__all__ = [
    "DENSE_RECIPES",
    "RECIPES",
    "Recipe",
    "concatenate",
    "matrices",
    "mix",
    "mix_factors",
    "mix_updates",
    "multiply",
    "reference",
    "sides",
    "truncate",
    "with_factors",
]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How tensors of several adapters become one: what is dropped, and whether signs are elected.

    Attributes:
      prune: which entries are dropped first: the smallest ones, random ones, or none.
      elect: whether only entries of the majority's sign count, and are averaged.
    """

    prune: Literal["magnitude", "random"] | None = None
    elect: bool = False


RECIPES = {
    "linear": Recipe(),
    "ties": Recipe("magnitude", elect=True),
    "dare_linear": Recipe("random"),
    "dare_ties": Recipe("random", elect=True),
    "magnitude_prune": Recipe("magnitude"),
}
DENSE_RECIPES = {f"{name}_svd": recipe for name, recipe in RECIPES.items() if recipe.prune}


def matrices(leaf: LoraArray) -> tuple[jax.Array, jax.Array]:
    """`a` `[*stack d_in rank]` and `b` `[*stack rank d_out]`, in float32 or wider."""
    stack = leaf.a.shape[: leaf.axes.count("stack")]
    wide = jnp.promote_types(jnp.promote_types(leaf.a.dtype, leaf.b.dtype), jnp.float32)
    a = leaf.a.reshape(*stack, -1, leaf.rank)
    return a.astype(wide), leaf.b.reshape(*stack, leaf.rank, -1).astype(wide)


def sides(leaf: LoraArray) -> tuple[int, int]:
    """The numbers of inputs and of outputs of one matrix."""
    depth = leaf.axes.count("stack")
    return math.prod(leaf.a.shape[depth:-1]), math.prod(leaf.b.shape[depth + 1 :])


def with_factors(leaf: LoraArray, a: jax.Array, b: jax.Array) -> LoraArray:
    """The leaf with other factors, given as `matrices` gives them."""
    depth = leaf.axes.count("stack")
    inputs, outputs = leaf.a.shape[depth:-1], leaf.b.shape[depth + 1 :]
    a = a.reshape(*a.shape[:depth], *inputs, a.shape[-1])
    return dataclasses.replace(leaf, a=a, b=b.reshape(*b.shape[: depth + 1], *outputs))


def reference(leaf: LoraArray) -> float:
    """The scaling of a result whose first leaf this is."""
    return abs(leaf.scaling) or 1.0


def _relative(leaves: Sequence[LoraArray], weights: Sequence[Any]) -> list[Any]:
    """What each `a_i @ b_i` counts in the result."""
    return [w * (leaf.scaling / reference(leaves[0])) for leaf, w in zip(leaves, weights)]


def concatenate(leaves: Sequence[LoraArray], weights: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """Factors of the weighted sum, whose ranks add up."""
    factors = list(map(matrices, leaves))
    counts = _relative(leaves, weights)
    a = jnp.concatenate([c * a for c, (a, _) in zip(counts, factors)], -1)
    return a, jnp.concatenate([b for _, b in factors], -2)


multiply = functools.partial(jnp.matmul, precision="highest")


def truncate(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The best factors of a rank for `a @ b`, singular values shared out evenly."""
    q_in, r_in = jnp.linalg.qr(a)  # [d_in total], [total total]
    q_out, r_out = jnp.linalg.qr(b.mT)
    u, s, v = jnp.linalg.svd(multiply(r_in, r_out.mT), full_matrices=False)
    u, s, v = u[..., :rank], s[..., None, :rank], v[..., :rank, :]
    return multiply(q_in, u) * jnp.sqrt(s), jnp.sqrt(s).mT * multiply(v, q_out.mT)


Mixer = Callable[..., jax.Array]  # (tensors, weights, index) as `mix` takes them


def mix_factors(
    leaves: Sequence[LoraArray], weights: Sequence[Any], mixer: Mixer
) -> tuple[jax.Array, jax.Array]:
    """Mixes the `a` of all leaves, and the `b`, each with the root of what its product counts."""
    counts = jnp.stack([jnp.asarray(count) for count in _relative(leaves, weights)])
    roots = jnp.sqrt(jnp.abs(counts))
    signed = jnp.where(counts >= 0, roots, -roots)  # on one side only, or two signs cancel
    mixed = []
    for index, (factors, shares) in enumerate(zip(zip(*map(matrices, leaves)), (signed, roots))):
        shape = factors[0].shape
        rows = [factor.reshape(-1, math.prod(shape[-2:])) for factor in factors]
        mixed.append(mixer(rows, shares, index=index).reshape(shape))
    return mixed[0], mixed[1]


def mix_updates(
    leaves: Sequence[LoraArray], weights: Sequence[Any], mixer: Mixer, rank: int
) -> tuple[jax.Array, jax.Array]:
    """Mixes dense updates, one matrix of a stack at a time, and gives the best factors of it."""
    scalings = _relative(leaves, [1.0] * len(leaves))
    pairs = [matrices(leaf) for leaf in leaves]
    stack = pairs[0][0].shape[:-2]
    count = math.prod(stack)
    rows = [[x.reshape(count, *x.shape[-2:]) for x in pair] for pair in pairs]
    shares = jnp.stack([jnp.asarray(weight) for weight in weights])

    def one(row: Any) -> tuple[jax.Array, jax.Array]:
        index, factors = row
        updates = [scaling * multiply(a, b) for scaling, (a, b) in zip(scalings, factors)]
        mixed = mixer([u.reshape(1, -1) for u in updates], shares, index=index)
        u, s, v = jnp.linalg.svd(mixed.reshape(updates[0].shape), full_matrices=False)
        root = jnp.sqrt(s[:rank])
        return u[:, :rank] * root, root[:, None] * v[:rank]

    a, b = jax.lax.map(one, (jnp.arange(count), rows))
    return a.reshape(*stack, *a.shape[1:]), b.reshape(*stack, *b.shape[1:])


def mix(
    tensors: Sequence[jax.Array],
    weights: jax.Array,
    *,
    index: Any,
    key: jax.Array | None,
    recipe: Recipe,
    density: float,
    by_size: bool,
) -> jax.Array:
    """Several `[stack size]` to one, each row of a stack for itself.

    Args:
      tensors: one for each adapter.
      weights: `Float[adapters]`.
      index: an integer, not the same for two calls with one key.
      key: for `recipe.prune == "random"`.
      recipe: what is done.
      density: the share of entries to keep.
      by_size: whether an entry's vote for a sign counts by its size.
    """
    if density < 1:
        keys: list[Any] = [None] * len(tensors)
        if key is not None:
            keys = list(jax.random.split(jax.random.fold_in(key, index), len(tensors)))
        tensors = [_prune(x, density, own) for x, own in zip(tensors, keys)]
    counted = jnp.stack([x * weight.astype(x.dtype) for x, weight in zip(tensors, weights)])
    if not recipe.elect:
        return counted.sum(0)
    signs = jnp.sign(jnp.stack(tensors))
    votes = (jnp.stack(tensors) if by_size else signs).sum(0)
    agreed = signs == jnp.where(votes >= 0, 1, -1)
    return (counted * agreed).sum(0) / jnp.maximum(agreed.sum(0), 1)


def _prune(x: jax.Array, density: float, key: jax.Array | None) -> jax.Array:
    """The largest entries of each row, or with a key random ones, divided by their share."""
    if key is not None:
        return jnp.where(jax.random.bernoulli(key, density, x.shape), x / density, 0)
    places = jax.lax.top_k(jnp.abs(x), int(density * x.shape[-1]))[1]
    mask = jnp.zeros(x.shape, bool)
    return jnp.where(jnp.put_along_axis(mask, places, True, axis=-1, inplace=False), x, 0)
