"""A frozen base in fewer bits: formats, and how a parameter tree gets into them and out again.

`quantize` replaces chosen weights of a tree by leaves that stand for them; `adapt` runs a function
on such a tree, `init` puts adapters on top. What a function does with a leaf is in
`packed_rules.py`, the arithmetic of NF4 in `nf4.py`.
"""

import collections
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jlora import nf4, tree
from jlora import packed_products as _products  # noqa: F401  registers rules
from jlora import packed_rules as _rules  # noqa: F401
from jlora.leaf import is_array_leaf
from jlora.lora_config import Axis, LoraConfig
from jlora.packed import QuantArray, frozen, weight_to_matrices
from jlora.targets import choose, leaves_by_path
from jlora.tree import Pattern
from jlora.usage import find_weights

__all__ = [
    "FORMATS",
    "Float8Array",
    "Format",
    "Int8Array",
    "NF4Array",
    "QuantArray",
    "check_finite",
    "dequantize",
    "format_of",
    "guarded",
    "pack_weight",
    "placements",
    "quantize",
]

_LOG = logging.getLogger("jlora")
# Last parts of an embedding's path in Flax, Haiku and Equinox, and its names in usual models.
_EMBEDDING = re.compile(r"\w*embed\w*|w[tp]e|emb", re.IGNORECASE)
Format = Literal["nf4", "int8", "float8"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4Array(QuantArray):
    """A weight in four bits with a scale for each 64 elements (NF4, arXiv:2305.14314).

    Bit for bit as bitsandbytes stores the transposed matrix `[out, in]`, where 64 divides `in`;
    else each row is padded with zeros to whole blocks.

    Attributes:
      codes: `UInt8[*stack rows columns/2]`, the first of two elements in the high nibble.
      absmax: the scales of blocks: `UInt8[*stack rows columns/64]` codes with double quantisation,
        `Float32` of that shape without.
      absmax_scale: `Float32[*stack groups]`, one for each 256 absmax codes; None without.
      absmax_offset: `Float32[*stack]`, the mean of the absmax values; None without.
    """

    format = "nf4"

    absmax: Any
    absmax_scale: Any
    absmax_offset: Any

    def num_columns(self) -> int:
        """The columns of one matrix, without padding."""
        return 2 * self.codes.shape[-1] - self.padding

    def num_units(self) -> int:
        """The blocks of a row."""
        return 2 * self.codes.shape[-1] // nf4.BLOCK

    def block_scales(self) -> jax.Array:
        """The scale of each block, `Float32[*stack rows columns/64]`."""
        if self.absmax_scale is None:
            return self.absmax
        return nf4.restore(self.absmax, self.absmax_scale, self.absmax_offset)

    def unpack(self) -> jax.Array:
        """The dense matrices `[*stack rows columns]`."""
        return nf4.unpack(self.codes, self.block_scales(), self.dtype)

    def unpack_rows(self, rows: jax.Array) -> jax.Array:
        """Some rows of one matrix: `[*rows columns]`."""
        if self.absmax_scale is None:
            absmax = self.absmax[rows]
        else:
            parts = self.absmax, self.absmax_scale, self.absmax_offset
            absmax = nf4.restore_rows(*parts, rows)
        return nf4.unpack(self.codes[rows], absmax, self.dtype)

    def pack_like(self, w: jax.Array) -> "NF4Array":
        """Another weight of this shape in this format."""
        double = self.absmax_scale is not None
        return pack_weight(w.astype(self.dtype), self.axes, "nf4", double_quantize=double)  # pyright: ignore[reportReturnType]

    def divisible(self) -> "NF4Array":
        """With the scales of blocks restored: the second level runs over the ends of any part."""
        if self.absmax_scale is None:
            return self
        scales = self.block_scales()
        return dataclasses.replace(self, absmax=scales, absmax_scale=None, absmax_offset=None)

    def _specs(self, stack: list[Any], rows: Any, columns: Any) -> Any:
        spec = jax.sharding.PartitionSpec
        double = self.absmax_scale is not None
        return dataclasses.replace(
            self,
            codes=spec(*stack, rows, columns),
            absmax=spec(*stack, rows, columns),
            absmax_scale=spec(*stack, None) if double else None,
            absmax_offset=spec(*stack) if double else None,
        )


@dataclasses.dataclass(frozen=True)
class _PerChannel(QuantArray):
    """A weight with one scale for each output channel: `codes * scale`.

    Attributes:
      codes: `[*stack rows columns]`.
      scale: `Float32[*stack rows]`, the largest absolute value of the row over that of a code.
    """

    scale: Any

    def unpack(self) -> jax.Array:
        """The dense matrices `[*stack rows columns]`."""
        return (self.codes.astype(jnp.float32) * self.scale[..., None]).astype(self.dtype)

    def unpack_rows(self, rows: jax.Array) -> jax.Array:
        """Some rows of one matrix: `[*rows columns]`."""
        part = self.codes[rows].astype(jnp.float32) * self.scale[rows][..., None]
        return part.astype(self.dtype)

    def _specs(self, stack: list[Any], rows: Any, columns: Any) -> Any:
        spec = jax.sharding.PartitionSpec
        codes, scale = spec(*stack, rows, columns), spec(*stack, rows)
        return dataclasses.replace(self, codes=codes, scale=scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Array(_PerChannel):
    """A weight in eight bits, the nearest of 255 steps, with one scale for each output channel."""

    format = "int8"

    def pack_like(self, w: jax.Array) -> "Int8Array":
        """Another weight of this shape in this format."""
        return pack_weight(w.astype(self.dtype), self.axes, "int8")  # pyright: ignore[reportReturnType]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8Array(_PerChannel):
    """A weight in float8 (e4m3, arXiv:2209.05433) with one scale for each output channel."""

    format = "float8"

    def pack_like(self, w: jax.Array) -> "Float8Array":
        """Another weight of this shape in this format."""
        return pack_weight(w.astype(self.dtype), self.axes, "float8")  # pyright: ignore[reportReturnType]


_Pack = Callable[..., tuple[type[QuantArray], dict[str, Any]]]


def _pack_nf4(w: jax.Array, double_quantize: bool) -> tuple[type[QuantArray], dict[str, Any]]:
    codes, absmax = nf4.pack(w)
    scale = offset = None
    if double_quantize:
        absmax, scale, offset = nf4.compress(absmax)
    parts = {"codes": codes, "absmax": absmax, "absmax_scale": scale, "absmax_offset": offset}
    return NF4Array, parts


def _pack_int8(w: jax.Array, double_quantize: bool) -> tuple[type[QuantArray], dict[str, Any]]:
    scaled, scale = _scaled_rows(w, 127)
    return Int8Array, {"codes": jnp.round(scaled).astype(jnp.int8), "scale": scale}


def _pack_float8(w: jax.Array, double_quantize: bool) -> tuple[type[QuantArray], dict[str, Any]]:
    scaled, scale = _scaled_rows(w, float(jnp.finfo(jnp.float8_e4m3fn).max))
    return Float8Array, {"codes": scaled.astype(jnp.float8_e4m3fn), "scale": scale}


def _scaled_rows(w: jax.Array, largest_code: float) -> tuple[jax.Array, jax.Array]:
    w = w.astype(jnp.float32)
    scale = jnp.abs(w).max(axis=-1) / largest_code
    scaled = w / jnp.where(scale > 0, scale, 1)[:, None]
    return jnp.clip(scaled, -largest_code, largest_code), scale


FORMATS: dict[str, _Pack] = {"nf4": _pack_nf4, "int8": _pack_int8, "float8": _pack_float8}


def pack_weight(
    w: jax.Array, axes: Sequence[Axis], fmt: Format, *, double_quantize: bool = True
) -> QuantArray:
    """Quantises one weight, one matrix of its stack after the other.

    Args:
      w: `Float[*axes]`.
      axes: the role of each axis: `"in"` for those that products contract, along which blocks run.
      fmt: `"nf4"`, `"int8"` or `"float8"`.
      double_quantize: whether NF4's scales are quantised too.
    """
    axes = tuple(axes)
    matrices = weight_to_matrices(w, axes)
    padding = -matrices.shape[-1] % nf4.BLOCK if fmt == "nf4" else 0
    kind: list[type[QuantArray]] = []

    def pack(matrix: jax.Array) -> dict[str, Any]:
        # Else XLA may leave out, on a GPU, the rounding to 16 bits of what is computed just before.
        matrix = jax.lax.optimization_barrier(jnp.pad(matrix, ((0, 0), (0, padding))))
        cls, parts = FORMATS[fmt](matrix, double_quantize)
        kind[:] = [cls]
        return parts

    stack = matrices.shape[:-2]
    if stack:  # one after the other: float32 copies of the whole stack would be twice its size
        parts = jax.lax.map(pack, matrices.reshape(-1, *matrices.shape[-2:]))
        parts = jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), parts)
    else:
        parts = pack(matrices)
    return kind[0](
        axes=axes,
        sizes=_sizes(w.shape, axes),
        dtype_name=jnp.dtype(w.dtype).name,
        padding=padding,
        **parts,
    )


