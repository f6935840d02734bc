"""PEFT folders: what PEFT itself computes from them, strictness in reading, safety in writing."""

import dataclasses
import functools
import json
import os
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora import peft
from jlora.models.decoder import Decoder, DecoderConfig

TOKENS = np.asarray(jax.random.randint(jax.random.key(9), (2, 12), 0, 61), np.int32)
SHAPE = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
)


@functools.cache
def tiny(**overrides):
    """A small decoder with random weights, norms and biases included."""
    model = Decoder(DecoderConfig(**SHAPE | overrides))
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS[:1])["params"]
    rng = np.random.default_rng(0)
    draw = lambda path, x: rng.normal(path.endswith("scale"), 0.1, x.shape)  # noqa: E731
    params = jlora.tree.map_with_path(lambda p, x: jnp.asarray(draw(p, x), x.dtype), shapes)
    return model, params


def apply(model):
    return jax.jit(jlora.adapt(lambda params, tokens: model.apply({"params": params}, tokens)))


def adapted(model, base, config, seed=2):
    """Adapters that change something: `b` is random; so are the leaves trained whole."""
    fn = lambda params, tokens: model.apply({"params": params}, tokens)  # noqa: E731
    init = functools.partial(jlora.init, config=config, fn=fn, args=(TOKENS,))
    rng = np.random.default_rng(seed)

    def draw(path, leaf, weight):
        if isinstance(leaf, jlora.LoraArray):
            a, b = (jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for x in (leaf.a, leaf.b))
            static = dict(scaling=leaf.scaling, axes=leaf.axes, dropout=leaf.dropout)
            leaf = type(leaf).start(weight, a, b, **static)
            if config.variant == "dora":
                change = jnp.asarray(rng.normal(1, 0.2, leaf.magnitude.shape), jnp.float32)
                leaf = dataclasses.replace(leaf, magnitude=leaf.magnitude * change)
            return leaf
        whole = any(jlora.tree.matches(pattern, path) for pattern in config.train)
        return weight * 1.1 + 0.05 if whole else weight

    shapes = jax.eval_shape(init, jax.random.key(0), base)
    return jlora.tree.map_with_path(draw, shapes, base, is_leaf=is_lora)


def is_lora(leaf):
    return isinstance(leaf, jlora.LoraArray)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def settings_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


QV = jlora.LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj"))
CONFIGS = {
    "two projections": (QV, {}),
    "all linear": (jlora.LoraConfig(rank=4, alpha=6, exclude=("lm_head",), dropout=0.1), {}),
    "head too": (jlora.LoraConfig(rank=4, alpha=6), {}),
    "patterns": (
        jlora.LoraConfig(
            rank=4,
            alpha=8,
            targets=("q_proj", "k_proj", "up_proj", "down_proj"),
            rank_pattern={"k_proj": 2, "*/up_proj/kernel": 6},
            alpha_pattern={"k_proj": 3.5, "q_proj": 16},
        ),
        {},
    ),
    "rank stabilised": (
        jlora.LoraConfig(
            rank=3,
            alpha=8,
            targets=("o_proj", "gate_proj"),
            rank_pattern={"gate_proj": 5},
            rank_stabilized=True,
        ),
        {"tie_embeddings": True},
    ),
    "embedding": (jlora.LoraConfig(rank=4, alpha=8, targets=("embed_tokens", "q_proj")), {}),
    "dora": (
        jlora.LoraConfig(
            rank=4,
            alpha=6,
            exclude=("lm_head",),
            rank_pattern={"v_proj": 3},
            rank_stabilized=True,
            variant="dora",
        ),
        {"qkv_bias": True, "family": "qwen2"},
    ),
    "biases of adapted modules": (
        jlora.LoraConfig(
            rank=4, alpha=8, targets=("q_proj", "up_proj"), train=("layers/self_attn/q_proj/bias",)
        ),
        {"qkv_bias": True, "family": "qwen2"},
    ),
    "all biases": (
        jlora.LoraConfig(rank=4, alpha=8, targets=("q_proj", "up_proj"), train=("*/bias",)),
        {"qkv_bias": True, "family": "qwen2"},
    ),
    "dora embedding": (
        jlora.LoraConfig(rank=4, alpha=8, targets=("embed_tokens", "q_proj"), variant="dora"),
        {},
    ),
    "norms whole": (
        jlora.LoraConfig(
            rank=4,
            alpha=8,
            targets=("q_proj",),
            train=("norm", "post_attention_layernorm", "lm_head"),
        ),
        {},
    ),
    "biased, one bias whole": (
        jlora.LoraConfig(
            rank=4, alpha=8, targets=("q_proj",), train=("layers/self_attn/k_proj/bias",)
        ),
        {"qkv_bias": True, "family": "qwen2"},
    ),
    "tied embedding whole": (
        jlora.LoraConfig(rank=4, alpha=8, targets=("q_proj",), train=("embed_tokens",)),
        {"tie_embeddings": True},
    ),
}


@pytest.fixture(params=CONFIGS, name="case")
def _case(request):
    config, overrides = CONFIGS[request.param]
    model, base = tiny(**overrides)
    return model, base, config, adapted(model, base, config)


def test_what_is_saved_loads_bit_equal_and_with_its_config(case, tmp_path):
    model, base, config, params = case
    peft.save(tmp_path / "adapter", params, config)
    loaded, read = peft.load(tmp_path / "adapter", base)
    if config.train == ("layers/self_attn/k_proj/bias",):  # PEFT knows only whole modules
        assert read.train == ("k_proj",)
        read = jlora.LoraConfig.from_json(config.to_json())
    assert_same(loaded, params)
    again = adapted(model, base, read)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert [x.shape for x in jax.tree.leaves(again)] == [x.shape for x in jax.tree.leaves(params)]
    assert read.dropout == config.dropout
    assert read.rank_stabilized == config.rank_stabilized


def test_peft_computes_the_same_logits(case, tmp_path):
    model, base, config, params = case
    torch, reference = torch_model(tmp_path / "base", model, base)
    peft.save(tmp_path / "adapter", params, config)
    reference = load_in_peft(reference, tmp_path / "adapter")
    expected = apply(model)(params, TOKENS)
    np.testing.assert_allclose(logits_of(torch, reference), expected, rtol=1e-4, atol=1e-4)
    difference = np.abs(expected - apply(model)(base, TOKENS)).max()
    assert difference > 1e-2  # or the adapter would prove nothing


MERGED = ("patterns", "rank stabilised", "embedding", "dora", "norms whole", "all biases")


@pytest.mark.parametrize("name", MERGED)
def test_merging_equals_merging_in_peft(name, tmp_path):
    config, overrides = CONFIGS[name]
    model, base = tiny(**overrides)
    params = adapted(model, base, config)
    _, reference = torch_model(tmp_path / "base", model, base)
    peft.save(tmp_path / "adapter", params, config)
    merged = load_in_peft(reference, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    _, expected = jlora.models.load(tmp_path / "merged")
    ours = jlora.merge_params(params)
    for path, leaf in jlora.lora.leaves_by_path(ours).items():
        np.testing.assert_allclose(
            leaf, jlora.lora.leaves_by_path(expected)[path], rtol=1e-6, atol=1e-6, err_msg=path
        )


PEFT_CONFIGS = {
    "default targets": dict(r=4, lora_alpha=8),
    "all-linear": dict(r=4, lora_alpha=8, target_modules="all-linear"),
    "regex": dict(r=4, lora_alpha=8, target_modules=r".*\.(q|o)_proj"),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"k_proj": 2, r"mlp\.down_proj": 3},
        alpha_pattern={"^model.layers.*.q_proj": 5},
        use_rslora=True,
    ),
    "excluded": dict(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]),
    "embedding": dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "v_proj"]),
    "head": dict(r=4, lora_alpha=8, target_modules=["lm_head", "v_proj"]),
    "modules_to_save": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        modules_to_save=["lm_head", "norm", "embed_tokens"],
    ),
    "dora": dict(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    "dora, rank stabilised": dict(
        r=4,
        lora_alpha=8,
        target_modules=["embed_tokens", "k_proj", "down_proj"],
        rank_pattern={"k_proj": 2},
        use_dora=True,
        use_rslora=True,
    ),
    "some layers": dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]
    ),
    "one layer by its pattern": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        layers_to_transform=1,
        layers_pattern="layers",
    ),
    "layers by a regex": dict(r=4, target_modules=r".*layers\.[12]\..*\.(k|up)_proj"),
    "a rank of each layer": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 6, "layers.2.self_attn.q_proj": 1},
        alpha_pattern={"layers.0.self_attn.q_proj": 3, "layers.1.mlp.down_proj": 5},
    ),
    "a rank of each layer, dora": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 6},
        use_dora=True,
        use_rslora=True,
    ),
    "a rank of the one layer": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        layers_to_transform=[1],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
    ),
    "gaussian": dict(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["up_proj"]),
}


