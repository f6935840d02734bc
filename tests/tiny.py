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


def random_params(config):
    """Weights in the config's dtype."""
    keys = iter(jax.random.split(jax.random.key(7), 64))
    return jax.tree.map(
        lambda leaf: (0.3 * jax.random.normal(next(keys), leaf.shape)).astype(config.dtype),
        decoder.param_shapes(config),
    )


def write_model(folder, *, layers=2, dtype="float32", tied=True):
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
        tie_embeddings=tied,
        dtype=dtype,
        eos_token_ids=(2,),
    )
    params = random_params(config)
    models.save(folder, decoder.Decoder(config), params, tokenizer_files=tokenizer_files())
    return folder


def write_large_model(folder, *, layers):
    """Writes a model whose tensors dwarf what Python allocates; returns the size of its file."""
    config = decoder.DecoderConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_layers=layers,
        num_heads=8, num_kv_heads=8, head_dim=128, tie_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    models.hf.save(folder, config, random_params(config))
    return (folder / "model.safetensors").stat().st_size


LARGEST_TENSOR = 4096 * 1024 * 2
# For a process whose memory is measured: what is freed goes back to the system at once.
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Begins such a process: `peak_of(fn)` gives what `fn` returns and the most bytes it took meanwhile.
MEASURE_PEAK = """
import gc, threading

def number(file, name):
    with open(file) as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

def resident():
    return 1024 * number("/proc/self/status", "RssAnon")

def peak_of(fn):
    gc.collect()
    start, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    result = fn()
    done.set()
    thread.join()
    return result, max(peak) - start
"""


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
