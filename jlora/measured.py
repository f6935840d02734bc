"""Adapters that start from data: EVA, LoRA-GA and QERA, measured through `adapt` on a few batches.

None builds what it measures of a weight, as a matrix of inputs or of gradients: what is wanted of
it, its leading singular vectors, is found by subspace iteration (arXiv:0909.4061), and a step of
that is what the gradient of an adapter's factor gives.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.factors import multiply, sides, with_factors
from jlora.leaf import is_array_leaf
from jlora.lora import LoraArray, LoraConfig, initialiser, leaves_by_path, merge_params
from jlora.packed import weight_to_matrices
from jlora.quant import QuantArray
from jlora.tree import map_with_path
from jlora.variants import check_quantised, without_stack
from jlora.watched import (
    LossFn,
    adapters_of,
    check_finite,
    check_met,
    gradients_of,
    moments_of,
    stack_of,
    stacked,
)

__all__ = ["eva", "lora_ga", "qera", "take_from_base"]

_SPARE = 8  # columns beyond those that are wanted, for a subspace that settles sooner


def lora_ga(
    key: jax.Array,
    params: Any,
    config: LoraConfig,
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    gamma: float = 16.0,
    iterations: int = 2,
) -> tuple[Any, LoraConfig]:
    """Starts so that the first step is nearest to that of full fine-tuning (arXiv:2407.05000).

    With the loss's gradient `u s v` along a weight, `a` becomes the first `rank` columns of `u`,
    `b` the next `rank` rows of `v`, both times `d_out**(1/4) / sqrt(gamma)`, and the base becomes
    `w - scaling * a @ b`, so that the function's output stays the same, at the rounding of the
    base's dtype or format. PEFT scales by the singular values besides; this is the paper.

    Args:
      key: of the randomised decomposition.
      params: a tree from `jlora.init`, with `init="default"`.
      config: the config it was made with.
      loss_fn: `loss_fn(params, batch)`, a scalar; goes through `jlora.adapt`.
      batches: a few; each is used `2 + 2 * iterations` times.
      gamma: how small the start is, at least 1.
      iterations: of the subspace iteration; more are nearer to the exact decomposition.

    Returns:
      The tree, and the config with `init="lora_ga"`: to save it, convert it with
      `jlora.variants.to_plain_lora`.

    Raises:
      ValueError: if there are no adapters or batches, a rank is above half of a weight's sides,
        `gamma` is below 1, or a gradient is not finite.
    """
    if gamma < 1:
        raise ValueError(f"gamma must be at least 1, got {gamma!r}.")
    _check_iterations(iterations)
    leaves = adapters_of(params)
    widths = {}
    for path, leaf in leaves.items():
        d_in, d_out = sides(leaf)
        if 2 * leaf.rank > min(d_in, d_out):
            raise ValueError(
                f"LoRA-GA takes {2 * leaf.rank} singular vectors of the gradient at {path!r}, "
                f"which is {d_in} by {d_out}. Lower its rank to {min(d_in, d_out) // 2}."
            )
        widths[path] = min(2 * leaf.rank + _SPARE, d_in, d_out)
    gradients = gradients_of(params, loss_fn, batches, leaves)
    outs = {path: x.mT for path, x in _random_columns(key, leaves, 1, widths).items()}
    for step in range(iterations + 1):
        along_in, _ = gradients(None, outs)
        ins = {path: jnp.linalg.qr(x)[0] for path, x in along_in.items()}
        _, along_out = gradients(ins, None)
        if step < iterations:
            outs = {path: jnp.linalg.qr(x.mT)[0].mT for path, x in along_out.items()}
    check_finite(along_out, "The gradient along {} holds NaN or infinite values.")

    def start(path: str, leaf: Any) -> Any:
        if path not in leaves:
            return leaf
        u, _, v = jnp.linalg.svd(along_out[path], full_matrices=False)
        rank, size = leaf.rank, sides(leaf)[1] ** 0.25 / math.sqrt(gamma)
        a, b = size * (ins[path] @ u)[..., :rank], size * v[..., rank : 2 * rank, :]
        return take_from_base(_with_factors(leaf, a, b))

    changed = dataclasses.replace(config, init="lora_ga")
    return map_with_path(start, params, is_leaf=is_array_leaf), changed


def take_from_base(leaf: LoraArray) -> LoraArray:
    """The leaf with a base less its update, in the base's dtype or format."""
    without = dataclasses.replace(leaf, a=-leaf.a)
    return dataclasses.replace(leaf, w=merge_params(without, requantize=is_array_leaf(leaf.w)))