def test_an_eva_adapter_of_peft_loads(tmp_path):
    model, base = tiny()
    torch, reference = torch_model(tmp_path / "base", model, base)
    import peft as other

    config = other.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=other.EvaConfig(rho=2.0),
    )
    reference = other.get_peft_model(reference, config)
    batch = {"input_ids": torch.from_numpy(TOKENS.astype(np.int64))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    other.initialize_lora_eva_weights(reference, [batch] * 3)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    reference.eval().save_pretrained(tmp_path / "adapter")
    assert len(set(settings_of(tmp_path / "adapter")["rank_pattern"].values())) > 1
    params, read = peft.load(tmp_path / "adapter", base)
    got = apply(model)(params, TOKENS)
    np.testing.assert_allclose(got, logits_of(torch, reference), rtol=1e-4, atol=1e-4)
    peft.save(tmp_path / "again", params, read)
    assert_same(peft.load(tmp_path / "again", base)[0], params)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_trained_load_and_are_written_again(bias, tmp_path):
    model, base = tiny(qkv_bias=True, family="qwen2")
    torch, reference = torch_model(tmp_path / "base", model, base)
    options = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], bias=bias)
    reference = wrap_in_peft(torch, reference, **options)
    reference.save_pretrained(tmp_path / "adapter")
    params, config = peft.load(tmp_path / "adapter", base)
    assert len(config.train) == (3 if bias == "all" else 2)
    got = apply(model)(params, TOKENS)
    np.testing.assert_allclose(got, logits_of(torch, reference), rtol=1e-4, atol=1e-4)
    peft.save(tmp_path / "again", params, config)
    assert settings_of(tmp_path / "again")["bias"] == bias
    assert set(tensors_of(tmp_path / "again")) == set(tensors_of(tmp_path / "adapter"))
    one = dataclasses.replace(config, train=("*/q_proj/bias",))
    with pytest.raises(NotImplementedError, match=r"none, all .* or those of adapted"):
        peft.save(tmp_path / "third", params, one)


BIASED = {
    "all, of one layer": dict(bias="all", target_modules=["q_proj"], layers_to_transform=[1]),
    "all, of one layer of two": dict(
        bias="all", target_modules=["q_proj", "down_proj"], layers_to_transform=[1]
    ),
    "beside a module": dict(
        bias="lora_only", target_modules=["q_proj"], modules_to_save=["o_proj"]
    ),
    "beside modules": dict(
        bias="lora_only", target_modules=["q_proj"], modules_to_save=["o_proj", "norm"]
    ),
    "all and a module": dict(bias="all", target_modules=["q_proj"], modules_to_save=["o_proj"]),
}


