"""Parameters filled tensor by tensor as a file is read: dense or quantised, where they belong.

A file has one tensor for each layer, mostly `[out, in]`; a parameter is the stack of them. The
experts of a layer count as one tensor, `[experts, out, in]`. Each tensor goes to the devices alone,
is quantised there if asked for, and is written into the stack in place: the host never holds more
than one, the devices one besides what is loaded. On a mesh, each process reads of every tensor only
what its own devices hold.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jlora import quant
from jlora.models import slices
from jlora.models.decoder import DecoderConfig, param_shapes
from jlora.quant import QuantArray

__all__ = [
    "Formats",
    "Place",
    "Source",
    "abstract",
    "axes_at",
    "describe",
    "fill",
    "format_at",
    "plan",
]

Place = Callable[[str, tuple[int, ...]], Sharding | None]
# One format for the weights of linear layers inside the layers, or formats by kind of weight:
# "layers" for those, "embeddings" for the embedding and an untied head.
Formats: TypeAlias = quant.Format | Mapping[str, quant.Format | None] | None

_KINDS = ("layers", "embeddings")
_TABLES = ("embed_tokens/embedding", "lm_head/kernel")


def format_at(path: str, formats: Formats) -> quant.Format | None:
    """The format that loading packs the parameter at this path in; None leaves it as it is.

    What is called layers are the weights of the linear layers inside the layers, as transformers
    has it with bitsandbytes, and experts: no router, no norm, no bias.
    """
    by_kind = _by_kind(formats)
    if unknown := set(by_kind) - set(_KINDS):
        raise ValueError(f"quantize has formats for {list(_KINDS)}, got {sorted(unknown)}.")
    for fmt in by_kind.values():
        if fmt is not None and (not isinstance(fmt, str) or fmt not in quant.FORMATS):
            raise ValueError(
                f"quantize must be one of {sorted(quant.FORMATS)} or None, got {fmt!r}."
            )
    router = path == "layers/mlp/gate/kernel"
    if path.startswith("layers/") and path.endswith("/kernel") and not router:
        return by_kind.get("layers")
    return by_kind.get("embeddings") if path in _TABLES else None


def describe(formats: Formats) -> str | None:
    """The formats in a few words; None if there are none."""
    layers, embeddings = map(_by_kind(formats).get, _KINDS)
    words = [layers, None if embeddings is None else f"embeddings {embeddings}"]
    return ", ".join(word for word in words if word is not None) or None


def _by_kind(formats: Formats) -> Mapping[str, quant.Format | None]:
    if not (formats is None or isinstance(formats, str | Mapping)):
        raise ValueError(
            f"quantize must be one of {sorted(quant.FORMATS)}, None, or formats for {list(_KINDS)} "
            f"such as {{'layers': 'nf4', 'embeddings': 'int8'}}, got {formats!r}."
        )
    return formats if isinstance(formats, Mapping) else {"layers": formats}


def plan(path: str, shape: Sequence[int], dtype: Any, formats: Formats) -> Any:
    """The parameter to make, as a `ShapeDtypeStruct` or a quantised leaf of those."""
    leaf = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
    fmt = format_at(path, formats)
    if fmt is None:
        return leaf
    pack = functools.partial(quant.pack_weight, axes=axes_at(path, len(shape)), fmt=fmt)
    return jax.eval_shape(pack, leaf)


def axes_at(path: str, ndim: int) -> tuple[Any, ...]:
    """The roles of a parameter's axes in which loading packs it."""
    if path.endswith("/embedding"):
        return ("out", "in")  # rows are looked up whole, and an output of a tied head
    return (*(("stack",) * (ndim - 2)), "in", "out")


def abstract(config: DecoderConfig, formats: Formats = None) -> Any:
    """The parameters of a model in its dtype as `ShapeDtypeStruct`s, packed as loading does."""

    def of(keys: Any, leaf: Any) -> Any:
        return plan("/".join(key.key for key in keys), leaf.shape, config.dtype, formats)

    return jax.tree_util.tree_map_with_path(of, param_shapes(config))


@dataclasses.dataclass(frozen=True)
class Source:
    """One parameter in a file.

    Attributes:
      path: of the parameter.
      leaf: from `plan`.
      layers: for each layer, or for the whole, a function that gives the tensors it is made of: one
        or, with the form "parts", those of a packed leaf; read already, or when they are cut.
      form: the tensor is the parameter's layer as it is, or its transpose `[out, in]`, which a
        quantised leaf packs in this orientation.
      stacked: whether the parameter has an axis of layers.
    """

    path: str
    leaf: Any
    layers: Sequence[Callable[[], Sequence[slices.Tensor]]]
    form: Literal["plain", "transposed", "parts"]
    stacked: bool


