"""LoRA as a transform of parameter trees (arXiv:2106.09685). Read this module first.

`init` replaces chosen weights of a tree by `LoraArray` leaves, each of which stands for
`w + scaling * a @ b`. `a` meets the input and starts random, `b` meets the output and starts at
zero, so a fresh adapter changes nothing. `split` cuts the tree into what trains and what does not,
`merge_params` gives plain arrays again. What a function does with such a leaf is in `lowrank.py`.
"""

import dataclasses
import functools
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from jlora import joined as _joined  # noqa: F401  registers rules
from jlora import products as _products  # noqa: F401
from jlora import tree
from jlora.leaf import ArrayLeaf, half_of_a_tree, is_array_leaf
from jlora.lora_config import Axis, LoraConfig
from jlora.lowrank import LowRank
from jlora.packed_products import PackedLowRank
from jlora.quant import QuantArray, dequantize, guarded
from jlora.rows import RowsArray, choose_rows
from jlora.targets import choose, leaves_by_path
from jlora.usage import find_weights

__all__ = [
    "Axis",
    "LoraArray",
    "LoraConfig",
    "count_parameters",
    "init",
    "initialiser",
    "labels",
    "leaves_by_path",
    "merge_params",
    "split",
    "variant",
    "variant_of",
]

_LOG = logging.getLogger("jlora")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraArray(ArrayLeaf):
    """A weight with a low-rank update (arXiv:2106.09685); stands for `w + scaling * a @ b`.

    A matrix `[d_in d_out]` has `a` `[d_in rank]` and `b` `[rank d_out]`. In general the axes of `w`
    that meet the input belong to `a`, those of the result to `b`, and stacked ones (layers of a
    scan, experts) to both, each in the order in which `w` has them.

    Attributes:
      w: `Float[*axes]`, frozen; may itself be a leaf that stands for an array.
      a: `Float[*stack *in rank]`, trained.
      b: `Float[*stack rank *out]`, trained.
      scaling: `alpha / rank`, a Python float, static under `jit`.
      axes: the role of each axis of `w`: `"stack"`, `"in"` or `"out"`.
      dropout: the share of the update's inputs that is zeroed while `adapt` has a key.
    """

    kind: ClassVar[str] = "LoRA"
    stacking: ClassVar[str] = (
        "Stacked adapters need a weight stacked alike, or a jax.vmap or jax.lax.scan over their "
        "leading axis, around jlora.adapt."
    )
    any_rank: ClassVar[bool] = False  # whether the rank may be above the sides of the weight
    # Of each array beside the weight: its label, and the role of each of its axes.
    arrays: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "a": ("lora_a", ("stack", "in", "rank")),
        "b": ("lora_b", ("stack", "rank", "out")),
    }

    w: Any
    a: Any
    b: Any
    scaling: float = dataclasses.field(metadata={"static": True})
    axes: tuple[Axis, ...] = dataclasses.field(default=("in", "out"), metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @classmethod
    def draw(
        cls,
        key: jax.Array,
        shapes: Mapping[str, "_Shapes"],
        roles: Mapping[str, tuple[Axis, ...]],
        dtype: str,
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Fresh `a` and `b` for each path, by the shapes that those of a plain LoRA have."""
        return {path: _draw_factors(key, path, *shapes[path], dtype) for path in roles}

    @classmethod
    def start(cls, w: Any, a: Any, b: Any, **static: Any) -> Self:
        """The leaf for a weight and its factors, with whatever else it keeps."""
        return cls(w, a, b, **static)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        if self.w is None:
            raise half_of_a_tree("This LoraArray has no weight: its tree")
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.w.dtype

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return self.a.shape[-1]

    @property
    def roles(self) -> tuple[Axis, ...]:
        """`axes` as the arrays have them: a `vmap` or `scan` outside takes or adds leading ones."""
        for name, array in self.present().items():
            _, own = self.arrays[name]
            if "stack" in own:  # read first: half of a tree has no weight to ask
                more = array.ndim - ("rank" in own) - sum(role in own for role in self.axes)
                break
        else:
            more = self.ndim - len(self.axes)
        stack: tuple[Axis, ...] = ("stack",) * more
        return (*stack, *self.axes[max(0, -more) :])

    def _check_shapes(self, path: str) -> None:
        roles = self.roles
        sizes = {"rank": [self.rank], "stack": [], "in": [], "out": []}
        for size, role in zip(self.shape, roles):
            sizes[role].append(size)
        gone = self.axes[: max(0, len(self.axes) - len(roles))]
        fits = len(roles) == self.ndim and all(
            list(array.shape) == [size for role in self.arrays[name][1] for size in sizes[role]]
            for name, array in self.present().items()
        )
        if not fits or set(gone) - {"stack"}:
            arrays = (f"{name} {list(array.shape)}" for name, array in self.present().items())
            raise ValueError(
                f"The arrays of {path or type(self).__name__!r} do not fit together: its weight is "
                f"{list(self.shape)}, {' and '.join(arrays)}, where its axes are {self.axes}. "
                f"{self.stacking}"
            )

    def name(self) -> str:
        """What messages call a leaf that is in no tree."""
        return type(self).__name__

    def placeholder(self) -> Any:
        """The weight itself, whose type has its placement on a mesh."""
        return self.w if isinstance(self.w, jax.Array) else super().placeholder()

    def why_frozen(self, path: str) -> str | None:
        """The gradient of the sum is that of the weight."""
        return self.w.why_frozen(path) if is_array_leaf(self.w) else None

    def enter(self, path: str) -> ArrayLeaf:
        """The leaf as rules want it."""
        return self.low_rank(path)

    def low_rank(self, path: str) -> LowRank:
        """The weight and its update, with both factors spread over the weight's axes."""
        if self.a is None or self.b is None:
            raise half_of_a_tree(f"{path!r} has no adapter in this tree, which")
        self._check_shapes(path)
        b = jnp.moveaxis(self.b, self.roles.count("stack"), -1)  # [*stack *out rank]
        u, v = self.spread(self.a, "in"), self.spread(b, "out")
        if is_array_leaf(self.w):
            kind, w = PackedLowRank, self.w.enter(path)
        else:
            kind, w = LowRank, self.w
        return kind(w, u, v, scaling=self.scaling, dropout=self.dropout, path=path)

    def product_factors(self) -> tuple[Any, Any]:
        """The `a` and `b` whose product, times `scaling`, is the update."""
        return self.a, self.b

    def spread(self, factor: jax.Array, owned: Axis | Literal["rank"]) -> jax.Array:
        """`[*stack *owned rank]` to `[*axes rank]`, with size 1 along the other factor's axes."""
        roles = self.roles
        order = [axis for role in ("stack", owned) for axis, r in enumerate(roles) if r == role]
        ranked = sorted(range(len(order)), key=order.__getitem__)
        factor = factor.transpose(*ranked, len(order))
        sizes = iter(factor.shape)
        shape = [next(sizes) if role in ("stack", owned) else 1 for role in roles]
        return factor.reshape(*shape, factor.shape[-1])

    def materialise(self) -> jax.Array:
        """`w + scaling * a @ b`, computed in float32 and rounded once to the dtype of `w`."""
        return self.low_rank("").materialise()

    def apply(self, w: np.ndarray, update: np.ndarray) -> np.ndarray:
        """What the leaf would stand for with this weight and this `scaling * a @ b`."""
        return w + update

    def present(self) -> dict[str, Any]:
        """The arrays beside the weight that are here: all, or those of one half of a split."""
        return {name: x for name in self.arrays if (x := getattr(self, name)) is not None}

    def of_layers(self, index: Any) -> dict[str, Any]:
        """`present`, the arrays of a stack cut to some of its layers by an index."""
        return {
            name: array[index] if "stack" in self.arrays[name][1] else array
            for name, array in self.present().items()
        }

    def num_trained(self) -> int:
        """How many parameters of the leaf train."""
        return sum(x.size for name, x in self.present().items() if self.arrays[name][0] != "frozen")

    def labels(self) -> Self:
        """The same leaf with `lora_a`, `lora_b`, `frozen`, ... in the places of its arrays."""
        w = jax.tree.map(lambda _: "frozen", self.w)
        return dataclasses.replace(self, w=w, **{n: self.arrays[n][0] for n in self.present()})


def init(
    key: jax.Array,
    params: Any,
    config: LoraConfig,
    *,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    base: Any = None,
) -> Any:
    """Replaces the chosen weights of a tree by `LoraArray` leaves with fresh adapters.

    `a` is uniform in `±1 / sqrt(d_in)` (as PEFT draws it), `b` is zero. Each leaf's key is derived
    from its path, so the same seed gives the same adapters in any order of targets and on any mesh.

    Args:
      key: a PRNG key.
      params: a tree of arrays, or of `ShapeDtypeStruct`s, which gives a tree of those.
      config: what to adapt and how.
      fn: called as `fn(params, *args)`, abstractly, to see how it uses each weight. Needed for
        `"all-linear"` and for weights of more than two axes that `config.axes` does not name;
        without it a matrix is taken as `[d_in, d_out]`.
      args: further arguments of `fn`; `ShapeDtypeStruct`s will do.
      base: the weights before they were quantised, for a `config.init` that starts from them.

    Returns:
      The tree with a `LoraArray` in place of each chosen weight.

    Raises:
      ValueError: if a pattern matches nothing, a target is no weight, its axes are unknown, nothing
        is known of `config.init` or `config.variant`, or the arguments are not in this order.
    """
    _check_order(key, params, config)
    if not isinstance(args, list | tuple):
        raise ValueError(
            f"args are the arguments of fn after params, got one {type(args).__name__}: write "
            "args=(x,) with a comma."
        )
    restart, kind = _initialiser_of(config), variant_of(config)
    leaves = leaves_by_path(params)
    uses = find_weights(fn, params, *args) if fn is not None else None
    roles = choose(leaves, config, uses)
    for path in roles:
        if isinstance(leaves[path], LoraArray):
            raise ValueError(f"{path!r} already has an adapter; merge it before adding another.")
    _check_train(leaves, config, roles)
    rows = choose_rows(leaves, config, roles)

    shapes = {
        path: _factor_shapes(path, leaves[path], r, config, kind) for path, r in roles.items()
    }
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))

    draw = functools.partial(kind.draw, shapes=shapes, roles=roles, dtype=config.dtype)
    factors = jax.eval_shape(draw, key) if abstract else draw(key)

    def adapt_leaf(path: str, leaf: Any) -> Any:
        if path in rows:
            begin = functools.partial(RowsArray.start, dtype=config.dtype, **rows[path])
            return jax.eval_shape(begin, leaf) if abstract else begin(leaf)
        if path not in roles:
            return leaf
        scaling = config.scaling_of(path)
        start = functools.partial(
            kind.start, scaling=scaling, axes=roles[path], dropout=config.dropout
        )
        arguments = (leaf, *factors[path])
        return jax.eval_shape(start, *arguments) if abstract else start(*arguments)

    adapted = tree.map_with_path(adapt_leaf, params, is_leaf=is_array_leaf)
    trainable, frozen = count_parameters(adapted, config)
    share = 100 * trainable / max(1, trainable + frozen)
    _LOG.info(
        "%s on %d weights: %s trainable parameters beside %s frozen ones, %.3f %%.",
        kind.kind, len(roles), f"{trainable:,}", f"{frozen:,}", share,
    )  # fmt: skip
    return adapted if restart is None or abstract else restart(key, adapted, base)


