"""Quantised parameters kept in one safetensors file, so that the next start reads no more.

A file belongs to one base, format and dtype. It tells the base's files by their size, time and
samples of their bytes, and holds a checksum for each layer's part of each array.
"""

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from jlora.models import weights
from jlora.quant import QuantArray

__all__ = ["load"]

_VERSION = "1"  # of this file's layout and of what quantising gives; a new one makes files stale
_CHECKSUMS = "checksums"
_SAMPLES, _SAMPLE_BYTES = 64, 65_536
_NAMES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint8": "U8", "int8": "I8",
    "float8_e4m3fn": "U8",  # safetensors gives numpy no float8
}  # fmt: skip


def load(
    folder: str | os.PathLike[str],
    path: Path,
    reader: Any,
    *,
    dtype: Any,
    quantize: weights.Formats,
    place: weights.Place | None,
) -> tuple[Any, dict[str, Any]]:
    """What `reader.load` gives, from the kept file if that is of this base, else kept from now on.

    Args:
      folder: where files are kept.
      path: of the base.
      reader: `models.hf` or `models.gguf`.
      dtype: as in `reader.load`.
      quantize: as in `reader.load`.
      place: as in `reader.load`.
    """
    config, tree = reader.shapes(path, dtype, quantize=quantize)
    formats = weights.describe(quantize)
    name = f"{path.resolve()} {formats} {dtype and jnp.dtype(dtype).name}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    file = (
        Path(folder)
        / f"{path.stem}-{str(formats).replace(', ', '-').replace(' ', '-')}-{digest}.safetensors"
    )
    fingerprint = _fingerprint(path)
    if file.is_file():
        try:
            return config, _read(file, fingerprint, tree, place)
        except (_UnusableError, safetensors.SafetensorError, OSError) as error:
            warnings.warn(f"{file} {error}; it is made again.", stacklevel=2)
    config, params = reader.load(path, dtype, quantize=quantize, place=place)
    if jax.process_count() == 1:
        try:
            _write(file, fingerprint, params)
        except OSError as error:  # the run can go on without it
            warnings.warn(f"The packed base could not be kept as {file}: {error}.", stacklevel=2)
    return config, params


class _UnusableError(Exception):
    """Says what is wrong with a kept file."""


def _fingerprint(path: Path) -> str:
    """Of the base's files: whatever training or conversion changes, it shows in the samples."""
    files = (
        [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.json")])
    )
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns} ".encode())
        with file.open("rb") as opened:
            for start in np.linspace(0, max(0, stat.st_size - _SAMPLE_BYTES), _SAMPLES):
                opened.seek(int(start))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _names(path: str, leaf: Any) -> list[str]:
    """What the arrays of a parameter are called in the file."""
    count = len(jax.tree.leaves(leaf))
    return [path] if count == 1 else [f"{path}.{i}" for i in range(count)]


def _pieces(path: str, array: Any) -> list[Any]:
    """The indices that cut an array into what is read or written at a time: one layer, or all."""
    return list(range(array.shape[0])) if path.startswith("layers/") else [...]


def _arrays(params: Any) -> Iterator[tuple[str, str, Any]]:
    """`(path, name in the file, array)` of each array, in the file's order."""
    for path, leaf in _leaves(params):
        for name, array in zip(_names(path, leaf), jax.tree.leaves(leaf), strict=True):
            yield path, name, array


def _bytes(array: Any) -> memoryview:
    """The bytes of an array, which is not copied if they lie on the host."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write(file: Path, fingerprint: str, params: Any) -> None:
    """Writes beside its place, piece by piece, and moves the file there when complete."""
    header: dict[str, Any] = {"__metadata__": {"base": fingerprint, "version": _VERSION}}
    end = count = 0
    for path, name, array in _arrays(params):
        kind = _NAMES[np.dtype(array.dtype).name]
        start, end = end, end + array.size * array.dtype.itemsize
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [start, end]}
        count += len(_pieces(path, array))
    header[_CHECKSUMS] = {"dtype": "U32", "shape": [count], "data_offsets": [end, end + 4 * count]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=f".{file.name}.", dir=file.parent, delete=False) as out:
        try:
            out.write(len(text).to_bytes(8, "little") + text)
            sums = []
            for path, _, array in _arrays(params):
                for index in _pieces(path, array):
                    piece = _bytes(array[index])
                    sums.append(zlib.crc32(piece))
                    out.write(piece)
            out.write(np.array(sums, "<u4").tobytes())
            out.flush()
            os.fsync(out.fileno())
            os.replace(out.name, file)
        except BaseException:
            os.unlink(out.name)
            raise


def _read(file: Path, fingerprint: str, tree: Any, place: weights.Place | None) -> dict[str, Any]:
    with safetensors.safe_open(file, framework="np") as opened:
        metadata = opened.metadata() or {}
        if metadata != {"base": fingerprint, "version": _VERSION}:
            raise _UnusableError("is not of the base as it is now")
        names = set(opened.keys())
        expected = {name for _, name, _ in _arrays(tree)} | {_CHECKSUMS}
        if names != expected:
            raise _UnusableError("does not hold the parameters of its base")
        sums = iter(opened.get_tensor(_CHECKSUMS).tolist())
        params: dict[str, Any] = {}
        for path, leaf in _leaves(tree):
            views = [opened.get_slice(name) for name in _names(path, leaf)]
            _insert(params, path, weights.fill(_source(path, leaf, views, sums), place))
    return params


def _source(path: str, leaf: Any, views: list[Any], sums: Iterator[int]) -> weights.Source:
    arrays = jax.tree.leaves(leaf)
    for view, array in zip(views, arrays, strict=True):
        if tuple(view.get_shape()) != array.shape:
            raise _UnusableError(f"has {path} in shape {view.get_shape()}")
    pieces = [_pieces(path, array) for array in arrays]
    expected = [[next(sums) for _ in part] for part in pieces]
    dtypes = [np.dtype(array.dtype) for array in arrays]

    def read(layer: int) -> list[np.ndarray]:
        values = []
        for view, part, checks, dtype in zip(views, pieces, expected, dtypes, strict=True):
            value = np.asarray(view[part[layer]])
            if zlib.crc32(_bytes(value)) != checks[layer]:
                raise _UnusableError(f"is damaged at {path}")
            values.append(value.view(dtype))
        return values

    layers = [lambda layer=layer: read(layer) for layer in range(len(pieces[0]))]
    form = "parts" if isinstance(leaf, QuantArray) else "plain"
    return weights.Source(path, leaf, layers, form, stacked=pieces[0] != [...])


def _insert(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf
