"""The files of a PEFT adapter folder: read with every check that needs no model, written whole."""

import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

__all__ = ["CONFIG", "PROJECTIONS", "WEIGHTS", "listed", "read_settings", "read_tensors", "write"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Metadata of the tensors' file, which other readers pass over; an unknown key of the config is an
# error in some of them.
_BASE = "jlora_base"
_DTYPES = ("F32", "BF16", "F16", "F64")

PROJECTIONS = "base_model.vera_A", "base_model.vera_B"  # of VeRA, which are in no module

# Fields of adapter_config.json that are read, or that change nothing in how an adapter computes.
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "modules_to_save", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "use_dora", "layers_to_transform", "layers_pattern", "bias",
    "trainable_token_indices", "target_parameters",
}  # fmt: skip
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip


# VeRA's names for what LoRA has too, and what else its config holds.
_VERA = {"vera_dropout": "lora_dropout", "init_weights": "init_lora_weights"}
_VERA_ALONE = {"save_projection", "projection_prng_key", "d_initial"}


def read_settings(file: pathlib.Path) -> dict[str, Any]:
    """adapter_config.json with PEFT's defaults filled in; refuses what is not read here."""
    if not file.is_file():
        nested = sorted(str(found.parent) for found in file.parent.glob(f"*/{CONFIG}"))
        hint = f" There is one in {', '.join(nested)}." if nested else ""
        raise FileNotFoundError(f"{file} is missing: is {file.parent} a PEFT adapter?{hint}")
    try:
        settings = json.loads(file.read_text("utf-8-sig"))  # some editors begin a file with a BOM
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise ValueError(f"{file} has no 'peft_type'; PEFT writes one, \"LORA\" for LoRA.")
    if settings["peft_type"] == "VERA":
        settings = _as_lora(file, settings)
    elif settings["peft_type"] != "LORA":
        raise NotImplementedError(
            f"{file}: peft_type is {settings['peft_type']!r}; only 'LORA' and 'VERA' can be loaded."
        )
    init = settings.get("init_lora_weights", True)
    refused = [
        f"{name}={value!r}"
        for name, value in settings.items()
        if name not in _READ | _HARMLESS and value
    ]
    if isinstance(init, str) and init not in ("gaussian", "orthogonal", "eva"):
        refused.append(f"init_lora_weights={init!r} (it changes the base model's weights)")
    if refused:
        raise NotImplementedError(
            f"{file} asks for what jlora does not read: {', '.join(refused)}. Merge the adapter "
            "with PEFT (merge_and_unload), save that model and load it instead."
        )
    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
    defaults |= {"use_rslora": False, "use_dora": False, "bias": "none"}
    settings = defaults | settings
    for name in ("rank_pattern", "alpha_pattern"):
        settings[name] = settings.get(name) or {}
    _check_types(file, settings)
    return settings


def _as_lora(file: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a VeRA adapter by the names that LoRA's have."""
    if not settings.get("save_projection", True):
        raise NotImplementedError(
            f"{file} has save_projection=false: its projections are random numbers of torch, which "
            "only torch can draw again. Load it with PEFT, set save_projection to true in its "
            "config and save it again."
        )
    if (bias := settings.get("bias", "none")) != "none":
        raise NotImplementedError(f"{file} has bias={bias!r}, which is read beside LoRA alone.")
    rank = settings.get("r", 256)
    renamed = {_VERA.get(k, k): value for k, value in settings.items() if k not in _VERA_ALONE}
    return renamed | {"r": rank, "lora_alpha": rank}


def _check_types(file: pathlib.Path, settings: Mapping[str, Any]) -> None:
    def refuse(name: str, expected: str) -> None:
        raise ValueError(f"{file}: {name} must be {expected}, got {settings[name]!r}.")

    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings[name], dict):
            refuse(name, "an object from names to numbers")
    for rank in (settings["r"], *settings["rank_pattern"].values()):
        if type(rank) is not int or rank < 1:
            refuse("rank_pattern" if settings["rank_pattern"] else "r", "whole and at least 1")
    for alpha in (settings["lora_alpha"], *settings["alpha_pattern"].values()):
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            name = "alpha_pattern" if settings["alpha_pattern"] else "lora_alpha"
            refuse(name, "above 0 and finite")
    layers = settings.get("layers_to_transform")
    if not all(type(x) is int for x in (layers if isinstance(layers, list) else [layers or 0])):
        refuse("layers_to_transform", "a layer's number or a list of them")
    tokens = settings.get("trainable_token_indices") or {}
    for rows in tokens.values() if isinstance(tokens, dict) else [tokens]:
        whole = isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
        if not whole or len(set(rows)) < len(rows):
            expected = "a list of different rows, or an object from names to those"
            refuse("trainable_token_indices", expected)
    if settings["bias"] not in ("none", "all", "lora_only"):
        refuse("bias", "'none', 'all' or 'lora_only'")
    dropout = settings["lora_dropout"]
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        refuse("lora_dropout", "at least 0 and below 1")
    texts = ("target_modules", "exclude_modules", "layers_pattern")
    for name in (*texts, "modules_to_save", "target_parameters"):
        value = settings.get(name) or []
        text = isinstance(value, str) and name in texts
        if not text and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
            refuse(name, "a list of names")
    values = (settings.get(name) for name in texts)
    regexes = [value for value in values if isinstance(value, str)]
    if isinstance(settings.get("layers_pattern"), list):
        regexes += settings["layers_pattern"]
    for regex in (*regexes, *settings["rank_pattern"], *settings["alpha_pattern"]):
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"{file}: {regex!r} is no regular expression: {error}.") from None


