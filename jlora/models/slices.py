"""Parts of tensors in safetensors files, by byte range: a process of many reads its own alone.

A file is not mapped to memory: the system would read and count whole pages, and keep them.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Sharding

__all__ = ["Joined", "Stored", "Tensor", "Turned", "offsets", "place", "whole"]

Box = tuple[slice, ...]
_MOST = 1 << 30  # bytes of one read, fewer than the system's limit


class Tensor(Protocol):
    """What can be cut before it is read; a NumPy array is such a tensor too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        ...

    @property
    def dtype(self) -> Any:
        """The NumPy dtype."""
        ...

    def __getitem__(self, box: Any, /) -> Any:
        """The part in a box of slices with steps of 1."""
        ...


def offsets(file: Path) -> dict[str, int]:
    """Where the data of each tensor starts in a safetensors file, in bytes from its begin."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}


class Stored:
    """A tensor in a file, in C order."""

    def __init__(self, file: Path, offset: int, shape: Sequence[int], dtype: Any):
        """Takes where it is; nothing is read."""
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self._file = file
        self._offset = offset

    def __getitem__(self, box: Box) -> np.ndarray:
        """Reads a part: in one piece as far as its last axes are whole, and else row by row."""
        starts, sizes = zip(*map(_bounds, box, self.shape), strict=True) if self.shape else ((), ())
        out = np.empty(sizes, self.dtype)
        if not out.size:
            return out
        run = len(sizes)  # the axes from here on are whole, and lie together in the file
        while run and sizes[run - 1] == self.shape[run - 1]:
            run -= 1
        outer = sizes[: max(0, run - 1)]
        rows = out.reshape(*outer, -1).view(np.uint8)
        strides = [int(np.prod(self.shape[i + 1 :])) for i in range(len(sizes))]
        first = sum(start * stride for start, stride in zip(starts, strides))
        with self._file.open("rb", buffering=0) as opened:
            for index in np.ndindex(*outer):
                element = first + sum(i * stride for i, stride in zip(index, strides))
                self._read(opened.fileno(), rows[index], element * self.dtype.itemsize)
        return out

    def _read(self, descriptor: int, row: np.ndarray, start: int) -> None:
        view, done = memoryview(row), 0  # pyright: ignore[reportArgumentType] (of NumPy)
        while done < len(view):
            part = view[done : done + _MOST]
            count = os.preadv(descriptor, [part], self._offset + start + done)
            if not count:
                raise ValueError(f"{self._file} ends within a tensor. Fetch or copy it again.")
            done += count


class Joined:
    """A tensor of which the file has parts, each in a box of it."""

    def __init__(self, shape: Sequence[int], dtype: Any, parts: Sequence[tuple[Box, Tensor]]):
        """Takes the parts with their places in the whole, which they fill; nothing is read."""
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self._parts = parts

    def __getitem__(self, box: Box) -> np.ndarray:
        """Reads what lies in a box."""
        wanted = [_bounds(cut, size) for cut, size in zip(box, self.shape, strict=True)]
        out = np.empty([size for _, size in wanted], self.dtype)
        for place, tensor in self._parts:
            here, there = [], []
            for cut, (start, size), whole in zip(place, wanted, self.shape, strict=True):
                first, length = _bounds(cut, whole)
                low, high = max(start, first), min(start + size, first + length)
                here.append(slice(low - start, high - start))
                there.append(slice(low - first, high - first))
            if all(cut.stop > cut.start for cut in here):
                # A part may have fewer axes than the whole, where it fills one place on an axis.
                part = tensor[tuple(there[len(there) - len(tensor.shape) :])]
                out[tuple(here)] = part
        return out


class Turned:
    """A tensor with its last two axes exchanged, if asked, and in another dtype."""

    def __init__(self, tensor: Tensor, dtype: Any, *, transposed: bool):
        """Takes the tensor; nothing is read."""
        self._tensor, self._transposed = tensor, transposed
        self.dtype = np.dtype(dtype)
        self.shape = self._turn(tuple(tensor.shape))

    def _turn(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*axes[:-2], axes[-1], axes[-2]) if self._transposed else axes

    def __getitem__(self, box: Box) -> np.ndarray:
        """Reads a part."""
        part = np.asarray(self._tensor[self._turn(box)])
        return (part.swapaxes(-1, -2) if self._transposed else part).astype(self.dtype)


def whole(tensor: Any) -> np.ndarray:
    """All of a tensor."""
    if isinstance(tensor, np.ndarray):
        return tensor
    if hasattr(tensor, "read"):
        return tensor.read()
    return tensor[tuple(slice(None) for _ in tensor.shape)]


def place(tensor: Tensor, sharding: Sharding) -> jax.Array:
    """Puts a tensor on devices; of a sharded one each process reads the part of its own devices.

    That part is read once, whatever devices of this process share of it, and is all of the tensor
    that the process holds.
    """
    shape = tuple(tensor.shape)
    boxes = {
        tuple(_bounds(cut, size) for cut, size in zip(index, shape, strict=True))
        for index in sharding.addressable_devices_indices_map(shape).values()
        if index is not None
    }
    around = [(min(s for s, _ in axis), max(s + n for s, n in axis)) for axis in zip(*boxes)]
    together = _volume([(low, high - low) for low, high in around])
    if together == sum(map(_volume, boxes)):
        whole = np.asarray(tensor[tuple(slice(low, high) for low, high in around)])

        def cut(index: Box) -> np.ndarray:
            bounds = map(_bounds, index, shape)
            here = zip(bounds, around)
            return whole[tuple(slice(s - low, s - low + n) for (s, n), (low, _) in here)]

        read: Callable[[Box], np.ndarray] = cut
    else:
        kept: dict[Any, np.ndarray] = {}

        def fetch(index: Box) -> np.ndarray:
            bounds = tuple(map(_bounds, index, shape))
            if bounds not in kept:
                kept[bounds] = np.asarray(tensor[tuple(slice(s, s + n) for s, n in bounds)])
            return kept[bounds]

        read = fetch
    # Copies: a device of a CPU would keep the memory of what it got, and with it the whole part.
    return jax.make_array_from_callback(
        shape, sharding, lambda index: np.array(read(index or ())), dtype=tensor.dtype
    )


def _bounds(cut: slice, size: int) -> tuple[int, int]:
    """Start and length."""
    start, stop, _ = cut.indices(size)
    return start, max(0, stop - start)


def _volume(box: Sequence[tuple[int, int]]) -> int:
    return int(np.prod([size for _, size in box], dtype=np.int64))
