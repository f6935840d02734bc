"""Each family of models against transformers: logits, generation, files both ways, adapters."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora import models
from jlora.generate import generate
from jlora.models import hf, hf_config
from jlora.models.decoder import Decoder, Experts, init_cache
from jlora.quant import QuantArray

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SOME = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
}
PHI = {"rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75}}
# (class names in transformers, what differs from SHAPE, fields of DecoderConfig that must matter)
CASES = {
    "llama": ("Llama", {}, {}),
    "mistral": ("Mistral", {"sliding_window": 8}, {"sliding_window": None}),
    "qwen2": ("Qwen2", SOME, {"sliding_layers": ()}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}, {}),
    "qwen3 biased": (
        "Qwen3",
        {"head_dim": 8, "attention_bias": True, **SOME},
        {"sliding_layers": (), "sliding_window": None},
    ),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 12,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 0.5,
        },
        {
            "sliding_window": None,
            "sliding_layers": (),
            "query_scalar": None,
            "attention_softcap": None,
            "logit_softcap": None,
            "activation": "silu",
            "zero_centered_norms": False,
            "scale_embeddings": False,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 8,
            "num_hidden_layers": 5,
            "sliding_window": 8,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
        {
            "sliding_window": None,
            "sliding_layers": (),
            "query_scalar": None,
            "local_rope_theta": None,
            "rope_scaling": None,
        },
    ),
    "phi3": (
        "Phi3",
        {
            "sliding_window": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e3,
                "partial_rotary_factor": 0.5,
            },
        },
        {"sliding_window": None, "rotary_factor": 1.0},
    ),
    "phi3 short": (
        "Phi3",
        {**PHI, "original_max_position_embeddings": 64},
        {"rope_scaling": None},
    ),
    "phi3 long": (
        "Phi3",
        {**PHI, "original_max_position_embeddings": 16},
        {"rope_scaling": None},
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 8},
        {"sliding_window": None, "experts": Experts(5, 2, renormalize=False)},
    ),
    "qwen3 moe": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "head_dim": 8,
            "rope_parameters": {"rope_theta": 5e5, **LLAMA3},
        },
        {"rope_scaling": None, "experts": Experts(6, 3, renormalize=True)},
    ),
    "qwen3 moe renormalized": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
        },
        {"sliding_window": None, "experts": Experts(6, 3, renormalize=False)},
    ),
}
MOE = ["mixtral", "qwen3 moe", "qwen3 moe renormalized"]
AXES = {
    "gemma3": {"down_proj": ("stack", "in", "out")},
    "mixtral": {"down_proj": ("stack", "stack", "in", "out")},
}


@functools.cache
def reference(name):
    """A model of transformers with every parameter random: fresh biases and norms prove little."""
    architecture, changes, _ = CASES[name]
    # A copy, since these configs write into the dicts they are given.
    config = getattr(transformers, f"{architecture}Config")(**copy.deepcopy({**SHAPE, **changes}))
    torch.manual_seed(0)
    cls = f"{architecture.removesuffix('Text')}ForCausalLM"
    model = getattr(transformers, cls)(config).eval()
    zero_centered = architecture.startswith("Gemma")
    for key, parameter in model.named_parameters():
        is_norm = "norm" in key and not zero_centered
        torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.3)
    if zero_centered:  # else these tied models, with their scaled embeddings, repeat the last token
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.03)
    return model


def reference_logits(model, tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
        )
    return out.logits.float().numpy()


@functools.cache
def inputs():
    """Rows many windows long: whole, padded on the left, padded on the right."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, 48))
    mask = np.ones((3, 48), bool)
    mask[1, :13] = False
    mask[2, 37:] = False
    return tokens, mask


