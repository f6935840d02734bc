"""GGUF files: models, tokenizers, and what is said of damaged ones."""

import copy
import dataclasses
import json

import gguf as gguf_package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import jlora.models.gguf as gguf
from jlora import chat
from jlora.models import hub
from jlora.models.decoder import Decoder, RopeScaling, init_cache

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 2, 64, 96, 4, 2, 40
HEAD_DIM = HIDDEN // HEADS


@pytest.fixture(scope="session")
def smollm2():
    try:
        return hub.resolve(SMOLLM2)
    except FileNotFoundError as error:
        pytest.skip(f"no model: {error}")


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2):
    if smollm2.is_dir():
        pytest.skip(
            "the original weights are in the Hugging Face cache, so no GGUF file was fetched"
        )
    return smollm2


@pytest.fixture(scope="session")
def reference_tokenizer(smollm2_gguf):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )


# A small model, as Hugging Face names and lays it out, and a writer of GGUF files.


def make_weights(*, tied=False, bias=False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kv = KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (HIDDEN,),
            f"model.layers.{i}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{i}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"model.layers.{i}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"model.layers.{i}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{i}.post_attention_layernorm.weight": (HIDDEN,),
            f"model.layers.{i}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"model.layers.{i}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"model.layers.{i}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
        if bias:
            shapes[f"model.layers.{i}.self_attn.q_proj.bias"] = (HIDDEN,)
            shapes[f"model.layers.{i}.self_attn.k_proj.bias"] = (kv,)
            shapes[f"model.layers.{i}.self_attn.v_proj.bias"] = (kv,)
    return {
        name: (rng.normal(size=shape) * 0.1 + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }


def gguf_name(name: str) -> str:
    for old, new in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        *((f"self_attn.{x}_proj", f"attn_{x}") for x in "qkv"),
        *((f"mlp.{x}_proj", f"ffn_{x}") for x in ("gate", "up", "down")),
    ):
        name = name.replace(old, new)
    return name


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of a llama."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def write(
    path, weights, *, architecture="llama", kind=Kind.F32, drop=(), extra=None, tensors=None
) -> None:
    writer = gguf_package.GGUFWriter(path, architecture)
    metadata = {
        "context_length": 128,
        "block_count": LAYERS,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5000.0,
    } | (extra or {})
    for key, value in metadata.items():
        if key in drop:
            continue
        key = key if key.startswith("tokenizer.") else f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)
    for name, array in (weights | (tensors or {})).items():
        if name in drop:
            continue
        if architecture == "llama" and ".q_proj." in name:
            array = permute(array, HEADS)
        if architecture == "llama" and ".k_proj." in name:
            array = permute(array, KV_HEADS)
        tensor_kind = Kind.F32 if array.ndim == 1 else kind
        data = gguf_package.quants.quantize(array, tensor_kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=tensor_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def expected_params(weights) -> dict[str, np.ndarray]:
    """Paths of the decoder's tree to arrays, from Hugging Face names."""
    params: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        array = array.T if "proj" in name or "lm_head" in name else array
        parts = name.removeprefix("model.").split(".")
        leaf = {"weight": "kernel", "bias": "bias"}[parts.pop()]
        leaf = "scale" if "norm" in parts[-1] else leaf
        leaf = "embedding" if "embed" in parts[-1] else leaf
        if parts[0] == "layers":
            path = "/".join(["layers", *parts[2:], leaf])
            stacked = params.setdefault(path, np.zeros((LAYERS, *array.shape), array.dtype))
            stacked[int(parts[1])] = array
        else:
            params["/".join([*parts, leaf])] = array
    return params


def flatten(params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_params_are_the_original_weights(tmp_path, architecture, tied, bias):
    weights = make_weights(tied=tied, bias=bias)
    write(tmp_path / "m.gguf", weights, architecture=architecture)
    config, params = gguf.load(tmp_path / "m.gguf")
    expected = expected_params(weights)
    actual = flatten(params)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)
    assert (config.tie_embeddings, config.qkv_bias, config.family) == (tied, bias, architecture)
    assert (config.rms_norm_eps, config.rope_theta, config.max_positions) == (1e-5, 5000.0, 128)
    assert (config.num_kv_heads, config.head_dim, config.vocab_size) == (KV_HEADS, HEAD_DIM, VOCAB)
    logits = Decoder(config).apply({"params": params}, jnp.arange(8)[None])
    assert logits.shape == (1, 8, VOCAB)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_quantised_weights_are_dequantised_then_cast_once(tmp_path, kind, dtype):
    kind = Kind[kind]
    # The rows of q and k change places in the file; blocks run along a row, so that loses nothing.
    weights = {
        name: array[:, : array.shape[1] // 32 * 32] if array.ndim == 2 else array
        for name, array in make_weights(tied=True).items()
    }
    write(tmp_path / "m.gguf", weights, kind=kind)
    config, params = gguf.load(tmp_path / "m.gguf", dtype=dtype)
    quantised = {
        name: gguf_package.dequantize(gguf_package.quants.quantize(array, kind), kind)
        if array.ndim == 2
        else array
        for name, array in weights.items()
    }
    actual = flatten(params)
    for path, array in expected_params(quantised).items():
        assert actual[path].dtype == jnp.dtype(dtype or "float32")
        np.testing.assert_array_equal(actual[path], array.astype(actual[path].dtype))
    assert config.dtype == (dtype or "float32")


def llama3_factors(factor: float) -> np.ndarray:
    """Written out from the definition, wavelength by wavelength."""
    factors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * 5000.0 ** (i / HEAD_DIM)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_rope_scaling_is_read(tmp_path):
    weights, path = make_weights(), tmp_path / "m.gguf"
    write(path, weights, extra={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert gguf.load(path)[0].rope_scaling == RopeScaling("linear", 4.0)
    write(path, weights, extra={"rope.scaling.type": "none"})
    assert gguf.load(path)[0].rope_scaling is None
    write(path, weights, tensors={"rope_freqs.weight": llama3_factors(32.0)})
    assert gguf.load(path)[0].rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    write(path, weights, tensors={"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)})
    with pytest.raises(NotImplementedError, match="rope_freqs"):
        gguf.load(path)
    write(path, weights, extra={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})
    with pytest.raises(NotImplementedError, match="yarn"):
        gguf.load(path)


@pytest.mark.slow
def test_logits_equal_transformers_own_reading(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "m.gguf", make_weights(), extra={"vocab_size": VOCAB})
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 16))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    config, params = gguf.load(tmp_path / "m.gguf")
    logits = Decoder(config).apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


# Files that cannot be used.


def test_truncated_file_is_named_with_both_sizes(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, make_weights())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="truncated") as error:
        gguf.load(path)
    for word in (str(path), f"{len(whole) - 1:,}", f"{len(whole):,}"):
        assert word in str(error.value)


@pytest.mark.parametrize("size", [4, 6, 20, 24, 60, 150, 400, 600, 1200, 2000])
def test_file_that_ends_in_its_header_is_named(tmp_path, size):
    path = tmp_path / "m.gguf"
    write(path, make_weights(), extra={"tokenizer.ggml.tokens": ["a" * 30] * 20})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"(?s){path}.*{size:,}.*Download it again"):
        gguf.load(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"not a model at all", b"\x80\x02}q\x00."])
def test_file_that_is_no_gguf_is_named(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.* is no GGUF file"):
        gguf.load(path)
    with pytest.raises(ValueError, match=f"{path}.* is no GGUF file"):
        gguf.tokenizer_files(path)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        gguf.load(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"architecture": "gemma3"}, NotImplementedError, "'gemma3'.*llama and qwen2"),
        ({"drop": ["block_count"]}, ValueError, r"no metadata 'llama\.block_count'"),
        ({"drop": ["model.norm.weight"]}, ValueError, r"Missing: output_norm\.weight"),
        ({"drop": ["model.embed_tokens.weight"]}, ValueError, r"token_embd\.weight"),
        ({"extra": {"block_count": 1}}, ValueError, r"Without a place: blk\.1\.attn_k"),
        ({"extra": {"expert_count": 8}}, NotImplementedError, "expert_count"),
        ({"extra": {"attention.head_count": 8}}, NotImplementedError, "differ in width"),
        ({"extra": {"attention.head_count_kv": [1, 2]}}, NotImplementedError, "head counts"),
        ({"extra": {"feed_forward_length": 128}}, ValueError, r"ffn_gate\.weight has shape"),
    ],
)
def test_model_that_the_decoder_cannot_hold_is_refused(tmp_path, options, error, words):
    path = tmp_path / "m.gguf"
    write(path, make_weights(), **options)
    with pytest.raises(error, match=f"{path}.*{words}"):
        gguf.load(path)


