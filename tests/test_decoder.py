"""The decoder alone: packing, padding, cache, rematerialisation, platforms. Parity: test_hf.py."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import attention
from jlora.models.decoder import (
    Decoder,
    DecoderConfig,
    Experts,
    RopeScaling,
    init_cache,
    param_shapes,
)

CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
)


def random_params(config, seed=0):
    """Random everywhere: fresh biases are zero and fresh norms one, which would prove less."""
    leaves, tree = jax.tree.flatten(param_shapes(config))
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, arrays)


def random_tokens(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, CONFIG.vocab_size, shape), jnp.int32)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def apply(params):
    jitted = jax.jit(
        lambda p, *args, **kwargs: Decoder(CONFIG).apply({"params": p}, *args, **kwargs)
    )
    return functools.partial(jitted, params)


def test_parameters_are_stacked_over_layers_and_two_dimensional_within():
    shapes = param_shapes(dataclasses.replace(CONFIG, qkv_bias=True, tie_embeddings=False))
    assert shapes["embed_tokens"]["embedding"].shape == (97, 32)
    assert shapes["layers"]["self_attn"]["q_proj"]["kernel"].shape == (3, 32, 32)
    assert shapes["layers"]["self_attn"]["k_proj"]["kernel"].shape == (3, 32, 16)
    assert shapes["layers"]["self_attn"]["k_proj"]["bias"].shape == (3, 16)
    assert "bias" not in shapes["layers"]["self_attn"]["o_proj"]
    assert shapes["layers"]["mlp"]["down_proj"]["kernel"].shape == (3, 48, 32)
    assert shapes["layers"]["input_layernorm"]["scale"].shape == (3, 32)
    assert shapes["norm"]["scale"].shape == (32,)
    assert shapes["lm_head"]["kernel"].shape == (32, 97)
    assert "lm_head" not in param_shapes(dataclasses.replace(CONFIG, tie_embeddings=True))


@pytest.mark.parametrize("positions", [False, True])
def test_packed_logits_equal_separate_ones(apply, positions):
    lengths = (70, 33, 90)  # several attention blocks, none of them aligned with a segment
    examples = [random_tokens(1, n, seed=n) for n in lengths]
    padding = jnp.zeros((1, 7), jnp.int32)
    tokens = jnp.concatenate([*examples, padding], axis=1)
    segment_ids = jnp.asarray(np.repeat([1, 2, 3, 0], [*lengths, 7]))[None]
    given = {}
    if positions:
        given["positions"] = jnp.concatenate([jnp.arange(n) for n in (*lengths, 7)])[None]
    packed = apply(tokens, segment_ids=segment_ids, **given)
    start = 0
    for example in examples:
        end = start + example.shape[1]
        np.testing.assert_allclose(packed[:, start:end], apply(example), rtol=1e-5, atol=2e-5)
        start = end


def test_nothing_leaks_across_segments(apply):
    tokens = random_tokens(1, 140)
    segment_ids = jnp.asarray(np.repeat([1, 2, 3], [60, 50, 30]))[None]
    before = apply(tokens, segment_ids=segment_ids)
    for start, end in ((0, 60), (60, 110), (110, 140)):
        changed = tokens.at[:, start:end].set((tokens[:, start:end] + 1) % CONFIG.vocab_size)
        after = apply(changed, segment_ids=segment_ids)
        outside = np.r_[0:start, end:140]
        np.testing.assert_array_equal(after[:, outside], before[:, outside])
        assert (after[:, start:end] != before[:, start:end]).any(axis=-1).all()


def test_no_gradient_leaks_across_segments():
    table = jax.random.normal(jax.random.key(0), (CONFIG.vocab_size, CONFIG.hidden_size))
    tokens = jnp.arange(90)[None]  # every token once: its embedding row is its gradient
    segment_ids = jnp.asarray(np.repeat([1, 2], [50, 40]))[None]
    params = random_params(CONFIG)

    def loss(table):
        tree = {**params, "embed_tokens": {"embedding": table}}
        logits = Decoder(CONFIG).apply({"params": tree}, tokens, segment_ids=segment_ids)
        return jnp.square(logits[:, 50:]).sum()

    rows = jax.jit(jax.grad(loss))(table)
    assert not rows[:50].any()
    assert rows[50:90].any(axis=-1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_logits_of_real_tokens(apply, side):
    tokens = random_tokens(3, 80)
    real = np.array([80, 63, 11])[:, None]
    index = np.arange(80)
    mask = jnp.asarray(index >= 80 - real if side == "left" else index < real)
    logits = apply(tokens, padding_mask=mask)
    other = apply(jnp.where(mask, tokens, 5), padding_mask=mask)
    for row, n in enumerate(real[:, 0]):
        part = slice(80 - n, 80) if side == "left" else slice(0, n)
        alone = apply(tokens[row : row + 1, part])[0]
        np.testing.assert_allclose(logits[row, part], alone, rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(logits[row, part], other[row, part])


@pytest.mark.parametrize("prefill", [(20,), (7, 13), (1,) * 20])
def test_cached_logits_equal_those_without_a_cache(apply, prefill):
    tokens = random_tokens(2, 26)
    mask = jnp.asarray(np.arange(26) >= np.array([[0], [9]]))
    expected = apply(tokens, padding_mask=mask)
    cache = init_cache(CONFIG, 2, 32)
    start, parts = 0, []
    for n in (*prefill, *[1] * 6):
        logits, cache = apply(
            tokens[:, start : start + n], padding_mask=mask[:, start : start + n], cache=cache
        )
        parts.append(logits)
        start += n
    logits = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=1e-5, atol=2e-5)
    assert int(cache.index) == 26


def test_greedy_text_with_the_cache_equals_that_without(apply):
    lengths, width = np.array([9, 4, 1]), 9
    prompts = [np.asarray(random_tokens(n, seed=n)) for n in lengths]
    rows, index = np.zeros((3, width + 8), np.int32), np.arange(3)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    for i in range(8):  # what follows a token does not change its logits
        rows[index, lengths + i] = apply(rows)[index, lengths + i - 1].argmax(-1)
    expected = np.stack([row[n : n + 8] for row, n in zip(rows, lengths, strict=True)])

    tokens = jnp.stack([jnp.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = jnp.asarray(np.arange(width) >= width - lengths[:, None])
    logits, cache = apply(tokens, padding_mask=mask, cache=init_cache(CONFIG, 3, width + 8))
    generated = []
    for _ in range(8):
        token = logits[:, -1:].argmax(-1)
        generated.append(token)
        logits, cache = apply(token, cache=cache)  # no mask: these tokens are real
    np.testing.assert_array_equal(jnp.concatenate(generated, axis=1), expected)


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [("none", 3), ("dots", 1), ("dots", 3), ("full", 2), ("keep:attention,q_proj", 3)],
)
def test_neither_rematerialisation_nor_unrolling_changes_a_gradient(params, remat, unroll):
    tokens = random_tokens(2, 24)

    def grad(config):
        def loss(params):
            return jnp.square(Decoder(config).apply({"params": params}, tokens)).mean()

        return jax.grad(loss)(params)

    expected = grad(CONFIG)
    given = grad(dataclasses.replace(CONFIG, remat=remat, unroll=unroll))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), given, expected
    )


def test_a_policy_keeps_what_it_says(params):
    tokens = random_tokens(4, 64)
    sizes = {}
    for remat in ("none", "dots", "keep:attention,q_proj", "attention", "full"):
        model = Decoder(dataclasses.replace(CONFIG, remat=remat))
        _, vjp = jax.vjp(lambda p, m=model: m.apply({"params": p}, tokens).sum(), params)
        sizes[remat] = sum(x.nbytes for x in jax.tree.leaves(vjp))
    assert sorted(sizes, key=sizes.__getitem__, reverse=True) == list(sizes)
    row = 4 * 3 * 4 * 64  # bytes of a number for each layer and token
    assert sizes["attention"] - sizes["full"] == 32 * row
    assert sizes["keep:attention,q_proj"] - sizes["attention"] == 32 * row


def test_no_score_is_kept_for_the_backward_pass(params):
    tokens = random_tokens(2, 64)
    _, vjp = jax.vjp(lambda p: Decoder(CONFIG).apply({"params": p}, tokens).sum(), params)
    assert not [x.shape for x in jax.tree.leaves(vjp) if x.shape[-2:] == (64, 64)]


def test_hidden_and_head_make_the_logits(params, apply):
    model, tokens = Decoder(CONFIG), random_tokens(2, 9)
    hidden = model.apply({"params": params}, tokens, method="hidden")
    assert hidden.shape == (2, 9, CONFIG.hidden_size)
    logits = model.apply({"params": params}, hidden, method="head")
    np.testing.assert_allclose(logits, apply(tokens), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near_float32_and_gives_float32_logits(params, apply, dtype):
    model, tokens = Decoder(dataclasses.replace(CONFIG, dtype=dtype)), random_tokens(2, 40)
    expected = apply(tokens)
    logits = model.apply({"params": params}, tokens)
    assert logits.dtype == jnp.float32
    assert model.apply({"params": params}, tokens, method="hidden").dtype == dtype
    # Eight bits of mantissa over three layers; the logits' spread is the scale.
    np.testing.assert_allclose(logits, expected, atol=0.05 * float(expected.std()))


def test_every_projection_is_a_product_with_its_cast_kernel():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", tie_embeddings=True)
    params = param_shapes(config)

    def fn(params, tokens):
        return Decoder(config).apply({"params": params}, tokens)

    text = str(jax.make_jaxpr(fn)(params, jax.ShapeDtypeStruct((1, 8), jnp.int32)))
    products = re.findall(r":\w+\[1,8,\d+\] = dot_general\[\s*dimension_numbers=(\S+)", text)
    assert products == ["(([2],"] * 8  # seven in the layer, one for the head


@pytest.mark.parametrize(("length", "heads"), [(1, (2, 2)), (65, (6, 2)), (200, (3, 1))])
def test_blocked_attention_equals_jax_nn(length, heads):
    rng = np.random.default_rng(length)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, length, n, 8)), jnp.float32)
        for n in (heads[0], heads[1], heads[1])
    )
    ids = jnp.asarray(np.sort(rng.integers(1, 4, (2, length))), jnp.int32)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    for segment_ids, mask in ((None, None), (ids, same)):
        for window in (None, 1, 9, 70, 1000):
            expected = jax.nn.dot_product_attention(
                q,
                k,
                v,
                mask=mask,
                is_causal=True,
                scale=0.7,
                local_window_size=None if window is None else (window - 1, 0),
            )
            attend = functools.partial(attention.causal_attention, window=window, scale=0.7)
            given = jax.jit(attend)(q, k, v, segment_ids=segment_ids)
            np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


def test_a_soft_cap_bounds_the_scores():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(0, 3, (1, 9, 1, 8)), jnp.float32) for _ in range(3))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * 0.5
    assert jnp.abs(scores).max() > 20
    scores = jnp.where(jnp.tri(9, dtype=bool), 2 * jnp.tanh(scores / 2), -jnp.inf)
    expected = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
    given = attention.causal_attention(q, k, v, scale=0.5, softcap=2.0)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


ALTERNATING = dataclasses.replace(
    CONFIG, sliding_window=16, sliding_layers=(True, False, True), dtype="bfloat16"
)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, dtype="bfloat16"),
        ALTERNATING,
        dataclasses.replace(CONFIG, dtype="bfloat16", experts=Experts(4, 2)),
    ],
    ids=["plain", "alternating", "experts"],
)
def test_the_model_lowers_for_every_platform_from_here(config, platform):
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def loss(params, tokens):
        return Decoder(config).apply({"params": params}, tokens, segment_ids=tokens).sum()

    traced = jax.jit(jax.grad(loss)).trace(param_shapes(config), tokens)
    assert traced.lower(lowering_platforms=(platform,)).as_text()


def test_cudnn_is_chosen_where_the_program_is_lowered_for_cuda(monkeypatch):
    def flash(q, k, v, segment_ids, *, options):
        return jnp.tanh(v.repeat(2, axis=2))  # a marker that nothing else here emits

    monkeypatch.setattr(attention, "_cudnn", flash)
    q, kv = (jax.ShapeDtypeStruct((2, 16, n, 8), jnp.bfloat16) for n in (4, 2))

    def marked(platform, *args):
        traced = jax.jit(attention.causal_attention).trace(*args)
        return "stablehlo.tanh" in traced.lower(lowering_platforms=(platform,)).as_text()

    assert marked("cuda", q, kv, kv)
    assert not marked("cpu", q, kv, kv)
    assert not marked("tpu", q, kv, kv)
    single = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, kv, kv)]
    assert not marked("cuda", *single)  # cuDNN has no float32


def test_layers_that_slide_and_layers_that_do_not_take_cudnn_both(monkeypatch):
    windows = []

    def flash(q, k, v, segment_ids, *, options):
        windows.append(options.window)
        return jnp.tanh(v.repeat(2, axis=2))

    monkeypatch.setattr(attention, "_cudnn", flash)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    apply = jax.jit(lambda params, tokens: Decoder(ALTERNATING).apply({"params": params}, tokens))
    traced = apply.trace(param_shapes(ALTERNATING), tokens)
    assert set(windows) == {None, 16}
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.tanh") == 2
    assert "stablehlo.tanh" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_a_config_refuses_what_cannot_be():
    for change, message in (
        ({"num_kv_heads": 3}, "num_kv_heads must divide"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"remat": "some"}, "remat must be"),
        ({"remat": "keep:q_porj"}, "remat must be"),
        ({"unroll": 0}, "unroll"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)
    with pytest.raises(ValueError, match="kind must be"):
        RopeScaling("yarn", factor=2.0)


def test_calls_refuse_what_cannot_be(params):
    model, tokens = Decoder(CONFIG), random_tokens(2, 8)
    cases = (
        ((tokens[0],), {}, "tokens must be integers"),
        ((tokens.astype(jnp.float32),), {}, "tokens must be integers"),
        ((tokens,), {"positions": jnp.arange(8)}, "positions must have the shape of tokens"),
        ((tokens,), {"padding_mask": jnp.ones((2, 8))}, "padding_mask must be boolean"),
        ((tokens,), {"cache": init_cache(CONFIG, 2, 7)}, "do not fit"),
        ((tokens,), {"cache": init_cache(CONFIG, 3, 9)}, "do not fit"),
        ((tokens,), {"cache": init_cache(CONFIG, 2, 9), "segment_ids": tokens}, "for training"),
    )
    for args, kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            model.apply({"params": params}, *args, **kwargs)


def test_a_token_outside_the_vocabulary_is_not_answered(apply):
    assert jnp.isnan(apply(jnp.asarray([[3, CONFIG.vocab_size]]))[:, 1]).all()