@functools.cache
def expected_logits(name):
    return reference_logits(reference(name), *inputs())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder that transformers writes of a case."""

    @functools.cache
    def folder(name):
        path = tmp_path_factory.mktemp("theirs") / "model"
        reference(name).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="module")
def load(folders):
    return functools.cache(lambda name: models.load(folders(name)))


@functools.cache
def forward(config):
    """One compiled function a config."""
    return jax.jit(
        lambda params, *args, **rest: Decoder(config).apply({"params": params}, *args, **rest)
    )


def assert_equal_trees(given, expected):
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def tensors_of(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {k: x for file in files for k, x in safetensors.numpy.load_file(file).items()}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_with_padding_on_either_side(load, name):
    model, params = load(name)
    tokens, mask = inputs()
    logits = forward(model.config)(params, tokens, padding_mask=mask)
    expected = expected_logits(name)
    assert expected[mask].std() > 0.1
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_packed_logits_equal_those_of_transformers_one_by_one(load, name):
    model, params = load(name)
    lengths = (29, 40, 18)
    rows = [np.random.default_rng(n).integers(0, VOCAB, (1, n)) for n in lengths]
    tokens = np.concatenate([*rows, np.zeros((1, 5), int)], axis=1)
    segment_ids = np.repeat([1, 2, 3, 0], [*lengths, 5])[None]
    logits = forward(model.config)(params, tokens, segment_ids=segment_ids)
    start = 0
    for row in rows:
        expected = reference_logits(reference(name), row, np.ones(row.shape, bool))
        end = start + row.shape[1]
        np.testing.assert_allclose(logits[:, start:end], expected, rtol=1e-4, atol=1e-4)
        start = end


@pytest.mark.parametrize(("name", "field"), [(n, f) for n, c in CASES.items() for f in c[2]])
def test_each_variant_matters_in_these_tests(load, name, field):
    """Else a decoder that ignores the field would pass."""
    model, params = load(name)
    changed = {field: CASES[name][2][field]}
    if changed == {"sliding_window": None}:
        changed["sliding_layers"] = ()
    config = dataclasses.replace(model.config, **changed)
    assert config != model.config
    tokens, mask = inputs()
    logits = Decoder(config).apply({"params": params}, tokens, padding_mask=mask)
    assert np.abs(logits[mask] - expected_logits(name)[mask]).max() > 0.01


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_through_the_cache_equals_that_of_transformers(load, name):
    model, params = load(name)
    width, count = 30, 16
    lengths = (30, 17, 23)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in lengths]
    tokens = torch.zeros((3, width), dtype=torch.long)
    mask = torch.zeros((3, width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.no_grad():
        out = reference(name).generate(
            tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    expected = out[:, width:].tolist()
    assert len({token for row in expected for token in row}) > 5  # a constant text proves little
    texts = generate(
        lambda params, tokens, **rest: model.apply({"params": params}, tokens, **rest),
        functools.partial(init_cache, model.config),
        params,
        prompts,
        max_new_tokens=count,
        key=jax.random.key(0),
    )
    assert texts == expected


@pytest.mark.parametrize("name", CASES)
def test_files_go_back_to_transformers_as_they_came(load, folders, tmp_path, name):
    model, params = load(name)
    models.save(tmp_path / "ours", model, params)
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(folders(name))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[key], tensor)

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert type(again) is type(reference(name))
    np.testing.assert_array_equal(
        reference_logits(again.eval(), *inputs())[inputs()[1]], expected_logits(name)[inputs()[1]]
    )
    config_again, params_again = hf.load(tmp_path / "ours")
    assert config_again == model.config
    assert_equal_trees(params_again, params)


@pytest.mark.parametrize("name", ["gemma3", "phi3 long", "mixtral", "qwen3 moe"])
def test_shards_hold_the_same_as_one_file(load, tmp_path, monkeypatch, name):
    model, params = load(name)
    reference(name).save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    monkeypatch.setattr(hf, "_SHARD_BYTES", 20_000)
    models.save(tmp_path / "ours", model, params)
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        assert len(list(folder.glob("*.safetensors"))) > 2
        assert_equal_trees(hf.load(folder)[1], params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    for parameter, expected in zip(again.parameters(), reference(name).parameters(), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("name", MOE)
def test_experts_stacked_in_the_file_are_read_too(load, tmp_path, name):
    reference(name).save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors_of(tmp_path / "stacked")
    assert_equal_trees(hf.load(tmp_path / "stacked")[1], load(name)[1])


@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_a_quantised_load_packs_projections_and_experts_but_no_router(load, folders, name):
    model, params = load(name)
    _, packed = models.load(folders(name), quantize="int8")
    is_packed = lambda leaf: isinstance(leaf, QuantArray)  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(packed, is_leaf=is_packed):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        inside = path.startswith("layers/") and path.endswith("/kernel")
        assert is_packed(leaf) == (inside and "/gate/" not in path), path
    tokens = inputs()[0][:1]
    run = jlora.adapt(lambda p, tokens: model.apply({"params": p}, tokens))
    dense = jax.tree.map(
        lambda x: x.materialise() if is_packed(x) else x, packed, is_leaf=is_packed
    )
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=0.01)
    expected = model.apply({"params": dense}, tokens)
    np.testing.assert_allclose(run(packed, tokens), expected, rtol=1e-4, atol=1e-4)


def adapted(name, model, params):
    """The model's function, and its parameters with adapters whose `b` is not zero."""
    tokens, _ = inputs()

    def apply(params, tokens, **rest):
        return model.apply({"params": params}, tokens, **rest)

    targets = ("all-linear", "experts") if name in MOE else ("all-linear",)
    config = jlora.LoraConfig(rank=2, alpha=4, targets=targets)
    params = jlora.init(jax.random.key(1), params, config, fn=apply, args=(jnp.asarray(tokens),))
    rng = np.random.default_rng(3)

    def with_b(leaf):
        if not isinstance(leaf, jlora.LoraArray):
            return leaf
        b = jnp.asarray(rng.normal(0, 0.1, leaf.b.shape), leaf.b.dtype)
        return dataclasses.replace(leaf, b=b)

    is_adapter = lambda leaf: isinstance(leaf, jlora.LoraArray)  # noqa: E731
    return apply, jax.tree.map(with_b, params, is_leaf=is_adapter)


