"""NF4 codes that a run rounds to its own rows: found once, and kept in its folder."""

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import gptq, packing, starts, targets, tree
from jlora.base import Base
from jlora.fingerprint import check_base, differences, fingerprint
from jlora.leaf import is_array_leaf
from jlora.quant import NF4Array

__all__ = ["FILE", "calibrate", "load", "save"]

FILE = "calibrated.npz"


def calibrate(base: Base, batches: Sequence[packing.Batch], originals: Any) -> Base:
    """Rounds the layers' NF4 weights to what they give for some batches.

    Args:
      base: without adapters, its layers in NF4.
      batches: to measure on.
      originals: the weights before quantising.
    """
    tables = [path for path in _packed(base) if not path.startswith("layers/")]
    params = gptq.calibrate(
        base.params,
        starts.outputs_of(base, "hidden"),
        batches,
        base=originals,
        exclude=tables,  # they look rows up whole, or meet no layer
    )
    return dataclasses.replace(base, params=params)


def _packed(base: Base) -> dict[str, NF4Array]:
    leaves = targets.leaves_by_path(base.params)
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, NF4Array)}


def save(file: Path, base: Base, found: Base, origin: Mapping[str, Any]) -> None:
    """Writes the codes of NF4 weights, whole or not at all.

    Args:
      file: replaced if it is there.
      base: as it was packed, for `load` to compare: scales are those of the base's own.
      found: from `calibrate` of it.
      origin: what they were rounded to and with, for `load` to compare.
    """
    codes = {path: np.asarray(leaf.codes) for path, leaf in _packed(found).items()}
    packed = _packed(base)
    text = json.dumps({"dtypes": _dtypes(packed), "weights": fingerprint(packed)})
    starts.write_arrays(file, codes, origin, base=text)


def _dtypes(packed: Mapping[str, NF4Array]) -> list[str]:
    return sorted({leaf.dtype_name for leaf in packed.values()})


def load(
    file: Path,
    base: Base,
    origin: Mapping[str, Any] | None = None,
    *,
    other_base: bool = False,
) -> Base | None:
    """Puts the codes that a run found into its base.

    Args:
      file: that `save` wrote.
      base: as it was packed, without adapters. In another dtype than the codes were found in it has
        other ones, so that shapes alone are compared.
      origin: as given to `save`; None takes whatever is there.
      other_base: leave a base as it is that the codes were not found for, with a warning.

    Returns:
      The base; None if there is no such file, or it has another origin.

    Raises:
      ValueError: if the file is damaged, or its codes were found for another base.
    """

    def parse(values: dict[str, Any]) -> tuple[list[str], dict[str, str], dict[str, Any]]:
        base = json.loads(str(values.pop("base")))
        return base["dtypes"], base["weights"], values

    again = "rounds its base again, if it is not finished"
    read = starts.read_arrays(file, origin, parse, again=again)
    if read is None:
        return None
    dtypes, weights, codes = read
    packed = _packed(base)
    recorded = weights if dtypes == _dtypes(packed) else {}
    if other_base and differences(recorded, packed):
        warnings.warn(
            f"The codes of {file} are those of another base: this one keeps its nearest codes, on "
            "which nothing was trained.",
            stacklevel=3,
        )
        return base
    check_base(file, base.name, recorded, packed)
    for path in sorted(codes.keys() | packed.keys()):
        if path not in packed or np.shape(codes.get(path)) != packed[path].codes.shape:
            raise ValueError(f"{file} holds the codes of another model: see {path!r}.")

    def put(path: str, leaf: Any) -> Any:
        return dataclasses.replace(leaf, codes=jnp.asarray(codes[path])) if path in codes else leaf

    params = tree.map_with_path(put, base.params, is_leaf=is_array_leaf)
    return dataclasses.replace(base, params=params)