# Tokenizers.

TEXTS = [
    "Hello world, it's 2024!  They'LL see.",
    "def f(x: int) -> str:\n\treturn f'{x:>10}'\n\n\n    # done\r\n",
    "naïve café — 日本語のテキスト 🙂👩‍👩‍👧",
    " leading, trailing and   inner   spaces  ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "{'a': [1, 2.5, -3e10]}\n1234567 x2y33z444",
    "e\u0301 and \u00e9, ﬁ, \u212b",
    "",
]


def test_smollm2_text_is_cut_as_transformers_does(smollm2_gguf, reference_tokenizer):
    tokenizer = chat.Tokenizer.from_files(gguf.tokenizer_files(smollm2_gguf))
    reference = reference_tokenizer
    for text in TEXTS:
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=False) == text
        assert tokenizer.decode(expected) == reference.decode(expected, skip_special_tokens=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    tokens, loss_mask = chat.encode_messages(tokenizer, messages)
    assert tokens == reference.apply_chat_template(messages, return_dict=True)["input_ids"]
    learned = [token for token, counts in zip(tokens, loss_mask, strict=True) if counts]
    assert tokenizer.decode(learned, skip_special_tokens=False) == "Hello!<|im_end|>"
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.pad_id) == ((2,), 1, 2)
    assert tokenizer.vocab_size == len(reference)