def read_tensors(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The file's tensors in float32, by their names in the base model, and its base's fingerprint.

    The fingerprint is empty where the file has none, as those that PEFT writes.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"{folder} has only adapter_model.bin, a pickle: reading one can run any code that "
                "is in it, so jlora does not. Load it with PEFT where you trust its source and "
                "call save_pretrained, which writes adapter_model.safetensors."
            )
        raise FileNotFoundError(f"{file} is missing.")
    tensors = {}
    try:
        with safetensors.safe_open(file, "np") as opened:
            recorded = (opened.metadata() or {}).get(_BASE, "{}")
            for name in opened.keys():  # noqa: SIM118
                dtype = opened.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise ValueError(
                        f"{file}: {name} has dtype {dtype}; an adapter's tensors are of "
                        f"{', '.join(_DTYPES)}. Convert it to one of these and save the file anew."
                    )
                tensors[name] = opened.get_tensor(name).astype(np.float32)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is broken or incomplete: {error}.") from None
    if broken := sorted(name for name, x in tensors.items() if not np.isfinite(x).all()):
        raise ValueError(
            f"{file}: tensors hold NaN or infinite elements: {listed(broken)}. The training that "
            "wrote them went wrong; take an adapter from before that."
        )
    if strange := sorted(
        {name for name in tensors if not name.startswith(_PREFIX)} - {*PROJECTIONS}
    ):
        raise ValueError(
            f"{file}: tensor names of a PEFT adapter begin with {_PREFIX!r}; these do not: "
            f"{listed(strange)}."
        )
    tensors = {name.removeprefix(_PREFIX): array for name, array in tensors.items()}
    return tensors, _read_base(file, recorded)


def _read_base(file: pathlib.Path, recorded: str) -> dict[str, str]:
    """The fingerprint in a file's metadata."""
    try:
        base = json.loads(recorded)
    except ValueError:
        base = None
    if not isinstance(base, dict) or not all(isinstance(text, str) for text in base.values()):
        raise ValueError(
            f"{file}: the metadata {_BASE!r} must be a JSON object from paths of weights to texts, "
            f"got {recorded[:80]!r}. Save the adapter again, or remove that entry: the base is "
            "then compared by shapes alone."
        )
    return base


def write(
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    base_license: str,
    base: Mapping[str, str],
) -> None:
    """Writes config, tensors and model card beside the folder, then moves them into place.

    `base` is the base model's fingerprint. A folder that was not there appears whole. In one that
    was, each file is replaced whole.
    """
    prefixed = {_PREFIX * (name not in PROJECTIONS) + name: x for name, x in tensors.items()}
    metadata = {"format": "pt"} | ({_BASE: json.dumps(base)} if base else {})
    contents = {
        "README.md": _model_card(settings, base_license).encode(),
        WEIGHTS: _serialised(prefixed, metadata),
        CONFIG: (json.dumps(settings, indent=2) + "\n").encode(),
    }
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; an adapter is saved as a folder.")
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        for name, content in contents.items():
            with open(staging / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if not folder.exists():
            staging.rename(folder)
            return
        for name in contents:
            os.replace(staging / name, folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _serialised(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of the same bytes each time; the library gives metadata no order."""
    data = safetensors.numpy.save(dict(tensors), metadata=dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    ordered = {"__metadata__": dict(metadata)}
    ordered |= {name: value for name, value in header.items() if name != "__metadata__"}
    text = json.dumps(ordered, separators=(",", ":")).encode()
    text = text.ljust(-len(text) % 8 + len(text))
    return len(text).to_bytes(8, "little") + text + data[end:]


_CARD = """---
{front}
---

# {kind} adapter{of}

Trained with jlora. {how}, on {targets}.

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

With jlora:

```python
import jlora

model, params = jlora.models.load({base})
params, config = jlora.peft.load("path/to/this/folder", params)
forward = jlora.adapt(model.apply)
```
"""


def _model_card(settings: Mapping[str, Any], base_license: str) -> str:
    base_model = settings["base_model_name_or_path"]
    kind = settings["peft_type"].lower()
    front = ["library_name: peft", "tags:", f"- {kind}", "- jlora"]
    front.append("pipeline_tag: text-generation")
    if base_model:
        front.append(f"base_model: {json.dumps(base_model)}")
    if base_license:
        front.append(f"license: {json.dumps(base_license)}")
    return _CARD.format(
        front="\n".join(front),
        of=f" for {base_model}" if base_model else "",
        kind="VeRA" if settings["peft_type"] == "VERA" else "LoRA",
        how=f"Rank {settings['r']}"
        + (f", alpha {settings['lora_alpha']}" if "lora_alpha" in settings else ""),
        targets=", ".join(
            f"`{target}`"
            for name in ("target_modules", "target_parameters")
            for target in settings.get(name) or ()
        ),
        base=json.dumps(base_model or "path/to/the/base/model"),
    )


def listed(names: Sequence[str], shown: int = 12) -> str:
    """Names for a message, the first of them if they are many."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more if names else "none"
