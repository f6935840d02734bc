"""How PEFT names what it adapts: modules of the Hugging Face model, and its patterns over them."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.models import hf

__all__ = [
    "HEAD",
    "Place",
    "find_places",
    "is_saved",
    "is_targeted",
    "is_tied",
    "nested",
    "pattern_value",
    "replaced_rows",
    "suffixes",
    "token_rows",
    "with_parents",
]

HEAD = "lm_head"
# A tree whose layers are numbered, not stacked, is no tree of our decoder.
_DECODER_PATH = re.compile(
    r"(embed_tokens|norm|lm_head|layers/\D.*)/(embedding|kernel|scale|bias)$"
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf lives in the Hugging Face model: one module, or one for each stacked layer."""

    modules: tuple[str, ...]
    parameter: str  # "weight" or "bias"
    stacked: bool
    kind: str  # "embedding", "kernel" (transposed there) or another name of a leaf
    # A weight that is no module of its own there (experts, a router): PEFT names the parameter.
    raw: bool = False
    vera: bool = False  # what is called factors here are the vectors of VeRA
    inner: bool = False  # PEFT wraps the module again for the next of its parameters

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one module's tensor, for a leaf of a given shape."""
        shape = shape[1:] if self.stacked else shape
        return (*shape[:-2], *shape[:-3:-1]) if self.kind == "kernel" else shape

    def target(self, module: str) -> str:
        """What PEFT's patterns match for one of the modules."""
        return f"{module}.{self.parameter}" if self.raw else module

    def tensors(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The whole leaf by its names in the files' model."""
        array = array if self.stacked else array[None]
        if self.kind == "kernel":
            array = array.swapaxes(-1, -2)
        return {f"{m}.{self.parameter}": x for m, x in zip(self.modules, array, strict=True)}

    def array(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The reverse of `tensors`."""
        array = np.stack([tensors[f"{module}.{self.parameter}"] for module in self.modules])
        if self.kind == "kernel":
            array = array.swapaxes(-1, -2)
        return array if self.stacked else array[0]

    def factor_names(self, module: str) -> tuple[str, str]:
        """What PEFT calls the two factors on a module."""
        if self.vera:
            return f"{module}.vera_lambda_d", f"{module}.vera_lambda_b"
        if self.kind == "embedding":
            return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
        module += ".base_layer" * self.inner
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

    def rows_name(self) -> str:
        """What PEFT calls the rows of a table that train alone."""
        return f"{self.modules[0]}.token_adapter.trainable_tokens_delta"

    def adapter_names(self, module: str, *, dora: bool) -> tuple[str, ...]:
        """What PEFT calls all tensors of an adapter on a module."""
        magnitude = (f"{module}.lora_magnitude_vector",) if dora else ()
        return (*self.factor_names(module), *magnitude)


def token_rows(module: str, place: Place, settings: Mapping[str, Any]) -> list[int] | None:
    """The rows of a module that PEFT's `trainable_token_indices` names; None for another module."""
    given = settings.get("trainable_token_indices") or {}
    if isinstance(given, list):  # those of the model's input embedding
        return given if place.kind == "embedding" else None
    return next((rows for name, rows in given.items() if _ends(module, name)), None)


def replaced_rows(
    settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], places: Mapping[str, Place]
) -> dict[str, tuple[int, list[int]]]:
    """The axis and the numbers of the rows that an adapter brings, for each table that has such."""
    found = {
        path: token_rows(place.modules[0], place, settings)
        for path, place in places.items()
        if place.rows_name() in tensors
    }
    return {path: (int(places[path].kind == "kernel"), x) for path, x in found.items() if x}


def find_places(leaves: Mapping[str, Any]) -> dict[str, Place]:
    """The leaves that a Hugging Face model has, and where."""
    places = {}
    for path, leaf in leaves.items():
        if not _DECODER_PATH.match(path):
            continue
        template, _, parameter = hf.hf_name(path).rpartition(".")
        stacked = "{}" in template
        modules = tuple(template.format(layer) for layer in range(leaf.shape[0] if stacked else 1))
        raw = path.startswith("layers/mlp/experts/") or path == "layers/mlp/gate/kernel"
        places[path] = Place(modules, parameter, stacked, path.rpartition("/")[2], raw)
    return places


def nested(places: Mapping[str, Place], adapted: Iterable[str]) -> dict[str, Place]:
    """The places where, of two parameters of one module that are adapted, one is wrapped inside."""
    gate_up, down = (f"layers/mlp/experts/{name}_proj/kernel" for name in ("gate_up", "down"))
    if not {gate_up, down} <= set(adapted):
        return dict(places)
    return {**places, gate_up: dataclasses.replace(places[gate_up], inner=True)}


def is_tied(places: Mapping[str, Place]) -> bool:
    """Whether the embedding is also the head."""
    embeds = any(place.kind == "embedding" for place in places.values())
    return embeds and all(place.modules != (HEAD,) for place in places.values())


def is_targeted(module: str, place: Place, settings: Mapping[str, Any]) -> bool:
    """PEFT's rule for the targets that the config names."""
    if place.raw:
        return any(_ends(place.target(module), x) for x in settings.get("target_parameters") or ())
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if not targets or _is_named(module, excluded) or is_saved(module, settings):
        return False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return place.kind == "kernel" and module != HEAD
    if not isinstance(targets, str) and module in targets:
        return True  # a full name counts whatever the layers
    return _is_named(module, targets) and _is_in_layers(module, settings)


def _is_in_layers(module: str, settings: Mapping[str, Any]) -> bool:
    """PEFT's rule for `layers_to_transform`: the first number after a segment of the name."""
    layers = settings.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    given = settings.get("layers_pattern") or ()
    patterns = [given] if isinstance(given, str) else given
    regexes = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in patterns]
    found = (re.match(regex, module) for regex in regexes or [r".*?\.[^.]*\.(\d+)\."])
    match = next(filter(None, found), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def _is_named(module: str, names: str | Sequence[str] | None) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(_ends(module, name) for name in names or ())


def is_saved(module: str, settings: Mapping[str, Any]) -> bool:
    """PEFT's rule for `modules_to_save`: an end of the name, or of a parent's, dots or not."""
    names = settings.get("modules_to_save") or ()
    return any(_ends(parent, n, at_dot=False) for parent in with_parents([module]) for n in names)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says of a module: its first matching regex counts."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def suffixes(wanted: Iterable[str], others: Iterable[str], *, at_dot: bool = True) -> list[str]:
    """The shortest ends of dotted names that cover every wanted name and no other one.

    Args:
      wanted: full names of modules.
      others: names that no end may match.
      at_dot: whether the reader compares whole segments, or any characters at the end.
    """
    found: dict[str, None] = {}
    for module in wanted:
        if any(_ends(module, suffix) for suffix in found):
            continue
        parts = module.split(".")
        for start in reversed(range(len(parts))):
            suffix = ".".join(parts[start:])
            if not any(_ends(other, suffix, at_dot) for other in others):
                break
        found[suffix] = None
    return sorted(found)


def _ends(name: str, suffix: str, at_dot: bool = True) -> bool:
    return name == suffix or name.endswith(f".{suffix}" if at_dot else suffix)


def with_parents(modules: Iterable[str]) -> set[str]:
    """The modules and all that contain them."""
    return {
        module.rsplit(".", depth)[0] for module in modules for depth in range(module.count(".") + 1)
    }