@pytest.mark.parametrize("name", BIASED)
def test_biases_beside_layers_and_modules_come_back(name, tmp_path):
    model, base = tiny(qkv_bias=True, o_bias=True, mlp_bias=True)
    torch, reference = torch_model(tmp_path / "base", model, base)
    reference = wrap_in_peft(torch, reference, r=4, lora_alpha=8, **BIASED[name])
    reference.save_pretrained(tmp_path / "adapter")
    params, config = peft.load(tmp_path / "adapter", base)
    want = logits_of(torch, reference)
    np.testing.assert_allclose(apply(model)(params, TOKENS), want, rtol=1e-4, atol=1e-4)
    peft.save(tmp_path / "again", params, config)
    assert_same(peft.load(tmp_path / "again", base)[0], params)
    _, fresh = torch_model(tmp_path / "base", model, base)
    got = logits_of(torch, load_in_peft(fresh, tmp_path / "again"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_what_peft_writes_loads_and_computes_the_same(name, tmp_path):
    model, base = tiny()
    torch, reference = torch_model(tmp_path / "base", model, base)
    reference = wrap_in_peft(torch, reference, **PEFT_CONFIGS[name])
    reference.save_pretrained(tmp_path / "adapter")
    params, config = peft.load(tmp_path / "adapter", base)
    got = apply(model)(params, TOKENS)
    np.testing.assert_allclose(got, logits_of(torch, reference), rtol=1e-4, atol=1e-4)
    assert np.abs(got - apply(model)(base, TOKENS)).max() > 1e-2
    again = adapted(model, base, config)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    peft.save(tmp_path / "again", params, config)
    assert_same(peft.load(tmp_path / "again", base)[0], params)


VLLM_KEYS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


@pytest.mark.parametrize("name", ["patterns", "rank stabilised", "embedding", "all linear"])
def test_what_is_saved_to_serve_has_one_rank_and_computes_the_same(name, tmp_path):
    config, overrides = CONFIGS[name]
    model, base = tiny(**overrides)
    params = adapted(model, base, config)
    peft.save(tmp_path, params, config, serve=True)
    settings = settings_of(tmp_path)
    largest = max(leaf.rank for leaf in jax.tree.leaves(params, is_leaf=is_lora) if is_lora(leaf))
    assert settings["r"] == settings["lora_alpha"] == largest
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    assert not settings["use_rslora"]
    assert not settings["use_dora"]
    assert settings["modules_to_save"] is None
    tensors = tensors_of(tmp_path)
    assert all(name.endswith(VLLM_KEYS) for name in tensors)
    assert {min(x.shape) for x in tensors.values()} == {largest}
    loaded, _ = peft.load(tmp_path, base)
    np.testing.assert_allclose(
        apply(model)(loaded, TOKENS), apply(model)(params, TOKENS), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", "no DoRA.*jlora.merge_params"),
        ("norms whole", "no trained weight.*jlora.merge_params"),
    ],
)
def test_what_vllm_does_not_take_is_not_saved_to_serve(name, message, tmp_path):
    config, overrides = CONFIGS[name]
    model, base = tiny(**overrides)
    with pytest.raises(NotImplementedError, match=message):
        peft.save(tmp_path / "x", adapted(model, base, config), config, serve=True)
    assert not (tmp_path / "x").exists()


def test_bfloat16_and_float16_adapters_load_exactly(tmp_path):
    _, base = tiny()
    for dtype in (jnp.bfloat16, jnp.float16):
        config = jlora.LoraConfig(rank=4, targets=("q_proj",), axes=Q_AXES, dtype="bfloat16")
        params = jlora.init(jax.random.key(0), base, config)
        peft.save(tmp_path / "wide", params, config)
        tensors = tensors_of(tmp_path / "wide")
        assert {x.dtype for x in tensors.values()} == {np.dtype("float32")}
        narrow = {name: x.astype(dtype) for name, x in tensors.items()}
        write_tensors(tmp_path / "wide", narrow)
        loaded, _ = peft.load(tmp_path / "wide", base)
        leaf = loaded["layers"]["self_attn"]["q_proj"]["kernel"]
        expected = params["layers"]["self_attn"]["q_proj"]["kernel"].a
        np.testing.assert_array_equal(leaf.a, expected.astype(dtype).astype(jnp.float32))
        assert leaf.a.dtype == jnp.float32


def test_the_config_names_exactly_what_was_adapted(tmp_path):
    model, base = tiny()
    config, _ = CONFIGS["norms whole"]
    peft.save(
        tmp_path / "adapter",
        adapted(model, base, config),
        config,
        base_model='some/"base"',
        base_license="apache-2.0",
    )
    assert settings_of(tmp_path / "adapter") == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": 'some/"base"',
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "target_parameters": None,
        "trainable_token_indices": None,
        "modules_to_save": ["lm_head", "model.norm", "post_attention_layernorm"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    names = set(tensors_of(tmp_path / "adapter"))
    prefix = "base_model.model."
    layer = prefix + "model.layers.2."
    assert f"{prefix}model.norm.weight" in names
    assert {n for n in names if n.startswith(layer)} == {
        f"{layer}self_attn.q_proj.lora_A.weight",
        f"{layer}self_attn.q_proj.lora_B.weight",
        f"{layer}post_attention_layernorm.weight",
    }
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert 'base_model: "some/\\"base\\""' in card
    assert 'license: "apache-2.0"' in card
    assert "PeftModel.from_pretrained" in card


def test_ranks_of_a_hand_made_tree_become_patterns(tmp_path):
    _, base = tiny()
    config = jlora.LoraConfig(rank=4, alpha=10, targets=("q_proj",), axes=Q_AXES)
    params = jlora.init(jax.random.key(0), base, config)
    other = jlora.LoraConfig(rank=7, alpha=0.3, targets=("v_proj",), axes={"*v_proj/kernel": AXES})
    params = jlora.init(jax.random.key(0), params, other)
    peft.save(tmp_path / "adapter", params, config)
    settings = settings_of(tmp_path / "adapter")
    assert (settings["r"], settings["lora_alpha"]) == (4, 10)
    assert settings["rank_pattern"] == {"v_proj": 7}
    assert settings["alpha_pattern"]["v_proj"] / 7 == pytest.approx(0.3 / 7, rel=1e-15)
    loaded, read = peft.load(tmp_path / "adapter", base)
    assert read.targets == ("q_proj", "v_proj")
    assert read.rank_pattern == (("v_proj", 7),)
    assert loaded["layers"]["self_attn"]["v_proj"]["kernel"].rank == 7


AXES = ("stack", "in", "out")
Q_AXES = {"*q_proj/kernel": AXES}


def simple(tmp_path, **overrides):
    """An adapter on q_proj in a folder, to be broken."""
    model, base = tiny(**overrides)
    config = jlora.LoraConfig(rank=4, alpha=8, targets=("q_proj",))
    params = adapted(model, base, config)
    peft.save(tmp_path / "adapter", params, config)
    return tmp_path / "adapter", base, params, config


def write_settings(folder, **changes):
    settings = {**settings_of(folder), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def write_tensors(folder, tensors):
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"peft_type": "LOHA"}, NotImplementedError, "peft_type is 'LOHA'"),
        ({"peft_type": None}, ValueError, "no 'peft_type'"),
        ({"use_dora": True}, ValueError, "Missing.*q_proj.lora_magnitude_vector"),
        ({"layers_to_transform": "0"}, ValueError, "layers_to_transform must be a layer's number"),
        ({"lora_bias": True}, NotImplementedError, "lora_bias=True"),
        ({"bias": "some"}, ValueError, "bias must be 'none', 'all' or 'lora_only'"),
        ({"trainable_token_indices": [1]}, ValueError, "Missing.*trainable_tokens_delta"),
        ({"trainable_token_indices": "1"}, ValueError, "must be a list of different rows"),
        ({"target_parameters": "x"}, ValueError, "target_parameters must be a list"),
        ({"init_lora_weights": "pissa"}, NotImplementedError, "pissa.*base model"),
        ({"of_tomorrow": 3}, NotImplementedError, "of_tomorrow=3"),
        ({"r": 0}, ValueError, "r must be whole and at least 1, got 0"),
        ({"lora_alpha": None}, ValueError, "lora_alpha must be above 0"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be above 0 and finite"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, ValueError, "alpha_pattern must be above 0"),
        ({"layers_pattern": 5, "layers_to_transform": 1}, ValueError, "layers_pattern must be a"),
        ({"layers_pattern": ["("]}, ValueError, "no regular expression"),
        ({"trainable_token_indices": [7, 7]}, ValueError, "must be a list of different rows"),
        ({"lora_dropout": 1}, ValueError, "lora_dropout must be"),
        ({"target_modules": 3}, ValueError, "target_modules must be a list"),
        ({"target_modules": "("}, ValueError, "no regular expression"),
        ({"modules_to_save": "norm"}, ValueError, "modules_to_save must be a list"),
        ({"rank_pattern": [1]}, ValueError, "rank_pattern must be an object"),
        ({"r": 5}, ValueError, r"q_proj.lora_A.weight has shape \[4, 24\], expected \[5, 24\]"),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 8}},
            ValueError,
            r"layers.1.self_attn.q_proj.lora_A.weight has shape \[4, 24\], expected \[8, 24\]",
        ),
        ({"target_modules": ["q_proj", "k_proj"]}, ValueError, "Missing.*layers.0.*k_proj.lora_A"),
        ({"modules_to_save": ["lm_head"]}, ValueError, "Missing from the file: lm_head.weight"),
        ({"modules_to_save": ["1.mlp"]}, NotImplementedError, "covers? all 3|cover all 3"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, error, message, tmp_path):
    folder, base, _, _ = simple(tmp_path)
    write_settings(folder, **changes)
    with pytest.raises(error, match=message) as caught:
        peft.load(folder, base)
    assert str(folder) in str(caught.value)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    folder, base, _, _ = simple(tmp_path)
    tensors = tensors_of(folder)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(changed, message, error=ValueError):
        write_tensors(folder, changed)
        with pytest.raises(error, match=message):
            peft.load(folder, base)

    without = {name: x for name, x in tensors.items() if name != first}
    stranger = first.replace("lora_A", "lora_magnitude_vector").removesuffix(".weight")
    refused(without, "Missing from the file: model.layers.0.*lora_A.weight. Without.*: none")
    refused(tensors | {stranger: tensors[first]}, "Missing.*: none. Without a place.*magnitude")
    refused(tensors | {first: tensors[first].T}, r"lora_A.weight has shape \[24, 4\]")
    refused({name[11:]: x for name, x in tensors.items()}, "begin with 'base_model.model.'")
    for wrong in (np.nan, np.inf):
        refused(tensors | {first: tensors[first] * wrong}, "NaN or infinite.*layers.0.*lora_A")
    refused(tensors | {first: tensors[first].astype(np.int32)}, "lora_A.weight has dtype I32;.*F32")
    narrow = tensors[first].astype(jnp.float8_e4m3fn)
    refused(tensors | {first: narrow}, "lora_A.weight has dtype F8_E4M3; an adapter's")
    embed = "base_model.model.model.embed_tokens.weight"
    copy = np.asarray(base["embed_tokens"]["embedding"])
    refused(tensors | {embed: copy + 1}, "embed_tokens.weight, which differs from the base")
    refused(tensors | {embed: copy[:5]}, r"embed_tokens.weight has shape \[5, 24\]")
    write_tensors(folder, tensors | {embed: copy})
    peft.load(folder, base)
    last = {name: x for name, x in tensors.items() if "layers.2" not in name}
    write_settings(folder, target_modules=r".*layers\.[01]\..*q_proj")
    write_tensors(folder, last)
    leaf = peft.load(folder, base)[0]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert leaf.a[:2].all(axis=(1, 2)).all()
    assert not leaf.a[2].any()
    assert not leaf.b[2].any()
    write_settings(folder, use_dora=True)  # a length would train where PEFT has none
    refused(last, "only in model.layers.0.*stacked", NotImplementedError)


