"""What tells one base model from another: shapes, and digests of samples of its weights.

A fingerprint is a dict from paths to texts such as `"30x576 bfloat16:9f86d081884c7d65"`: the shape
of a weight and a digest of up to 1024 of its elements. A sample is rounded to bfloat16 before it is
digested, so a base read in float32 or in bfloat16 has the same; in float16, which rounds small
elements otherwise, it has one of its own. Of a quantised weight the codes are digested. Only
digests of one form are compared: a quantised base is told from a plain one by its embeddings, norms
and biases, which no format touches.
"""

import hashlib
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora.lora import LoraArray
from jlora.quant import QuantArray, format_of
from jlora.rows import RowsArray
from jlora.targets import leaves_by_path

__all__ = ["check_base", "differences", "fingerprint", "rows_of"]

Rows = Mapping[str, tuple[int, Sequence[int]]]

_SAMPLES = 1024


def fingerprint(
    params: Any, *, skip: Collection[str] = (), rows: Rows | None = None
) -> dict[str, str]:
    """Takes the fingerprint of a base model: of weights as they are, below adapters.

    Args:
      params: arrays, quantised or not, on any mesh, with adapters or without.
      skip: paths of weights that are not the base's any more.
      rows: of tables, which an adapter replaces, so that the base's may be any; by default those
        that train in `params`.

    Returns:
      From the path of each weight to its shape and digest. A sample is read, not the weight.
    """
    rows = rows_of(params) if rows is None else rows
    shapes: dict[str, str] = {}
    forms: dict[str, str] = {}
    arrays: dict[str, jax.Array] = {}
    for path, leaf in leaves_by_path(params).items():
        w = leaf.w if isinstance(leaf, LoraArray | RowsArray) else leaf
        array = w.codes if isinstance(w, QuantArray) else w
        if path in skip or not isinstance(array, jax.Array | np.ndarray) or not array.size:
            continue
        shapes[path] = "x".join(map(str, w.shape))
        forms[path] = format_of(w) if isinstance(w, QuantArray) else _form(array.dtype)
        arrays[path] = jnp.asarray(array)
    samples = _read({path: _automatic(x) for path, x in arrays.items()})
    for path in rows.keys() & samples.keys():
        axis, numbers = rows[path]
        samples[path] = samples[path][~np.isin(_places(arrays[path].shape)[axis], numbers)]
    return {
        path: f"{shape} {forms[path]}:{_digest(samples[path], forms[path])}"
        for path, shape in shapes.items()
    }


def rows_of(params: Any) -> dict[str, tuple[int, Sequence[int]]]:
    """The axis and the numbers of the rows that train alone, for each table that has such."""
    leaves = leaves_by_path(params).items()
    return {path: (x.axis, x.indices) for path, x in leaves if isinstance(x, RowsArray)}


def differences(recorded: Mapping[str, str], params: Any, *, rows: Rows | None = None) -> list[str]:
    """What tells a base from the one whose fingerprint this is, a line for each such weight."""
    return _differences(recorded, fingerprint(params, rows=rows))


def _differences(recorded: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    lines = []
    for path, text in recorded.items():
        if path not in here:
            lines.append(f"{path}: there is none")
            continue
        (shape, form, digest), (own_shape, own_form, own_digest) = map(_parts, (text, here[path]))
        if shape != own_shape:
            lines.append(f"{path}: its shape was {shape} and is {own_shape}")
        elif form == own_form and digest != own_digest:
            lines.append(f"{path}: its elements are others")
    return lines


def _parts(text: str) -> tuple[str, str, str]:
    shape, _, rest = text.partition(" ")
    form, _, digest = rest.partition(":")
    return shape, form, digest


def check_base(
    folder: Any, name: str, recorded: Mapping[str, str], params: Any, *, rows: Rows | None = None
) -> None:
    """Refuses a base that differs from the one whose fingerprint is in a folder.

    Warns where no weight was read in a form of the recorded one, so that shapes alone are compared.

    Raises:
      ValueError: listing where it differs.
    """
    here = fingerprint(params, rows=rows)
    if lines := _differences(recorded, here):
        more = f"\n  and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise ValueError(
            f"{folder} was made for another base model than this one{f', for {name}' * bool(name)}:"
            "\n  " + "\n  ".join(lines[:4]) + f"{more}\nLoad the base it was made for. To put it "
            "on this one all the same, pass other_base=True, or --other-base on the command line."
        )
    forms, own = ({path: _parts(x[path])[1] for path in recorded} for x in (recorded, here))
    if recorded and all(own[path] != form for path, form in forms.items()):
        warnings.warn(
            f"Only shapes say that this is the base model of {folder}: its weights are in "
            f"{_listed(own)} here, and were in {_listed(forms)} where the adapter was made "
            "(float32 counts as bfloat16). Load the base so to have its elements compared.",
            stacklevel=3,
        )


def _listed(forms: Mapping[str, str]) -> str:
    return " and ".join(sorted(set(forms.values())))


def _form(dtype: Any) -> str:
    """Dtypes of one form give one digest for one file."""
    return "bfloat16" if dtype in (jnp.float32, jnp.bfloat16) else jnp.dtype(dtype).name


def _digest(sample: np.ndarray, form: str) -> str:
    rounded = sample.astype(jnp.bfloat16) if form == "bfloat16" else sample
    return hashlib.sha256(np.ascontiguousarray(rounded).tobytes()).hexdigest()[:16]


def _read(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """The samples of all arrays, in one program for each mesh or device that holds some."""
    homes: dict[Any, dict[str, jax.Array]] = {}
    for path, array in arrays.items():
        sharding = array.sharding
        named = isinstance(sharding, NamedSharding)
        everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if named else sharding
        homes.setdefault(everywhere, {})[path] = array
    samples: dict[str, np.ndarray] = {}
    for everywhere, some in homes.items():
        samples |= jax.device_get(jax.jit(_sample, out_shardings=everywhere)(some))
    return samples


def _sample(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Elements spread over each array; indexed by axis, so that a sharded one is not gathered."""
    return {path: array[_places(array.shape)] for path, array in arrays.items()}


def _places(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    size = math.prod(shape)
    count = min(size, _SAMPLES)
    step = max(1, int(0.6180339887 * size))  # visits all of the array evenly, rows and columns
    while math.gcd(step, size) > 1:
        step -= 1
    places = np.arange(count, dtype=np.int64) * step % size
    return tuple(np.unravel_index(places, shape))


def _automatic(array: jax.Array) -> jax.Array:
    """The same array on a mesh whose axes need no placement of results spelled out."""
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        return array
    mesh: Any = sharding.mesh
    if all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        return array
    plain = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    return jax.device_put(array, NamedSharding(plain, PartitionSpec(*sharding.spec)))
