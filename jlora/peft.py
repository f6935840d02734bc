"""PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, both directions.

PEFT keeps `lora_A.weight` `[rank d_in]` and `lora_B.weight` `[d_out rank]` for every layer, this
package `a` `[layers d_in rank]` and `b` `[layers rank d_out]`. Names of modules are those of the
Hugging Face model, from the table in `models/hf.py`. Adapters are written in float32.
"""

import collections
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.dora import DoraArray
from jlora.fingerprint import check_base, fingerprint
from jlora.leaf import is_array_leaf
from jlora.lora import LoraArray, LoraConfig, labels, leaves_by_path
from jlora.peft_folder import (
    CONFIG,
    PROJECTIONS,
    WEIGHTS,
    listed,
    read_settings,
    read_tensors,
    write,
)
from jlora.peft_names import (
    HEAD,
    Place,
    find_places,
    is_targeted,
    is_tied,
    nested,
    replaced_rows,
    suffixes,
    with_parents,
)
from jlora.peft_read import (
    check_shape,
    dense,
    match,
    plain_biases,
    read_adapter,
    read_config,
    read_copies,
    read_rows,
)
from jlora.peft_vera import read_vera, vera_places, vera_settings, vera_tensors
from jlora.rows import RowsArray
from jlora.vera import VeraArray

__all__ = ["check", "load", "save"]

_TIED_ADVICE = (
    "the model's head is tied to its embedding, and in PEFT only the embedding would change. "
    "Merge the adapter (jlora.merge_params) and save the whole model, or adapt other weights"
)