@pytest.mark.parametrize(
    ("changes", "stranger"),
    [
        ({"target_modules": ["v_proj"]}, "layers.0.self_attn.q_proj.lora_A"),
        ({"layers_to_transform": [1]}, "layers.0.self_attn.q_proj.lora_A"),
        ({"exclude_modules": ["1.self_attn.q_proj"]}, "layers.1.self_attn.q_proj.lora_B"),
        ({"exclude_modules": ["q_proj"], "target_modules": None}, "layers.2.self_attn.q_proj"),
    ],
)
def test_factors_that_the_config_leaves_out_are_refused(changes, stranger, tmp_path):
    folder, base, _, _ = simple(tmp_path)
    targets = {"target_modules": ["q_proj", "v_proj"]}
    tensors = tensors_of(folder)
    more = {n.replace("q_proj", "v_proj"): x for n, x in tensors.items() if "lora_A" in n}
    more |= {n.replace("q_proj", "v_proj"): x[:12] for n, x in tensors.items() if "lora_B" in n}
    write_tensors(folder, tensors | more)
    write_settings(folder, **targets)
    peft.load(folder, base)
    write_settings(folder, target_modules=None)  # then the tensors alone say it
    peft.load(folder, base)
    write_settings(folder, **targets | changes)
    with pytest.raises(ValueError, match=f"Without a place in the model: .*{stranger}"):
        peft.load(folder, base)


