"""What the tensors of a PEFT folder are in a tree: each has one use, and each target is filled."""

import dataclasses
import math
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.dora import DoraArray
from jlora.leaf import is_array_leaf
from jlora.lora import LoraArray, LoraConfig
from jlora.peft_folder import CONFIG, WEIGHTS, listed
from jlora.peft_names import (
    HEAD,
    Place,
    is_saved,
    is_targeted,
    is_tied,
    pattern_value,
    token_rows,
)
from jlora.rows import RowsArray

__all__ = [
    "check_shape",
    "dense",
    "match",
    "plain_biases",
    "read_adapter",
    "read_config",
    "read_copies",
    "read_rows",
]


def dense(leaf: Any) -> Any:
    """The array that a leaf stands for."""
    return leaf.materialise() if is_array_leaf(leaf) else leaf


def plain_biases(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Biases by their names in the model: PEFT names those of its wrapped modules apart.

    Of a module that is saved whole it writes the bias once more, and the one it had before.
    """
    tensors = {name.replace(".base_layer.bias", ".bias"): x for name, x in tensors.items()}
    wrappers = (".modules_to_save.bias", ".original_module.bias")
    again = {
        name
        for name in tensors
        for end in wrappers
        if name.endswith(end) and f"{name.removesuffix(end)}.bias" in tensors
    }
    return {name: x for name, x in tensors.items() if name not in again}


def match(
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    leaves: Mapping[str, Any],
    places: Mapping[str, Place],
) -> tuple[list[str], list[str], list[str]]:
    """The paths with factors, replaced whole and with rows, where every tensor has a use."""
    adapted, whole, tables = [], [], []
    expected: set[str] = set()
    targeted = {module for p in places.values() for module in _covered(p, settings, tensors)}
    spare: set[str] = set()  # copies of base weights, which PEFT stores beside adapted embeddings
    for path, place in places.items():
        saved = [
            module
            for module in place.modules
            if is_saved(module, settings) or _trains_bias(module, place, settings, targeted)
        ]
        if saved:
            _check_cover(folder, path, place, saved)
            whole.append(path)
            expected.update(f"{module}.{place.parameter}" for module in place.modules)
            continue
        if place.parameter == "weight" and token_rows(place.modules[0], place, settings):
            tables.append(path)
            expected.add(place.rows_name())
        if _takes_factors(folder, path, place, settings, tensors):
            adapted.append(path)
            dora = settings["use_dora"]
            for module in _covered(place, settings, tensors):
                expected.update(place.adapter_names(module, dora=dora))
        spare.update(set(_copies(place)) & set(tensors))
    if is_tied(places):
        spare |= _check_tied(folder, settings, tensors, places, adapted, whole)
    missing, unused = expected - set(tensors), set(tensors) - expected - spare
    if missing or unused:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit {CONFIG} and the model. Missing from the file: "
            f"{listed(sorted(missing))}. Without a place in the model: {listed(sorted(unused))}."
        )
    if not adapted and not tables:
        raise ValueError(f"{folder} holds no factors for any weight of this model.")
    return adapted, whole, tables


def read_rows(
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    path: str,
    leaf: Any,
    place: Place,
) -> RowsArray:
    """A table with the rows that the file has for it."""
    numbers = token_rows(place.modules[0], place, settings) or []
    size, width = place.shape(leaf.shape)
    if max(numbers) >= size:
        raise ValueError(
            f"{folder} trains row {max(numbers)} of {path!r}, which has {size} here. If tokens "
            f"were added to the model, make room for them first: jlora.tokens.grow."
        )
    if is_array_leaf(leaf):
        raise NotImplementedError(f"{folder} adapts {path!r} and trains rows of it besides.")
    check_shape(folder, place.rows_name(), tensors[place.rows_name()], (len(numbers), width))
    table = RowsArray.start(leaf, jnp.float32, numbers, int(place.kind == "kernel"))
    rows = tensors[place.rows_name()][np.argsort(numbers)]
    return dataclasses.replace(table, rows=jnp.asarray(rows))


def _takes_factors(
    folder: pathlib.Path,
    path: str,
    place: Place,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> bool:
    """Whether the folder has an adapter for a leaf; DoRA must cover all of it."""
    covered = _covered(place, settings, tensors)
    if covered and settings["use_dora"]:
        _check_cover(folder, path, place, covered)
    return bool(covered)


def _trains_bias(
    module: str, place: Place, settings: Mapping[str, Any], targeted: Collection[str]
) -> bool:
    """PEFT's rule for `bias`: all of the model's, or those of adapted modules."""
    if place.parameter != "bias" or settings["bias"] == "none":
        return False
    return settings["bias"] == "all" or module in targeted


def _covered(
    place: Place, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> list[str]:
    """The modules of a leaf that the config adapts; where it names none, those of the file."""
    if not place.raw and (place.parameter != "weight" or place.kind not in ("kernel", "embedding")):
        return []
    modules = place.modules
    if settings.get("target_modules") is None and not settings.get("target_parameters"):
        modules = [m for m in modules if not set(place.factor_names(m)).isdisjoint(tensors)]
        settings = {**settings, "target_modules": ".*"}
    return [module for module in modules if is_targeted(module, place, settings)]


def _check_cover(folder: pathlib.Path, path: str, place: Place, covered: Sequence[str]) -> None:
    if len(covered) < len(place.modules):
        raise NotImplementedError(
            f"{folder} changes {path!r} only in {listed(covered)}. Its layers are stacked in one "
            f"leaf here, so an adapter has to cover all {len(place.modules)} of them."
        )


def _copies(place: Place) -> list[str]:
    """What PEFT calls a leaf's own tensors where it stores them beside an adapter."""
    parameters = (place.parameter, f"base_layer.{place.parameter}")
    return [f"{module}.{parameter}" for module in place.modules for parameter in parameters]


def read_copies(
    folder: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    leaves: Mapping[str, Any],
    places: Mapping[str, Place],
    whole: Sequence[str],
    *,
    other_base: bool,
) -> dict[str, Any]:
    """The base's weights that the file has copies of, where those differ: the copies.

    PEFT stores embeddings and heads that were resized, and puts them into a model that it loads the
    adapter on.

    Raises:
      ValueError: if a copy differs from the base's weight, up to bfloat16 rounding, and
        `other_base` is not set.
    """
    tied, found = is_tied(places), {}
    for path, place in places.items():
        heads = (f"{HEAD}.weight", f"{HEAD}.base_layer.weight")
        names = [*_copies(place), *(heads if tied and place.kind == "embedding" else ())]
        names = [name for name in names if name in tensors]
        if path in whole or not names:
            continue
        base = np.asarray(jnp.asarray(dense(leaves[path]), jnp.bfloat16))
        own = place.tensors(base)
        for name in names:
            check_shape(folder, name, tensors[name], place.shape(leaves[path].shape))
            module = name.removesuffix(f".{place.parameter}").removesuffix(".base_layer")
            module = place.modules[0] if module == HEAD else module
            if np.array_equal(
                own[f"{module}.{place.parameter}"], tensors[name].astype(jnp.bfloat16)
            ):
                continue
            if not other_base or place.stacked:
                raise ValueError(
                    f"{folder / WEIGHTS} holds {name}, which differs from the base model's and is "
                    "not in modules_to_save: the adapter was made for another base model, or for "
                    "this one with a resized vocabulary. Load that base, or take the file's weight "
                    "in place of the base's, as PEFT does: other_base=True, or --other-base."
                )
            copy = tensors[name].swapaxes(-1, -2) if place.kind == "kernel" else tensors[name]
            found[path] = jnp.asarray(copy, leaves[path].dtype)
    return found


def _check_tied(
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    adapted: Sequence[str],
    whole: Sequence[str],
) -> set[str]:
    """The tensors of a tied model's head, which have to be the embedding's."""
    path, table = next((p, place) for p, place in places.items() if place.kind == "embedding")
    heads = {f"{HEAD}.weight", f"{HEAD}.base_layer.weight"} & set(tensors)
    apart = path in adapted or any(name.startswith(f"{HEAD}.lora_") for name in tensors)
    copies = [tensors[name] for name in (*sorted(heads), *_copies(table)) if name in tensors]
    apart |= any(not np.array_equal(copies[0], other) for other in copies[1:])
    if path in whole:
        apart |= not (heads or settings.get("ensure_weight_tying"))
    else:
        apart |= is_saved(HEAD, settings)
    if apart:
        raise NotImplementedError(
            f"{folder} changes the embedding and the head apart from each other, but in this model "
            "they are one leaf. Merge it with PEFT into a model with tie_word_embeddings=false and "
            "load that."
        )
    return heads


def read_adapter(
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    leaf: Any,
    place: Place,
) -> LoraArray:
    """The adapter of a leaf, from the tensors of all its modules.

    All of them get the largest rank, by zeros, and the scaling that belongs to it: what another
    module has more or less is in its `b`.
    """
    pairs = dict(
        zip(
            _covered(place, settings, tensors),
            _ranks_and_alphas(settings, tensors, place),
            strict=True,
        )
    )
    rank, alpha = max(pairs.values())
    scaling = _scaling(settings, rank, alpha)
    *stack, d_in, d_out = leaf.shape
    experts = tuple(stack[place.stacked :])
    count = math.prod(experts)
    downs, ups, lengths = [], [], []
    for module in place.modules:
        down, up, magnitude = place.adapter_names(module, dora=True)
        if down not in tensors:
            # Not adapted. Where both factors are zero, so are their gradients: it stays that way.
            downs.append(np.zeros((*experts, d_in, rank), np.float32))
            ups.append(np.zeros((*experts, rank, d_out), np.float32))
            continue
        own = pairs[module][0]
        check_shape(folder, down, tensors[down], (count * own, d_in))
        check_shape(folder, up, tensors[up], (d_out, own * count))
        # PEFT has a rank of one expert after the other in A, and expert by expert of a rank in B.
        a = tensors[down].reshape(*experts, own, d_in).swapaxes(-1, -2)
        b = tensors[up].reshape(d_out, own, *experts).T
        if (share := _scaling(settings, *pairs[module]) / scaling) != 1:
            b = np.float32(share) * b
        whole = [(0, 0)] * len(experts)
        downs.append(np.pad(a, [*whole, (0, 0), (0, rank - own)]))
        ups.append(np.pad(b, [*whole, (0, rank - own), (0, 0)]))
        if settings["use_dora"]:
            check_shape(folder, magnitude, tensors[magnitude], (d_out,))
            lengths.append(tensors[magnitude])
    a, b = (jnp.asarray(np.stack(x) if place.stacked else x[0]) for x in (downs, ups))
    kind = DoraArray if settings["use_dora"] else LoraArray
    adapter = kind.start(
        leaf,
        a,
        b,
        scaling=scaling,
        axes=(*(("stack",) * len(stack)), "in", "out"),
        dropout=settings["lora_dropout"],
    )
    if not lengths:
        return adapter
    magnitude = jnp.asarray(np.stack(lengths) if place.stacked else lengths[0])
    return dataclasses.replace(adapter, magnitude=magnitude)  # pyright: ignore[reportCallIssue]


def _ranks_and_alphas(
    settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], place: Place
) -> list[tuple[int, float]]:
    """What the config says of each module of a leaf that has an adapter."""
    return [
        (
            pattern_value(settings["rank_pattern"], name, settings["r"]),
            pattern_value(settings["alpha_pattern"], name, settings["lora_alpha"]),
        )
        for name in map(place.target, _covered(place, settings, tensors))
    ]


def _scaling(settings: Mapping[str, Any], rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)


def read_config(
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    filled: Mapping[str, Any],
    leaves: Mapping[str, Any],
    places: Mapping[str, Place],
) -> LoraConfig:
    """The config whose `init` would give the same leaves."""
    adapted = [path for path, leaf in filled.items() if isinstance(leaf, LoraArray)]
    tables = [path for path, leaf in filled.items() if isinstance(leaf, RowsArray)]
    pairs = {path: max(_ranks_and_alphas(settings, tensors, places[path])) for path in adapted}
    weights = [path for path in leaves if path.rpartition("/")[2] not in ("bias", "scale")]

    def differing(index: int, usual: Any) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for value in dict.fromkeys(pair[index] for pair in pairs.values()):
            if value != usual:
                same = [path for path in pairs if pairs[path][index] == value]
                found |= dict.fromkeys(_patterns(same, pairs), value)
        return found

    return LoraConfig(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        targets=_patterns(adapted, weights),
        rank_pattern=differing(0, settings["r"]),
        alpha_pattern=differing(1, settings["lora_alpha"]),
        dropout=settings["lora_dropout"],
        rank_stabilized=settings["use_rslora"],
        variant="dora" if settings["use_dora"] else "lora",
        train=_patterns([path for path in filled if path not in (*adapted, *tables)], leaves),
        rows={
            pattern: filled[path].indices
            for path in tables
            for pattern in _patterns([path], leaves)
        },
    )


def _patterns(wanted: Sequence[str], paths: Iterable[str]) -> tuple[str, ...]:
    """For each wanted path its module's name, or the whole path where others share that name."""
    others = [path for path in paths if path not in wanted]

    def pattern(path: str) -> str:
        segment = path.split("/")[-2]
        return path if any(tree.matches(segment, other) for other in others) else segment

    return tuple(dict.fromkeys(pattern(path) for path in wanted))


def check_shape(folder: pathlib.Path, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape."""
    if array.shape != tuple(shape):
        raise ValueError(
            f"{folder / WEIGHTS}: {name} has shape {list(array.shape)}, expected {list(shape)} "
            "from the base model's weight and the rank in the config."
        )