def fill(source: Source, place: Place | None = None) -> Any:
    """Reads a parameter, one tensor at a time.

    Args:
      source: where it is.
      place: gives the placement of a weight by its path and shape; None, or where it returns None:
        the default device. A quantised weight's arrays are cut as the weight is, no block apart.

    Raises:
      ValueError: if a weight to be quantised holds NaN or infinite elements.
    """
    leaf = source.leaf
    sharding = place(source.path, tuple(leaf.shape)) if place is not None else None
    shapes, treedef = jax.tree.flatten(leaf)
    shardings = _shardings(leaf, sharding, len(shapes))
    packs = isinstance(leaf, QuantArray) and source.form != "parts"
    if not source.stacked and packs:
        return _packed(source, sharding, shardings)
    if not source.stacked:
        turned = source.form == "transposed"
        arrays = [
            _put(slices.Turned(x, s.dtype, transposed=turned), where)
            for x, s, where in zip(source.layers[0](), shapes, shardings, strict=True)
        ]
        return treedef.unflatten(arrays)
    # The stack is written where the compiler may choose placements on the way; an Explicit mesh,
    # which wants them spelled out, is back at the end.
    sharding = _automatic(sharding)
    out = [_automatic(x) for x in shardings] if sharding is not None else None
    arrays = jax.jit(_zeros, static_argnums=0, out_shardings=out)(
        tuple((x.shape, x.dtype) for x in shapes)
    )
    write = jax.jit(_write, static_argnames=("form", "fmt", "dtype"), donate_argnums=0,
                    out_shardings=out)  # fmt: skip
    for layer, read in enumerate(source.layers):
        tensors = [
            _put(tensor, _layer_sharding(sharding, source.form, len(tensor.shape)))
            for tensor in read()
        ]
        if packs:
            quant.check_finite(tensors[0], f"{source.path!r}, layer {layer},")
        arrays = write(
            arrays,
            tensors,
            layer,
            form=source.form,
            fmt=quant.format_of(leaf) if packs else None,
            dtype=leaf.dtype.name,
        )
        jax.block_until_ready(arrays)  # or the tensors of later layers would gather on the device
    if sharding is not None:
        arrays = jax.device_put(arrays, shardings)
    return treedef.unflatten(arrays)


def _packed(source: Source, sharding: Sharding | None, shardings: list[Any]) -> Any:
    """A parameter without layers, packed from its one tensor."""
    leaf: QuantArray = source.leaf
    (tensor,) = source.layers[0]()
    axes = leaf.axes
    if source.form == "transposed":
        axes = axes[::-1]
        if isinstance(sharding, NamedSharding):
            places = [*sharding.spec, None, None][:2][::-1]
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*places))
    table = _put(tensor, _automatic(sharding))
    quant.check_finite(table, repr(source.path))

    def pack(table: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(
            quant.pack_weight(table.astype(leaf.dtype), axes, quant.format_of(leaf))
        )

    out = None if sharding is None else [_automatic(x) for x in shardings]
    arrays = jax.block_until_ready(jax.jit(pack, out_shardings=out)(table))
    if sharding is not None:
        arrays = jax.device_put(arrays, shardings)
    return jax.tree.unflatten(jax.tree.structure(leaf), arrays)


def _automatic(sharding: Sharding | None) -> Sharding | None:
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh: Any = sharding.mesh
    return NamedSharding(jax.sharding.Mesh(mesh.devices, mesh.axis_names), sharding.spec)


def _put(tensor: slices.Tensor, where: Sharding | None) -> jax.Array:
    if isinstance(where, NamedSharding):
        return slices.place(tensor, where)
    # A copy, for what was read may be a view of the file.
    return jax.device_put(slices.whole(tensor), where, may_alias=False)


def _zeros(shapes: Sequence[tuple[tuple[int, ...], Any]]) -> list[jax.Array]:
    return [jnp.zeros(shape, dtype) for shape, dtype in shapes]


def _write(
    arrays: Sequence[jax.Array],
    tensors: Sequence[jax.Array],
    layer: jax.Array,
    *,
    form: str,
    fmt: quant.Format | None,
    dtype: str,
) -> list[jax.Array]:
    """Puts one layer into the stacked arrays."""
    if fmt is not None:
        (matrix,) = tensors
        axes: Any = ("out", "in") if form == "transposed" else ("in", "out")
        axes = ("stack",) * (matrix.ndim - 2) + axes
        tensors = jax.tree.leaves(quant.pack_weight(matrix.astype(dtype), axes, fmt))
    elif form == "transposed":
        tensors = [tensor.swapaxes(-1, -2) for tensor in tensors]
    pairs = zip(arrays, tensors, strict=True)
    return [
        jax.lax.dynamic_update_index_in_dim(array, tensor.astype(array.dtype), layer, 0)
        for array, tensor in pairs
    ]


def _shardings(leaf: Any, sharding: Sharding | None, count: int) -> list[Any]:
    """That of each array of a leaf."""
    if isinstance(leaf, QuantArray) and isinstance(sharding, NamedSharding):
        return jax.tree.leaves(quant.placements(leaf, sharding))
    return [sharding] * count


def _layer_sharding(sharding: Sharding | None, form: str, ndim: int) -> Any:
    """Where a layer's tensor goes: cut as the weight is, so that no device receives all of it."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    if form == "parts":
        return NamedSharding(sharding.mesh, PartitionSpec())
    places = [*sharding.spec[1:], *[None] * (ndim + 1 - len(sharding.spec))][:ndim]
    if form == "transposed":
        places[-2:] = places[-2:][::-1]
    return NamedSharding(sharding.mesh, PartitionSpec(*places))
