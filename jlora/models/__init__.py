"""Models that jlora brings along, and the files they are read from.

>>> model, params = jlora.models.load("HuggingFaceTB/SmolLM2-135M-Instruct")
>>> logits = model.apply({"params": params}, tokens)
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["load", "resolve", "save", "tokenizer_files"]

# Loaded on first use: flax, safetensors and gguf are not needed to name this package.
_SUBMODULES = (
    "attention", "cache", "decoder", "decoder_config", "gguf", "gguf_tokenizer", "hf", "hf_config",
    "hf_families", "hf_rope", "hub", "layers", "moe", "remat", "rotary",
)  # fmt: skip


def load(name_or_dir: str | os.PathLike[str], *, dtype: Any = None) -> tuple[Any, dict[str, Any]]:
    """Loads a model from a folder, a `.gguf` file, or by its Hugging Face name.

    Args:
      name_or_dir: what `resolve` takes.
      dtype: of parameters and computation, by default the file's.

    Returns:
      `(model, params)`: `model.apply({"params": params}, tokens)` gives logits.
    """
    from jlora.models import decoder, gguf, hf

    path = resolve(name_or_dir)
    config, params = gguf.load(path, dtype) if _is_gguf(path) else hf.load(path, dtype)
    return decoder.Decoder(config), params


def save(
    directory: str | os.PathLike[str],
    model: Any,
    params: Mapping[str, Any],
    *,
    tokenizer_files: Mapping[str, str] | None = None,
) -> None:
    """Writes a Hugging Face folder: config.json, safetensors, and tokenizer files as given.

    Args:
      directory: the folder to make; an earlier model there is replaced once this one is complete.
      model: from `load`.
      params: plain arrays; merge adapters first.
      tokenizer_files: what the function of this name gives for the model that was loaded.
    """
    from jlora.models import hf

    hf.save(directory, model.config, params, tokenizer_files)


def resolve(name_or_dir: str | os.PathLike[str]) -> Path:
    """The folder or `.gguf` file of a model, fetched if it is not on this machine."""
    from jlora.models import hub

    return hub.resolve(name_or_dir)


def tokenizer_files(name_or_dir: str | os.PathLike[str]) -> dict[str, str]:
    """The tokenizer's files (tokenizer.json and those beside it) of a model, name to text."""
    from jlora.models import gguf, hf

    path = resolve(name_or_dir)
    return gguf.tokenizer_files(path) if _is_gguf(path) else hf.tokenizer_files(path)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"jlora.models.{name}")
    raise AttributeError(f"module 'jlora.models' has no attribute {name!r}")
