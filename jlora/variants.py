"""Adapters that start from the weights: PiSSA, QPiSSA, OLoRA and LoftQ.

Each takes a tree from `jlora.init` and gives one of the same structure with other factors and
another base, so that training, sharding and merging need to know nothing of them. A config names
one in its field `init`, and `jlora.init` looks it up among those registered here: `lora.py` is
below this module in the order of reading and cannot import it.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jlora.leaf import is_array_leaf
from jlora.lora import LoraArray, LoraConfig, initialiser, leaves_by_path
from jlora.packed import matrices_to_weight, weight_to_matrices
from jlora.quant import QuantArray, dequantize
from jlora.tree import map_with_path

__all__ = ["from_plain_lora", "loftq", "olora", "pissa", "to_plain_lora"]


def pissa(
    params: Any,
    *,
    base: Any = None,
    niter: int | None = None,
    iterations: int = 1,
    key: jax.Array | None = None,
) -> Any:
    """Starts from the largest singular directions, and trains those (PiSSA, arXiv:2404.02948).

    With `w = u s v` the factors are `u_r sqrt(s_r)` and `sqrt(s_r) v_r`, shared out over `scaling`,
    and the base becomes the residual `w - scaling * a @ b`: the function's output stays the same,
    at the rounding of the base's dtype. Over a quantised base the residual is quantised in its
    format (QPiSSA), which leaves a smaller error than quantising the weight.

    Args:
      params: a tree from `jlora.init`, over plain or quantised weights.
      base: the weights before they were quantised, where they were; without, their dequantised
        values are taken.
      niter: power iterations of a randomised decomposition (16 is close to exact, and much faster
        for large weights); None for the exact one.
      iterations: for a quantised base, how often factors and residual are fitted to each other.
      key: for the randomised decomposition.

    Returns:
      The tree with new factors and bases; shapes and dtypes do not change. Memory: float32 copies
      of one matrix of a stack at a time.

    Raises:
      ValueError: if there is no adapter, `base` does not fit, or a number is out of range.
    """
    if niter is not None and (niter < 0 or key is None):
        raise ValueError(f"niter={niter!r} must be at least 0 and needs a key.")
    return _restart(params, base, key, niter, iterations, quantise_first=False)


def loftq(params: Any, base: Any, *, iterations: int = 1) -> Any:
    """Fits the factors to the error of quantising (LoftQ, arXiv:2310.08659).

    Alternates `q = quantise(w - scaling * a @ b)`, from `a @ b = 0`, with the best `scaling * a @
    b` of its rank for `w - q`: the function on the fresh tree is nearer to that on `base` than on
    the quantised base alone. The scaling is divided out, unlike in PEFT, which asks for `alpha =
    rank` instead.

    Args:
      params: a tree from `jlora.init` over quantised weights; adapters over plain ones stay as
        they are.
      base: the weights before they were quantised, a tree of the base's structure.
      iterations: at least 1; the paper uses 1 and 5.

    Returns:
      The tree with new factors and quantised bases. Memory: as `pissa`.

    Raises:
      ValueError: if no weight with an adapter is quantised, or `base` does not fit.
    """
    check_quantised("LoftQ", params, base)
    for path, leaf in leaves_by_path(base).items():
        if isinstance(leaf, QuantArray):
            raise ValueError(
                f"LoftQ starts from what quantising lost, and {path!r} of base is quantised "
                "itself: pass the weights as they were before jlora.quantize."
            )
    return _restart(params, base, None, None, iterations, quantise_first=True)


def check_quantised(name: str, params: Any, base: Any) -> None:
    """Raises ValueError if a start that corrects quantising, of this name, has nothing to do."""
    adapters = [leaf for leaf in leaves_by_path(params).values() if isinstance(leaf, LoraArray)]
    if adapters and not any(isinstance(leaf.w, QuantArray) for leaf in adapters):
        raise ValueError(
            f"{name} makes up for the error of quantising, and no weight with an adapter is "
            "quantised: call jlora.quantize (model.quantize in a run) before jlora.init, and give "
            "the plain weights as base."
        )
    if base is None:
        raise ValueError(f"{name} needs the weights before they were quantised: pass base=.")


def olora(params: Any, *, base: Any = None) -> Any:
    """Starts from an orthonormal basis of the weight's outputs (OLoRA, arXiv:2406.01775).

    With the decomposition `w.T = q r`, `b` is the transpose of the first columns of `q`, `a` that
    of the first rows of `r`, and the base becomes the residual `w - scaling * a @ b`, as in PEFT:
    the function's output stays the same, at the rounding of the base's dtype. Over a quantised base
    the residual is quantised.

    Args:
      params: a tree from `jlora.init`, over plain or quantised weights.
      base: as in `pissa`.

    Returns:
      The tree with new factors and bases; shapes and dtypes do not change.

    Raises:
      ValueError: if there is no adapter, or `base` does not fit.
    """
    return _restart(params, base, None, None, 1, quantise_first=False, orthonormal=True)


def to_plain_lora(
    initial: Any, trained: Any, config: LoraConfig, *, base: Any = None
) -> tuple[Any, LoraConfig]:
    """Turns an adapter that changed its base into one for the original weights, of twice the rank.

    The trained update less the initial one is `[a, a0] @ [b, -b0]`, as PEFT converts PiSSA. Over a
    plain base the function stays the same, at the rounding of the base's dtype; over a quantised
    one, what the fresh adapter left of quantising's error is missing afterwards.

    Args:
      initial: the tree that training started from, as `jlora.init` gave it.
      trained: the tree after training.
      config: that of both.
      base: the original weights. Without, they are restored from `initial`, which cannot be where
        that is quantised.

    Returns:
      A tree over the original weights, and its config, whose `init` is `"default"`.

    Raises:
      ValueError: for a quantised base without `base`.
    """
    factor = math.sqrt(2) if config.rank_stabilized else 2
    plain = dataclasses.replace(
        config,
        rank=2 * config.rank,
        alpha=factor * config.alpha,
        rank_pattern=[(pattern, 2 * rank) for pattern, rank in config.rank_pattern],
        alpha_pattern=[(pattern, factor * alpha) for pattern, alpha in config.alpha_pattern],
        init="default",
    )
    originals = None if base is None else leaves_by_path(base)

    def double(path: str, start: Any, end: Any) -> Any:
        if not isinstance(end, LoraArray):
            return end if originals is None or not isinstance(end, QuantArray) else originals[path]
        if originals is not None:
            w = originals[path]
        elif is_array_leaf(start.w):
            raise ValueError(
                f"{path!r} is quantised, so its original weights are not in this tree: pass them "
                "as base=, or merge the adapter with jlora.merge_params."
            )
        else:
            w = start.materialise()
        rank_axis = end.axes.count("stack")
        a = jnp.concatenate([end.a, start.a], -1)
        b = jnp.concatenate([end.b, -start.b], rank_axis)
        scaling = plain.scaling_of(path)  # the same but for the last bit, which the config says
        scaling = scaling if math.isclose(scaling, end.scaling, rel_tol=1e-12) else end.scaling
        return dataclasses.replace(end, w=w, a=a, b=b, scaling=scaling)

    return map_with_path(double, initial, trained, is_leaf=is_array_leaf), plain


def from_plain_lora(initial: Any, plain: Any) -> Any:
    """The trained tree that `to_plain_lora` made another of, over the base it was trained on.

    Args:
      initial: the tree that training started from, made again.
      plain: a tree from `to_plain_lora`, also after `jlora.peft.save` and `load`.

    Raises:
      ValueError: if the adapter did not start from `initial`.
    """

    def halve(path: str, start: Any, both: Any) -> Any:
        if not isinstance(start, LoraArray):
            return both
        first = slice(None, start.rank)
        rank_axis = start.axes.count("stack")
        b = jnp.split(both.b, 2, rank_axis) if both.rank == 2 * start.rank else [both.b, None]
        if (
            b[1] is None
            or not _close(both.a[..., start.rank :], start.a)
            or not _close(b[1], -start.b)
        ):
            raise ValueError(
                f"The adapter at {path!r} did not start where this base, seed and init do: the "
                "base has changed, or this machine decomposes it otherwise. Use the adapter as it "
                "is, on the original weights."
            )
        return dataclasses.replace(start, a=both.a[..., first], b=b[0])

    return map_with_path(halve, initial, plain, is_leaf=is_array_leaf)


def _close(got: jax.Array, wanted: jax.Array) -> bool:
    scale = float(jnp.abs(wanted).max()) or 1.0
    return bool(jnp.allclose(got, wanted.astype(got.dtype), rtol=0, atol=1e-3 * scale))


@initialiser(r"pissa(_niter_(\d+))?")
def _pissa(match: re.Match[str], key: jax.Array, params: Any, base: Any) -> Any:
    niter = None if match[2] is None else int(match[2])
    return pissa(params, base=base, niter=niter, key=key)


@initialiser(r"olora")
def _olora(match: re.Match[str], key: jax.Array, params: Any, base: Any) -> Any:
    return olora(params, base=base)


@initialiser(r"loftq(_iter_(\d+))?")
def _loftq(match: re.Match[str], key: jax.Array, params: Any, base: Any) -> Any:
    return loftq(params, base, iterations=int(match[2] or 1))


def _restart(
    params: Any,
    base: Any,
    key: jax.Array | None,
    niter: int | None,
    iterations: int,
    *,
    quantise_first: bool,
    orthonormal: bool = False,
) -> Any:
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations!r}.")
    leaves = leaves_by_path(params)
    if not any(isinstance(leaf, LoraArray) for leaf in leaves.values()):
        raise ValueError("This tree has no adapters to start. Call jlora.init first.")
    originals = {} if base is None else leaves_by_path(base)

    def restart(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoraArray):
            return leaf
        if type(leaf) is not LoraArray:
            raise ValueError(f"{path!r} is {leaf.kind}; these starts are for LoRA alone.")
        if base is not None and getattr(originals.get(path), "shape", None) != leaf.shape:
            raise ValueError(f"base has no weight of shape {leaf.shape} at {path!r}.")
        if quantise_first and not isinstance(leaf.w, QuantArray):
            return leaf  # nothing was lost
        w = originals.get(path, leaf.w)
        w = dequantize(w, dtype=jnp.float32) if isinstance(w, QuantArray) else jnp.asarray(w)
        start = _Start(leaf, niter, iterations, quantise_first, orthonormal)
        return jax.jit(start)(w, jax.random.key(0) if key is None else key)

    return map_with_path(restart, params, is_leaf=is_array_leaf)


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """Computes the new start of one leaf, one matrix of its stack after the other."""

    like: LoraArray
    niter: int | None
    iterations: int
    quantise_first: bool
    orthonormal: bool = False

    def __call__(self, w: jax.Array, key: jax.Array) -> LoraArray:
        """The leaf for the original weight `w`, in the dtype and format of the one it replaces."""
        like, axes = self.like, self.like.axes
        places = [axis for axis, role in enumerate(axes) if role == "stack"]
        stack = tuple(w.shape[axis] for axis in places)
        layers = jnp.moveaxis(w, places, range(len(places)))
        layers = layers.reshape(-1, *layers.shape[len(places) :])
        own = tuple(role for role in axes if role != "stack")
        one = functools.partial(self._one, own=own, key=key)
        base, a, b = jax.lax.map(one, layers)
        if isinstance(like.w, QuantArray):
            parts = iter(jax.tree.leaves(base))
            base = jax.tree.map(lambda old: next(parts).reshape(old.shape), like.w)
        else:
            base = jnp.moveaxis(base.reshape(*stack, *base.shape[1:]), range(len(places)), places)
        a, b = a.reshape(like.a.shape), b.reshape(like.b.shape)
        return dataclasses.replace(like, w=base, a=a, b=b)

    def _one(self, w: jax.Array, own: tuple[Any, ...], key: jax.Array) -> Any:
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))

        def fit(target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            """The best factors for a target, as they are stored, and what they leave of `w`."""
            a, b = self._decompose(weight_to_matrices(target, own).mT, key)
            product = jnp.matmul(a.astype(w.dtype), b.astype(w.dtype), precision="highest")
            update = matrices_to_weight(self.like.scaling * product.mT, w.shape, own)
            return a, b, w - update

        packed = self.like.w
        if not isinstance(packed, QuantArray):
            a, b, residual = fit(w)
            return residual.astype(packed.dtype), a, b
        pack = without_stack(packed).pack_like
        a, b, residual = fit(w - _dense(pack(w))) if self.quantise_first else fit(w)
        base = pack(w) if self.quantise_first else pack(residual)
        for _ in range(self.iterations - 1):
            if self.quantise_first:
                base = pack(residual)
            a, b, residual = fit(w - _dense(base))
            if not self.quantise_first:
                base = pack(residual)
        return base, a, b

    def _decompose(self, w: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The factors for a matrix `[in out]`: those of the best product, or of a basis."""
        rank, dtype = self.like.rank, self.like.a.dtype
        if self.orthonormal:
            q, r = jnp.linalg.qr(w.mT)
            return r[:rank].mT.astype(dtype), q[:, :rank].mT.astype(dtype)
        if self.niter is None:
            u, s, v = jnp.linalg.svd(w, full_matrices=False)
        else:
            u, s, v = randomised_svd(w, rank, self.niter, key)
        root = jnp.sqrt(s[:rank] / self.like.scaling)
        return (u[:, :rank] * root).astype(dtype), (root[:, None] * v[:rank]).astype(dtype)


def _dense(packed: QuantArray) -> jax.Array:
    return packed.materialise().astype(jnp.float32)


def without_stack(leaf: QuantArray) -> QuantArray:
    """The format of one matrix of a stack."""
    kept = [(role, size) for role, size in zip(leaf.axes, leaf.sizes) if role != "stack"]
    axes, sizes = zip(*kept)
    return dataclasses.replace(leaf, axes=axes, sizes=sizes)


def randomised_svd(
    w: jax.Array, rank: int, niter: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular values and vectors by subspace iteration (arXiv:0909.4061)."""
    size = min(rank + 8, *w.shape)
    multiply = functools.partial(jnp.matmul, precision="highest")
    q = jnp.linalg.qr(multiply(w, jax.random.normal(key, (w.shape[1], size), w.dtype)))[0]
    for _ in range(niter):
        q = jnp.linalg.qr(multiply(w.mT, q))[0]
        q = jnp.linalg.qr(multiply(w, q))[0]
    u, s, v = jnp.linalg.svd(multiply(q.mT, w), full_matrices=False)
    return multiply(q, u), s, v