def use_smollm_digits(reference) -> None:
    """SmolLM's own tokenizer cuts digits off first; transformers' GGUF reader does not."""
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )


def test_smollm2_digits_stand_alone(smollm2_gguf):
    tokenizer = chat.Tokenizer.from_files(gguf.tokenizer_files(smollm2_gguf))
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("x   12")]
    assert pieces == ["x", "   ", "1", "2"]


def test_smollm2_digits_are_cut_as_in_its_own_tokenizer(smollm2_gguf, reference_tokenizer):
    tokenizer = chat.Tokenizer.from_files(gguf.tokenizer_files(smollm2_gguf))
    reference = copy.deepcopy(reference_tokenizer)
    use_smollm_digits(reference)
    for text in [*TEXTS, "x = [\n    1,\n    22]\n", "½ ² Ⅷ a²  3 ١٢٣", "\t\t7"]:
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"]


def test_tokenizer_folder_is_read_by_transformers(smollm2_gguf, tmp_path):
    transformers = pytest.importorskip("transformers")
    files = gguf.tokenizer_files(smollm2_gguf)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = chat.Tokenizer.from_files(files)
    for text in TEXTS:
        assert reference(text)["input_ids"] == tokenizer.encode(text)
    assert reference.eos_token == "<|im_end|>"
    assert reference.chat_template == tokenizer.chat_template
    assert reference.model_max_length == 8192
    config = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == 2