_Initialiser = Callable[[re.Match[str], jax.Array, Any, Any], Any]
_INITIALISERS: dict[str, _Initialiser] = {}


def initialiser(pattern: str) -> Callable[[_Initialiser], _Initialiser]:
    """Registers `fn(match, key, adapted, base)` for a `config.init` that matches a regex whole."""

    def register(fn: _Initialiser) -> _Initialiser:
        _INITIALISERS[pattern] = fn
        return fn

    return register


_VARIANTS: dict[str, type[LoraArray]] = {"lora": LoraArray}


def variant(name: str) -> Callable[[type[LoraArray]], type[LoraArray]]:
    """Registers a leaf class for a `config.variant`."""

    def register(kind: type[LoraArray]) -> type[LoraArray]:
        _VARIANTS[name] = kind
        return kind

    return register


def variant_of(config: LoraConfig) -> type[LoraArray]:
    """The leaf class that a config asks for."""
    if config.variant not in _VARIANTS:
        raise ValueError(f"variant must be one of {sorted(_VARIANTS)}, got {config.variant!r}.")
    return _VARIANTS[config.variant]


def _initialiser_of(config: LoraConfig) -> Callable[..., Any] | None:
    if config.init == "default":
        return None
    for pattern, start in _INITIALISERS.items():
        if match := re.fullmatch(pattern, config.init):
            return functools.partial(start, match)
    raise ValueError(
        f"init must be 'default' or match one of {sorted(_INITIALISERS)}, got {config.init!r}."
    )


