"""config.json of a Hugging Face folder <-> DecoderConfig.

Every field is either read, known not to change what the model computes, or refused by name: a field
that is skipped in silence is a model that answers wrongly in silence.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jlora.models.decoder import DecoderConfig, RopeScaling

__all__ = ["from_json", "to_json"]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
# What a config.json may leave out, and what transformers then takes.
_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_READ = frozenset(
    """architectures model_type dtype torch_dtype vocab_size hidden_size intermediate_size
    num_hidden_layers num_attention_heads num_key_value_heads head_dim max_position_embeddings
    rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters bos_token_id
    eos_token_id pad_token_id""".split()  # noqa: SIM905
)
# Read for these families; for others transformers has no such field.
_READ_BY_FAMILY = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "qwen2": {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
}
# Provenance, generation defaults, classification heads, settings of other programs.
_NO_EFFECT = frozenset(
    """transformers_version use_cache initializer_range pretraining_tp is_llama_config
    transformers.js_config unsloth_version unsloth_fixed model_name attn_implementation
    output_hidden_states output_attentions output_scores return_dict return_dict_in_generate
    chunk_size_feed_forward id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix sep_token_id decoder_start_token_id torchscript
    forced_bos_token_id forced_eos_token_id max_length min_length max_new_tokens do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens remove_invalid_values""".split()  # noqa: SIM905
)
# Fields that are no trouble at these values.
_HARMLESS = {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (1,)}
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


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
    family = _family(data, source)
    _refuse_unknown(data, family, source)
    _refuse_sliding_window(data, family, source)

    def need(key: str) -> Any:
        value = data.get(key, _DEFAULTS.get(key))
        if value is None:
            raise ValueError(f"{source} lacks {key!r}.")
        return value

    num_heads, hidden_size = need("num_attention_heads"), need("hidden_size")
    kv_heads = data.get("num_key_value_heads")
    if kv_heads is None:
        kv_heads = num_heads if family == "llama" else need("num_key_value_heads")
    theta, scaling = _rope(data, source)
    eos = data.get("eos_token_id")
    attention_bias = family == "qwen2" or bool(data.get("attention_bias"))
    return DecoderConfig(
        vocab_size=need("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=need("intermediate_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=data.get("head_dim") or hidden_size // num_heads,
        max_positions=need("max_position_embeddings"),
        rms_norm_eps=need("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=need("tie_word_embeddings"),
        qkv_bias=attention_bias,
        o_bias=attention_bias and family == "llama",
        mlp_bias=bool(data.get("mlp_bias")),
        dtype=_dtype(data, source),
        family=family,
        bos_token_id=data.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=data.get("pad_token_id"),
    )


def to_json(config: DecoderConfig, *, dtype: str) -> dict[str, Any]:
    """The contents of a config.json, in old and new spellings where those differ.

    Args:
      config: of the decoder.
      dtype: of the parameters as they are written.

    Raises:
      ValueError: if `config.family` names an architecture that cannot express `config`.
    """
    if config.family not in _ARCHITECTURES:
        raise ValueError(f"family must be one of {list(_ARCHITECTURES)}, got {config.family!r}.")
    eos = config.eos_token_ids
    scaling = _rope_to_json(config.rope_scaling)
    data: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.family == "llama":
        data |= {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}
    elif config.family == "mistral":
        data |= {"sliding_window": None}
    else:
        data |= {"use_sliding_window": False}

    again = from_json(data, source="config.json")
    # How it computes is no part of the file.
    again = dataclasses.replace(again, dtype=config.dtype, remat=config.remat, unroll=config.unroll)
    if again != config:
        lost = [
            f"{field.name}={getattr(config, field.name)!r}"
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(again, field.name)
        ]
        raise ValueError(
            f"{_ARCHITECTURES[config.family]} cannot express {', '.join(lost)}; choose another "
            f"family of {list(_ARCHITECTURES)}."
        )
    return data


def _family(data: Mapping[str, Any], source: str) -> str:
    names = data.get("architectures") or []
    families = {name: family for family, name in _ARCHITECTURES.items()}
    family = data.get("model_type") or (families.get(names[0]) if names else None)
    if family not in _ARCHITECTURES or any(families.get(name) != family for name in names):
        raise NotImplementedError(
            f"{source} describes model_type {data.get('model_type')!r}, architectures "
            f"{list(names)}; supported are {list(_ARCHITECTURES.values())}."
        )
    return family


def _refuse_unknown(data: Mapping[str, Any], family: str, source: str) -> None:
    known = _READ | _NO_EFFECT | _READ_BY_FAMILY[family]
    unknown = {
        key: value
        for key, value in data.items()
        # An empty or false value says that something is off, which it is.
        if value and key not in known and value not in _HARMLESS.get(key, ()) and key[0] != "_"
    }
    if data.get("hidden_act", "silu") not in _HARMLESS["hidden_act"]:
        unknown["hidden_act"] = data["hidden_act"]
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
        raise NotImplementedError(
            f"{source} sets {listed}, which jlora's decoder does not model for {family!r}. If the "
            "field does not change what the model computes, remove it from the file."
        )


def _refuse_sliding_window(data: Mapping[str, Any], family: str, source: str) -> None:
    window = data.get("sliding_window", 4096)  # transformers' default for these families
    if window is None or window >= data.get("max_position_embeddings", 0):
        window = None
    slides = False
    if family == "mistral":
        slides = window is not None
    elif family == "qwen2":
        num_layers = data.get("num_hidden_layers", 0)
        slides = bool(data.get("use_sliding_window")) and window is not None
        slides = slides and data.get("max_window_layers", 28) < num_layers
        kinds = set(data.get("layer_types") or ()) - {"full_attention"}
        slides = slides or bool(kinds and window is not None)
    if slides:
        raise NotImplementedError(
            f"{source} sets sliding_window={window}, shorter than its max_position_embeddings; "
            "jlora's decoder attends to all tokens. If you only use sequences up to the window, "
            "set sliding_window to null there."
        )


def _rope(data: Mapping[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Reads the new spelling, `rope_parameters`, or the old, `rope_theta` and `rope_scaling`."""
    rope = dict(data.get("rope_scaling") or {}) or dict(data.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None) or data.get("rope_theta") or 10000.0
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    if kind not in _ROPE_KEYS:
        raise NotImplementedError(
            f"{source} asks for rotary positions of type {kind!r}; supported are "
            f"{list(_ROPE_KEYS)}."
        )
    wanted = _ROPE_KEYS[kind]
    unknown = {
        key: value
        for key, value in rope.items()
        if key not in wanted and value and value not in _HARMLESS.get(key, ())
    }
    if unknown:
        raise NotImplementedError(
            f"{source} sets {unknown} for rotary positions of type {kind!r}, which jlora's "
            "decoder does not model."
        )
    if missing := sorted(wanted - set(rope)):
        raise ValueError(f"{source} lacks {missing} for rotary positions of type {kind!r}.")
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), RopeScaling("linear", factor=float(rope["factor"]))
    return float(theta), RopeScaling(
        "llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )


def _rope_to_json(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _dtype(data: Mapping[str, Any], source: str) -> str:
    name = str(data.get("dtype") or data.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise NotImplementedError(f"{source} sets dtype {name!r}; use float32, bfloat16, float16.")
    return jnp.dtype(name).name