@pytest.mark.parametrize("name", CASES)
def test_adapters_on_every_projection_equal_merged_weights(load, name):
    model, params = load(name)
    apply, params = adapted(name, model, params)
    tokens, mask = inputs()
    layers = params["layers"]
    kernels = [x for x in jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, jlora.LoraArray))
               if x.ndim > 2]  # fmt: skip
    assert all(isinstance(x, jlora.LoraArray) for x in kernels)
    if name in MOE:
        experts = layers["mlp"]["experts"]["down_proj"]["kernel"]
        assert experts.axes == ("stack", "stack", "in", "out")
        assert experts.a.shape[:2] == experts.w.shape[:2]  # factors of each expert

    run = jlora.adapt(apply, on_unsupported="error")
    logits = jax.jit(run)(params, tokens, padding_mask=mask)
    merged = forward(model.config)(jlora.merge_params(params), tokens, padding_mask=mask)
    assert np.abs(merged[mask] - expected_logits(name)[mask]).max() > 0.1
    np.testing.assert_allclose(logits[mask], merged[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_gradients_of_adapters_do_not_depend_on_how_layers_are_run(load, name):
    model, params = load(name)
    tokens = jnp.asarray(inputs()[0])
    config = jlora.LoraConfig(rank=2, targets=("down_proj",), axes=AXES[name])
    params = jlora.init(jax.random.key(1), params, config)
    trainable, frozen = jlora.split(params, config)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)

    def grad(**changes):
        changed = Decoder(dataclasses.replace(model.config, **changes))
        run = jlora.adapt(changed.apply, on_unsupported="error")

        def loss(trainable):
            return jnp.square(run({"params": jlora.combine(trainable, frozen)}, tokens)).mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(trainable))

    expected = grad()
    assert all((np.abs(x).max(axis=(-1, -2)) > 0).all() for x in expected)
    for changes in ({"remat": "full"}, {"unroll": 2}, {"remat": "full", "unroll": 99}):
        for a, b in zip(grad(**changes), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("name", ["gemma2", "phi3"])
def test_adapters_of_peft_on_all_linear_modules_load(load, folders, tmp_path, name):
    peft = pytest.importorskip("peft")
    model, params = load(name)
    # Not the cached model: PEFT puts its layers into the one it is given.
    base = transformers.AutoModelForCausalLM.from_pretrained(folders(name), dtype="auto")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path)
    params, _ = jlora.peft.load(tmp_path, params)
    tokens, mask = inputs()
    run = jlora.adapt(lambda p, *args, **rest: model.apply({"params": p}, *args, **rest))
    logits = jax.jit(run)(params, tokens, padding_mask=mask)
    expected = reference_logits(theirs, tokens, mask)
    assert np.abs(expected[mask] - expected_logits(name)[mask]).max() > 0.01
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_longrope_chooses_factors_for_each_row_alone(load):
    """As transformers does for a row alone; there, one long row would change its neighbours."""
    name = "phi3 long"
    model, params = load(name)
    tokens, mask = inputs()
    mask = mask.copy()
    mask[1, : 48 - 16] = False  # as long as the first training, no longer
    logits = forward(model.config)(params, tokens, padding_mask=mask)
    for row in range(3):
        alone = tokens[row][mask[row]][None]
        expected = reference_logits(reference(name), alone, np.ones(alone.shape, bool))[0]
        np.testing.assert_allclose(logits[row, mask[row]], expected, rtol=1e-4, atol=1e-4)


def test_a_window_counts_tokens_and_not_the_padding_between_calls(load):
    model, params = load("mistral")
    tokens = np.random.default_rng(4).integers(0, VOCAB, (1, 24))
    run = forward(model.config)
    expected = run(params, tokens)
    cache = init_cache(model.config, 1, 40)
    first, mask = np.pad(tokens[:, :12], ((0, 0), (0, 6))), np.arange(18)[None] < 12
    _, cache = run(params, first, padding_mask=mask, cache=cache)
    logits, _ = run(params, tokens[:, 12:], cache=cache)
    np.testing.assert_allclose(logits, expected[:, 12:], rtol=1e-4, atol=1e-4)


def test_a_window_leaves_no_score_outside_of_it():
    """A window is work saved, not only a mask: no block has all keys before it."""
    from jlora.models.attention import causal_attention

    q = jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32)

    def flops(**options):
        run = jax.jit(functools.partial(causal_attention, **options))
        return run.lower(q, q, q).compile().cost_analysis()["flops"]

    assert flops(window=64) < 0.5 * flops()


