"""What merging adapters costs, before anyone ships the result."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret import adapt
from jlora.leaf import is_array_leaf
from jlora.lora import LoraArray, leaves_by_path, merge_params
from jlora.quant import QuantArray, dequantize
from jlora.tree import map_with_path

__all__ = ["LogitError", "MergeError", "WeightError", "logit_errors", "merge_error"]


@dataclasses.dataclass(frozen=True)
class WeightError:
    """What a merge does to one weight `w` with the update `u = scaling * a @ b`.

    Norms are Frobenius norms over the whole leaf, in float64; `base` is what `w` stands for. Where
    `config.init` changed it, `u` is what was trained, and `base` what training began from.

    Attributes:
      path: of the weight.
      update: `|u| / |base|`, how large the update is.
      rounding: `|merged - (base + u)| / |base + u|` of the merge in the weight's own dtype.
      worst: the largest `rounding` of one matrix of a stack.
      erased: `1 - <Q(base + u) - base, u> / |u|^2`, the share of the update, along its own
        direction, that quantising again takes away: 0 keeps it, 1 erases it. Below 0 it grew. None
        where the weight is not quantised.
      noise: `|Q(base + u) - base - u| / |u|`, all that quantising again changes, which also counts
        what is not along the update. Where it is above 1, it is larger than what was learned.
      shift: `|original - base| / |u|`, how far the 16-bit weights are from what the adapter was
        trained on. None where `base` was not given.
    """

    path: str
    update: float
    rounding: float
    worst: float
    erased: float | None = None
    noise: float | None = None
    shift: float | None = None


@dataclasses.dataclass(frozen=True)
class LogitError:
    """What a way of merging does to the function's first result, the logits of a sample.

    Attributes:
      way: `"dequantised"`, `"original"` or `"requantised"`; `"merged"` where nothing is quantised.
      largest: absolute difference from the adapted function's.
      mean: absolute difference.
      divergence: mean over rows of `KL(softmax(adapted) | softmax(merged))`, nats.
    """

    way: str
    largest: float
    mean: float
    divergence: float


@dataclasses.dataclass(frozen=True)
class MergeError:
    """What a merge costs; `str` gives the tables.

    Attributes:
      rows: one for each weight with an adapter.
      logits: one for each way of merging; empty without a function.
    """

    rows: tuple[WeightError, ...]
    logits: tuple[LogitError, ...] = ()

    def __str__(self) -> str:
        head = ("weight", "update", "rounding", "worst", "erased", "noise", "shift")
        names = [field.name for field in dataclasses.fields(WeightError)[1:]]
        cells = [(row.path, *(_shown(getattr(row, name)) for name in names)) for row in self.rows]
        tables = [_table([head, *cells])] if self.rows else []
        if self.logits:
            head = ("logits after merging", "largest", "mean", "divergence")
            rows = [(x.way, *map(_shown, (x.largest, x.mean, x.divergence))) for x in self.logits]
            tables.append(_table([head, *rows]))
        return "\n\n".join("\n".join(table) for table in tables)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in cells
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def merge_error(
    params: Any,
    *,
    base: Any = None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
) -> MergeError:
    """Says what merging adapters costs: per weight, and in the logits of a sample.

    Weights are compared in float64 on the host, one layer of a stack at a time: the memory is a
    few float64 copies of one layer's weight. With `fn`, one merged model at a time is built too.

    Args:
      params: a tree from `init`, over plain or quantised weights.
      base: the original weights, a tree of the base's structure, where a quantised base is to be
        merged into those. Where `config.init` changed the base, the tree of adapters for them, as
        `jlora.variants.to_plain_lora` gives it.
      fn: called as `fn(params, *args)`; its first result is taken as logits `[..., classes]`.
      args: further arguments of `fn`: the sample.

    Raises:
      ValueError: if the tree has no adapters, or `base` lacks or misshapes a weight.

    >>> print(merge_error(params, fn=model.apply, args=(tokens,)))  # doctest: +SKIP
    """
    leaves = leaves_by_path(params)
    originals = None if base is None else leaves_by_path(base)
    for path, leaf in leaves.items():
        shape = getattr(leaf, "shape", None)
        if originals is not None and getattr(originals.get(path), "shape", None) != shape:
            raise ValueError(f"base has no weight of shape {shape} at {path!r}.")
    adapted = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoraArray)}
    if not adapted:
        raise ValueError("This tree has no adapters to merge. Call jlora.init first.")
    rows = tuple(
        _weight_error(path, leaf, None if originals is None else originals[path])
        for path, leaf in adapted.items()
    )
    if fn is None:
        return MergeError(rows)
    original = None if base is None else functools.partial(_on_original, params, originals)
    return MergeError(rows, tuple(logit_errors(params, original, fn, args)))


def _layers(leaf: LoraArray, original: Any) -> Iterator[tuple[LoraArray, Any]]:
    """Each matrix of a stack, with its adapter and what it was before it was quantised."""
    places = [axis for axis, role in enumerate(leaf.axes) if role == "stack"]
    axes = tuple(role for role in leaf.axes if role != "stack")
    for index in itertools.product(*(range(leaf.shape[axis]) for axis in places)):
        where = dict(zip(places, index))
        cut = tuple(where.get(axis, slice(None)) for axis in range(len(leaf.axes)))
        if isinstance(leaf.w, QuantArray):
            w = jax.tree.map(lambda x: x[index], leaf.w)  # noqa: B023
            sizes = [n for n, role in zip(leaf.w.sizes, leaf.w.axes) if role != "stack"]
            own = tuple(role for role in leaf.w.axes if role != "stack")
            w = dataclasses.replace(w, axes=own, sizes=tuple(sizes))
        else:
            w = leaf.w[cut]
        layer = dataclasses.replace(leaf, w=w, axes=axes, **leaf.of_layers(index))
        if isinstance(original, LoraArray):
            arrays = original.of_layers(index)
            yield layer, dataclasses.replace(original, w=original.w[cut], axes=axes, **arrays)
        else:
            yield layer, None if original is None else original[cut]


def _weight_error(path: str, leaf: LoraArray, original: Any) -> WeightError:
    layers = [_sums(layer, source) for layer, source in _layers(leaf, original)]
    sums = {name: sum(layer[name] for layer in layers) for name in layers[0]}
    quantised = isinstance(leaf.w, QuantArray)
    changes = sums["update"] > 0
    return WeightError(
        path,
        _ratio(sums["update"], sums["base"]),
        _ratio(sums["rounded"], sums["exact"]),
        max(_ratio(layer["rounded"], layer["exact"]) for layer in layers),
        erased=1 - sums["kept"] / sums["update"] if quantised and changes else None,
        noise=_ratio(sums["noise"], sums["update"]) if quantised and changes else None,
        shift=_ratio(sums["shift"], sums["update"]) if original is not None and changes else None,
    )


# Compiled one by one, because in one program a weight might go on without its rounding to 16 bits.
_dense, _merged = jax.jit(dequantize), jax.jit(merge_params)
_requantised = jax.jit(functools.partial(merge_params, requantize=True))


def _sums(layer: LoraArray, source: Any) -> dict[str, float]:
    """Squared norms for one matrix, and an inner product.

    `source` is what the adapter is merged into; or, where that takes another one, with it.
    """
    quantised = isinstance(layer.w, QuantArray)
    w = _dense(layer.w)
    base = _double(w)
    trained = layer.apply(base, _update(layer))
    if isinstance(source, LoraArray):
        written = dataclasses.replace(source, w=jnp.asarray(source.w))
        base = trained - _update(written)
    else:
        written = dataclasses.replace(layer, w=w if source is None else jnp.asarray(source))
    update = trained - base
    target = base if source is None else _double(written.w)
    merged = _double(_merged(written))
    exact = written.apply(target, _update(written))
    sums = {
        "base": _square(base),
        "update": _square(update),
        "exact": _square(exact),
        "rounded": _square(merged - exact),
        "shift": 0.0 if source is None else _square(target - base),
    }
    if quantised:
        change = _double(_dense(_requantised(layer))) - base
        sums["kept"] = float(np.vdot(change, update))
        change -= update
        sums["noise"] = _square(change)
    return sums


def _double(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _square(x: np.ndarray) -> float:
    return float(np.vdot(x, x))


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0 if not part else math.inf


def _update(layer: LoraArray) -> np.ndarray:
    """`scaling * a @ b` of one matrix in float64, with its axes in the order of the weight's."""
    a, b = map(_double, layer.product_factors())
    product = np.tensordot(a, b, 1)  # [*in *out]
    order = [axis for role in ("in", "out") for axis, r in enumerate(layer.axes) if r == role]
    return layer.scaling * product.transpose(np.argsort(order))


