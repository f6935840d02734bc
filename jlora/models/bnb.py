"""Weights that bitsandbytes serialised in four bits, as NF4Array leaves or exactly dequantised.

transformers' `save_pretrained` of a model in NF4 writes, for each weight `[out, in]`, its bytes and
beside them the scales, the maps of codes to values, and a JSON text about them.
"""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import nf4
from jlora.models.weights import Source
from jlora.quant import Format, NF4Array

__all__ = ["Packed", "collect", "is_packed", "source"]

_LOG = logging.getLogger("jlora")
_STATE = ".quant_state.bitsandbytes__"
_FORMAT = "quantization_config of bitsandbytes with load_in_4bit and bnb_4bit_quant_type='nf4'"


def is_packed(config: Mapping[str, Any], source: str) -> bool:
    """Whether a config.json says that the weights are in NF4.

    Raises:
      NotImplementedError: if they are in another format.
    """
    given = config.get("quantization_config")
    if not given:
        return False
    method = given.get("quant_method", "bitsandbytes")
    kind = given.get("bnb_4bit_quant_type", "fp4")  # what bitsandbytes takes where nothing is said
    if method == "bitsandbytes" and given.get("load_in_4bit") and kind == "nf4":
        return True
    what = f"quant_method={method!r}"
    if method == "bitsandbytes":
        what += f", {kind} in 4 bits" if given.get("load_in_4bit") else ", 8 bits (LLM.int8)"
    raise NotImplementedError(
        f"{source} says that the weights are quantised: {what}. Read are a {_FORMAT}, and weights "
        "that are not quantised, which quantize= packs as they are read."
    )


@dataclasses.dataclass(frozen=True)
class Packed:
    """One weight `[out, in]` of four bits an element.

    Attributes:
      name: of the weight.
      file: it is in.
      shape: of the dense weight.
      dtype: of the weight that was quantised.
      tensors: the bytes at "" and what lies beside them, by the end of the name.
      block: elements that share a scale.
      offset: the mean of the scales where those are quantised too, else None.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    tensors: Mapping[str, Any]
    block: int
    offset: float | None

    @property
    def stored(self) -> str:
        """The type as safetensors calls it."""
        return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(self.dtype, self.dtype)

    def fits(self) -> bool:
        """Whether an NF4Array can hold it: blocks of 64 that do not run from row to row."""
        return self.block == nf4.BLOCK and self.shape[1] % nf4.BLOCK == 0

    def parts(self) -> list[np.ndarray]:
        """The arrays of an NF4Array."""
        rows, columns = self.shape
        blocks = columns // nf4.BLOCK
        arrays = [self._codes().reshape(rows, columns // 2)]
        arrays.append(self.tensors[".absmax"].read().reshape(rows, blocks))
        if self.offset is not None:
            scale = self.tensors[".nested_absmax"].read().reshape(nf4.num_groups(rows, blocks))
            arrays += [scale, np.asarray(self.offset, np.float32)]
        return arrays

    def read(self) -> np.ndarray:
        """The dense weight, as bitsandbytes defines it: `code * absmax`, rounded to the dtype."""
        size = self.shape[0] * self.shape[1]
        codes = self._codes()
        values = nf4.CODE[np.stack([codes >> 4, codes & 15], axis=-1)].reshape(-1)[:size]
        absmax = self.tensors[".absmax"].read().reshape(-1)
        if self.offset is not None:
            scale = np.repeat(self.tensors[".nested_absmax"].read(), nf4.GROUP)[: absmax.size]
            absmax = nf4.DYNAMIC_MAP[absmax] * scale + np.float32(self.offset)
        values *= np.repeat(absmax, self.block)[:size]
        return values.reshape(self.shape).astype(jnp.dtype(self.dtype))

    def _codes(self) -> np.ndarray:
        # They may be stored as numbers of another type, for programs that shard by it.
        return np.ascontiguousarray(self.tensors[""].read()).reshape(-1).view(np.uint8)


def collect(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a folder with a `Packed` in place of each weight's several.

    Args:
      tensors: by name; with `file`, `shape` and `read()`.

    Raises:
      ValueError: if a weight lacks a part, or a part cannot be.
      NotImplementedError: if it is in another format of bitsandbytes.
    """
    found = dict(tensors)
    for state_name in [name for name in tensors if _STATE in name]:
        name, kind = state_name.split(_STATE)
        if kind != "nf4":
            raise NotImplementedError(
                f"{tensors[state_name].file}: {name} is quantised to {kind!r}; only nf4 is read."
            )
        found[name] = _packed(name, tensors, state_name)
        for end in (f"{_STATE}{kind}", *_ENDS):
            found.pop(name + end, None)
    return found


