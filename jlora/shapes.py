"""Shapes of models by a short name or from a config.json: what there is to know without weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from jlora import tree
from jlora.models import decoder, hf_config

__all__ = ["NAMES", "attention_pairs", "decoder_config", "of_model", "step_flops"]

_LLAMA3 = {
    "vocab_size": 128256,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_positions": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_WIDE = {"hidden_size": 8192, "num_layers": 80, "num_heads": 64}
_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
    },
    # Llama-3.2-1B, but for its stretched frequencies, which cost nothing
    "1b": _LLAMA3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_layers": 16,
        "head_dim": 64,
        "tie_embeddings": True,
    },
    "8b": _LLAMA3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32},
    # LLaMA-65B (arXiv:2302.13971)
    "65b": _WIDE
    | {"vocab_size": 32000, "intermediate_size": 22016, "num_kv_heads": 64, "head_dim": 128},
    "70b": _LLAMA3 | _WIDE | {"intermediate_size": 28672},
}
NAMES = tuple(_SHAPES)
# Models of these shapes; all of Llama 3 (arXiv:2407.21783) but the frequencies of 3.1 and later.
_MODELS = {
    "1b": ("Llama-3.2-1B",),
    "8b": ("Meta-Llama-3-8B", "Llama-3.1-8B"),
    "70b": ("Meta-Llama-3-70B", "Llama-3.1-70B", "Llama-3.3-70B"),
}


def decoder_config(shape: str) -> decoder.DecoderConfig:
    """The shape of that name, or of a config.json or the folder that holds one.

    Raises:
      ValueError: if there is no such shape, or the file is no config.json.
    """
    if shape in _SHAPES:
        return decoder.DecoderConfig(**_SHAPES[shape])
    path = Path(shape)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"shape must be one of {list(NAMES)} or the path of a config.json, got {shape!r}."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}.") from None
    data.pop("quantization_config", None)
    return hf_config.from_json(data, source=str(path))


def of_model(name: str) -> str | None:
    """The shape of a model on the hub that is known by its name, such as Llama-3.1-8B-Instruct."""
    owner, _, model = name.rpartition("/")
    if owner != "meta-llama":
        return None
    model = model.removesuffix("-Instruct")
    return next((shape for shape, models in _MODELS.items() if model in models), None)


# What a step asks for


def attention_pairs(config: decoder.DecoderConfig, length: int) -> int:
    """(query, key) pairs that the causal mask and the windows let through, over all layers."""
    window = config.sliding_window
    full = length * (length + 1) // 2
    if window is None or window >= length:
        return config.num_layers * full
    local = window * (window + 1) // 2 + (length - window) * window
    return sum(local if slides else full for slides in config.slides)


def step_flops(
    config: decoder.DecoderConfig, adapters: dict[str, int], *, tokens: int, pairs: float
) -> float:
    """Model flops of one optimizer step: what its mathematics asks for, however it is computed.

        projections, head     4 * parameters * tokens          forward, and the input's gradient
        adapters              6 * parameters * tokens          the same, and their own gradient
        attention             12 * heads * head_dim * pairs    two products forward, four backward

    Of a mixture of experts those count that a token goes through.

    Args:
      config: of the decoder.
      adapters: how many parameters train beside each adapted weight, by the weight's path.
      tokens: of the step.
      pairs: of queries and keys, over all rows and layers.
    """

    shapes = decoder.param_shapes(dataclasses.replace(config, unroll=1))
    leaves = dict(zip(tree.leaf_paths(shapes), jax.tree.leaves(shapes)))
    tied = "embed_tokens/embedding" if config.tie_embeddings else ""
    total = 0.0
    for path, leaf in leaves.items():
        if not path.endswith("/kernel") and path != tied:
            continue
        share = 1.0
        if config.experts is not None and "/experts/" in path:
            share = config.experts.per_token / config.experts.count
        total += share * (4 * leaf.size + 6 * adapters.get(path, 0)) * tokens
    return total + 12 * config.num_heads * config.head_dim * pairs
