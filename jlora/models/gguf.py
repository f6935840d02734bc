"""A GGUF file to (DecoderConfig, params), and its tokenizer to Hugging Face files.

Quantised tensors are dequantised. The header is read here, so that a damaged file can be told as
such, and because reading a large vocabulary through `gguf.GGUFReader` takes seconds.
"""

import mmap
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from gguf import quants

from jlora.models import gguf_tokenizer, weights
from jlora.models.decoder import DecoderConfig, RopeScaling

__all__ = ["load", "shapes", "tokenizer_files"]

# Does the file keep the rows of q and k in pairs, for interleaved RoPE, as llama.cpp's llama wants?
_PAIRED_ROPE = {"llama": True, "qwen2": False}

_LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm/scale",
    "attn_q.weight": "self_attn/q_proj/kernel",
    "attn_q.bias": "self_attn/q_proj/bias",
    "attn_k.weight": "self_attn/k_proj/kernel",
    "attn_k.bias": "self_attn/k_proj/bias",
    "attn_v.weight": "self_attn/v_proj/kernel",
    "attn_v.bias": "self_attn/v_proj/bias",
    "attn_output.weight": "self_attn/o_proj/kernel",
    "attn_output.bias": "self_attn/o_proj/bias",
    "ffn_norm.weight": "post_attention_layernorm/scale",
    "ffn_gate.weight": "mlp/gate_proj/kernel",
    "ffn_gate.bias": "mlp/gate_proj/bias",
    "ffn_up.weight": "mlp/up_proj/kernel",
    "ffn_up.bias": "mlp/up_proj/bias",
    "ffn_down.weight": "mlp/down_proj/kernel",
    "ffn_down.bias": "mlp/down_proj/bias",
}
_OTHER_TENSORS = {
    "token_embd.weight": "embed_tokens/embedding",
    "output_norm.weight": "norm/scale",
    "output.weight": "lm_head/kernel",
}
# Metadata under "<architecture>." that we use, or that does not change what the model computes.
_KNOWN_KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}


def load(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike | None = None,
    *,
    quantize: weights.Formats = None,
    place: weights.Place | None = None,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a llama or qwen2 model, tensor by tensor.

    Args:
      path: the `.gguf` file.
      dtype: of the parameters and of the computation; float32 by default, in which the file's
        numbers are exact.
      quantize: formats for the weights, as `weights.format_at` has them.
      place: as in `weights.fill`.

    Returns:
      `(config, params)` as `models/decoder.py` has them, layers stacked.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a GGUF file, truncated, or lacks metadata or tensors.
      NotImplementedError: if the model is of a kind that the decoder does not compute.
    """
    config, sources = _opened(Path(path), dtype, quantize)
    params: dict[str, Any] = {}
    for source in sources:
        _insert(params, source.path, weights.fill(source, place))
    return config, params


def shapes(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike | None = None,
    *,
    quantize: weights.Formats = None,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """What `load` gives, with `ShapeDtypeStruct`s for arrays; no weight is read."""
    config, sources = _opened(Path(path), dtype, quantize)
    params: dict[str, Any] = {}
    for source in sources:
        _insert(params, source.path, source.leaf)
    return config, params


def tokenizer_files(path: str | os.PathLike[str]) -> dict[str, str]:
    """Writes the file's tokenizer and chat template as the files of a Hugging Face folder.

    Args:
      path: the `.gguf` file; of any architecture.

    Returns:
      File name to text: tokenizer.json, tokenizer_config.json, special_tokens_map.json,
      generation_config.json.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a GGUF file, truncated, or has no tokenizer.
      NotImplementedError: if its tokenizer is of a kind not known here.
    """
    file = _read(Path(path))
    try:
        return gguf_tokenizer.files(file.metadata)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"The tokenizer in {file.path} cannot be used: {error}.") from error


# The file.


class _Tensor(NamedTuple):
    shape: tuple[int, ...]  # as numpy has it: slowest axis first
    kind: gguf.GGMLQuantizationType
    start: int
    nbytes: int


class _File(NamedTuple):
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, _Tensor]
    data: mmap.mmap

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(key, default)

    def need(self, key: str) -> Any:
        if key not in self.metadata:
            raise ValueError(f"{self.path} has no metadata '{key}', so the model cannot be built.")
        return self.metadata[key]

    def array(self, name: str) -> np.ndarray:
        """A tensor, dequantised to float32."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, tensor.nbytes, tensor.start)
        raw = raw.reshape(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind))
        try:
            return quants.dequantize(raw, tensor.kind).reshape(tensor.shape)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{self.path}: tensor {name} is stored as {tensor.kind.name}, which the gguf "
                "package cannot dequantise. Use a Q4_0, Q4_1, Q8_0, K-quant, BF16, F16 or F32 file."
            ) from error


