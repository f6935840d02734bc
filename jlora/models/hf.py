"""A Hugging Face folder (config.json, safetensors, tokenizer files) <-> (DecoderConfig, params).

The only place, with peft.py, that knows foreign names and layouts: a PyTorch weight is `[out, in]`,
one tensor a layer; ours are `[in, out]`, stacked over layers.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jlora.models import bnb, hf_config, hf_names, slices, weights
from jlora.models.decoder import param_shapes
from jlora.models.decoder_config import DecoderConfig
from jlora.models.hf_names import hf_name, is_transposed

__all__ = ["hf_name", "is_transposed", "load", "save", "shapes", "tokenizer_files"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_SHARD_BYTES = 5_000_000_000
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LISTED = 20  # tensors of one kind that a message names


def load(
    directory: str | os.PathLike[str],
    dtype: Any = None,
    *,
    quantize: weights.Formats = None,
    place: weights.Place | None = None,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a model, tensor by tensor into the stacked arrays.

    Args:
      directory: with config.json and model.safetensors, or the shards of an index; weights that
        bitsandbytes serialised in NF4 become `NF4Array` leaves.
      dtype: of parameters and computation; by default parameters keep the file's and the
        computation uses the dtype that config.json states.
      quantize: formats for the weights, as `weights.format_at` has them.
      place: as in `weights.fill`.

    Returns:
      `(config, params)` as `models/decoder.py` has them.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, or config.json and the tensors do not agree both ways.
      NotImplementedError: if config.json describes something the decoder does not compute.
    """
    with _opened(Path(directory), dtype, quantize) as (config, sources):
        flat = {source.path: weights.fill(source, place) for source in sources}
    return config, _unflatten(flat)


def shapes(
    directory: str | os.PathLike[str], dtype: Any = None, *, quantize: weights.Formats = None
) -> tuple[DecoderConfig, dict[str, Any]]:
    """What `load` gives, with `ShapeDtypeStruct`s for arrays; no weight is read."""
    directory = Path(directory)
    config, packed = _read_config(directory, dtype)
    if dtype is None or packed:  # the heads of the weights' files say more
        with _opened(directory, dtype, quantize) as (config, sources):
            return config, _unflatten({source.path: source.leaf for source in sources})
    return config, weights.abstract(config, quantize)


def save(
    directory: str | os.PathLike[str],
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokenizer_files: Mapping[str, str] | None = None,
) -> None:
    """Writes a folder that `load`, transformers and what builds on it can read.

    It is written beside its place and moved there when complete: a crash or a full disk leaves an
    earlier folder as it was. An earlier model folder is replaced; one with other files is refused.

    Args:
      directory: the folder to make.
      config: of the decoder.
      params: plain arrays, as the decoder has them.
      tokenizer_files: file name to text, copied as they are.

    Raises:
      ValueError: if params are not those of config, or the folder holds other files.
      OSError: if it cannot be written.
    """
    directory = Path(directory).resolve()
    flat = _flatten(params)
    _check_params(flat, _flatten(param_shapes(config)))
    dtype = np.dtype(flat["embed_tokens/embedding"].dtype).name
    texts = {"config.json": json.dumps(hf_config.to_json(config, dtype=dtype), indent=2) + "\n"}
    for name, text in (tokenizer_files or {}).items():
        if name not in _TOKENIZER_FILES:
            raise ValueError(f"{name!r} is no tokenizer file; those are {_TOKENIZER_FILES}.")
        texts[name] = text
    with _replacing(directory) as staging:
        for name, text in texts.items():
            (staging / name).write_bytes(text.encode())
        try:
            _write_tensors(staging, flat, config.family)
        except safetensors.SafetensorError as error:
            raise OSError(f"Could not write tensors to {directory}: {error}") from error


def tokenizer_files(directory: str | os.PathLike[str]) -> dict[str, str]:
    """File name to text, of those tokenizer files that the folder has."""
    files = [Path(directory) / name for name in _TOKENIZER_FILES]
    return {file.name: file.read_bytes().decode() for file in files if file.is_file()}


def _read_config(directory: Path, dtype: Any) -> tuple[DecoderConfig, bool]:
    """The config, and whether the weights are packed in four bits."""
    file = directory / "config.json"
    data = _read_json(file)
    packed = bnb.is_packed(data, str(file))
    data.pop("quantization_config", None)
    config = hf_config.from_json(data, source=str(file))
    return config if dtype is None else dataclasses.replace(config, dtype=dtype), packed


