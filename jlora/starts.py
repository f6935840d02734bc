"""Starts that a run measures on its own rows: taken once, and kept in its folder.

All of a run that goes on, is served, merged or exported comes from these factors, also the base
that a start took something from: no data is read a second time.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import measured, objective, packing, tree, watched
from jlora.base import Base
from jlora.leaf import is_array_leaf

__all__ = [
    "FILE",
    "MEASURED",
    "calibration",
    "load",
    "measure",
    "outputs_of",
    "read_arrays",
    "save",
    "write_arrays",
]

MEASURED = ("eva", "lora_ga", "qera", "qera_diagonal")
FILE = "start.npz"

Start = tuple[Any, jlora.LoraConfig]


def calibration(batches: packing.Batches, count: int) -> list[packing.Batch]:
    """The first batches of a run, no row twice."""
    return [batches.batch(i) for i in range(min(count, batches.per_epoch))]


def measure(
    init: str,
    key: jax.Array,
    base: Base,
    lora: jlora.LoraConfig,
    batches: Sequence[packing.Batch],
    originals: Callable[[], Any],
) -> Start:
    """Measures a start.

    Args:
      init: one of `MEASURED`.
      key: of the randomised decompositions.
      base: with fresh adapters.
      lora: the config they were made with.
      batches: to measure on.
      originals: gives the weights before quantising, where they are needed.

    Returns:
      The tree and the config, as `jlora.measured` gives them.
    """
    if init == "lora_ga":
        loss = objective.make_loss(base.model, base.params, lora)

        def mean_loss(params: Any, batch: Any) -> jax.Array:
            total, count = loss(params, batch, None)
            return total / jnp.maximum(count, 1)

        return measured.lora_ga(key, base.params, lora, mean_loss, batches)
    adapted = watched.adapters_of(base.params)
    # Logits of all tokens at once are large, and tell nothing where the head has no adapter.
    method = "__call__" if any(path.startswith("lm_head") for path in adapted) else "hidden"
    fn = outputs_of(base, method)
    if init == "eva":
        return measured.eva(key, base.params, lora, fn, batches)
    diagonal = init == "qera_diagonal"
    return measured.qera(key, base.params, lora, fn, batches, base=originals(), diagonal=diagonal)


def outputs_of(base: Base, method: str) -> Callable[[Any, Any], Any]:
    """What a method of the model gives for a batch, as a function of its weights and the batch."""

    def outputs(params: Any, batch: Any) -> Any:
        places = {name: batch[name] for name in ("positions", "segment_ids")}
        return base.apply(params, batch["tokens"], method=method, **places)

    return jlora.adapt(outputs)


def save(file: Path, start: Start, origin: Mapping[str, Any]) -> None:
    """Writes the factors of a start and its config, whole or not at all.

    Args:
      file: replaced if it is there.
      start: from `measure`.
      origin: what it was measured on and with, for `load` to compare.
    """
    params, lora = start
    arrays = {
        f"{path}.{name}": np.asarray(getattr(leaf, name).astype(jnp.float32))
        for path, leaf in jlora.lora.leaves_by_path(params).items()
        if isinstance(leaf, jlora.LoraArray)
        for name in ("a", "b")
    }
    write_arrays(file, arrays, origin, config=lora.to_json())


def write_arrays(
    file: Path, arrays: Mapping[str, np.ndarray], origin: Mapping[str, Any], **texts: str
) -> None:
    """Writes an npz file of arrays, what they were measured on and texts, whole or not at all."""
    texts["origin"] = _digest(origin)
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        np.savez(stream, **texts, **arrays)  # pyright: ignore[reportArgumentType]
    partial.replace(file)


def load(
    file: Path,
    adapt: Callable[[jlora.LoraConfig], Base],
    origin: Mapping[str, Any] | None = None,
) -> tuple[Base, jlora.LoraConfig] | None:
    """Puts the start of a run into its base.

    Args:
      file: that `save` wrote.
      adapt: gives the base with fresh adapters of a config.
      origin: as given to `save`; None takes whatever start is there.

    Returns:
      The base and the start's config; None if there is no such file, or it has another origin.

    Raises:
      ValueError: if the file is damaged, or fits another base.
    """

    def parse(values: dict[str, Any]) -> tuple[jlora.LoraConfig, dict[str, Any]]:
        return jlora.LoraConfig.from_json(str(values.pop("config"))), values

    read = read_arrays(file, origin, parse, again="measures the start again")
    if read is None:
        return None
    lora, values = read
    base = adapt(dataclasses.replace(lora, init="default"))

    def put(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, jlora.LoraArray):
            return leaf
        arrays = {name: values.get(f"{path}.{name}") for name in ("a", "b")}
        for name, array in arrays.items():
            own = getattr(leaf, name)
            if array is None or array.shape != own.shape:
                raise ValueError(f"{file} holds the start of another model: see {path!r}.")
            arrays[name] = jnp.asarray(array, own.dtype)
        leaf = dataclasses.replace(leaf, **arrays)
        return measured.take_from_base(leaf) if lora.init == "lora_ga" else leaf

    params = tree.map_with_path(put, base.params, is_leaf=is_array_leaf)
    return dataclasses.replace(base, params=params), lora


def read_arrays(
    file: Path,
    origin: Mapping[str, Any] | None,
    parse: Callable[[dict[str, Any]], Any],
    *,
    again: str,
) -> Any:
    """Reads what `write_arrays` wrote; None if there is no such file, or it has another origin.

    Args:
      file: to read.
      origin: as it was written; None takes any.
      parse: makes what is wanted of arrays and texts by name.
      again: what `jlora train` does if the file is gone, for the message.

    Raises:
      ValueError: if the file is damaged, or `parse` does not find in it what it needs.
    """
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as read:
            values = {name: read[name] for name in read.files}
        made_from = str(values.pop("origin"))
        parsed = parse(values)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} is damaged ({error}). Remove it: jlora train of the same run {again}."
        ) from None
    return None if origin is not None and made_from != _digest(origin) else parsed


def _digest(origin: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
