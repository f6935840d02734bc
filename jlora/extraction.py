"""An adapter out of two dense checkpoints: the best low-rank update from one to the other."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.alignment import same_values
from jlora.factors import with_factors
from jlora.leaf import is_array_leaf
from jlora.lora import LoraArray, LoraConfig, init, leaves_by_path
from jlora.lora_config import Axis
from jlora.packed import weight_to_matrices
from jlora.quant import QuantArray, dequantize
from jlora.variants import randomised_svd

__all__ = ["ExtractedWeight", "Extraction", "extract"]

_LOG = logging.getLogger("jlora")


@dataclasses.dataclass(frozen=True)
class ExtractedWeight:
    """How much of the difference `d = tuned - base` of a weight its adapter holds.

    Attributes:
      path: of the weight.
      rank: of the adapter.
      change: `|d| / |base|`, how far the weight was moved; Frobenius norms over the whole leaf.
      captured: `|scaling * a @ b|^2 / |d|^2`, the share of the difference's energy; 1 is all.
    """

    path: str
    rank: int
    change: float
    captured: float


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What `extract` took over and what it did not; `str` gives a table.

    Attributes:
      rows: one for each weight with an adapter.
      left_out: paths of the other leaves that differ between the checkpoints and are not in
        `config.train`: they are those of the base.
    """

    rows: tuple[ExtractedWeight, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        width = max(len(row.path) for row in self.rows)
        lines = [f"{'weight':{width}}  rank    change  captured"]
        lines += [
            f"{row.path:{width}}  {row.rank:4}  {row.change:8.3g}  {row.captured:8.4f}"
            for row in self.rows
        ]
        if self.left_out:
            lines.append(f"Changed, but left as in the base: {', '.join(self.left_out)}.")
        return "\n".join(lines)


def extract(
    base: Any,
    tuned: Any,
    config: LoraConfig,
    *,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    niter: int | None = None,
    key: jax.Array | None = None,
) -> tuple[Any, Extraction]:
    """Extracts the adapter that is nearest to a fine-tuned model, by SVD of the difference.

    Args:
      base: the weights before tuning, plain or quantised.
      tuned: the weights after, a tree with the same leaves.
      config: says which weights get adapters and of what rank. Leaves that it trains whole are
        taken from `tuned`.
      fn: as in `jlora.init`.
      args: as in `jlora.init`.
      niter: power iterations of a randomised decomposition, which is much faster for large weights
        (`captured` then says what it found); None for the exact one.
      key: for the randomised decomposition.

    Returns:
      The base with adapters, and what they captured. Memory: float32 copies of one matrix of a
      stack at a time, of a quantised leaf all of it.

    Raises:
      ValueError: if the trees do not fit each other or the config, or `config.init` is one that
        changes the base.
    """
    if config.init != "default":
        raise ValueError(f"init={config.init!r} changes the base; extract needs the default.")
    if niter is not None and (niter < 0 or key is None):
        raise ValueError(f"niter={niter!r} must be at least 0 and needs a key.")
    after = _check_pair(base, tuned)
    key = jax.random.key(0) if key is None else key
    adapted = init(key, base, config, fn=fn, args=args)
    measured: dict[str, tuple[int, jax.Array]] = {}
    left_out = []

    def fill(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoraArray):
            if config.trains_whole(path):
                return after[path]
            if not same_values(leaf, after[path]):
                left_out.append(path)
            return leaf
        a, b, norms = _fit(leaf, after[path], key, niter)
        measured[path] = leaf.rank, norms
        return with_factors(leaf, a, b)

    filled = tree.map_with_path(fill, adapted, is_leaf=is_array_leaf)
    rows = []
    for path, (rank, norms) in measured.items():
        whole, difference, captured = map(float, norms)
        change = math.sqrt(difference / whole) if whole else math.inf if difference else 0.0
        share = min(1.0, captured / difference) if difference else 1.0
        rows.append(ExtractedWeight(path, rank, change, share))
    if left_out:
        _LOG.warning(
            "%d leaves without an adapter were changed and are left as in the base: %s. Name them "
            "in the config's targets or train to take them over.",
            len(left_out), ", ".join(left_out[:6]) + (", ..." if len(left_out) > 6 else ""),
        )  # fmt: skip
    return filled, Extraction(tuple(rows), tuple(left_out))


def _check_pair(base: Any, tuned: Any) -> dict[str, Any]:
    """The leaves after tuning by path, which must be those before."""
    before, after = leaves_by_path(base), leaves_by_path(tuned)
    if before.keys() != after.keys():
        raise ValueError(
            f"base and tuned have different leaves: {sorted(before.keys() - after.keys())} in base "
            f"alone, {sorted(after.keys() - before.keys())} in tuned alone."
        )
    for path, leaf in before.items():
        for x in (leaf, after[path]):
            if is_array_leaf(x) and not isinstance(x, QuantArray):
                raise ValueError(
                    f"{path!r} already has an adapter; merge it with jlora.merge_params first."
                )
        shapes = [getattr(x, "shape", None) for x in (leaf, after[path])]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{path!r} has shape {shapes[0]} in base and {shapes[1]} in tuned; where tokens "
                "were added, cut or fill one of them first."
            )
    return after


@functools.partial(jax.jit, static_argnums=3)
def _fit(
    leaf: LoraArray, tuned: Any, key: jax.Array, niter: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`a`, `b` for the difference, and the energies of the base, the difference and the update."""
    depth, rank = leaf.axes.count("stack"), leaf.rank

    def one(pair: tuple[jax.Array, jax.Array]) -> Any:
        before, after = (w.mT.astype(jnp.promote_types(w.dtype, jnp.float32)) for w in pair)
        difference = after - before
        if niter is None:
            u, s, v = jnp.linalg.svd(difference, full_matrices=False)
        else:
            u, s, v = randomised_svd(difference, rank, niter, key)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        root = jnp.sqrt(s / leaf.scaling)
        energies = jnp.stack([jnp.sum(x**2) for x in (before, difference, s)])
        return u * root, root[:, None] * v, energies

    rows = tuple(_rows(w, leaf.axes) for w in (leaf.w, tuned))
    a, b, energies = jax.lax.map(one, rows)
    stack = leaf.a.shape[:depth]
    a, b = (x.astype(leaf.a.dtype).reshape(*stack, *x.shape[1:]) for x in (a, b))
    return a, b, energies.sum(0)


def _rows(w: Any, axes: Sequence[Axis]) -> jax.Array:
    """`[*axes]` to `[matrices out in]`."""
    dense = dequantize(w, dtype=jnp.float32) if isinstance(w, QuantArray) else jnp.asarray(w)
    matrices = weight_to_matrices(dense, axes)
    return matrices.reshape(-1, *matrices.shape[-2:])
