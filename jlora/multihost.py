"""What processes of one program say to each other; with one process, nothing is sent."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["all_agree", "to_host"]


def all_agree(value: bool) -> bool:
    """Whether `value` is true on every process; none goes on before all have come here."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def to_host(arrays: Any) -> Any:
    """Arrays of a mesh as NumPy arrays, whole and on every process, one after the other."""

    def fetch(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return jax.device_get(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(fetch, arrays)