# config.json as publishers wrote them, before transformers 5 changed the spelling.
PUBLISHED = {
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "hidden_act": "silu", "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
        "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "float32", "vocab_size": 256000,
    },
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
        "attn_logit_softcapping": None, "cache_implementation": "hybrid",
        "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "vocab_size": 262144,
    },
    "Phi-3.5-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0,
        "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "model_type": "phi3", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.0 + i / 4 for i in range(48)],
            "short_factor": [1.0 + i / 40 for i in range(48)], "type": "longrope",
        },
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 32064,
    },
    "Phi-4-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "full_attn_mod": 1,
        "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
        "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "phi3", "num_attention_heads": 24,
        "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.0 + i / 4 for i in range(48)],
            "short_factor": [1.0] * 48, "type": "longrope",
        },
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "vocab_size": 200064,
    },
    "Mixtral-8x7B-v0.1": {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 32000,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_spellings_mean_what_transformers_makes_of_them(tmp_path, name):
    published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published))
    ours = hf_config.from_json(published, source=name)
    written = hf_config.to_json(ours, dtype=ours.dtype)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(written))
    for folder in (tmp_path, tmp_path / "ours"):
        config = transformers.AutoConfig.from_pretrained(folder)
        theirs = hf_config.from_json(config.to_dict() | {"architectures": None}, source=name)
        same = {field: getattr(ours, field) for field in ("bos_token_id", "eos_token_ids",
                                                          "pad_token_id")}  # fmt: skip
        assert dataclasses.replace(theirs, **same) == ours


def test_layers_that_slide_are_read_as_transformers_reads_them():
    gemma = hf_config.from_json(PUBLISHED["gemma-3-1b-it"], source="config.json")
    assert gemma.slides == tuple(i % 6 != 5 for i in range(26))
    gemma = hf_config.from_json(PUBLISHED["gemma-2-2b"], source="config.json")
    assert gemma.slides == (True, False) * 13
    shape = {**SHAPE, "model_type": "mistral"}

    def read(**changes):
        return hf_config.from_json({**shape, **changes}, source="config.json")

    assert read(sliding_window=None).sliding_window is None
    assert read().sliding_window == 4096  # transformers' default where Mistral's file says nothing
    qwen = {"model_type": "qwen2", "sliding_window": 100, "max_window_layers": 1}
    assert read(**qwen).sliding_window is None
    assert read(**qwen, use_sliding_window=True).slides == (False, True, True)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read(**qwen, use_sliding_window=True, layer_types=kinds).slides == (True, False, True)
    with pytest.raises(ValueError, match="no sliding_window"):
        read(**qwen, layer_types=kinds)
    with pytest.raises(NotImplementedError, match="chunked_attention"):
        read(**qwen, layer_types=["chunked_attention"] * 3)


REFUSED = [
    ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_types"),
    ("Qwen3-0.6B", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma-2-2b", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
    ("gemma-2-2b", {"hidden_act": "silu"}, "hidden_act='silu'"),
    ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    (
        "gemma-3-1b-it",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "full_attention only",
    ),
    ("Phi-3.5-mini-instruct", {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
    ("Phi-3.5-mini-instruct", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "type 'yarn'"),
    ("Phi-4-mini-instruct", {"full_attn_mod": 2}, "full_attn_mod=2"),
    ("Mixtral-8x7B-v0.1", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ("Qwen3-30B-A3B", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
    ("Qwen3-30B-A3B", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_a_field_that_is_not_modelled_is_refused_by_name(name, changes, message):
    with pytest.raises(NotImplementedError, match=message):
        hf_config.from_json({**PUBLISHED[name], **changes}, source="config.json")


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="one number of experts"):
        hf_config.from_json({**PUBLISHED["Qwen3-30B-A3B"], "num_local_experts": 8}, source="x")
    with pytest.raises(ValueError, match="short_factors must have 48 numbers"):
        hf_config.from_json(
            {**PUBLISHED["Phi-3.5-mini-instruct"],
             "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            source="x",
        )  # fmt: skip
    config = hf_config.from_json(PUBLISHED["gemma-3-1b-it"], source="x")
    for changes, message in (
        ({"sliding_layers": (True,)}, "one entry for each of 26 layers"),
        ({"sliding_window": None}, "needs a sliding_window"),
        ({"sliding_window": 0}, "at least 1"),
        ({"rotary_factor": 0.1}, "even part of each head"),
        ({"activation": "relu"}, "activation must be"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match="per_token must be"):
        Experts(4, 5)
    with pytest.raises(ValueError, match=r"cannot express .*local_rope_theta"):
        hf_config.to_json(dataclasses.replace(config, family="gemma2"), dtype="float32")