def test_files_that_are_broken_or_missing_are_named(tmp_path):
    folder, base, _, _ = simple(tmp_path)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for broken in (b"", b"12", whole[: len(whole) // 2], b"\xff" * 100):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match=r"adapter_model.safetensors is broken or incomplete"):
            peft.load(folder, base)
    tensors = safetensors.numpy.load(whole)
    for metadata in ("[]", '"a"', '{"norm/scale": 3}', "{"):
        safetensors.numpy.save_file(tensors, weights, metadata={"jlora_base": metadata})
        with pytest.raises(ValueError, match=r"adapter_model.safetensors: the metadata 'jlora_b"):
            peft.load(folder, base)
    safetensors.numpy.save_file(tensors, weights)
    config = (folder / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").write_bytes(b"\xef\xbb\xbf" + config)
    peft.load(folder, base)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing"):
        peft.load(folder, base)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="a pickle: reading one can run any code"):
        peft.load(folder, base)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not JSON"):
        peft.load(folder, base)
    with pytest.raises(FileNotFoundError, match=r"There is one in .*adapter"):
        peft.load(tmp_path, base)


def test_what_peft_cannot_say_is_refused_by_name(tmp_path):
    model, base = tiny(tie_embeddings=True, qkv_bias=True)

    def refused(config, message, params=None, error=NotImplementedError):
        params = adapted(model, base, config) if params is None else params
        with pytest.raises(error, match=message):
            peft.save(tmp_path / "adapter", params, config)
        assert not any(tmp_path.iterdir())

    refused(jlora.LoraConfig(rank=4, targets=("embed_tokens",)), "'embed_tokens/embedding'.*tied")
    one = jlora.LoraConfig(rank=4, targets=("q_proj", "v_proj"), train=("layers/*/q_proj/bias",))
    refused(one, "q_proj/bias'. train; PEFT trains none, all .* or those of adapted modules")
    q = jlora.LoraConfig(rank=4, targets=("q_proj",))
    trainable, _ = jlora.split(adapted(model, base, q), q)
    refused(q, "one half of a split", trainable, ValueError)
    refused(q, "no adapters in params", base, ValueError)
    foreign = {"layers": [{"q_proj": {"kernel": jnp.ones((8, 8))}}]}
    foreign = jlora.init(jax.random.key(0), foreign, q)
    refused(q, "'layers/0/q_proj/kernel' has no name in a Hugging Face model", foreign)


def test_a_tied_head_that_changes_alone_is_refused(tmp_path):
    folder, base, _, _ = simple(tmp_path, tie_embeddings=True)
    tensors = tensors_of(folder)
    table = np.asarray(base["embed_tokens"]["embedding"])
    names = [f"base_model.model.{n}.weight" for n in ("model.embed_tokens", "lm_head")]
    write_tensors(folder, tensors | {names[1]: table})
    peft.load(folder, base)
    write_settings(folder, modules_to_save=["embed_tokens", "lm_head"])
    write_tensors(folder, tensors | {names[0]: table + 1, names[1]: table + 1})
    loaded, read = peft.load(folder, base)
    assert read.train == ("embed_tokens",)
    np.testing.assert_array_equal(loaded["embed_tokens"]["embedding"], table + 1)
    write_tensors(folder, tensors | {names[0]: table + 1, names[1]: table + 2})
    with pytest.raises(NotImplementedError, match="apart from each other"):
        peft.load(folder, base)
    write_settings(folder, modules_to_save=["embed_tokens"])
    write_tensors(folder, tensors | {names[0]: table + 1})
    with pytest.raises(NotImplementedError, match="apart from each other"):
        peft.load(folder, base)
    write_settings(folder, modules_to_save=["lm_head"])
    write_tensors(folder, tensors | {names[1]: table + 1})
    with pytest.raises(NotImplementedError, match="apart from each other"):
        peft.load(folder, base)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_with_a_resized_embedding_loads_where_it_is_asked_for(tied, tmp_path):
    model, base = tiny(tie_embeddings=tied)
    torch, reference = torch_model(tmp_path / "base", model, base)
    reference.resize_token_embeddings(64)
    options = dict(r=4, lora_alpha=8, target_modules=["q_proj"])
    reference = wrap_in_peft(torch, reference, **options)
    reference.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    wide, grown = jlora.tokens.grow(model, base, 64)
    with pytest.raises(ValueError, match=r"resized vocabulary.*other_base=True, or --other-base"):
        peft.load(tmp_path / "adapter", grown)
    params, config = peft.load(tmp_path / "adapter", grown, other_base=True)
    assert not config.train
    got = apply(wide)(params, TOKENS)
    np.testing.assert_allclose(got, logits_of(torch, reference), rtol=1e-4, atol=1e-4)


def test_an_adapter_is_not_put_on_an_adapter(tmp_path):
    folder, _, params, _ = simple(tmp_path)
    with pytest.raises(ValueError, match="already has an adapter"):
        peft.load(folder, params)


def test_saving_again_replaces_only_the_adapters_files(tmp_path):
    folder, _, params, config = simple(tmp_path)
    (folder / "notes.txt").write_text("mine")
    before = tensors_of(folder)
    peft.save(folder, jax.tree.map(lambda x: 2 * x, params), config)
    after = tensors_of(folder)
    assert all((after[name] == 2 * before[name]).all() for name in before)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    folder, base, params, config = simple(tmp_path)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            peft.save(target, jax.tree.map(lambda x: 2 * x, params), config)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert_same(peft.load(folder, base)[0], params)
    with pytest.raises(ValueError, match="is a file"):
        peft.save(folder / "README.md", params, config)


# The reference.


def torch_model(folder, model, params):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    jlora.models.save(folder, model, params)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return torch, loaded.eval()


def logits_of(torch, model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()


def load_in_peft(model, folder):
    import peft as reference

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = reference.PeftModel.from_pretrained(model, str(folder)).eval()
    told = [str(w.message) for w in caught if "adapter keys" in str(w.message)]
    assert not told, told
    return loaded


def wrap_in_peft(torch, model, **options):
    import peft as reference

    wrapped = reference.get_peft_model(
        model, reference.LoraConfig(task_type="CAUSAL_LM", **options)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for _, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return wrapped.eval()
