"""Rotary positions in a config.json, in the spellings that transformers has had for them."""

import math
from collections.abc import Mapping
from typing import Any

from jlora.models.decoder_config import DecoderConfig
from jlora.models.hf_families import FAMILIES, HARMLESS
from jlora.models.rotary import RopeScaling

__all__ = ["read", "to_json"]

# What each type of rotary positions needs, and what it may have besides.
_ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        set(),
    ),
    "longrope": (
        {"short_factor", "long_factor", "original_max_position_embeddings"},
        {"factor", "attention_factor"},
    ),
}


def read(data: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """The fields of DecoderConfig that say how positions are rotated.

    Args:
      data: a config.json, with the new spelling, `rope_parameters`, or the old, `rope_theta` and
        `rope_scaling`.
      name: of the family.
      source: the file's name, for messages.
    """
    defaults = FAMILIES[name].defaults
    fields: dict[str, Any] = {}
    if name == "gemma3_text":
        nested = data.get("rope_parameters") or {}
        rope = {**(nested.get("full_attention") or {}), **(data.get("rope_scaling") or {})}
        local = dict(nested.get("sliding_attention") or {})
        theta = local.pop("rope_theta", None) or data.get("rope_local_base_freq")
        fields["local_rope_theta"] = float(theta or defaults["rope_local_base_freq"])
        kind = local.pop("rope_type", None) or "default"
        if (
            kind != "default"
            or any(local.values())
            or set(nested)
            - {
                "full_attention",
                "sliding_attention",
            }
        ):
            raise NotImplementedError(
                f"{source} sets rope_parameters={nested}; jlora's decoder scales the rotary "
                "positions of full_attention only."
            )
    else:
        rope = dict(data.get("rope_scaling") or {}) or dict(data.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None) or data.get("rope_theta") or defaults["rope_theta"]
    fields["rope_theta"] = float(theta)
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    if name == "phi3":
        kind = "longrope" if kind == "su" else kind  # its name in the first files
        partial = rope.pop("partial_rotary_factor", None) or data.get("partial_rotary_factor")
        fields["rotary_factor"] = float(partial or 1)
        if kind == "longrope":
            key = "original_max_position_embeddings"
            rope[key] = data.get(key) or rope.get(key) or defaults[key]
    fields["rope_scaling"] = _scaling(kind, rope, data, source)
    return fields


def _scaling(
    kind: str, rope: Mapping[str, Any], data: Mapping[str, Any], source: str
) -> RopeScaling | None:
    if kind not in _ROPE_KEYS:
        raise NotImplementedError(
            f"{source} asks for rotary positions of type {kind!r}; supported are "
            f"{list(_ROPE_KEYS)}."
        )
    wanted, optional = _ROPE_KEYS[kind]
    unknown = {
        key: value
        for key, value in rope.items()
        if key not in wanted | optional and value and value not in HARMLESS.get(key, ())
    }
    if unknown:
        raise NotImplementedError(
            f"{source} sets {unknown} for rotary positions of type {kind!r}, which jlora's "
            "decoder does not model."
        )
    if missing := sorted(wanted - set(rope)):
        raise ValueError(f"{source} lacks {missing} for rotary positions of type {kind!r}.")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=float(rope["factor"]))
    original = int(rope["original_max_position_embeddings"])
    if kind == "longrope":
        factor = rope.get("factor") or data.get("max_position_embeddings", original) / original
        return RopeScaling(
            "longrope",
            original_max_positions=original,
            short_factors=rope["short_factor"],
            long_factors=rope["long_factor"],
            attention_factor=float(
                rope.get("attention_factor") or _attention_factor(factor, original)
            ),
        )
    return RopeScaling(
        "llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=original,
    )


def _attention_factor(factor: float, original: int) -> float:
    """What LongRoPE takes where a file names none."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def to_json(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a config.json, in both spellings."""
    scaling = _scaling_to_json(config)
    theta = {"rope_theta": config.rope_theta}
    parameters: dict[str, Any] = {"rope_type": "default", **theta, **scaling}
    data: dict[str, Any] = {**theta, "rope_scaling": scaling or None}
    if config.family == "phi3":
        partial = {"partial_rotary_factor": config.rotary_factor}
        data |= partial
        parameters |= partial
        if scaling:
            original = scaling.pop("original_max_position_embeddings")
            data["original_max_position_embeddings"] = original
            # Earlier versions of transformers refuse other fields than these three.
            scaling["type"] = scaling.pop("rope_type")
            factor = config.max_positions / original
            if scaling["attention_factor"] == _attention_factor(factor, original):
                del scaling["attention_factor"]
    if config.family == "gemma3_text":
        local = config.local_rope_theta
        data["rope_local_base_freq"] = local
        parameters = {
            "full_attention": parameters,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return {**data, "rope_parameters": parameters}


def _scaling_to_json(config: DecoderConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    original = scaling.original_max_positions
    if scaling.kind == "longrope":
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
            "attention_factor": scaling.attention_factor,
            "original_max_position_embeddings": original,
        }
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": original,
    }
