"""A tiny random model in a Hugging Face folder, with a tokenizer and data: for whole runs."""

import json

import jax
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import yaml

from jlora import models
from jlora.models import decoder

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokenizer_files():
    """A byte-level tokenizer without merges: one token a byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    config = {"chat_template": CHATML, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(config)}


def write_model(folder, *, layers=2, dtype="float32"):
    """Writes the folder; returns its path."""
    config = decoder.DecoderConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=32,
        intermediate_size=48,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=256,
        tie_embeddings=True,
        dtype=dtype,
        eos_token_ids=(2,),
    )
    keys = iter(jax.random.split(jax.random.key(7), 64))
    params = jax.tree.map(
        lambda leaf: (0.3 * jax.random.normal(next(keys), leaf.shape)).astype(dtype),
        decoder.param_shapes(config),
    )
    models.save(folder, decoder.Decoder(config), params, tokenizer_files=tokenizer_files())
    return folder


def write_data(path, count=24):
    """Writes chats in which the answer repeats a letter; returns the path."""
    rows = []
    for i in range(count):
        letter = "abcdefgh"[i % 8]
        messages = [
            {"role": "user", "content": f"{letter} {i}"},
            {"role": "assistant", "content": letter * 4},
        ]
        rows.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(rows) + "\n")
    return path


def write_config(folder, **sections):
    """Writes a model, data and a config that trains in seconds; returns the config's path."""
    config = {
        "name": "tiny",
        "output": str(folder / "runs"),
        "model": {"path": str(write_model(folder / "model"))},
        "data": {
            "train": str(write_data(folder / "train.jsonl")),
            "validation": 4,
            "length": 64,
        },
        "lora": {"rank": 4, "dropout": 0.1},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 2},
        "train": {"steps": 8, "batch_size": 2, "accumulation": 2},
        "eval": {"every": 4, "samples": 2, "sample_tokens": 4},
        "checkpoint": {"every": 2, "keep": 2},
    }
    for section, values in sections.items():
        config[section] = {**config[section], **values} if isinstance(values, dict) else values
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