def _sizes(shape: Sequence[int], axes: Sequence[Axis]) -> tuple[int, ...]:
    """The sizes that the arrays do not tell: those of all but the first axis of each role."""
    first = {axes.index(role) for role in ("in", "out")}
    return tuple(
        0 if role == "stack" or axis in first else size
        for axis, (size, role) in enumerate(zip(shape, axes))
    )


_pack_compiled = jax.jit(pack_weight, static_argnames=("axes", "fmt", "double_quantize"))


def quantize(
    params: Any,
    fmt: Format = "nf4",
    *,
    targets: Pattern | Sequence[Pattern] = "all-linear",
    exclude: Pattern | Sequence[Pattern] = (),
    double_quantize: bool = True,
    axes: Mapping[Pattern, Sequence[Axis]] | Sequence[Any] = (),
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    donate: bool = False,
) -> Any:
    """Replaces chosen weights of a tree by quantised leaves, which are frozen.

    Put adapters on top with `jlora.init`, and run functions on the tree with `jlora.adapt`, with or
    without adapters. NF4 with double quantisation takes 4.127 bits a parameter.

    Args:
      params: a tree of arrays, or of `ShapeDtypeStruct`s, which gives a tree of those.
      fmt: `"nf4"` (arXiv:2305.14314; 64 elements share a scale), `"int8"` or `"float8"` (one scale
        for each output channel).
      targets: patterns of the weights, as in `LoraConfig`. `"all-linear"` is what `fn` only uses in
        matrix products; without `fn`, every matrix but those that are embeddings by their name.
      exclude: patterns of weights to leave as they are, whatever `targets` says.
      double_quantize: whether the scales of NF4 are quantised to eight bits as well.
      axes: roles of axes where no function is given, as in `LoraConfig`.
      fn: called as `fn(params, *args)`, abstractly, to see which axes its products contract.
      args: further arguments of `fn`; `ShapeDtypeStruct`s will do.
      donate: frees each weight as soon as it is packed. Of two copies of the model, one is then
        never there; `params` cannot be used again.

    Returns:
      The tree with a leaf of `Format` in place of each chosen weight.

    Raises:
      ValueError: if a pattern matches nothing, a target is no weight or empty, its axes are
        unknown, or it holds NaN or infinite elements, which is not looked for under `jit`.

    >>> packed = quantize({"w": jnp.ones((128, 32))}, "nf4")
    """
    if fmt not in FORMATS:
        raise ValueError(f"The format must be one of {sorted(FORMATS)}, got {fmt!r}.")
    leaves = leaves_by_path(params)
    uses = find_weights(fn, params, *args) if fn is not None else None
    config = LoraConfig(targets=targets, exclude=exclude, axes=axes)  # pyright: ignore[reportArgumentType]
    if uses is None and "all-linear" in config.targets:
        others = tuple(pattern for pattern in config.targets if pattern != "all-linear")
        config = dataclasses.replace(config, targets=(*others, *_matrices(leaves, config)))
    roles = choose(leaves, config, uses)
    for path in roles:
        if 0 in leaves[path].shape:
            raise ValueError(f"{path!r} of shape {leaves[path].shape} has no elements.")
        if is_array_leaf(leaves[path]):
            raise ValueError(
                f"{path!r} is a {type(leaves[path]).__name__} already. Quantise plain weights, and "
                "put adapters on top afterwards."
            )
        if uses is not None and uses[path].kind == "embedding":
            # Rows are looked up whole, so blocks run along them.
            swapped: dict[str, Axis] = {"in": "out", "out": "in", "stack": "stack"}
            roles[path] = tuple(swapped[role] for role in roles[path])
    uses_left = collections.Counter(id(leaves[path]) for path in leaves)

    def pack(path: str, leaf: Any) -> Any:
        if path not in roles:
            return leaf
        compiled = functools.partial(
            _pack_compiled, axes=roles[path], fmt=fmt, double_quantize=double_quantize
        )
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(compiled, leaf)
        if isinstance(leaf, jax.core.Tracer):  # pyright: ignore[reportAttributeAccessIssue]
            return compiled(leaf)
        check_finite(leaf, repr(path))
        packed = compiled(leaf)
        uses_left[id(leaf)] -= 1
        if donate and isinstance(leaf, jax.Array) and not uses_left[id(leaf)]:
            jax.block_until_ready(packed)
            leaf.delete()
        return packed

    return tree.map_with_path(pack, params, is_leaf=is_array_leaf)