@initialiser(r"eva|lora_ga|qera(_diagonal)?")
def _needs_data(match: Any, key: jax.Array, params: Any, base: Any) -> Any:
    raise ValueError(
        f"init={match[0]!r} starts from data: call jlora.init with init='default', and "
        f"jlora.measured.{match[0].removesuffix('_diagonal')} with batches on what it gives."
    )


def eva(
    key: jax.Array,
    params: Any,
    config: LoraConfig,
    fn: Callable[..., Any],
    batches: Sequence[Any],
    *,
    rho: float = 2.0,
    iterations: int = 2,
) -> tuple[Any, LoraConfig]:
    """Starts `a` from what the inputs vary in most, and shares out the ranks (arXiv:2410.07170).

    The columns of `a` become the leading right singular vectors of a weight's inputs, over all
    tokens of the batches, not centred; `b` stays zero, so the function does not change. Ranks go to
    the weights whose next direction explains the largest share of its inputs' energy, with as many
    in all as before and at most `rho` times as many for one weight; the scaling of each stays as it
    was. The layers of a stack share their weight's rank, by their mean.

    Args:
      key: of the randomised decomposition.
      params: a tree from `jlora.init`.
      config: the config it was made with.
      fn: `fn(params, batch)`, of any floating-point result; goes through `jlora.adapt`.
      batches: a few; each is used `1 + iterations` times.
      rho: at least 1, which keeps the ranks.
      iterations: of the subspace iteration.

    Returns:
      The tree with new ranks, and the config with their patterns. A weight that got none has lost
      its adapter, and is in `exclude`.

    Raises:
      ValueError: if there are no adapters or batches, `rho` is below 1, or a weight's inputs cannot
        be measured, as in `qera`.
    """
    if rho < 1:
        raise ValueError(f"rho must be at least 1, got {rho!r}.")
    _check_iterations(iterations)
    leaves = adapters_of(params)
    tops = {p: min(round(rho * x.rank), *sides(x)) for p, x in leaves.items()}
    widths = {path: min(tops[path] + _SPARE, *sides(leaf)) for path, leaf in leaves.items()}
    ins = _random_columns(key, leaves, 0, widths)
    gradients = moments_of(params, fn, batches, leaves)
    moments, energy = gradients(ins, None)
    for _ in range(iterations):
        ins = {path: jnp.linalg.qr(x)[0] for path, x in moments.items()}
        moments, energy = gradients(ins, None)
    check_met(energy)
    shares, bases = {}, {}
    for path, x in ins.items():
        values, vectors = jnp.linalg.eigh(x.mT @ moments[path])
        bases[path] = (x @ vectors)[..., ::-1]
        share = values[..., ::-1] / jnp.maximum(energy[path][..., :1, 0], 1e-30)
        shares[path] = share.reshape(-1, share.shape[-1]).mean(0)[: tops[path]]
    ranks = _share_out(shares, leaves)

    def start(path: str, leaf: Any) -> Any:
        if path not in leaves:
            return leaf
        rank, axis = ranks[path], leaf.axes.count("stack")
        if not rank:
            return leaf.w
        shape = [rank if i == axis else size for i, size in enumerate(leaf.b.shape)]
        a = bases[path][..., :rank].reshape(*leaf.a.shape[:-1], rank).astype(leaf.a.dtype)
        return dataclasses.replace(leaf, a=a, b=jnp.zeros(shape, leaf.b.dtype))

    tree = map_with_path(start, params, is_leaf=is_array_leaf)
    return tree, _with_ranks(config, leaves, ranks)


