"""NF4 codes that a run rounds to its own rows: found once, and kept in its folder."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import gptq, packing, starts, targets, tree
from jlora.base import Base
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
    params = gptq.calibrate(
        base.params,
        starts.outputs_of(base, "hidden"),
        batches,
        base=originals,
        exclude=("embed_tokens", "lm_head"),  # tables look rows up whole, or meet no layer
    )
    return dataclasses.replace(base, params=params)


def save(file: Path, base: Base, origin: Mapping[str, Any]) -> None:
    """Writes the codes of NF4 weights, whole or not at all.

    Args:
      file: replaced if it is there.
      base: from `calibrate`.
      origin: what they were rounded to and with, for `load` to compare.
    """
    leaves = targets.leaves_by_path(base.params)
    codes = {path: np.asarray(x.codes) for path, x in leaves.items() if isinstance(x, NF4Array)}
    starts.write_arrays(file, codes, origin)


def load(file: Path, base: Base, origin: Mapping[str, Any] | None = None) -> Base | None:
    """Puts the codes that a run found into its base.

    Args:
      file: that `save` wrote.
      base: without adapters.
      origin: as given to `save`; None takes whatever is there.

    Returns:
      The base; None if there is no such file, or it has another origin.

    Raises:
      ValueError: if the file is damaged, or fits another base.
    """
    codes = starts.read_arrays(file, origin, again="rounds its base again")
    if codes is None:
        return None

    def put(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, NF4Array):
            return leaf
        if path not in codes or codes[path].shape != leaf.codes.shape:
            raise ValueError(f"{file} holds the codes of another model: see {path!r}.")
        return dataclasses.replace(leaf, codes=jnp.asarray(codes[path]))

    params = tree.map_with_path(put, base.params, is_leaf=is_array_leaf)
    return dataclasses.replace(base, params=params)