@contextlib.contextmanager
def _opened(
    directory: Path, dtype: Any, quantize: weights.Formats
) -> Iterator[tuple[DecoderConfig, list[weights.Source]]]:
    """The config and where each parameter is, once both are known to agree."""
    config, packed = _read_config(directory, dtype)
    with contextlib.ExitStack() as stack:
        tensors = {
            name: _Tensor(handle, name, file, offset)
            for file in _weight_files(directory)
            for handle in [stack.enter_context(_open(file))]
            for name, offset in slices.offsets(file).items()
        }
        tensors = bnb.collect(tensors) if packed else tensors
        shapes = _flatten(param_shapes(config))
        stacked = any(name.endswith(".experts.gate_up_proj") for name in tensors)
        parts = {
            path: hf_names.parts(path, leaf.shape, config.family, stacked_experts=stacked)
            for path, leaf in shapes.items()
        }
        _check_tensors(directory, tensors, shapes, parts, tied=config.tie_embeddings)
        yield (
            config,
            [
                _source(path, leaf.shape, tensors, parts[path], dtype, quantize)
                for path, leaf in shapes.items()
            ],
        )


def _source(
    path: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, Any],
    parts: Mapping[str, hf_names.Index],
    dtype: Any,
    quantize: weights.Formats,
) -> weights.Source:
    stacked = "{}" in hf_name(path)
    found = [tensors[name] for name in parts]
    many = stacked and len(parts) > shape[0]
    if packed := [tensor for tensor in found if isinstance(tensor, bnb.Packed)]:
        if many:
            raise NotImplementedError(
                f"{packed[0].file} holds experts in four bits; those are read from files that are "
                "not quantised, with quantize= to pack them."
            )
        fmt = weights.format_at(path, quantize)
        return bnb.source(path, shape, found, dtype, fmt, stacked=stacked)
    stored = jnp.result_type(*{jnp.dtype(_DTYPES[tensor.stored]) for tensor in found})
    leaf = weights.plan(path, shape, stored if dtype is None else dtype, quantize)
    form = "transposed" if is_transposed(path) else "plain"
    if not many:
        layers = [lambda tensor=tensor: [tensor] for tensor in found]
        return weights.Source(path, leaf, layers, form, stacked)

    def join(layer: int) -> list[slices.Joined]:
        """One layer's experts, whose tensors come one by one, as if they were one tensor."""
        inside = []
        for name, index in parts.items():
            if index[0] == layer:
                expert, *matrix = index[1:]
                box = (slice(expert, expert + 1), *(matrix[::-1] if form != "plain" else matrix))
                inside.append((box, tensors[name]))
        whole = hf_names.tensor_shape(path, shape, (layer,))
        return [slices.Joined(whole, stored, inside)]

    layers = [functools.partial(join, layer) for layer in range(shape[0])]
    return weights.Source(path, leaf, layers, form, stacked)


class _Tensor:
    """One tensor of an open safetensors file: read whole, or in parts by `slices`."""

    def __init__(self, handle: Any, name: str, file: Path, offset: int):
        self.name, self.file = name, file
        self._handle, self._offset = handle, offset
        view = handle.get_slice(name)
        self.shape = tuple(view.get_shape())
        self.stored = view.get_dtype()

    @property
    def dtype(self) -> Any:
        return jnp.dtype(_DTYPES[self.stored])

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        return slices.Stored(self.file, self._offset, self.shape, self.dtype)[box]

    def read(self) -> np.ndarray:
        try:
            return self._handle.get_tensor(self.name)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self.file}: cannot read {self.name}: {error}.") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}.")
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(data).__name__}.")
    return data


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if not (directory / _INDEX).is_file():
        raise FileNotFoundError(
            f"{directory} has neither {_SINGLE} nor {_INDEX}. Other weight formats are not read; "
            "transformers' save_pretrained writes this one."
        )
    names = set(_read_json(directory / _INDEX).get("weight_map", {}).values())
    files = [directory / Path(name).name for name in sorted(names)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{directory} lacks {', '.join(absent)}, named in {_INDEX}.")
    return files


def _open(file: Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is damaged or incomplete: {error}. "
            "Fetch or copy it again."
        ) from error


def _check_tensors(
    directory: Path,
    tensors: Mapping[str, Any],
    shapes: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, hf_names.Index]],
    *,
    tied: bool,
) -> None:
    expected = {
        name: hf_names.tensor_shape(path, leaf.shape, index)
        for path, leaf in shapes.items()
        for name, index in parts[path].items()
    }
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in tensors]
    unexpected, misshapen = [], []
    for name, tensor in tensors.items():
        where = f"{name} {tensor.shape} in {tensor.file.name}"
        if name not in expected:
            if not (name.endswith(".rotary_emb.inv_freq") or _is_tied_copy(name, tensors, tied)):
                unexpected.append(where)
        elif tensor.shape != expected[name]:
            misshapen.append(f"{where}, expected {expected[name]}")
        elif tensor.stored not in _DTYPES:
            misshapen.append(f"{where} of type {tensor.stored}, expected one of {list(_DTYPES)}")
    _refuse(
        f"The tensors of {directory} are not those of its config.json.",
        {"missing": missing, "unexpected": unexpected, "wrong": misshapen},
    )