def check_finite(w: jax.Array, name: str) -> None:
    """Raises ValueError, with the weight's name, if an element is NaN or infinite."""
    if not _is_finite(w):
        raise ValueError(
            f"{name} holds NaN or infinite elements: a scale for many elements cannot store them. "
            "Look where the weights come from."
        )


@jax.jit
def _is_finite(w: jax.Array) -> jax.Array:
    return jnp.isfinite(w).all()


def _matrices(leaves: Mapping[str, Any], config: LoraConfig) -> list[re.Pattern[str]]:
    """Patterns of the leaves that look like matrices of products where no function says."""
    not_products = {"bias", "scale"}
    found = [
        path
        for path, leaf in leaves.items()
        if len(getattr(leaf, "shape", ())) >= 2
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and path.split("/")[-1] not in not_products
        and not any(map(_EMBEDDING.fullmatch, path.split("/")[-2:]))
    ]
    if not found:
        raise ValueError("targets='all-linear' found nothing: the tree has no matrices.")
    return [re.compile(f"^{re.escape(path)}$") for path in found]


def dequantize(params: Any, *, dtype: Any = None) -> Any:
    """The tree with plain arrays in place of quantised weights, also of those inside adapters.

    Args:
      params: a tree with leaves of `quantize`.
      dtype: of the dense weights; by default that of the weights that were quantised.

    Raises:
      ValueError: if `dtype` is no floating-point type.
      TypeError: if a gradient with respect to a quantised weight is asked for.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"Weights are of floating point, got dtype={jnp.dtype(dtype).name}.")

    def unpack(leaf: Any) -> Any:
        if not isinstance(leaf, QuantArray):
            return leaf
        dtype_name = leaf.dtype_name if dtype is None else jnp.dtype(dtype).name
        leaf = dataclasses.replace(leaf, dtype_name=dtype_name)
        if isinstance(leaf.codes, jax.ShapeDtypeStruct):
            return jax.eval_shape(type(leaf).materialise, leaf)
        return _materialise_compiled(leaf)

    return jax.tree.map(unpack, guarded(params), is_leaf=lambda leaf: isinstance(leaf, QuantArray))


# One by one the steps would write arrays of several times the weight's size.
_materialise_compiled = jax.jit(lambda leaf: leaf.materialise())


def guarded(params: Any) -> Any:
    """The tree with quantised weights that say their path where their gradient is asked for."""

    def has_arrays(x: Any) -> bool:
        return isinstance(x, QuantArray) and isinstance(x.codes, jax.Array)

    def guard(path: str, leaf: Any) -> Any:
        return jax.tree.map(
            lambda x: frozen(x, path) if has_arrays(x) else x, leaf, is_leaf=has_arrays
        )

    return tree.map_with_path(guard, params, is_leaf=is_array_leaf)


def format_of(leaf: QuantArray) -> Format:
    """The format of a quantised weight, as `quantize` calls it."""
    return leaf.format  # pyright: ignore[reportReturnType]


def placements(leaf: QuantArray, sharding: NamedSharding) -> Any:
    """The leaf with a sharding in place of each array, for a weight that is placed by `sharding`.

    No block, whose elements share a scale, is ever cut: an axis that the packed form cannot cut
    there is replicated, and the log says so.
    """
    for axis in leaf.uncut_axes(sharding.spec, sharding.mesh):
        _LOG.warning(
            "Axis %d of a %s %s is replicated: its packed form has no place to cut it by %s.",
            axis, type(leaf).__name__, leaf.shape, sharding.spec[axis],
        )  # fmt: skip
    return leaf.shardings(sharding)