def byte_level_metadata(pre: str) -> dict:
    """A byte-level vocabulary with some merges and special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator([text * 3 for text in TEXTS], trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<s>", "</s>", "<|im_start|>"]
    tokens += ["<|im_end|>", "<think>"]
    plain = len(model["vocab"])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * plain + [3] * 4 + [4],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": plain,
        "tokenizer.ggml.eos_token_id": plain + 1,
        "tokenizer.ggml.eot_token_id": plain + 3,
        "tokenizer.ggml.add_bos_token": True,
    }


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_byte_level_text_is_cut_as_transformers_does(tmp_path, pre):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "m.gguf"
    write(path, make_weights(), extra=byte_level_metadata(pre))
    files = gguf.tokenizer_files(path)
    tokenizer = chat.Tokenizer.from_files(files)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    if pre == "smollm":
        use_smollm_digits(reference)
    for text in [*TEXTS, "a <think>b</think></s> c"]:
        if pre == "qwen2" and "\u0301" in text:
            continue  # Qwen 2 normalises to NFC, which transformers' GGUF reader does not know
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_ids == (tokenizer.eos_id, tokenizer.eos_id + 2)
    assert "<think>" in tokenizer.decode(tokenizer.encode("<think></s>"))
    for name, text in files.items():  # and the folder begins texts with the first token, as asked
        (tmp_path / name).write_text(text, encoding="utf-8")
    folder = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert folder("Hello")["input_ids"] == [tokenizer.bos_id, *tokenizer.encode("Hello")]


def sentencepiece_metadata() -> dict:
    """A SentencePiece BPE vocabulary: bytes, then pieces by falling score."""
    pieces = ["▁t", "he", "in", "▁the", "er", "▁a", "re", "an", "ll", "▁H", "ello", "lo", "▁Hello"]
    pieces += ["el", "ell", "▁w", "or", "ld", "orld", "▁world", "▁▁", "▁▁▁▁", "ing", "▁thing"]
    letters = sorted({c for text in TEXTS[:2] for c in text if c.isascii() and c > " "})
    pieces += ["▁", *letters]
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_text_is_cut_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "m.gguf"
    write(path, make_weights(), extra=sentencepiece_metadata())
    tokenizer = chat.Tokenizer.from_files(gguf.tokenizer_files(path))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in [*TEXTS, "Hello the thing", "Hello</s>"]:
        if text.startswith(" "):
            continue  # see below
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=False) == text
    # Like SentencePiece and Llama 2's own tokenizer.json, and unlike transformers' GGUF reader, a
    # text that begins with a space gets one more.
    pieces = [tokenizer.backend.id_to_token(token) for token in tokenizer.encode(" Hello")]
    assert pieces == ["▁", "▁Hello"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokenizer.ggml.pre": "bloom"}, NotImplementedError, "'bloom'.*known"),
        ({"tokenizer.ggml.pre": None}, NotImplementedError, "None"),
        ({"tokenizer.ggml.model": "t5"}, NotImplementedError, "'t5'"),
        ({"tokenizer.ggml.tokens": None}, ValueError, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, ValueError, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.eos_token_id": None}, ValueError, "eos_token_id"),
        ({"tokenizer.ggml.padding_token_id": 99_999}, ValueError, "'pad': 99999"),
    ],
)
def test_tokenizer_of_unknown_kind_is_refused(tmp_path, change, error, words):
    metadata = byte_level_metadata("gpt-2") | change
    path = tmp_path / "m.gguf"
    present = {key: value for key, value in metadata.items() if value is not None}
    write(path, make_weights(), extra=present)
    with pytest.raises(error, match=f"{path}.*({words})"):
        gguf.tokenizer_files(path)


# The real model.


@pytest.mark.slow
def test_smollm2_logits_and_greedy_text_equal_transformers(smollm2_gguf):
    """Both in float32 on the same numbers; 1e-3 of logits up to 33 is the order of the sums."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    config, params = gguf.load(smollm2_gguf)
    model = Decoder(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 48))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    logits = model.apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)

    tokenizer = chat.Tokenizer.from_files(gguf.tokenizer_files(smollm2_gguf))
    messages = [{"role": "user", "content": "Write two sentences about the sea."}]
    prompt = chat.encode_prompt(tokenizer, messages)
    with torch.no_grad():
        generated = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # it takes EOS for padding
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
        )
    expected_tokens = generated[0, len(prompt) :].tolist()

    @jax.jit
    def step(params, tokens, cache):
        logits, cache = model.apply({"params": params}, tokens, cache=cache)
        return logits[:, -1].argmax(axis=-1), cache

    token, cache = step(params, jnp.asarray([prompt]), init_cache(config, 1, len(prompt) + 32))
    produced = [int(token[0])]
    while len(produced) < 32:
        token, cache = step(params, token[:, None], cache)
        produced.append(int(token[0]))
    assert produced == expected_tokens


@pytest.mark.slow
def test_smollm2_in_bfloat16_is_float32_rounded(smollm2_gguf):
    exact_config, exact = gguf.load(smollm2_gguf)
    config, params = gguf.load(smollm2_gguf, dtype=jnp.bfloat16)
    assert config == dataclasses.replace(exact_config, dtype="bfloat16")
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), params, exact
    )