def _is_tied_copy(name: str, tensors: Mapping[str, Any], tied: bool) -> bool:
    """Some writers store a tied head again; one that differs from the embedding is no copy."""
    table = tensors.get("model.embed_tokens.weight")
    if name != "lm_head.weight" or not tied or table is None:
        return False
    copy = tensors[name]
    if (copy.shape, copy.stored) != (table.shape, table.stored):
        return False
    return copy.read().tobytes() == table.read().tobytes()


def _check_params(flat: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    misshapen = [
        f"{path} {tuple(leaf.shape)}, expected {shapes[path].shape}"
        for path, leaf in flat.items()
        if path in shapes and tuple(leaf.shape) != shapes[path].shape
    ]
    misshapen += [
        f"{path} is no plain array but {type(leaf).__name__}; make it one with jlora.merge_params"
        for path, leaf in flat.items()
        if not isinstance(leaf, jax.Array | np.ndarray)
    ]
    _refuse(
        "These parameters are not those of the decoder's config.",
        {
            "missing": sorted(set(shapes) - set(flat)),
            "unexpected": sorted(set(flat) - set(shapes)),
            "wrong": misshapen,
        },
    )


def _refuse(message: str, faults: Mapping[str, Sequence[str]]) -> None:
    """Raises one error that lists every kind of fault, if there is any."""
    lines = [message]
    for kind, items in faults.items():
        if items:
            more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
            lines.append(f"  {kind}: {'; '.join(items[:_LISTED])}{more}")
    if len(lines) > 1:
        raise ValueError("\n".join(lines))


def _write_tensors(directory: Path, flat: Mapping[str, Any], family: str) -> None:
    """Writes one file, or shards and their index; one shard at a time is in memory besides."""
    shards: list[list[tuple[str, str, hf_names.Index]]] = [[]]  # (tensor, parameter, its part)
    room = _SHARD_BYTES
    for path, leaf in flat.items():
        parts = hf_names.parts(path, leaf.shape, family)
        size = leaf.size * leaf.dtype.itemsize // len(parts)
        for name, index in parts.items():
            if size > room and shards[-1]:
                shards.append([])
                room = _SHARD_BYTES
            shards[-1].append((name, path, index))
            room -= size
    if len(shards) == 1:
        _write_shard(directory / _SINGLE, shards[0], flat)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, shard, flat)
        weight_map |= dict.fromkeys((name for name, _, _ in shard), file)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in flat.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / _INDEX).write_bytes(json.dumps(index, indent=2).encode())


def _write_shard(
    file: Path, shard: Sequence[tuple[str, str, hf_names.Index]], flat: Mapping[str, Any]
) -> None:
    tensors, whole, current = {}, np.empty(0), None
    for name, path, index in shard:
        if path != current:
            whole, current = np.asarray(flat[path]), path
        tensors[name] = np.ascontiguousarray(hf_names.oriented(whole[index], path))
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that takes its place if the body succeeds."""
    _refuse_other_files(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    old = staging.with_name(f"{staging.name}.old")
    try:
        yield staging
        _flush(staging)
        if directory.exists():
            directory.rename(old)
        staging.rename(directory)
    except BaseException:
        if old.exists() and not directory.exists():
            old.rename(directory)
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _refuse_other_files(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; name a folder to write the model to.")
    if not directory.exists():
        return
    known = {"config.json", _INDEX, *_TOKENIZER_FILES}
    others = [
        file.name
        for file in directory.iterdir()
        if file.name not in known and file.suffix != ".safetensors"
    ]
    if others:
        raise ValueError(
            f"{directory} holds files that are no part of a model ({', '.join(sorted(others)[:5])})"
            " and would be lost; name a new folder."
        )


def _flush(directory: Path) -> None:
    """Puts the files on the disk, readable by whom the user's umask lets."""
    mask = os.umask(0)
    os.umask(mask)
    for file in directory.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        file.chmod(0o666 & ~mask)  # safetensors and mkdtemp make files for their owner alone
    directory.chmod(0o777 & ~mask)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = value
    return tree