def qera(
    key: jax.Array,
    params: Any,
    config: LoraConfig,
    fn: Callable[..., Any],
    batches: Sequence[Any],
    *,
    base: Any,
    iterations: int = 2,
    diagonal: bool = False,
) -> tuple[Any, LoraConfig]:
    """Starts from the best correction of what quantising did to the outputs (arXiv:2410.06040).

    Of all updates of its rank, `scaling * a @ b` makes `sum(|x (w - q - scaling * a @ b)|**2)`
    least, over the inputs `x` that the quantised weight `q` meets; `q` stays as it is. With the
    error `e = w - q` and the leading eigenvectors `v` of `e.T @ x.T @ x @ e`, that update is `e @ v
    @ v.T`: the paper's `R**-1/2 svd(R**1/2 e)` without an inverse, so there may be fewer inputs
    than directions. Each column of `a` is as long as the row of `b` that it meets.

    Args:
      key: of the randomised decomposition.
      params: a tree from `jlora.init` over quantised weights; adapters over plain ones stay as
        they are.
      config: the config it was made with.
      fn: `fn(params, batch)`, of any floating-point result; goes through `jlora.adapt`. Inputs are
        those with adapters left out.
      batches: a few; each is used `1 + iterations` times. All tokens count, padding too.
      base: the weights before they were quantised, a tree of the base's structure.
      iterations: of the subspace iteration.
      diagonal: leaves out how inputs go together and takes the diagonal of `x.T @ x` alone, as the
        paper's approximation does. Each batch is used once.

    Returns:
      The tree with new factors, and the config with `init="qera"` or `"qera_diagonal"`: for the
      weights before quantising, convert it with `jlora.variants.to_plain_lora`. Memory: `2 * rank +
      8` columns for each weight's inputs and outputs, twice, and float32 copies of one matrix at a
      time.

    Raises:
      ValueError: if there are no adapters or batches, no weight with an adapter is quantised,
        `base` does not fit, or a weight's inputs cannot be measured: it is used otherwise than in
        products from its input side and lookups of its rows, meets nothing but zeros, or NaN.
    """
    _check_iterations(iterations)
    leaves = {p: x for p, x in adapters_of(params).items() if isinstance(x.w, QuantArray)}
    check_quantised("QERA", params, base)
    originals = leaves_by_path(base)
    for path, leaf in leaves.items():
        if getattr(originals.get(path), "shape", None) != leaf.shape:
            raise ValueError(f"base has no weight of shape {leaf.shape} at {path!r}.")
        if isinstance(originals[path], QuantArray):
            raise ValueError(
                f"QERA starts from what quantising lost, and {path!r} of base is quantised itself: "
                "pass the weights as they were before jlora.quantize."
            )
    gradients = moments_of(params, fn, batches, leaves, of="squares" if diagonal else "inputs")
    column = {path: jnp.zeros(stacked(leaf, 0, 1)) for path, leaf in leaves.items()}
    squares, energy = gradients(column, None) if diagonal else ({}, {})
    errors = {path: _Error(leaf, jnp.asarray(originals[path])) for path, leaf in leaves.items()}
    widths = {path: min(2 * x.rank + _SPARE, *sides(x)) for path, x in leaves.items()}
    outs = _random_columns(key, leaves, 1, widths)
    for step in range(iterations + 1):
        along = {path: errors[path](v) for path, v in outs.items()}
        if diagonal:
            moments = {path: squares[path] * x for path, x in along.items()}
        else:
            moments, energy = gradients(along, None)
        if step < iterations:
            outs = {p: jnp.linalg.qr(errors[p](x, transposed=True))[0] for p, x in moments.items()}
    check_met(energy)

    def start(path: str, leaf: Any) -> Any:
        if path not in leaves:
            return leaf
        values, vectors = jnp.linalg.eigh(_symmetric(multiply(along[path].mT, moments[path])))
        vectors = vectors[..., ::-1][..., : leaf.rank]
        a, b = multiply(along[path], vectors), multiply(outs[path], vectors).mT
        length = jnp.linalg.norm(a, axis=-2, keepdims=True)
        root = jnp.sqrt(length / leaf.scaling)
        # Factors stay those of a default start where quantising lost no more than rounding does,
        # and for one of a stack that met nothing, such as an expert.
        w = jnp.asarray(originals[path], a.dtype)
        found = length > 1e-6 * jnp.linalg.norm(w) / math.sqrt(w.size / sides(leaf)[0])
        found &= values[..., None, -1:] > 0
        a = jnp.where(found, a / jnp.where(found, length, 1) * root, leaf.a.reshape(a.shape))
        b = jnp.where(found.mT, b * root.mT, 0)
        return _with_factors(leaf, a, b)

    changed = dataclasses.replace(config, init="qera_diagonal" if diagonal else "qera")
    return map_with_path(start, params, is_leaf=is_array_leaf), changed


