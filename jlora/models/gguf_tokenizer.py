"""A GGUF file's tokenizer metadata to the files of a Hugging Face folder.

Where `transformers`' own GGUF reader cuts text otherwise than the tokenizer that the model was
trained with (digits after spaces in SmolLM, NFC in Qwen 2, words that no merge builds in Llama 3,
text after a special token in Llama 2), this follows the latter.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["files"]

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type

Metadata = Mapping[str, Any]

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class _PreTokenizer(NamedTuple):
    """How text is cut before the merges; `tokenizer.ggml.pre` names it."""

    digits: bool = False  # every digit by itself, before GPT-2's pattern
    split: str | None = None  # instead of GPT-2's pattern
    normalizer: str | None = None
    ignore_merges: bool = False  # a word of the vocabulary is one token, whatever the merges say


_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(),
    "smollm": _PreTokenizer(digits=True),
    "llama-bpe": _PreTokenizer(split=_LLAMA3_SPLIT, ignore_merges=True),
    "qwen2": _PreTokenizer(split=_QWEN2_SPLIT, normalizer="NFC"),
}


def files(metadata: Metadata) -> dict[str, str]:
    """Writes tokenizer.json and the small files beside it.

    Args:
      metadata: the header of a GGUF file, key to value.

    Returns:
      File name to text: tokenizer.json, tokenizer_config.json, special_tokens_map.json,
      generation_config.json.

    Raises:
      ValueError: if the metadata has no tokenizer, or a broken one.
      NotImplementedError: if the tokenizer is of a kind not known here.
    """
    tokens = _need(metadata, "tokens")
    model = _need(metadata, "model")
    if len(set(tokens)) < len(tokens):
        raise ValueError("the vocabulary lists a token twice")
    if model == "gpt2":
        spec = _byte_level(metadata, tokens)
    elif model == "llama":
        spec = _sentencepiece(metadata, tokens)
    else:
        raise NotImplementedError(
            f"its tokenizer is of the kind {model!r}; known are gpt2 (byte-level BPE) and llama "
            "(SentencePiece BPE)"
        )
    special, ids, eos_ids = _special_tokens(metadata, tokens)
    add_bos = bool(_get(metadata, "add_bos_token", model == "llama"))
    if add_bos and "bos_token" in special:
        spec["post_processor"] = _bos_first(special["bos_token"], ids["bos_token_id"])
    config: dict[str, Any] = special | {
        "add_bos_token": add_bos,
        "add_eos_token": bool(_get(metadata, "add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    context_length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if context_length is not None:
        config["model_max_length"] = context_length
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    texts = {
        "tokenizer.json": spec,
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
        "generation_config.json": ids | {"eos_token_id": eos_ids},
    }
    return {name: json.dumps(text, ensure_ascii=False, indent=1) for name, text in texts.items()}


def _get(metadata: Metadata, key: str, default: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{key}", default)


def _need(metadata: Metadata, key: str) -> Any:
    if f"tokenizer.ggml.{key}" not in metadata:
        raise ValueError(f"its metadata has no 'tokenizer.ggml.{key}', so it has no tokenizer")
    return metadata[f"tokenizer.ggml.{key}"]


def _special_tokens(
    metadata: Metadata, tokens: Sequence[str]
) -> tuple[dict[str, str], dict[str, int], int | list[int]]:
    """The tokens with a role, some of their ids, and the ids that end a turn or a text."""
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found: dict[str, int | None] = {
        role: _get(metadata, f"{key}_token_id") for role, key in roles.items()
    }
    if found["eos"] is None:
        raise ValueError("its metadata has no 'tokenizer.ggml.eos_token_id'")
    if beyond := {role: i for role, i in found.items() if i is not None and i >= len(tokens)}:
        raise ValueError(f"it has {len(tokens)} tokens and gives special ones the ids {beyond}")
    special = {f"{role}_token": tokens[i] for role, i in found.items() if i is not None}
    ids = {f"{r}_token_id": i for r, i in found.items() if r in ("bos", "pad") and i is not None}
    ends = (found["eos"], _get(metadata, "eot_token_id"))
    eos_ids = list(dict.fromkeys(i for i in ends if i is not None))
    return special, ids, eos_ids if len(eos_ids) > 1 else eos_ids[0]


def _spec(model: dict[str, Any], added: list[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json, as the `tokenizers` package writes it."""
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    steps = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    common = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None}
    return head | steps | parts | {"model": common | {"end_of_word_suffix": None} | model}


def _added_tokens(metadata: Metadata, tokens: Sequence[str]) -> list[dict[str, Any]]:
    types = _get(metadata, "token_type") or [_NORMAL] * len(tokens)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **flags, "special": kind == _CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _byte_level(metadata: Metadata, tokens: Sequence[str]) -> dict[str, Any]:
    pre = _get(metadata, "pre")
    if pre not in _PRE_TOKENIZERS:
        raise NotImplementedError(
            f"its text is cut by 'tokenizer.ggml.pre' = {pre!r}, unknown here, so its tokens would "
            f"be wrong; known are {', '.join(_PRE_TOKENIZERS)}. Use the model's Hugging Face folder"
        )
    kind = _PRE_TOKENIZERS[pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[dict[str, Any]] = [byte_level | {"use_regex": kind.split is None}]
    if kind.digits:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    if kind.split:
        split = {"type": "Split", "pattern": {"Regex": kind.split}, "behavior": "Isolated"}
        steps.insert(0, split | {"invert": False})
    return _spec(
        {
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind.ignore_merges,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in _need(metadata, "merges")],
        },
        _added_tokens(metadata, tokens),
        normalizer={"type": kind.normalizer} if kind.normalizer else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=byte_level | {"use_regex": True},
    )


def _sentencepiece(metadata: Metadata, tokens: Sequence[str]) -> dict[str, Any]:
    """As Llama 2's own tokenizer.json: the scores' order becomes the merges' order."""
    types = _need(metadata, "token_type")
    scores = _need(metadata, "scores")
    unknown = tokens[_get(metadata, "unknown_token_id", 0)]
    ids = {token: i for i, token in enumerate(tokens)}
    normal = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoder: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizers: list[dict[str, Any]] = [space]
    if _get(metadata, "add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _spec(
        {
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": _merges(normal, ids),
        },
        _added_tokens(metadata, tokens),
        normalizer={"type": "Sequence", "normalizers": normalizers},
        decoder={"type": "Sequence", "decoders": decoder},
    )


def _merges(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """All ways to build a token from two others, the best token first."""
    merges = []
    for token in scores:
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        found = [(left, right) for left, right in pairs if left in scores and right in scores]
        merges += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return sorted(merges, key=lambda m: (scores[m[0] + m[1]], len(m[0]), len(m[1])), reverse=True)


def _bos_first(bos: str, bos_id: int) -> dict[str, Any]:
    def piece(letter: str, kind: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos, "type_id": kind}},
            {"Sequence": {"id": letter, "type_id": kind}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": piece("A", 0),
        "pair": [*piece("A", 0), *piece("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
