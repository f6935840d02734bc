"""Adapters that start from data: EVA and LoRA-GA, measured through `adapt` on a few batches.

Neither builds an array of a weight's size: what is wanted of a large matrix, its leading singular
vectors, is found by subspace iteration (arXiv:0909.4061), and a step of that on inputs or on
gradients is what the gradient of an adapter's factor gives.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.leaf import Equation, is_array_leaf, product_sides, rule
from jlora.lora import LoraArray, LoraConfig, initialiser, leaves_by_path, merge_params
from jlora.lowrank import LowRank, contract
from jlora.products import name_axes
from jlora.tree import map_with_path

__all__ = ["eva", "lora_ga"]

_SPARE = 8  # columns beyond those that are wanted, for a subspace that settles sooner

LossFn = Callable[[Any, Any], jax.Array]


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
      ValueError: if there are no adapters or batches, or a rank is above half of a weight's sides.
    """
    leaves = _adapters(params)
    widths = {}
    for path, leaf in leaves.items():
        d_in, d_out = _sides(leaf)
        if 2 * leaf.rank > min(d_in, d_out):
            raise ValueError(
                f"LoRA-GA takes {2 * leaf.rank} singular vectors of the gradient at {path!r}, "
                f"which is {d_in} by {d_out}. Lower its rank to {min(d_in, d_out) // 2}."
            )
        widths[path] = min(2 * leaf.rank + _SPARE, d_in, d_out)
    gradients = _gradients(params, loss_fn, batches, leaves)
    outs = {
        path: jnp.linalg.qr(
            jax.random.normal(jax.random.fold_in(key, i), _stacked(leaf, 1, widths[path]))
        )[0].mT
        for i, (path, leaf) in enumerate(leaves.items())
    }
    for step in range(iterations + 1):
        along_in, _ = gradients(None, outs)
        ins = {path: jnp.linalg.qr(x)[0] for path, x in along_in.items()}
        _, along_out = gradients(ins, None)
        if step < iterations:
            outs = {path: jnp.linalg.qr(x.mT)[0].mT for path, x in along_out.items()}

    def start(path: str, leaf: Any) -> Any:
        if path not in leaves:
            return leaf
        u, _, v = jnp.linalg.svd(along_out[path], full_matrices=False)
        rank, size = leaf.rank, _sides(leaf)[1] ** 0.25 / math.sqrt(gamma)
        a, b = size * (ins[path] @ u)[..., :rank], size * v[..., rank : 2 * rank, :]
        leaf = dataclasses.replace(
            leaf, a=a.reshape(leaf.a.shape).astype(leaf.a.dtype),
            b=b.reshape(leaf.b.shape).astype(leaf.b.dtype),
        )  # fmt: skip
        without = dataclasses.replace(leaf, a=-leaf.a)
        return dataclasses.replace(leaf, w=merge_params(without, requantize=is_array_leaf(leaf.w)))

    changed = dataclasses.replace(config, init="lora_ga")
    return map_with_path(start, params, is_leaf=is_array_leaf), changed