def _check_order(key: Any, params: Any, config: Any) -> None:
    dtype = getattr(key, "dtype", None)
    is_key = dtype is not None and (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or (dtype == jnp.uint32 and key.ndim == 1)
    )
    if not is_key or isinstance(params, LoraConfig) or not isinstance(config, LoraConfig):
        given = ", ".join(type(argument).__name__ for argument in (key, params, config))
        raise ValueError(
            "init takes a PRNG key, the parameters and a LoraConfig, in this order: "
            f"jlora.init(jax.random.key(0), params, config). It got: {given}."
        )


def _check_train(leaves: Mapping[str, Any], config: LoraConfig, adapted: Iterable[str]) -> None:
    for pattern in config.train:
        matched = [path for path in leaves if tree.matches(pattern, path)]
        if not matched:
            raise tree.unmatched("train", pattern, leaves)
        for path in matched:
            if path in adapted:
                raise ValueError(f"{path!r} is both in targets and in train; choose one.")
            if isinstance(leaves[path], RowsArray):
                raise ValueError(f"{path!r} is both in rows and in train; choose one.")
            if isinstance(leaves[path], QuantArray):
                raise ValueError(
                    f"train names {path!r}, which is quantised and has no gradient: leave it out "
                    "of train or quantize (model.quantize, model.quantize_embeddings in a run)."
                )
            dtype = getattr(leaves[path], "dtype", type(leaves[path]).__name__)
            if isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"train names {path!r}, whose dtype {dtype} has no gradient.")