class _Cursor:
    """Reads the little-endian header from front to back."""

    _SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {
        10: "<Q",
        11: "<q",
        12: "<d",
    }

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.position)
        self.position += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.number("<Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise struct.error("a string ends beyond the file")
        return str(self.data[start : self.position], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.string()
        if kind != 9:
            return self.number(self._SCALARS[kind])
        item, count = self.number("<I"), self.number("<Q")
        if item in (8, 9):
            return [self.value(item) for _ in range(count)]
        form = self._SCALARS[item]
        values = np.frombuffer(self.data, form.replace("<?", "?"), count, self.position)
        self.position += values.nbytes
        return values.tolist()


def _read(path: Path) -> _File:
    if not path.is_file():
        raise FileNotFoundError(f"There is no GGUF file {path}.")
    size = path.stat().st_size
    with path.open("rb") as opened:
        magic = opened.read(4)
        if magic != b"GGUF":
            raise ValueError(
                f"{path} ({size:,} bytes) is no GGUF file: it begins with {magic!r}, not b'GGUF'."
            )
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        metadata, tensors = _read_header(_Cursor(data))
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{path} is truncated or damaged: its {size:,} bytes end, or make no sense, before the "
            f"header does ({error}). Download it again."
        ) from error
    expected = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=0)
    if size < expected:
        raise ValueError(
            f"{path} is truncated: it has {size:,} bytes, its header tells of {expected:,}. "
            "Download it again."
        )
    return _File(path, metadata, tensors, data)


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    cursor.position = 4
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}, expected 2 or 3, little-endian")
    num_tensors, num_values = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("<I"))
    tensors: dict[str, _Tensor] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        shape = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))[::-1]
        kind = gguf.GGMLQuantizationType(cursor.number("<I"))
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(shape, dtype=object))
        tensors[name] = _Tensor(shape, kind, cursor.number("<Q"), count // block * nbytes)
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    start = -(-cursor.position // alignment) * alignment
    return metadata, {
        name: tensor._replace(start=start + tensor.start) for name, tensor in tensors.items()
    }


# The model.


def _config(file: _File, architecture: str, dtype: np.dtype) -> DecoderConfig:
    def need(key: str) -> Any:
        return file.need(f"{architecture}.{key}")

    def get(key: str, default: Any = None) -> Any:
        return file.get(f"{architecture}.{key}", default)

    unknown = {
        key: value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
        and key.removeprefix(f"{architecture}.") not in _KNOWN_KEYS
        and value  # 0, False and "" switch a feature off
    }
    if unknown:
        raise NotImplementedError(
            f"{file.path} sets {unknown}, which jlora's decoder does not compute "
            "(a mixture of experts, for one)."
        )
    hidden_size, num_heads = need("embedding_length"), need("attention.head_count")
    num_kv_heads = get("attention.head_count_kv", num_heads)
    intermediate_size = need("feed_forward_length")
    if not all(isinstance(n, int) for n in (num_heads, num_kv_heads, intermediate_size)):
        raise NotImplementedError(f"{file.path} gives its layers different sizes or head counts.")
    head_dim = get("attention.key_length", hidden_size // num_heads)
    widths = {
        head_dim,
        get("attention.value_length", head_dim),
        get("rope.dimension_count", head_dim),
    }
    if len(widths) > 1:
        raise NotImplementedError(
            f"{file.path}: keys, values and rotary embeddings differ in width: {sorted(widths)}."
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(
            f"{file.path} has no tensor token_embd.weight, so it is no language model."
        )
    ends = (file.get("tokenizer.ggml.eos_token_id"), file.get("tokenizer.ggml.eot_token_id"))
    return DecoderConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=need("block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=need("context_length"),
        rms_norm_eps=_as_written(need("attention.layer_norm_rms_epsilon")),
        rope_theta=_as_written(get("rope.freq_base", 10_000.0)),
        rope_scaling=_rope_scaling(file, architecture, head_dim),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        dtype=dtype.name,
        family=architecture,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        pad_token_id=file.get("tokenizer.ggml.padding_token_id"),
    )


def _as_written(number: float) -> float:
    """1e-05 for the float32 next to it, 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _rope_scaling(file: _File, architecture: str, head_dim: int) -> RopeScaling | None:
    """Linear scaling stands in the metadata, Llama 3's in a tensor of one factor a frequency."""
    kind = file.get(f"{architecture}.rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, architecture, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=file.need(f"{architecture}.rope.scaling.factor"))
    raise NotImplementedError(f"{file.path} scales its rotary embeddings by {kind!r}.")


def _llama3_scaling(file: _File, architecture: str, head_dim: int) -> RopeScaling:
    stored = file.array("rope_freqs.weight")
    # The file keeps the factors only; the other numbers are those of every Llama 3 model so far.
    scaling = RopeScaling("llama3", factor=float(stored.max()))
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    theta = file.get(f"{architecture}.rope.freq_base", 10_000.0)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((scaling.original_max_positions / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / scaling.factor + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise NotImplementedError(
            f"{file.path}: the factors in rope_freqs.weight are not those of Llama 3's scaling."
        )
    return scaling


def _opened(
    path: Path, dtype: jax.typing.DTypeLike | None, quantize: weights.Formats
) -> tuple[DecoderConfig, list[weights.Source]]:
    """The config and where each parameter is, once file and model are known to agree."""
    file = _read(path)
    architecture = file.get("general.architecture")
    if architecture not in _PAIRED_ROPE:
        raise NotImplementedError(
            f"{file.path} holds a model of architecture {architecture!r}; "
            f"jlora reads {' and '.join(_PAIRED_ROPE)} from GGUF files."
        )
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    config = _config(file, architecture, dtype)
    shapes = _shapes(config)
    _check_tensors(file, config, shapes)
    sources = []

    def add(path: str, shape: tuple[int, ...], layers: list[Any], stacked: bool) -> None:
        form = "transposed" if path.endswith("kernel") else "plain"
        leaf = weights.plan(path, shape, dtype, quantize)
        sources.append(weights.Source(path, leaf, layers, form, stacked))

    for name, path_there in _OTHER_TENSORS.items():
        if path_there in shapes:
            add(path_there, shapes[path_there], [_reader(file, name)], stacked=False)
    for name, path_there in _LAYER_TENSORS.items():
        if path_there in shapes:
            paired = _PAIRED_ROPE[architecture] and name.startswith(("attn_q.", "attn_k."))
            head_dim = config.head_dim if paired else None
            names = [f"blk.{layer}.{name}" for layer in range(config.num_layers)]
            add(
                f"layers/{path_there}",
                (config.num_layers, *shapes[path_there]),
                [_reader(file, layer_name, head_dim) for layer_name in names],
                stacked=True,
            )
    return config, sources


def _reader(file: _File, name: str, head_dim: int | None = None) -> Callable[[], list[np.ndarray]]:
    """Reads a tensor; with `head_dim` its rows are in pairs."""

    def read() -> list[np.ndarray]:
        array = file.array(name)
        return [array if head_dim is None else _unpair(array, head_dim)]

    return read


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, without the layer axis."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens/embedding": (config.vocab_size, hidden),
        "norm/scale": (hidden,),
        "input_layernorm/scale": (hidden,),
        "post_attention_layernorm/scale": (hidden,),
        "self_attn/q_proj/kernel": (hidden, queries),
        "self_attn/k_proj/kernel": (hidden, keys),
        "self_attn/v_proj/kernel": (hidden, keys),
        "self_attn/o_proj/kernel": (queries, hidden),
        "mlp/gate_proj/kernel": (hidden, inner),
        "mlp/up_proj/kernel": (hidden, inner),
        "mlp/down_proj/kernel": (inner, hidden),
    }
    biased = {"self_attn/q_proj": config.qkv_bias, "self_attn/k_proj": config.qkv_bias}
    biased |= {"self_attn/v_proj": config.qkv_bias, "self_attn/o_proj": config.o_bias}
    biased |= {f"mlp/{name}_proj": config.mlp_bias for name in ("gate", "up", "down")}
    for path, has_bias in biased.items():
        if has_bias:
            shapes[f"{path}/bias"] = shapes[f"{path}/kernel"][1:]
    if not config.tie_embeddings:
        shapes["lm_head/kernel"] = (hidden, config.vocab_size)
    return shapes


def _check_tensors(
    file: _File, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    expected = {name: shapes[path] for name, path in _OTHER_TENSORS.items() if path in shapes}
    for layer in range(config.num_layers):
        expected |= {
            f"blk.{layer}.{name}": shapes[path]
            for name, path in _LAYER_TENSORS.items()
            if path in shapes
        }
    missing = sorted(set(expected) - set(file.tensors))
    unused = sorted(set(file.tensors) - set(expected) - {"rope_freqs.weight"})
    if missing or unused:
        raise ValueError(
            f"{file.path} does not hold the tensors of its model. "
            f"Missing: {', '.join(missing) or 'none'}. "
            f"Without a place: {', '.join(unused) or 'none'}."
        )
    for name, shape in expected.items():
        wanted = shape if name == "token_embd.weight" else shape[::-1]  # stored as [out, in]
        if file.tensors[name].shape != wanted:
            raise ValueError(
                f"{file.path}: tensor {name} has shape {list(file.tensors[name].shape)}, "
                f"expected {list(wanted)}."
            )


def _unpair(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from x0 y0 x1 y1 ..., as the file has them, to x0 x1 ... y0 y1 ..."""
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _insert(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf
