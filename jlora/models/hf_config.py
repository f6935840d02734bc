"""config.json of a Hugging Face folder <-> DecoderConfig.

Every field is either read, known not to change what the model computes, or refused by name: a field
that is skipped in silence is a model that answers wrongly in silence.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jlora.models import hf_rope
from jlora.models.decoder_config import DecoderConfig, Experts
from jlora.models.hf_families import FAMILIES, HARMLESS, NO_EFFECT, READ

__all__ = ["from_json", "to_json"]


def from_json(data: Mapping[str, Any], *, source: str) -> DecoderConfig:
    """Reads the contents of a config.json.

    Args:
      data: the parsed file.
      source: its name, for messages.

    Returns:
      The configuration; its dtype is the file's, float32 where the file says none.

    Raises:
      NotImplementedError: if it describes a model that the decoder does not compute.
      ValueError: if a field is missing or cannot be.
    """
    name = _family_name(data, source)
    family = FAMILIES[name]
    _refuse_unknown(data, name, source)

    def get(key: str) -> Any:
        return data.get(key, family.defaults.get(key))

    def need(key: str) -> Any:
        if (value := get(key)) is None:
            raise ValueError(f"{source} lacks {key!r}.")
        return value

    num_heads, hidden_size = need("num_attention_heads"), need("hidden_size")
    kv_heads = data.get("num_key_value_heads")
    if kv_heads is None:
        kv_heads = num_heads if name in ("llama", "phi3") else need("num_key_value_heads")
    eos = data.get("eos_token_id")
    attention_bias = bool(data.get("attention_bias"))
    window, slides = _windows(data, name, source)
    width = "moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size"
    fields = {
        "qkv_bias": attention_bias,
        "experts": _experts(data, name, source),
        "query_scalar": get("query_pre_attn_scalar"),
        "attention_softcap": get("attn_logit_softcapping"),
        "logit_softcap": get("final_logit_softcapping"),
        **hf_rope.read(data, name, source),
        **family.common,
    }
    return DecoderConfig(
        vocab_size=need("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=need(width),
        num_layers=need("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=get("head_dim") or hidden_size // num_heads,
        max_positions=need("max_position_embeddings"),
        rms_norm_eps=need("rms_norm_eps"),
        sliding_window=window,
        sliding_layers=slides,
        tie_embeddings=need("tie_word_embeddings"),
        o_bias=attention_bias,
        mlp_bias=bool(data.get("mlp_bias")),
        dtype=_dtype(data, source),
        family=name,
        bos_token_id=data.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=data.get("pad_token_id"),
        **fields,
    )


def to_json(config: DecoderConfig, *, dtype: str) -> dict[str, Any]:
    """The contents of a config.json, in old and new spellings where those differ.

    Args:
      config: of the decoder.
      dtype: of the parameters as they are written.

    Raises:
      ValueError: if `config.family` names an architecture that cannot express `config`.
    """
    name = config.family
    if name not in FAMILIES:
        raise ValueError(f"family must be one of {list(FAMILIES)}, got {name!r}.")
    family = FAMILIES[name]
    eos = config.eos_token_ids
    data: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": family.activations[0],
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        **hf_rope.to_json(config),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        **_windows_to_json(config),
        **_experts_to_json(config),
    }
    if "attention_bias" in family.reads:
        data["attention_bias"] = config.o_bias
    if "mlp_bias" in family.reads:
        data["mlp_bias"] = config.mlp_bias
    if "hidden_activation" in family.reads:
        data["hidden_activation"] = family.activations[0]
        data["query_pre_attn_scalar"] = config.query_scalar
        data["final_logit_softcapping"] = config.logit_softcap
    if "attn_logit_softcapping" in family.reads:
        data["attn_logit_softcapping"] = config.attention_softcap

    again = from_json(data, source="config.json")
    again = dataclasses.replace(again, dtype=config.dtype, remat=config.remat, unroll=config.unroll)
    if again != config:
        lost = [
            f"{field.name}={getattr(config, field.name)!r}"
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(again, field.name)
        ]
        raise ValueError(
            f"{family.architecture} cannot express {', '.join(lost)}; choose another "
            f"family of {list(FAMILIES)}."
        )
    return data


def _family_name(data: Mapping[str, Any], source: str) -> str:
    names = data.get("architectures") or []
    families = {family.architecture: name for name, family in FAMILIES.items()}
    family = data.get("model_type") or (families.get(names[0]) if names else None)
    if family not in FAMILIES or any(families.get(name) != family for name in names):
        raise NotImplementedError(
            f"{source} describes model_type {data.get('model_type')!r}, architectures "
            f"{list(names)}; supported are {list(families)}."
        )
    return family


def _refuse_unknown(data: Mapping[str, Any], name: str, source: str) -> None:
    family = FAMILIES[name]
    known = READ | NO_EFFECT | family.reads
    unknown = {
        key: value
        for key, value in data.items()
        # An empty or false value says that something is off, which it is.
        if value and key not in known and value not in HARMLESS.get(key, ()) and key[0] != "_"
    }
    for key in {"hidden_act", "hidden_activation"} & (READ | family.reads):
        if data.get(key, family.activations[0]) not in family.activations:
            unknown[key] = data[key]
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
        raise NotImplementedError(
            f"{source} sets {listed}, which jlora's decoder does not model for {name!r}. If the "
            "field does not change what the model computes, remove it from the file."
        )


def _experts(data: Mapping[str, Any], name: str, source: str) -> Experts | None:
    if "num_experts_per_tok" not in FAMILIES[name].reads:
        return None
    counts = {data[key] for key in ("num_local_experts", "num_experts") if data.get(key)}
    per_token = data.get("num_experts_per_tok")
    if len(counts) != 1 or not per_token:
        raise ValueError(
            f"{source} must say num_experts_per_tok and one number of experts, in "
            f"num_local_experts or num_experts; it says {per_token!r} and {sorted(counts)}."
        )
    return Experts(
        counts.pop(), per_token, renormalize=name == "mixtral" or bool(data.get("norm_topk_prob"))
    )


def _experts_to_json(config: DecoderConfig) -> dict[str, Any]:
    experts = config.experts
    if experts is None:
        return {}
    data = {"num_local_experts": experts.count, "num_experts_per_tok": experts.per_token}
    if config.family == "qwen3_moe":
        data |= {
            "num_experts": experts.count,
            "moe_intermediate_size": config.intermediate_size,
            "norm_topk_prob": experts.renormalize,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return data


def _windows(
    data: Mapping[str, Any], name: str, source: str
) -> tuple[int | None, tuple[bool, ...]]:
    """The window and which layers slide; an empty tuple for all."""
    family = FAMILIES[name]
    window = data.get("sliding_window", family.defaults.get("sliding_window"))
    if "use_sliding_window" in family.reads and not data.get("use_sliding_window"):
        window = None
    if "layer_types" not in family.reads:
        return window, ()

    count = data.get("num_hidden_layers", 0)
    if kinds := data.get("layer_types"):
        if len(kinds) != count or set(kinds) - {"sliding_attention", "full_attention"}:
            raise NotImplementedError(
                f"{source} sets layer_types={kinds}; jlora's decoder has 'sliding_attention' and "
                f"'full_attention', one for each of num_hidden_layers={count}."
            )
        slides = tuple(kind == "sliding_attention" for kind in kinds)
    elif name == "gemma2":
        slides = tuple(i % 2 == 0 for i in range(count))
    elif name == "gemma3_text":
        pattern = data.get("sliding_window_pattern", family.defaults["sliding_window_pattern"])
        slides = tuple((i + 1) % pattern != 0 for i in range(count))
    else:
        first = data.get("max_window_layers", family.defaults["max_window_layers"])
        slides = tuple(window is not None and i >= first for i in range(count))
    if any(slides) and window is None:
        raise ValueError(
            f"{source} has layers that slide, by its layer_types, and no sliding_window."
        )
    return window, slides


def _windows_to_json(config: DecoderConfig) -> dict[str, Any]:
    reads, window = FAMILIES[config.family].reads, config.sliding_window
    data: dict[str, Any] = {}
    if "sliding_window" in reads:
        data["sliding_window"] = window
    if "use_sliding_window" in reads:
        data["use_sliding_window"] = window is not None
    if "layer_types" not in reads:
        return data
    slides = config.slides
    data["layer_types"] = ["sliding_attention" if x else "full_attention" for x in slides]
    if "max_window_layers" in reads:
        # For readers that do not know layer_types. Without a window the number says nothing.
        data["max_window_layers"] = slides.index(True) if window is not None else len(slides)
    elif window is None:
        data["sliding_window"] = config.max_positions  # of no layer; the field must be there
    if "sliding_window_pattern" in reads:
        for pattern in (6, *range(2, len(slides) + 1)):
            if slides == tuple((i + 1) % pattern != 0 for i in range(len(slides))):
                data["sliding_window_pattern"] = pattern
                break
    return data


def _dtype(data: Mapping[str, Any], source: str) -> str:
    name = str(data.get("dtype") or data.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise NotImplementedError(f"{source} sets dtype {name!r}; use float32, bfloat16, float16.")
    return jnp.dtype(name).name