@initialiser(r"lora_ga")
def _needs_data(match: Any, key: jax.Array, params: Any, base: Any) -> Any:
    raise ValueError(
        "init='lora_ga' starts from gradients: call jlora.init with init='default', and "
        "jlora.measured.lora_ga with a loss and batches on what it gives."
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
      ValueError: if there are no adapters or batches, or `rho` is below 1.
    """
    if rho < 1:
        raise ValueError(f"rho must be at least 1, got {rho!r}.")
    leaves = _adapters(params)
    tops = {p: min(round(rho * x.rank), *_sides(x)) for p, x in leaves.items()}
    ins = {
        path: jnp.linalg.qr(
            jax.random.normal(
                jax.random.fold_in(key, i),
                _stacked(leaf, 0, min(tops[path] + _SPARE, *_sides(leaf))),
            )
        )[0]
        for i, (path, leaf) in enumerate(leaves.items())
    }
    watched = {path: _Watched(**_fields(leaf)) for path, leaf in leaves.items()}
    gradients = _gradients(params, lambda p, batch: _total(fn(p, batch)), batches, watched)
    moments, energy = gradients(ins, None)
    for _ in range(iterations):
        ins = {path: jnp.linalg.qr(x)[0] for path, x in moments.items()}
        moments, energy = gradients(ins, None)
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
        a = bases[path][..., :rank].reshape(*leaf.a.shape[:-1], rank).astype(leaf.a.dtype)
        shape = [rank if i == axis else size for i, size in enumerate(leaf.b.shape)]
        return dataclasses.replace(leaf, a=a, b=jnp.zeros(shape, leaf.b.dtype))

    tree = map_with_path(start, params, is_leaf=is_array_leaf)
    return tree, _with_ranks(config, leaves, ranks)


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
    depth = {path: math.prod(_stack(leaf)) for path, leaf in leaves.items()}
    left = sum(depth[path] * leaf.rank for path, leaf in leaves.items())
    ranks = dict.fromkeys(leaves, 0)
    every = [(float(x), path) for path, share in shares.items() for x in share]
    for _, path in sorted(every, key=lambda pair: -pair[0]):
        if depth[path] <= left:
            ranks[path] += 1
            left -= depth[path]
    return ranks


# What both measure with.


def _adapters(params: Any) -> dict[str, LoraArray]:
    leaves = leaves_by_path(params)
    found = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoraArray)}
    if not found:
        raise ValueError("This tree has no adapters to start. Call jlora.init first.")
    if other := next((path for path, leaf in found.items() if type(leaf) is not LoraArray), None):
        raise ValueError(f"{other!r} is {found[other].kind}; these starts are for LoRA alone.")
    return found


def _fields(leaf: LoraArray) -> dict[str, Any]:
    return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(LoraArray)}


def _stack(leaf: LoraArray) -> tuple[int, ...]:
    return leaf.a.shape[: leaf.axes.count("stack")]


def _sides(leaf: LoraArray) -> tuple[int, int]:
    """Inputs and outputs of one matrix of a stack."""
    stack = len(_stack(leaf))
    return math.prod(leaf.a.shape[stack:-1]), math.prod(leaf.b.shape[stack + 1 :])


def _stacked(leaf: LoraArray, side: int, width: int) -> tuple[int, ...]:
    return (*_stack(leaf), _sides(leaf)[side], width)


def _gradients(
    params: Any, loss_fn: LossFn, batches: Sequence[Any], leaves: Mapping[str, LoraArray]
) -> Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """A function of `a` and `b`, one of them None for zero, to their gradients over all batches.

    Factors are `[*stack in k]` and `[*stack k out]`, and the scaling is 1.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("There are no batches to start from.")

    def loss(factors: Any, params: Any, batch: Any) -> jax.Array:
        def put(path: str, leaf: Any) -> Any:
            if path not in leaves:
                return leaf
            a, b = factors[path]
            like = leaves[path]
            stack = len(_stack(like))
            a = a.reshape(*like.a.shape[:-1], -1)
            b = b.reshape(*like.b.shape[:stack], -1, *like.b.shape[stack + 1 :])
            kept = dataclasses.replace(like, w=leaf.w, scaling=1.0, dropout=0.0)
            return dataclasses.replace(kept, a=a, b=b)

        return loss_fn(map_with_path(put, params, is_leaf=is_array_leaf), batch)

    grad = jax.jit(jax.grad(loss))

    def gradients(ins: Any, outs: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        factors = {}
        for path, leaf in leaves.items():
            if outs is None:
                a = ins[path]
                factors[path] = (a, jnp.zeros(_stacked(leaf, 1, a.shape[-1])).mT)
            else:
                b = outs[path]
                factors[path] = (jnp.zeros(_stacked(leaf, 0, b.shape[-2])), b)
        total = functools.reduce(
            functools.partial(jax.tree.map, jnp.add),
            (grad(factors, params, batch) for batch in batches),
        )
        return {p: x[0] for p, x in total.items()}, {p: x[1] for p, x in total.items()}

    return gradients


def _total(results: Any) -> jax.Array:
    """Something that depends on all of the results."""
    floating = (x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating))
    return sum((jnp.sum(x.astype(jnp.float32)) for x in floating), jnp.float32(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Watched(LoraArray):
    """A weight whose gradients tell of its inputs: `x.T @ x @ a` for `a`, `sum(x**2)` for `b`."""

    def low_rank(self, path: str) -> LowRank:
        """The leaf as rules want it."""
        low = super().low_rank(path)
        w = low.w.materialise() if is_array_leaf(low.w) else low.w
        fields = {field.name: getattr(low, field.name) for field in dataclasses.fields(LowRank)}
        return _Watching(**{**fields, "w": w})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Watching(LowRank):
    """The same on its way through a function."""


@rule(_Watching, "dot_general")
def _watch(equation: Equation, left: Any, right: Any) -> Any:
    leaf, x, leaf_dims, x_dims = product_sides(equation, left, right, _Watching)
    if is_array_leaf(x):
        return NotImplemented
    leaf_axes, x_axes = name_axes(leaf, x, leaf_dims, x_dims)
    free = [axis for axis in x_axes if axis[0] == "x" or leaf.v.shape[axis[1]] > 1]
    seen = jax.lax.stop_gradient(x).astype(leaf.u.dtype)
    hidden = contract(seen, x_axes, leaf.u, [*leaf_axes, "rank"], [*free, "rank"])
    nothing = _report(hidden, leaf.v, jnp.sum(jnp.square(seen)))
    out = equation.bind(*((leaf.w, x) if leaf is left else (x, leaf.w)))
    return out + nothing.astype(out.dtype)


@jax.custom_vjp
def _report(hidden: jax.Array, v: jax.Array, energy: jax.Array) -> jax.Array:
    """Zero, whose derivatives are what was seen."""
    return jnp.zeros(())


def _seen(hidden: jax.Array, v: jax.Array, energy: jax.Array) -> Any:
    return jnp.zeros(()), (hidden, v, energy)


def _told(seen: Any, _: jax.Array) -> Any:
    hidden, v, energy = seen
    return hidden, jnp.broadcast_to(energy, v.shape).astype(v.dtype), jnp.zeros_like(energy)


_report.defvjp(_seen, _told)