_NESTED_ENDS = (".nested_absmax", ".nested_quant_map")
_ENDS = (".absmax", ".quant_map", *_NESTED_ENDS)


def _packed(name: str, tensors: Mapping[str, Any], state_name: str) -> Packed:
    file = tensors[state_name].file
    try:
        state = json.loads(tensors[state_name].read().tobytes())
        rows, columns = shape = tuple(state["shape"])
        block, dtype = int(state["blocksize"]), str(state["dtype"])
        nested = "nested_blocksize" in state
        offset = float(state["nested_offset"]) if nested else None
        groups_of = state.get("nested_blocksize", nf4.GROUP)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {state_name} cannot be read: {error!r}.") from error
    ends = ("", *_ENDS) if nested else ("", ".absmax", ".quant_map")
    if absent := [name + end for end in ends if name + end not in tensors]:
        raise ValueError(f"{file}: the quantised weight {name} lacks {', '.join(absent)}.")
    parts = {end: tensors[name + end] for end in ends}
    blocks = -(-rows * columns // block)
    sizes = {"": -(-rows * columns // 2), ".absmax": blocks, ".quant_map": 16}
    if nested:
        sizes |= {".nested_absmax": nf4.num_groups(1, blocks), ".nested_quant_map": 256}
    given = {end: math.prod(parts[end].shape) for end in sizes}
    # Stored as bytes, or as numbers of another type: "U8", "BF16", "F32", ...
    given[""] *= int(re.findall(r"\d+", parts[""].stored)[0]) // 8
    maps = {".quant_map": nf4.CODE, ".nested_quant_map": nf4.DYNAMIC_MAP}
    if (
        given != sizes
        or groups_of != nf4.GROUP
        or not all(
            np.array_equal(parts[end].read(), values)
            for end, values in maps.items()
            if end in parts
        )
    ):
        raise ValueError(
            f"{file}: the parts of {name} {shape} are not those of NF4 with blocks of {block}: "
            f"sizes {given}, expected {sizes}, with bitsandbytes' own maps."
        )
    return Packed(name, file, shape, dtype, parts, block, offset)


def source(
    path: str,
    shape: tuple[int, ...],
    tensors: Sequence[Any],
    dtype: Any,
    fmt: Format | None,
    *,
    stacked: bool,
) -> Source:
    """Where to read a parameter of which at least one layer is packed.

    It becomes an NF4Array if every layer can be part of one; else it is dense, exactly what
    bitsandbytes' codes stand for, and the log says why.
    """
    if fmt not in (None, "nf4"):
        raise ValueError(
            f"{tensors[0].file} holds weights in nf4 already; quantising those to {fmt!r} would "
            "lose more. Leave quantize out, or take the original weights."
        )
    packed = [tensor for tensor in tensors if isinstance(tensor, Packed)]
    kinds = {tensor.offset is None for tensor in packed}
    dtype = jnp.dtype(dtype or jnp.result_type(*{tensor.dtype for tensor in packed}))
    if len(packed) == len(tensors) and len(kinds) == 1 and all(t.fits() for t in packed):
        leaf = _leaf(shape, dtype, double=kinds == {False}, stacked=stacked)
        return Source(path, leaf, [tensor.parts for tensor in tensors], "parts", stacked)
    _LOG.warning(
        "%s is kept dense: its 4-bit blocks run from row to row, or not all its layers have them.",
        path,
    )
    layers = [lambda tensor=tensor: [tensor.read()] for tensor in tensors]
    return Source(path, jax.ShapeDtypeStruct(shape, dtype), layers, "transposed", stacked)


def _leaf(shape: tuple[int, ...], dtype: Any, *, double: bool, stacked: bool) -> NF4Array:
    *stack, columns, rows = shape
    blocks = columns // nf4.BLOCK

    def array(kind: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*stack, *sizes), kind)

    return NF4Array(
        codes=array(jnp.uint8, rows, columns // 2),
        axes=("stack", "in", "out") if stacked else ("in", "out"),
        sizes=(0,) * len(shape),
        dtype_name=dtype.name,
        padding=0,
        absmax=array(jnp.uint8 if double else jnp.float32, rows, blocks),
        absmax_scale=array(jnp.float32, nf4.num_groups(rows, blocks)) if double else None,
        absmax_offset=array(jnp.float32) if double else None,
    )
