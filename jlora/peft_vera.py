"""PEFT's VeRA folders: two vectors for each module, and one pair of projections beside them."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.lora import LoraConfig
from jlora.peft_folder import PROJECTIONS, WEIGHTS
from jlora.peft_names import Place
from jlora.peft_read import check_shape
from jlora.vera import VeraArray

__all__ = ["read_vera", "vera_places", "vera_settings", "vera_tensors"]


def vera_places(places: Mapping[str, Place]) -> dict[str, Place]:
    """The same places, whose factors are called as VeRA's vectors are."""
    return {path: dataclasses.replace(place, vera=True) for path, place in places.items()}


def read_vera(
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    projections: Mapping[str, np.ndarray],
    shared: dict[Any, Any],
    path: str,
    leaf: Any,
    place: Place,
) -> VeraArray:
    """The adapter of a leaf, from the vectors of all its modules and its part of the projections.

    Args:
      folder: for messages.
      settings: of the folder.
      tensors: by their names in the base model.
      projections: `vera_A` `[rank d_in]` and `vera_B` `[d_out rank]`.
      shared: parts that leaves read before have; filled with this one's.
      path: of the leaf.
      leaf: the weight.
      place: of the weight, from `vera_places`.

    Raises:
      ValueError: if a tensor has a wrong shape.
      NotImplementedError: if not all layers of the leaf have an adapter, or PEFT's VeRA has no such
        weights.
    """
    if place.raw or place.kind != "kernel":
        raise NotImplementedError(f"{folder} adapts {path!r}, and VeRA is for linear weights.")
    *_, d_in, d_out = leaf.shape
    rank = settings["r"]
    vectors = []
    for module in place.modules:
        names = place.factor_names(module)
        if names[0] not in tensors:
            raise NotImplementedError(
                f"{folder} adapts {path!r} in some layers alone. Its layers are stacked in one "
                f"leaf here, so a VeRA adapter has to cover all {len(place.modules)} of them."
            )
        for name, size in zip(names, (rank, d_out)):
            check_shape(folder, name, tensors[name], (size,))
        vectors.append([tensors[name] for name in names])
    parts = []
    for name, size in zip(PROJECTIONS, (d_in, d_out)):
        whole = projections[name] if name == PROJECTIONS[1] else projections[name].T  # [size rank]
        if whole.ndim != 2 or whole.shape[0] < size or whole.shape[1] != rank:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} has shape {list(projections[name].shape)}, and "
                f"{path!r} needs {size} of rank {rank}."
            )
        if (name, size) not in shared:
            part = whole[:size] if name == PROJECTIONS[0] else whole[:size].T
            shared[name, size] = jnp.asarray(np.ascontiguousarray(part))
        parts.append(shared[name, size])
    lambda_d, lambda_b = (
        jnp.asarray(np.stack(x) if place.stacked else x[0]) for x in zip(*vectors)
    )
    adapter = VeraArray.start(
        leaf,
        *parts,
        scaling=1.0,
        axes=("stack",) * (leaf.ndim - 2) + ("in", "out"),
        dropout=settings["lora_dropout"],
    )
    return dataclasses.replace(adapter, lambda_d=lambda_d, lambda_b=lambda_b)


def vera_tensors(
    adapters: Mapping[str, VeraArray], places: Mapping[str, Place]
) -> dict[str, np.ndarray]:
    """The tensors of adapters, the projections among them.

    Raises:
      ValueError: if adapters have projections that are no parts of one pair.
    """
    tensors: dict[str, np.ndarray] = {}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in PROJECTIONS}
    for path, leaf in adapters.items():
        place = places[path]
        a, b, d, g = (
            np.asarray(x.astype(jnp.float32))
            for x in (leaf.a, leaf.b, leaf.lambda_d, leaf.lambda_b)
        )
        for name, part in zip(PROJECTIONS, (a, b.T)):
            parts[name].append(part)  # [size rank]
        for module, *layer in zip(
            place.modules, *((d, g) if place.stacked else (d[None], g[None]))
        ):
            for name, vector in zip(place.factor_names(module), layer):
                tensors[name] = np.ascontiguousarray(vector)
    for name, own in parts.items():
        longest = max(own, key=len)
        if not all(np.array_equal(part, longest[: len(part)]) for part in own):
            raise ValueError(
                "The adapters' projections are not parts of one pair, as in VeRA they are: all of "
                "them must come from one jlora.init or one jlora.peft.load."
            )
        whole = longest.T if name == PROJECTIONS[0] else longest
        tensors[name] = np.ascontiguousarray(whole)
    return tensors


def vera_settings(settings: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """adapter_config.json of a VeRA folder, from what that of LoRA would be."""
    kept = ("task_type", "base_model_name_or_path", "inference_mode", "r", "target_modules",
            "modules_to_save", "bias", "fan_in_fan_out", "revision")  # fmt: skip
    return {
        "peft_type": "VERA",
        **{name: settings[name] for name in kept if name in settings},
        "vera_dropout": config.dropout,
        "save_projection": True,
        "projection_prng_key": 0,
        "init_weights": True,
    }
