"""The families of models: which fields their config.json has, and what they have in common."""

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["FAMILIES", "HARMLESS", "NO_EFFECT", "READ", "Family"]


@dataclasses.dataclass(frozen=True)
class Family:
    """A model_type: what its files say and leave out, and what all its models have in common.

    Attributes:
      architecture: the class in transformers.
      reads: fields that only some families have.
      defaults: what transformers takes for a field that a file leaves out.
      activations: names in files of the one it has; the first is written.
      common: fields of DecoderConfig.
    """

    architecture: str
    reads: frozenset[str]
    defaults: Mapping[str, Any]
    activations: tuple[str, ...] = ("silu", "swish")
    common: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _family(architecture: str, reads: str, defaults: Mapping[str, Any], **rest: Any) -> Family:
    return Family(architecture, frozenset(reads.split()), {**_DEFAULTS, **defaults}, **rest)


_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
_WINDOWS = "use_sliding_window sliding_window max_window_layers layer_types"
_QWEN_WINDOWS = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}
_EXPERTS = "num_experts_per_tok num_local_experts"
_GEMMA = """hidden_activation attention_bias query_pre_attn_scalar sliding_window layer_types
    final_logit_softcapping"""
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_COMMON = {
    "activation": "gelu_tanh",
    "zero_centered_norms": True,
    "post_norms": True,
    "scale_embeddings": True,
}
# By model_type.
FAMILIES: dict[str, Family] = {
    "llama": _family(
        "LlamaForCausalLM", "attention_bias mlp_bias", {"max_position_embeddings": 2048}
    ),
    "mistral": _family(
        "MistralForCausalLM",
        "sliding_window",
        {"sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "qwen2": _family("Qwen2ForCausalLM", _WINDOWS, _QWEN_WINDOWS, common={"qkv_bias": True}),
    "qwen3": _family(
        "Qwen3ForCausalLM",
        f"attention_bias {_WINDOWS}",
        {**_QWEN_WINDOWS, "head_dim": 128},
        common={"qk_norm": True},
    ),
    "gemma2": _family(
        "Gemma2ForCausalLM",
        f"{_GEMMA} attn_logit_softcapping",
        {
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        activations=("gelu_pytorch_tanh",),
        common=_GEMMA_COMMON,
    ),
    "gemma3_text": _family(
        "Gemma3ForCausalLM",
        f"{_GEMMA} sliding_window_pattern rope_local_base_freq",
        {
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
        activations=("gelu_pytorch_tanh",),
        common={**_GEMMA_COMMON, "qk_norm": True},
    ),
    "phi3": _family(
        "Phi3ForCausalLM",
        "sliding_window original_max_position_embeddings partial_rotary_factor",
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        common={"fused_projections": True},
    ),
    "mixtral": _family(
        "MixtralForCausalLM",
        f"sliding_window {_EXPERTS}",
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1e6},
    ),
    "qwen3_moe": _family(
        "Qwen3MoeForCausalLM",
        f"""{_EXPERTS} num_experts moe_intermediate_size norm_topk_prob attention_bias
        use_sliding_window sliding_window max_window_layers""",
        {"sliding_window": 4096, "max_position_embeddings": 32768},
        common={"qk_norm": True},
    ),
}
# Fields that every family has.
READ = frozenset(
    """architectures model_type dtype torch_dtype vocab_size hidden_size intermediate_size
    num_hidden_layers num_attention_heads num_key_value_heads head_dim max_position_embeddings
    hidden_act rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters bos_token_id
    eos_token_id pad_token_id""".split()  # noqa: SIM905
)
# Provenance, generation defaults, classification heads, losses, settings of other programs.
NO_EFFECT = frozenset(
    """transformers_version use_cache initializer_range pretraining_tp is_llama_config
    transformers.js_config unsloth_version unsloth_fixed model_name attn_implementation
    output_hidden_states output_attentions output_scores return_dict return_dict_in_generate
    chunk_size_feed_forward id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix sep_token_id decoder_start_token_id torchscript
    forced_bos_token_id forced_eos_token_id max_length min_length max_new_tokens do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens remove_invalid_values auto_map cache_implementation
    output_router_logits router_aux_loss_coef""".split()  # noqa: SIM905
)
# Fields that are no trouble at these values.
HARMLESS = {
    "partial_rotary_factor": (1,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "decoder_sparse_step": (1,),
}