def save(
    directory: str | os.PathLike[str],
    params: Any,
    config: LoraConfig,
    *,
    base_model: str = "",
    base_license: str = "",
    revision: str = "",
    base: Mapping[str, str] | None = None,
    serve: bool = False,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads on the same base model.

    Ranks and alphas that differ between weights become `rank_pattern` and `alpha_pattern`, leaves
    of `config.train` become `modules_to_save`. The files are written whole beside the folder and
    then moved, so a full disk leaves what was there before.

    Args:
      directory: made if it is missing; of files in it only those of an adapter are replaced.
      params: the whole tree, with adapters.
      config: the config it was made with.
      base_model: name or folder of the base model, noted in the config and the model card.
      base_license: the base model's license, e.g. "apache-2.0", noted in the model card.
      revision: the base model's commit on the hub, noted in the config.
      base: the base model's `jlora.fingerprint`, which `load` compares with the model it is given;
        by default that of the weights in `params` that do not train.
      serve: write what vLLM takes: one rank and one alpha for all weights, with every scaling
        inside `lora_B` and zeros up to the largest rank.

    Raises:
      ValueError: if `params` has no adapters, is only one half of a split, or started from a
        changed base (`config.init`): convert it with `jlora.variants.to_plain_lora` first.
      NotImplementedError: if PEFT, or vLLM with `serve`, has no way to say what a leaf does.
    """
    if config.init != "default":
        raise ValueError(
            f"init={config.init!r} changed the base, so on the original model this adapter would "
            "be another function. Convert it with jlora.variants.to_plain_lora, or merge it."
        )
    leaves = leaves_by_path(params)
    adapters = _adapters(leaves)
    if not adapters:
        raise ValueError("There are no adapters in params; jlora.init puts them there.")
    for path, leaf in adapters.items():
        if leaf.w is None or len(leaf.present()) < len(leaf.arrays):
            raise ValueError(
                f"The adapter at {path!r} is one half of a split; "
                "give the whole tree, jlora.combine(trainable, frozen)."
            )
    places, tables, trained = _find(params, leaves, adapters, config)
    if serve:
        adapters, config = _for_serving(adapters, [*trained, *tables], config, places)
    vera = any(isinstance(leaf, VeraArray) for leaf in adapters.values())
    tensors = {}
    if vera:
        places = vera_places(places)
        tensors = vera_tensors(adapters, places)
    else:
        for path, leaf in adapters.items():
            tensors |= _factor_tensors(leaf, places[path])
    if not tensors:
        raise ValueError("All factors of all adapters are zero: there is nothing to save.")
    bias, biases = _biases(trained, tensors, places)
    modules = [path for path in trained if path not in biases]
    _check_modules(modules, adapters, places)
    whole = _whole_tensors(modules, leaves, places)
    saved = {name.rpartition(".")[0] for name in whole}
    settings = _settings(adapters, tensors, places, config, saved)
    settings["use_dora"] = any(isinstance(leaf, DoraArray) for leaf in adapters.values())
    settings["bias"] = bias
    for path in biases:
        whole |= _bias_tensors(leaves[path], places[path], tensors)
    whole |= {
        places[path].rows_name(): np.asarray(leaf.rows.astype(jnp.float32))
        for path, leaf in tables.items()
    }
    settings["trainable_token_indices"] = _token_rows(tables, places)
    settings["base_model_name_or_path"] = base_model or None
    if revision:
        settings["revision"] = revision
    if vera:
        if biases or tables:
            raise NotImplementedError(
                f"{[*biases, *tables][0]!r} trains beside VeRA adapters, for which PEFT's VeRA has "
                "no names. Merge with jlora.merge_params and save the whole model."
            )
        settings = vera_settings(settings, config)
    base = fingerprint(params, skip=trained) if base is None else base
    write(pathlib.Path(directory), settings, tensors | whole, base_license, base)


def check(params: Any, config: LoraConfig) -> None:
    """Finds before anything trains what `save` would refuse of the leaves' places and kinds.

    Args:
      params: the whole tree, with adapters; shapes and dtypes are enough.
      config: the config it was made with.

    Raises:
      NotImplementedError: if PEFT has no way to say what a leaf does.
    """
    leaves = leaves_by_path(params)
    _find(params, leaves, _adapters(leaves), config)


def _adapters(leaves: Mapping[str, Any]) -> dict[str, LoraArray]:
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoraArray)}


def _find(
    params: Any, leaves: Mapping[str, Any], adapters: Mapping[str, LoraArray], config: LoraConfig
) -> tuple[dict[str, Place], dict[str, RowsArray], list[str]]:
    """Where the leaves are in a model, tables whose rows train, and the paths of what trains whole.

    Raises:
      NotImplementedError: if PEFT has no way to say what one of them does.
    """
    places = nested(find_places(leaves), adapters)
    tables = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, RowsArray)}
    names = leaves_by_path(labels(params, config))
    trained = [path for path, name in names.items() if isinstance(name, str) and name == "full"]
    _check_expressible(adapters, [*trained, *tables], places)
    return places, tables, trained


def load(
    directory: str | os.PathLike[str], params: Any, *, other_base: bool = False
) -> tuple[Any, LoraConfig]:
    """Puts a PEFT adapter's factors on a base model's parameters.

    An adapter that this package wrote knows its base by shapes and samples of weights
    (`jlora.fingerprint`); for one of PEFT's, shapes alone are compared.

    Args:
      directory: holds `adapter_config.json` and `adapter_model.safetensors`.
      params: plain or quantised, without adapters.
      other_base: take `params` even if they are not the base that the adapter was made for. Where
        the file has copies of its base's embedding or head, as PEFT stores them after a change of
        the vocabulary, these replace the weights in `params`.

    Returns:
      The tree with `LoraArray` leaves (float32 factors), and a config with which `jlora.init` would
      make the same ones.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is broken, tensors are missing, left over or of a wrong shape, or the
        adapter was made for another base.
      NotImplementedError: if the adapter is more than LoRA, DoRA or VeRA and modules trained whole.
    """
    folder = pathlib.Path(directory)
    settings = read_settings(folder / CONFIG)
    tensors, base = read_tensors(folder)
    if settings["bias"] != "none":
        tensors = plain_biases(tensors)
    leaves = leaves_by_path(params)
    for path, leaf in leaves.items():
        if isinstance(leaf, LoraArray | RowsArray):
            raise ValueError(f"{path!r} already has an adapter; merge it before loading another.")
    places = find_places(leaves)
    if not other_base:
        name, commit = (settings.get(key) for key in ("base_model_name_or_path", "revision"))
        name = f"{name or ''}{f' of revision {commit}' * bool(commit)}"
        check_base(folder, name, base, params, rows=replaced_rows(settings, tensors, places))
    places = nested(
        places, [p for p, x in places.items() if is_targeted(x.modules[0], x, settings)]
    )
    vera = settings["peft_type"] == "VERA"
    projections, shared = {}, {}
    if vera:
        places = vera_places(places)
        if missing := sorted(set(PROJECTIONS) - set(tensors)):
            raise ValueError(f"{folder / WEIGHTS} lacks {listed(missing)}, which VeRA shares.")
        projections = {name: tensors.pop(name) for name in PROJECTIONS}
    adapted, whole, tables = match(folder, settings, tensors, leaves, places)
    copies = read_copies(folder, tensors, leaves, places, whole, other_base=other_base)
    leaves, filled = {**leaves, **copies}, dict[str, Any]()
    for path in tables:
        filled[path] = read_rows(folder, settings, tensors, path, leaves[path], places[path])
    for path in adapted:
        where = leaves[path], places[path]
        if vera:
            filled[path] = read_vera(folder, settings, tensors, projections, shared, path, *where)
        else:
            filled[path] = read_adapter(folder, settings, tensors, *where)
    for path in whole:
        for module in (place := places[path]).modules:
            name = f"{module}.{place.parameter}"
            check_shape(folder, name, tensors[name], place.shape(leaves[path].shape))
        filled[path] = jnp.asarray(place.array(tensors), leaves[path].dtype)
    params = tree.map_with_path(
        lambda path, leaf: filled.get(path, copies.get(path, leaf)), params, is_leaf=is_array_leaf
    )
    config = read_config(settings, tensors, filled, leaves, places)
    return params, dataclasses.replace(config, variant="vera") if vera else config


def _for_serving(
    adapters: Mapping[str, LoraArray],
    trained: Sequence[str],
    config: LoraConfig,
    places: Mapping[str, Place],
) -> tuple[dict[str, LoraArray], LoraConfig]:
    """The same updates with one rank and a scaling of 1, and the config that says so."""
    advice = "Merge the adapter with jlora.merge_params, save the whole model and serve that."
    if trained:
        raise NotImplementedError(
            f"vLLM takes no trained weight beside an adapter, as {trained[0]!r} is one. {advice}"
        )
    if raw := next((path for path in adapters if places[path].raw), None):
        raise NotImplementedError(
            f"{raw!r} is a parameter that PEFT adapts by target_parameters, and vLLM wants experts "
            f"in another layout. {advice}"
        )
    rank = max(leaf.rank for leaf in adapters.values())

    def fold(path: str, leaf: LoraArray) -> LoraArray:
        if type(leaf) is not LoraArray:
            raise NotImplementedError(
                f"vLLM takes no {leaf.kind} adapter, as {path!r} is one. {advice}"
            )
        more = rank - leaf.rank
        axis = leaf.axes.count("stack")
        a = jnp.pad(leaf.a, [(0, 0)] * (leaf.a.ndim - 1) + [(0, more)])
        b = leaf.scaling * leaf.b.astype(jnp.float32)
        b = jnp.pad(b, [(0, more if place == axis else 0) for place in range(b.ndim)])
        return dataclasses.replace(leaf, a=a, b=b, scaling=1.0)

    plain = {"rank_pattern": (), "alpha_pattern": (), "rank_stabilized": False}
    return (
        {path: fold(path, leaf) for path, leaf in adapters.items()},
        dataclasses.replace(config, rank=rank, alpha=float(rank), **plain),
    )


def _check_expressible(
    adapters: Mapping[str, LoraArray], trained: Sequence[str], places: Mapping[str, Place]
) -> None:
    for path in (*adapters, *trained):
        if path not in places:
            raise NotImplementedError(
                f"{path!r} has no name in a Hugging Face model, so no PEFT adapter can hold it. "
                f"Known here: {', '.join(sorted(places)) or 'none of the leaves'}."
            )
    for path, leaf in adapters.items():
        place = places[path]
        stack = ("stack",) * (leaf.ndim - 2)
        fits = leaf.axes in ((*stack, "in", "out"), (*stack, "out", "in"))
        is_stack = leaf.ndim - 2 == place.stacked + (place.parameter not in ("weight", "bias"))
        if isinstance(leaf, VeraArray) and (place.raw or place.kind != "kernel"):
            raise NotImplementedError(
                f"The adapter at {path!r} is one that PEFT's VeRA lacks, which is for linear "
                "weights. Merge it with jlora.merge_params and save the whole model."
            )
        if place.kind not in ("kernel", "embedding") or not fits or not is_stack:
            raise NotImplementedError(
                f"The adapter at {path!r} has axes {leaf.axes}; PEFT knows one input and one "
                "output axis a layer. Merge it with jlora.merge_params and save the whole model."
            )
        if place.kind == "embedding" and is_tied(places):
            raise NotImplementedError(
                f"The adapter at {path!r} cannot be exported: {_TIED_ADVICE}."
            )
        if place.raw and isinstance(leaf, DoraArray):
            raise NotImplementedError(
                f"The adapter at {path!r} is DoRA, which PEFT lacks for experts and routers. Merge "
                "it with jlora.merge_params and save the whole model."
            )
    if len({type(leaf) for leaf in adapters.values()}) > 1:
        raise NotImplementedError(
            "The adapters are of several kinds, and PEFT's folders hold one kind each. "
            "Merge with jlora.merge_params and save the whole model."
        )


def _check_modules(
    trained: Sequence[str], adapters: Mapping[str, LoraArray], places: Mapping[str, Place]
) -> None:
    adapted = {module: path for path in adapters for module in places[path].modules}
    for path in trained:
        if other := next((adapted[m] for m in places[path].modules if m in adapted), None):
            raise NotImplementedError(
                f"{path!r} is trained whole and {other!r} beside it has an adapter; PEFT saves a "
                "module whole or adapts it, not both. Merge with jlora.merge_params and save the "
                "whole model, or leave one of the two out."
            )


def _biases(
    trained: Sequence[str], tensors: Mapping[str, np.ndarray], places: Mapping[str, Place]
) -> tuple[str, list[str]]:
    """PEFT's `bias`, and the leaves that it names: all biases, or all of adapted modules.

    Those of modules that are saved whole are not counted.
    """
    whole = {
        m for path in trained if places[path].parameter != "bias" for m in places[path].modules
    }
    every = [
        path
        for path, place in places.items()
        if place.parameter == "bias" and whole.isdisjoint(place.modules)
    ]
    adapted = {re.sub(r"\.(lora|vera)_[^/]*$", "", name) for name in tensors}
    beside = [path for path in every if adapted.issuperset(places[path].modules)]
    chosen = [path for path in every if path in trained]
    if all(adapted.isdisjoint(places[path].modules) for path in chosen):
        return "none", []  # a module without an adapter is saved whole
    for mode, paths in (("all", every), ("lora_only", beside)):
        if chosen == paths:
            return mode, chosen
    raise NotImplementedError(
        f"Of the biases {chosen} train; PEFT trains none, all ({every}) or those of adapted "
        f"modules ({beside}). Train one of these sets, or merge with jlora.merge_params and save "
        "the whole model."
    )


def _bias_tensors(
    leaf: Any, place: Place, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    array = np.asarray(dense(leaf).astype(jnp.float32))
    named = {}
    for name, bias in place.tensors(array).items():
        module = name.removesuffix(".bias")
        wrapped = f"{module}.lora_A.weight" in tensors
        named[f"{module}.base_layer.bias" if wrapped else name] = np.ascontiguousarray(bias)
    return named


def _token_rows(tables: Mapping[str, RowsArray], places: Mapping[str, Place]) -> Any:
    """PEFT's `trainable_token_indices`: a list for the embedding alone, else an object."""
    rows = {places[p].modules[0].rpartition(".")[2]: [*x.indices] for p, x in tables.items()}
    embeds = all(places[path].kind == "embedding" for path in tables)
    return next(iter(rows.values())) if rows and embeds else rows or None


def _factor_tensors(leaf: LoraArray, place: Place) -> dict[str, np.ndarray]:
    a, b = (np.asarray(x.astype(jnp.float32)) for x in (leaf.a, leaf.b))
    if not place.stacked:
        a, b = a[None], b[None]
    if leaf.axes[-1] == "in":  # then a belongs to the columns, and the files' input is the rows
        a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    tensors = {}
    for module, a_layer, b_layer in zip(place.modules, a, b, strict=True):
        down, up = place.factor_names(module)
        if a_layer.any() or b_layer.any():  # else a layer without an adapter, see `_adapter`
            a_layer = a_layer.swapaxes(-1, -2)  # [rank d_in], or [experts rank d_in]
            tensors[down] = np.ascontiguousarray(a_layer.reshape(-1, a_layer.shape[-1]))
            tensors[up] = np.ascontiguousarray(b_layer.T.reshape(b_layer.shape[-1], -1))
    if isinstance(leaf, DoraArray):
        magnitude = np.asarray(leaf.magnitude.astype(jnp.float32))
        for module, lengths in zip(place.modules, magnitude if place.stacked else magnitude[None]):
            down, up, name = place.adapter_names(module, dora=True)
            if down not in tensors:
                raise NotImplementedError(
                    f"The DoRA adapter of {module} has factors that are all zero; PEFT would start "
                    "it afresh. Merge it with jlora.merge_params and save the whole model."
                )
            tensors[name] = np.ascontiguousarray(lengths)
    return tensors


def _whole_tensors(
    trained: Sequence[str], leaves: Mapping[str, Any], places: Mapping[str, Place]
) -> dict[str, np.ndarray]:
    """All tensors of every module that has a leaf trained whole, since PEFT saves modules."""
    modules = {module for path in trained for module in places[path].modules}
    tensors: dict[str, np.ndarray] = {}
    for path, place in places.items():
        if place.modules[0] not in modules:
            continue
        array = np.asarray(dense(leaves[path]).astype(jnp.float32))
        tensors |= {k: np.ascontiguousarray(x) for k, x in place.tensors(array).items()}
        if place.kind == "embedding" and is_tied(places):
            tensors[f"{HEAD}.weight"] = tensors[f"{place.modules[0]}.weight"]
    return tensors


def _settings(
    adapters: Mapping[str, LoraArray],
    tensors: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    config: LoraConfig,
    whole: Iterable[str],
) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    targets = {
        places[path].target(module): path
        for path in adapters
        for module in places[path].modules
        if places[path].factor_names(module)[0] in tensors
    }
    raw = [name for name, path in targets.items() if places[path].raw]
    adapted = {name: path for name, path in targets.items() if name not in raw}
    others = {module for place in places.values() for module in place.modules} - set(adapted)
    parameters = {f"{m}.{place.parameter}" for place in places.values() for m in place.modules}
    if is_tied(places):
        others.add(HEAD)
    ranks = {name: adapters[path].rank for name, path in targets.items()}
    alphas = {name: _alpha(adapters[path], config) for name, path in targets.items()}
    rank = _usual(ranks.values(), config.rank)
    alpha = _usual(alphas.values(), config.alpha)
    saved = sorted(set(whole))
    unsaved = with_parents({*adapted, *others}) - set(saved)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole_number(alpha),
        "lora_dropout": 0.0 if raw else config.dropout,  # which PEFT has not for parameters
        "target_modules": suffixes(adapted, others) or None,
        "target_parameters": suffixes(raw, parameters - set(raw)) or None,
        # PEFT looks for these at the end of names without regard to dots: "norm" would also mean
        # every "input_layernorm".
        "modules_to_save": suffixes(saved, unsaved, at_dot=False) or None,
        "rank_pattern": _by_suffix(ranks, rank),
        "alpha_pattern": {k: _whole_number(v) for k, v in _by_suffix(alphas, alpha).items()},
        "use_rslora": config.rank_stabilized,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _alpha(leaf: LoraArray, config: LoraConfig) -> float:
    """The alpha that gives the leaf's scaling to the last bit, if the config names it."""
    divisor = math.sqrt(leaf.rank) if config.rank_stabilized else leaf.rank
    named = [config.alpha, *dict(config.alpha_pattern).values()]
    exact = (alpha for alpha in named if alpha / divisor == leaf.scaling)
    return next(exact, leaf.scaling * divisor)


def _usual(values: Iterable[Any], configured: Any) -> Any:
    """The configured value where any module has it, else the most frequent one."""
    counts = collections.Counter(values)
    return configured if configured in counts else counts.most_common(1)[0][0]


def _whole_number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _by_suffix(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    patterns = {}
    for value in dict.fromkeys(values.values()):
        if value != usual:
            wanted = [module for module in values if values[module] == value]
            others = set(values) - set(wanted)
            patterns |= dict.fromkeys(suffixes(wanted, others), value)
    return patterns
