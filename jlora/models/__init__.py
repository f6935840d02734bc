"""Models that jlora brings along, and the files they are read from.

>>> model, params = jlora.models.load("HuggingFaceTB/SmolLM2-135M-Instruct")
>>> logits = model.apply({"params": params}, tokens)
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora.models.weights import Formats, Place

__all__ = ["load", "resolve", "revision", "save", "shapes", "tokenizer_files"]

# Loaded on first use: flax, safetensors and gguf are not needed to name this package.
_SUBMODULES = (
    "attention", "bnb", "cache", "decoder", "decoder_config", "gguf", "gguf_tokenizer", "hf",
    "hf_config", "hf_families", "hf_names", "hf_rope", "hub", "layers", "moe",
    "packed_cache", "remat", "rotary", "slices", "splash", "weights",
)  # fmt: skip


def load(
    name_or_dir: str | os.PathLike[str],
    *,
    dtype: Any = None,
    quantize: "Formats" = None,
    sharding: "Place | None" = None,
    cache: str | os.PathLike[str] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Loads a model from a folder, a `.gguf` file, or by its Hugging Face name.

    Tensors are read, quantised and placed one by one: the host holds one at a time, the devices one
    besides what is loaded.

    Args:
      name_or_dir: what `resolve` takes.
      dtype: of parameters and computation, by default the file's.
      quantize: `"nf4"`, `"int8"` or `"float8"` packs the weights of linear layers inside the
        layers, as transformers has it with bitsandbytes: not embeddings, the head, norms or biases.
        `{"layers": "nf4", "embeddings": "int8"}` packs the embedding and an untied head too.
        Weights that a folder holds in bitsandbytes' NF4 become `NF4Array` leaves also without it.
      sharding: called with the path and shape of each weight, gives its `Sharding`, or None for
        the default device. A quantised weight's arrays follow it, no block cut apart.
      cache: a folder to keep packed weights in, with `quantize`: the next load reads those alone,
        bit-equal. They take their packed size on the disk; a stale or damaged file is made again.

    Returns:
      `(model, params)`: `model.apply({"params": params}, tokens)` gives logits; on a tree with
      quantised leaves, `jlora.adapt` of that does.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, contradicts itself, or cannot be quantised as asked.
      NotImplementedError: if the model or its format is of a kind that is not read.
    """
    from jlora.models import decoder

    path = resolve(name_or_dir)
    reader = _reader(path)
    if quantize is not None and cache is not None:
        from jlora.models import packed_cache

        config, params = packed_cache.load(
            cache, path, reader, dtype=dtype, quantize=quantize, place=sharding
        )
    else:
        config, params = reader.load(path, dtype, quantize=quantize, place=sharding)
    return decoder.Decoder(config), params


def shapes(
    name_or_dir: str | os.PathLike[str], *, dtype: Any = None, quantize: "Formats" = None
) -> tuple[Any, dict[str, Any]]:
    """What `load` gives, with `ShapeDtypeStruct`s for arrays: to look at a model of any size."""
    from jlora.models import decoder

    path = resolve(name_or_dir)
    config, params = _reader(path).shapes(path, dtype, quantize=quantize)
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


def revision(name_or_dir: str | os.PathLike[str]) -> str:
    """The commit of a model from the Hugging Face hub; empty where it is not known."""
    from jlora.models import hub

    return hub.revision(hub.resolve(name_or_dir))


def tokenizer_files(name_or_dir: str | os.PathLike[str]) -> dict[str, str]:
    """The tokenizer's files (tokenizer.json and those beside it) of a model, name to text."""
    path = resolve(name_or_dir)
    return _reader(path).tokenizer_files(path)


def _reader(path: Path) -> Any:
    """The module that reads this kind of file."""
    from jlora.models import gguf, hf

    return gguf if path.suffix.lower() == ".gguf" else hf


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"jlora.models.{name}")
    raise AttributeError(f"module 'jlora.models' has no attribute {name!r}")