_Shapes = tuple[int, tuple[int, ...], tuple[int, ...]]


def _factor_shapes(
    path: str, leaf: Any, roles: tuple[Axis, ...], config: LoraConfig, kind: type[LoraArray]
) -> _Shapes:
    """The number of inputs, the shape of `a` and the shape of `b` for a weight."""
    stack, inputs, outputs = (
        tuple(size for size, role in zip(leaf.shape, roles) if role == wanted)
        for wanted in ("stack", "in", "out")
    )
    d_in, d_out = math.prod(inputs), math.prod(outputs)
    rank = config.rank_of(path)
    if rank > min(d_in, d_out) and not kind.any_rank:
        raise ValueError(
            f"rank {rank} is too large for {path!r}, which maps {d_in} inputs to {d_out} outputs. "
            "Lower rank, give this weight its own in rank_pattern, or exclude it."
        )
    return d_in, (*stack, *inputs, rank), (*stack, rank, *outputs)


def _draw_factors(
    key: jax.Array,
    path: str,
    d_in: int,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    dtype: str,
) -> tuple[jax.Array, jax.Array]:
    """`a` uniform in `±1 / sqrt(d_in)` from a key of its own path, and `b` zero."""
    name = np.uint32(zlib.crc32(path.encode()))
    a = _draw_uniform(key, name, np.float32(d_in**-0.5), a_shape, dtype)
    return a, jnp.zeros(b_shape, dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))  # one program for all weights of one shape
def _draw_uniform(
    key: jax.Array, name: jax.Array, bound: jax.Array, shape: tuple[int, ...], dtype: str
) -> jax.Array:
    key = jax.random.fold_in(key, name)
    return (bound * jax.random.uniform(key, shape, jnp.float32, -1, 1)).astype(dtype)