def _check_iterations(iterations: int) -> None:
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations!r}.")


def _random_columns(
    key: jax.Array, leaves: Mapping[str, LoraArray], side: int, widths: Mapping[str, int]
) -> dict[str, jax.Array]:
    """Orthonormal columns for the inputs (side 0) or outputs (side 1) of each matrix."""
    return {
        path: jnp.linalg.qr(
            jax.random.normal(jax.random.fold_in(key, i), stacked(leaf, side, widths[path]))
        )[0]
        for i, (path, leaf) in enumerate(leaves.items())
    }


def _with_factors(leaf: LoraArray, a: jax.Array, b: jax.Array) -> LoraArray:
    return with_factors(leaf, a.astype(leaf.a.dtype), b.astype(leaf.b.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class _Error:
    """What quantising took from a weight, as a product with it: one matrix of a stack at a time."""

    leaf: LoraArray
    original: jax.Array

    def __call__(self, x: jax.Array, *, transposed: bool = False) -> jax.Array:
        """`e @ x`, or `e.T @ x`, for `x` `[*stack side columns]`."""
        return _times_error(self.leaf.w, self.original, x, self.leaf.axes, transposed)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _times_error(
    packed: QuantArray, original: jax.Array, x: jax.Array, axes: tuple[Any, ...], transposed: bool
) -> jax.Array:
    places = [axis for axis, role in enumerate(axes) if role == "stack"]
    own = tuple(role for role in axes if role != "stack")
    count = len(places)
    original = jnp.moveaxis(original, places, range(count))

    def one(layer: tuple[Any, jax.Array, jax.Array]) -> jax.Array:
        arrays, w, x = layer
        q = without_stack(jax.tree.unflatten(jax.tree.structure(packed), arrays)).materialise()
        e = w.astype(x.dtype) - q.astype(x.dtype)
        e = weight_to_matrices(e, own)  # [out in]
        return multiply(e if transposed else e.mT, x)

    layers = [y.reshape(-1, *y.shape[count:]) for y in (*jax.tree.leaves(packed), original, x)]
    *arrays, original, columns = layers
    out = jax.lax.map(one, (arrays, original, columns))
    return out.reshape(*x.shape[:-2], *out.shape[1:])


def _symmetric(x: jax.Array) -> jax.Array:
    return (x + x.mT) / 2


def _with_ranks(
    config: LoraConfig, leaves: Mapping[str, LoraArray], ranks: Mapping[str, int]
) -> LoraConfig:
    root = config.rank_stabilized
    return dataclasses.replace(
        config,
        rank_pattern={path: rank for path, rank in ranks.items() if rank},
        alpha_pattern={
            path: leaves[path].scaling * (math.sqrt(rank) if root else rank)
            for path, rank in ranks.items()
            if rank
        },
        exclude=(*config.exclude, *(path for path, rank in ranks.items() if not rank)),
    )


def _share_out(shares: Mapping[str, jax.Array], leaves: Mapping[str, LoraArray]) -> dict[str, int]:
    """The rank of each weight: directions by the share they explain, as long as there are ranks."""
    depth = {path: math.prod(stack_of(leaf)) for path, leaf in leaves.items()}
    left = sum(depth[path] * leaf.rank for path, leaf in leaves.items())
    ranks = dict.fromkeys(leaves, 0)
    every = [(float(x), path) for path, share in shares.items() for x in share]
    for _, path in sorted(every, key=lambda pair: -pair[0]):
        if depth[path] <= left:
            ranks[path] += 1
            left -= depth[path]
    return ranks
