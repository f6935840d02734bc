"""The devices and processes of a run: the mesh, what goes to it and what comes back.

With several processes each holds a part of every array. All of them run the same program on the
same batches, and one, the first, writes files.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import sharding

__all__ = ["check_rows", "is_first", "make_mesh", "put_rows", "row_parts", "to_host"]


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def make_mesh(sizes: Mapping[str, int] | None, devices: Sequence[Any]) -> Mesh | None:
    """The mesh of a run; None for the default device, where nothing is asked and one process runs.

    Raises:
      ValueError: as `sharding.make_mesh` does.
    """
    if sizes is None:
        if len({device.process_index for device in devices}) == 1:
            return None
        sizes = {"fsdp": -1}
    return sharding.make_mesh(sizes, devices)


def row_parts(mesh: Mesh | None) -> int:
    """Into how many parts a mesh cuts the rows of a batch."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(mesh: Mesh | None, sizes: Mapping[str, int | None]) -> None:
    """Refuses batches whose rows a mesh does not divide.

    Args:
      mesh: of the run.
      sizes: rows of a batch by the name of the key that says so; None is not looked at.
    """
    parts = row_parts(mesh)
    for name, rows in sizes.items():
        if rows is not None and rows % parts:
            assert mesh is not None
            raise ValueError(
                f"{name} is {rows}, and the rows of a batch are shared by {parts} devices (mesh: "
                f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}): make it a multiple of "
                f"{parts}, such as {-(-rows // parts) * parts}, or give tensor more of them."
            )


def put_rows(mesh: Mesh | None, *, leading: int = 0) -> Callable[[Any], Any]:
    """A function that puts a batch of NumPy arrays on a mesh, of each process its rows alone.

    Args:
      mesh: None leaves batches as they are.
      leading: axes before the rows.
    """
    if mesh is None:
        return lambda batch: batch
    where = sharding.batch_sharding(mesh, leading=leading)

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return lambda batch: jax.tree.map(put, batch)


def to_host(arrays: Any) -> Any:
    """Arrays of a mesh as NumPy arrays, on every process, one after the other."""

    def fetch(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, arrays)


def everywhere(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