def logit_errors(
    params: Any,
    on_original: Callable[[], Any] | None,
    fn: Callable[..., Any],
    args: Sequence[Any],
) -> Iterator[LogitError]:
    """What each way of merging changes in the logits: that part of `merge_error`.

    Args:
      params: as there.
      on_original: gives a tree of adapters over the original weights, or None for no such way.
      fn: as there.
      args: as there.
    """
    forward = adapt(fn, on_unsupported="allow")

    def logits(tree: Any) -> np.ndarray:
        return _double(jax.tree.leaves(forward(tree, *args))[0])

    wanted = logits(params)
    bases = (leaf.w if isinstance(leaf, LoraArray) else leaf
             for leaf in jax.tree.leaves(params, is_leaf=is_array_leaf))  # fmt: skip
    quantised = any(isinstance(leaf, QuantArray) for leaf in bases)
    ways: dict[str, Callable[[], Any]] = {
        "dequantised" if quantised else "merged": lambda: merge_params(params)
    }
    if on_original is not None:
        ways["original"] = lambda: merge_params(on_original())
    if quantised:
        ways["requantised"] = lambda: merge_params(params, requantize=True)
    for way, merged in ways.items():
        got = logits(merged())
        difference = np.abs(got - wanted)
        yield LogitError(
            way, float(difference.max()), float(difference.mean()), _divergence(wanted, got)
        )


def _on_original(params: Any, originals: Any) -> Any:
    def replace(path: str, leaf: Any) -> Any:
        if isinstance(leaf, LoraArray):
            own = originals[path]
            if isinstance(own, LoraArray):
                return own
            return dataclasses.replace(leaf, w=jnp.asarray(own))
        return originals[path] if isinstance(leaf, QuantArray) else leaf

    return map_with_path(replace, params, is_leaf=is_array_leaf)


def _divergence(wanted: np.ndarray, got: np.ndarray) -> float:
    p, q = _log_softmax(wanted), _log_softmax(got)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
