"""Hugging Face folders: equal to transformers both ways, strict about what they hold."""

import dataclasses
import json
import os
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jlora import models
from jlora.models import hf, hf_config
from jlora.models.decoder import Decoder, DecoderConfig, RopeScaling, param_shapes

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# (architecture, what differs from SHAPE)
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": False, "eos_token_id": [2, 7]}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama all heads": ("Llama", {"num_key_value_heads": 4, "head_dim": 12}),
    "llama biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama scaled": ("Llama", {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}),
    "llama linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
}
CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers")


def random_params(config, dtype="float32"):
    leaves, tree = jax.tree.flatten(param_shapes(config))
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(0, 0.2, leaf.shape), dtype) for leaf in leaves]
    return jax.tree.unflatten(tree, arrays)


def reference(transformers, torch, name):
    """A model of transformers with every parameter random: fresh biases and norms prove little."""
    architecture, changes = CASES[name]
    config = getattr(transformers, f"{architecture}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def reference_logits(torch, model, tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
        )
    return out.logits.float().numpy()


def inputs():
    tokens = np.random.default_rng(1).integers(0, 97, (3, 40))
    mask = np.ones((3, 40), bool)
    mask[1, :13] = False  # left padding
    mask[2, 29:] = False  # right padding
    return tokens, mask


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "model"
    hf.save(directory, CONFIG, random_params(CONFIG), {"tokenizer.json": "{}"})
    return directory


