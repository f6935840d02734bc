"""Parameters filled tensor by tensor as a file is read: dense or quantised, where they belong.

A file has one tensor for each layer, mostly `[out, in]`; a parameter is the stack of them. The
experts of a layer count as one tensor, `[experts, out, in]`. Each tensor goes to the devices alone,
is quantised there if asked for, and is written into the stack in place: the host never holds more
than one, the devices one besides what is loaded. On a mesh, each process reads of every tensor only
what its own devices hold.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jlora import quant
from jlora.models import slices
from jlora.quant import QuantArray

__all__ = ["Place", "Source", "fill", "is_quantised", "plan"]

Place = Callable[[str, tuple[int, ...]], Sharding | None]


def is_quantised(path: str) -> bool:
    """Whether loading in a quantised format quantises the parameter at this path.

    These are the weights of the linear layers inside the layers, as transformers has it with
    bitsandbytes, and experts: no embedding, no head, no router, no norm, no bias.
    """
    router = path == "layers/mlp/gate/kernel"
    return path.startswith("layers/") and path.endswith("/kernel") and not router


def plan(path: str, shape: Sequence[int], dtype: Any, fmt: quant.Format | None) -> Any:
    """The parameter to make, as a `ShapeDtypeStruct` or a quantised leaf of those."""
    if fmt is not None and fmt not in quant.FORMATS:
        raise ValueError(f"quantize must be one of {sorted(quant.FORMATS)} or None, got {fmt!r}.")
    leaf = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
    if fmt is None or not is_quantised(path):
        return leaf
    axes: Any = (*(("stack",) * (len(shape) - 2)), "in", "out")
    return jax.eval_shape(functools.partial(quant.pack_weight, axes=axes, fmt=fmt), leaf)


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
    packs = isinstance(leaf, QuantArray) and source.form != "parts"
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