def labels(params: Any, config: LoraConfig) -> Any:
    """Names each array `lora_a`, `lora_b`, `magnitude`, `full` (trained whole) or `frozen`.

    Args:
      params: a tree from `init`, or either half of it from `split`.
      config: the config it was made with.

    Returns:
      A tree of the same structure with a string in place of each array.
    """

    def label(path: str, leaf: Any) -> Any:
        if isinstance(leaf, LoraArray | RowsArray):
            return leaf.labels()
        if isinstance(leaf, QuantArray):
            return jax.tree.map(lambda _: "frozen", leaf)
        trains = config.trains_whole(path)
        return jax.tree.map(lambda _: "full" if trains else "frozen", leaf)

    return tree.map_with_path(label, params, is_leaf=is_array_leaf)


def split(params: Any, config: LoraConfig) -> tuple[Any, Any]:
    """Cuts a tree into what trains and what does not: two trees of one shape, None in the holes.

    Take gradients with respect to the first: then no gradient, moment or update of a frozen weight
    ever exists. `jlora.combine` joins them.

    Raises:
      ValueError: if a pattern of `config.train` matches nothing, or nothing would train.
    """
    leaves = leaves_by_path(params)
    _check_train(leaves, config, [p for p, leaf in leaves.items() if isinstance(leaf, LoraArray)])
    names = labels(params, config)
    if all(name == "frozen" for name in jax.tree.leaves(names)):
        raise ValueError("Nothing in this tree trains: it has no adapters. Call jlora.init first.")
    trainable = jax.tree.map(lambda name, x: None if name == "frozen" else x, names, params)
    frozen = jax.tree.map(lambda name, x: x if name == "frozen" else None, names, params)
    return trainable, frozen


def merge_params(params: Any, *, dtype: Any = None, requantize: bool = False) -> Any:
    """The tree with plain arrays: each adapter's update is added to its weight.

    Pure, so nothing drifts however often it is called: `w + scaling * a @ b` in float32, rounded
    once. A quantised weight becomes the dense one that it stands for.

    Args:
      params: a tree from `init`, also under `jit`, or a single leaf.
      dtype: of the merged weights; by default that of each base weight.
      requantize: pack merged weights whose base is quantised again, in the same format, and leave
        quantised weights without an adapter as they are. `jlora.merge_error` says what that costs.

    Raises:
      ValueError: if both `dtype` and `requantize` are given.
    """
    if requantize and dtype is not None:
        raise ValueError("A weight is quantised again in its own format: leave dtype out.")

    def merge(leaf: Any) -> Any:
        if isinstance(leaf, QuantArray):
            return leaf if requantize else dequantize(leaf, dtype=dtype)
        if isinstance(leaf, RowsArray):
            w = leaf.w if dtype is None else leaf.w.astype(dtype)
            return dataclasses.replace(leaf, w=w).materialise()
        if not isinstance(leaf, LoraArray):
            return leaf
        if requantize and isinstance(leaf.w, QuantArray):
            wide = dequantize(leaf.w, dtype=jnp.promote_types(leaf.dtype, jnp.float32))
            return leaf.w.pack_like(dataclasses.replace(leaf, w=wide).materialise())
        if dtype is None:
            return leaf.materialise()
        wide = jnp.promote_types(dtype, jnp.float32)
        base = leaf.w.materialise() if is_array_leaf(leaf.w) else leaf.w
        return dataclasses.replace(leaf, w=base.astype(wide)).materialise().astype(dtype)

    return jax.tree.map(merge, guarded(params), is_leaf=is_array_leaf)


def count_parameters(
    params: Any, config: LoraConfig, measure: Callable[[Any], int] = lambda x: math.prod(x.shape)
) -> tuple[int, int]:
    """A measure summed over what trains and over what does not; a quantised weight is one."""

    def one(leaf: Any) -> bool:
        return isinstance(leaf, QuantArray)

    leaves, treedef = jax.tree.flatten(params, is_leaf=one)
    names = treedef.flatten_up_to(labels(params, config))
    trainable = frozen = 0
    for name, leaf in zip(names, leaves):
        size = measure(leaf) if hasattr(leaf, "dtype") else 0
        if one(leaf) or name == "frozen":
            frozen += size
        else:
            trainable += size
    return trainable, frozen