def edit_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(directory, change):
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def assert_equal_trees(given, expected):
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_both_ways(torch, transformers, tmp_path, name):
    expected_model = reference(transformers, torch, name)
    expected_model.save_pretrained(tmp_path / "theirs")
    tokens, mask = inputs()
    expected = reference_logits(torch, expected_model, tokens, mask)

    model, params = models.load(tmp_path / "theirs")
    logits = model.apply({"params": params}, jnp.asarray(tokens), padding_mask=jnp.asarray(mask))
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=1e-4, atol=1e-4)

    models.save(tmp_path / "ours", model, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert type(again) is type(expected_model)
    np.testing.assert_array_equal(
        reference_logits(torch, again.eval(), tokens, mask)[mask], expected[mask]
    )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters", "rms_norm_eps"):
        assert getattr(again.config, key) == getattr(expected_model.config, key), key


def test_bfloat16_weights_go_to_transformers_and_back_bit_equal(torch, transformers, tmp_path):
    params = random_params(CONFIG, "bfloat16")
    hf.save(tmp_path / "a", dataclasses.replace(CONFIG, dtype="bfloat16"), params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "b")
    config, again = hf.load(tmp_path / "b")
    assert config.dtype == "bfloat16"
    assert_equal_trees(again, params)


def test_shards_of_transformers_are_read(torch, transformers, tmp_path):
    model = reference(transformers, torch, "llama")
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_equal_trees(hf.load(tmp_path / "sharded")[1], hf.load(tmp_path / "single")[1])


def test_our_shards_are_read_by_transformers(torch, transformers, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "_SHARD_BYTES", 20_000)
    params = random_params(CONFIG)
    hf.save(tmp_path / "model", CONFIG, params)
    files = sorted(file.name for file in (tmp_path / "model").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    assert_equal_trees(hf.load(tmp_path / "model")[1], params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    kernel = theirs.model.layers[2].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(kernel.T, params["layers"]["mlp"]["up_proj"]["kernel"][2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_save_then_load_is_bit_equal(tmp_path, dtype):
    config = dataclasses.replace(
        CONFIG,
        dtype=dtype,
        rope_scaling=RopeScaling("llama3", 8.0, original_max_positions=64),
        rope_theta=5e5,
        eos_token_ids=(1, 2),
        bos_token_id=0,
        qkv_bias=True,
        o_bias=True,
    )
    params = random_params(config, dtype)
    files = {"tokenizer.json": '{"é": "\r\n"}', "chat_template.jinja": "{{ x }}\n"}
    hf.save(tmp_path / "model", config, params, files)
    config_again, again = hf.load(tmp_path / "model")
    assert config_again == config
    assert_equal_trees(again, params)
    assert hf.tokenizer_files(tmp_path / "model") == files
    assert os.stat(tmp_path / "model" / "model.safetensors").st_mode & 0o044


def test_a_dtype_that_is_asked_for_is_that_of_parameters_and_computation(folder):
    config, params = hf.load(folder, "bfloat16")
    assert config.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_old_and_new_spellings_mean_the_same(folder):
    file = folder / "config.json"
    data = json.loads(file.read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype"):
        del data[key]
    scaling = dict(LLAMA3)
    old = {**data, "rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    new = {**data, "rope_parameters": {"rope_theta": 5e5, **scaling}, "dtype": "bfloat16"}
    older = {**data, "rope_scaling": {"type": "linear", "factor": 2.0}}
    newer = {**data, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    plain = {**data, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}

    def read(data):
        return hf_config.from_json(data, source="config.json")

    assert read(old) == read(new)
    assert read(new).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
    assert read(new).dtype == "bfloat16"
    assert read(older) == read(newer)
    assert read(plain).rope_theta == 3e4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_a_config_field_that_is_not_modelled_is_refused_by_name(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(NotImplementedError, match=message) as error:
        hf.load(folder)
    assert str(folder / "config.json") in str(error.value)


def test_fields_without_effect_are_accepted(folder):
    edit_config(
        folder,
        is_llama_config=True,
        rope_interleaved=False,
        use_cache=True,
        attention_dropout=0.0,
        partial_rotary_factor=1.0,
        temperature=0.6,
        num_local_experts=None,
        _name_or_path="x",
        **{"transformers.js_config": {"dtype": "q4"}},
    )
    hf.load(folder)


def test_a_config_without_a_needed_field_is_refused(folder):
    data = json.loads((folder / "config.json").read_text())
    del data["hidden_size"]
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="lacks 'hidden_size'"):
        hf.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        hf.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        hf.load(folder)


def test_one_error_names_every_missing_unexpected_and_misshapen_tensor(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.ones((48, 32), np.float32)
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        tensors["lm_head.weight"] = np.ones((97, 32), np.int8)

    edit_tensors(folder, change)
    with pytest.raises(ValueError, match="not those of its config") as error:
        hf.load(folder)
    text = str(error.value)
    assert str(folder) in text
    assert "missing: model.layers.1.mlp.up_proj.weight (48, 32)" in text
    assert "unexpected: model.layers.3.mlp.up_proj.weight (48, 32) in model.safetensors" in text
    assert "model.norm.weight (31,) in model.safetensors, expected (32,)" in text
    assert "lm_head.weight (97, 32) in model.safetensors of type I8" in text


def test_rotary_buffers_and_a_tied_copy_of_the_head_are_tolerated(tmp_path):
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    params = random_params(config)
    hf.save(tmp_path / "model", config, params)

    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit_tensors(tmp_path / "model", copy)
    assert_equal_trees(hf.load(tmp_path / "model")[1], params)

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1

    edit_tensors(tmp_path / "model", untie)
    with pytest.raises(ValueError, match=r"unexpected: lm_head\.weight"):
        hf.load(tmp_path / "model")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors \(\d+ bytes\) is damaged"):
        hf.load(folder)


def test_a_missing_shard_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "_SHARD_BYTES", 30_000)
    hf.save(tmp_path / "model", CONFIG, random_params(CONFIG))
    next((tmp_path / "model").glob("model-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of"):
        hf.load(tmp_path / "model")
    for file in (tmp_path / "model").glob("model*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        hf.load(tmp_path / "model")


def test_params_that_do_not_fit_the_config_are_not_saved(tmp_path):
    params = random_params(CONFIG)
    params["extra"] = {"kernel": jnp.ones(3)}
    params["norm"] = {"scale": jnp.ones(5)}
    del params["lm_head"]
    with pytest.raises(ValueError, match="not those of the decoder") as error:
        hf.save(tmp_path / "model", CONFIG, params)
    text = str(error.value)
    assert "missing: lm_head/kernel" in text
    assert "unexpected: extra/kernel" in text
    assert "norm/scale (5,), expected (32,)" in text
    assert not list(tmp_path.iterdir())


def test_a_family_that_cannot_express_the_config_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, qkv_bias=True)  # Llama has biases on all four or none
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot express qkv_bias=True"):
        hf.save(tmp_path / "model", config, random_params(config))
    hf.save(tmp_path / "model", dataclasses.replace(config, family="qwen2"), random_params(config))


def test_a_full_disk_leaves_the_earlier_folder_and_nothing_else(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    params = jax.tree.map(lambda x: x + 1, random_params(CONFIG))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # writes beyond fail
    try:
        with pytest.raises(OSError, match="Could not write tensors to"):
            hf.save(folder, CONFIG, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


def test_saving_replaces_a_model_but_no_other_files(folder):
    params = jax.tree.map(lambda x: x + 1, random_params(CONFIG))
    hf.save(folder, CONFIG, params)
    assert_equal_trees(hf.load(folder)[1], params)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no part of a model \(notes\.txt\)"):
        hf.save(folder, CONFIG, params)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="is a file"):
        hf.save(folder / "notes.txt", CONFIG, params)


def test_names_are_those_of_transformers():
    assert hf.hf_name("layers/self_attn/q_proj/kernel") == "model.layers.{}.self_attn.q_proj.weight"
    assert hf.hf_name("layers/self_attn/q_proj/bias") == "model.layers.{}.self_attn.q_proj.bias"
    assert hf.hf_name("embed_tokens/embedding") == "model.embed_tokens.weight"
    assert hf.hf_name("lm_head/kernel") == "lm_head.weight"
    assert hf.is_transposed("lm_head/kernel")
    assert not hf.is_transposed("embed_tokens/embedding")
    with pytest.raises(KeyError, match="No Hugging Face name"):
        hf.hf_name("layers/self_attn/q_proj/a")


def test_load_gives_a_model_and_save_takes_it(folder, tmp_path):
    model, params = models.load(folder)
    assert isinstance(model, Decoder)
    assert models.tokenizer_files(folder) == {"tokenizer.json": "{}"}
    models.save(tmp_path / "copy", model, params, tokenizer_files=models.tokenizer_files(folder))
    for file in folder.iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
