"""Generation: the cache changes nothing, a row knows no neighbour, sampling follows its law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.generate import generate, nucleus, sample, stream
from jlora.models.decoder import Decoder, DecoderConfig, init_cache

VOCAB, DIM, HEADS = 40, 32, 4


def toy_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"embed": (VOCAB, DIM), "qkv": (DIM, 3 * DIM), "out": (DIM, DIM), "head": (DIM, VOCAB)}
    return {
        name: jax.random.normal(key, shape) / (1.0 if name == "embed" else shape[0] ** 0.5)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }


def toy_cache(batch, length):
    kv = jnp.zeros((batch, length, DIM))
    return {"k": kv, "v": kv, "real": jnp.zeros((batch, length), bool), "index": jnp.int32(0)}


def toy_forward(params, tokens, *, positions, padding_mask, cache):
    """One causal attention layer with additive positions; enough to depend on all of a prompt."""
    batch, length = tokens.shape
    angle = positions[..., None] * 10.0 ** -jnp.linspace(0, 2, DIM // 2)
    x = params["embed"][tokens] + jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
    q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
    start = cache["index"]
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    cache = {
        "k": put(cache["k"], k),
        "v": put(cache["v"], v),
        "real": put(cache["real"], padding_mask),
        "index": start + length,
    }
    split = lambda y: y.reshape(batch, -1, HEADS, DIM // HEADS)  # noqa: E731
    scores = jnp.einsum("bqhd,bkhd->bhqk", split(q), split(cache["k"]))
    seen = jnp.arange(scores.shape[-1]) <= start + jnp.arange(length)[:, None]
    mask = (seen & cache["real"][:, None])[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, split(cache["v"])).reshape(batch, length, DIM)
    return (x + mixed @ params["out"]) @ params["head"], cache


@jax.jit
def full_logits(params, tokens):
    """Logits of whole texts, padded on the right, where a causal model does not look."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    real = jnp.ones(tokens.shape, bool)
    cache = toy_cache(*tokens.shape)
    return toy_forward(params, tokens, positions=positions, padding_mask=real, cache=cache)[0]


def naive_greedy(params, prompt, count):
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        tokens[0, end] = full_logits(params, tokens)[0, end - 1].argmax()
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


PROMPTS = [[3], [1, 2, 3, 4, 5], list(range(30)), [7] * 17]
toy = functools.partial(generate, toy_forward, toy_cache)
KEY = jax.random.key(0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_with_the_cache_equals_greedy_without_it(prompt):
    params = toy_params()
    expected = naive_greedy(params, prompt, 32)
    assert len(set(expected)) > 3  # a constant text would prove little
    assert toy(params, [prompt], max_new_tokens=32, key=KEY) == [expected]
    assert (
        list(stream(toy_forward, toy_cache, params, prompt, max_new_tokens=32, key=KEY)) == expected
    )


def test_a_ragged_batch_equals_its_prompts_one_by_one():
    params = toy_params(1)
    batch = toy(params, PROMPTS, max_new_tokens=24, key=KEY)
    assert batch == [toy(params, [p], max_new_tokens=24, key=KEY)[0] for p in PROMPTS]


MODEL = Decoder(
    DecoderConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
)
CONFIG = jlora.LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))


@jlora.adapt
def decoder(params, tokens, **rest):
    return MODEL.apply({"params": params}, tokens, **rest)


decoder_cache = functools.partial(init_cache, MODEL.config)


@functools.cache
def decoder_params():
    """Random weights and adapters whose `b` is not zero, large enough for varied texts."""
    tokens = jnp.zeros((1, 4), jnp.int32)

    def make(key):
        params = MODEL.init(key, tokens)["params"]
        return jlora.init(key, params, CONFIG, fn=decoder, args=(tokens,))

    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(make, KEY)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


@functools.cache
def decoder_texts():
    """What full forward passes give, without a cache, for each prompt."""
    logits = jax.jit(decoder)
    texts = []
    for prompt in PROMPTS:
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(prompt)] = prompt
        for end in range(len(prompt), len(prompt) + 32):
            tokens[0, end] = logits(decoder_params(), tokens)[0, end - 1].argmax()
        texts.append(tokens[0, len(prompt) : len(prompt) + 32].tolist())
    return texts


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapted_decoder_generates_what_full_forward_passes_give(merged):
    params = decoder_params()
    params = jlora.merge_params(params) if merged else params
    options = dict(max_new_tokens=32, key=KEY)
    assert generate(decoder, decoder_cache, params, PROMPTS, **options) == decoder_texts()
    streamed = stream(decoder, decoder_cache, params, PROMPTS[1], **options)
    assert list(streamed) == decoder_texts()[1]


def test_the_adapter_changes_the_decoders_text():
    base = jax.tree.map(
        lambda leaf: leaf.w if isinstance(leaf, jlora.LoraArray) else leaf,
        decoder_params(),
        is_leaf=lambda leaf: isinstance(leaf, jlora.LoraArray),
    )
    texts = generate(decoder, decoder_cache, base, PROMPTS, max_new_tokens=32, key=KEY)
    assert all(text != other for text, other in zip(texts, decoder_texts(), strict=True))
    assert all(len(set(text)) > 2 for text in decoder_texts())


def test_a_prompt_outside_the_vocabulary_is_refused():
    with pytest.raises(FloatingPointError, match="outside the vocabulary"):
        generate(decoder, decoder_cache, decoder_params(), [[1, 97]], max_new_tokens=2, key=KEY)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_sampled_row_does_not_know_its_neighbours(top_p):
    params = toy_params(2)
    draw = functools.partial(
        toy, params, max_new_tokens=20, key=jax.random.key(5), temperature=1.5, top_p=top_p
    )
    first = draw([PROMPTS[1], PROMPTS[0], PROMPTS[3]])
    second = draw([PROMPTS[2], PROMPTS[0], PROMPTS[1]])
    assert first[1] == second[1]
    assert first[0] == draw([PROMPTS[1]])[0]
    assert draw([PROMPTS[0]] * 3)[0] != draw([PROMPTS[0]] * 3)[1]
    assert first != toy(
        params,
        [PROMPTS[1], PROMPTS[0], PROMPTS[3]],
        max_new_tokens=20,
        key=jax.random.key(6),
        temperature=1.5,
        top_p=top_p,
    )


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_stream_draws_what_generate_draws(make_key):
    params = toy_params(3)
    options = dict(max_new_tokens=20, key=make_key(1), temperature=0.9, top_p=0.9)
    expected = toy(params, [PROMPTS[1]], **options)[0]
    assert list(stream(toy_forward, toy_cache, params, PROMPTS[1], **options)) == expected


def test_a_row_ends_at_its_eos_and_the_others_go_on():
    params = toy_params()
    free = toy(params, PROMPTS, max_new_tokens=32, key=KEY)
    eos = free[1][6]
    stopped = toy(params, PROMPTS, max_new_tokens=32, key=KEY, eos_ids=(eos, 10_000))
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == (whole[: whole.index(eos)] if eos in whole else whole)
    assert len(stopped[1]) <= 6
    streamed = stream(
        toy_forward, toy_cache, params, PROMPTS[1], max_new_tokens=32, key=KEY, eos_ids=(eos,)
    )
    assert list(streamed) == stopped[1]


def test_the_loop_ends_when_every_row_has():
    steps = []

    def counting(params, tokens, **rest):
        jax.debug.callback(lambda: steps.append(tokens.shape))
        return toy_forward(params, tokens, **rest)

    free = toy(toy_params(), [[3]], max_new_tokens=100, key=KEY)[0]
    generate(
        counting, toy_cache, toy_params(), [[3]], max_new_tokens=100, key=KEY, eos_ids=(free[4],)
    )
    jax.effects_barrier()
    assert len(steps) == 1 + free.index(free[4]) + 1  # the prefill, then up to the EOS


def test_many_lengths_share_one_compilation_and_parameters_are_arguments():
    traces = []

    def traced(params, tokens, **rest):
        assert isinstance(params["embed"], jax.core.Tracer)
        traces.append(tokens.shape)
        return toy_forward(params, tokens, **rest)

    for length, count in [(1, 17), (5, 20), (16, 32), (17, 31)]:
        generate(
            traced, toy_cache, toy_params(length), [[1] * length], max_new_tokens=count, key=KEY
        )
    assert traces == [(1, 16), (1, 1)]


def test_top_p_keeps_the_smallest_set_of_that_mass():
    logits = jax.random.normal(KEY, (200, 50)) * 3
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    cut = jax.jit(nucleus)
    for top_p in (1e-6, 0.1, 0.5, 0.9, 0.999):
        kept = np.asarray(cut(logits, top_p))
        mass = (probabilities * kept).sum(-1)
        least = np.where(kept, probabilities, 2.0).min(-1)
        most_cut = np.where(kept, 0.0, probabilities).max(-1)
        assert kept.any(-1).all()
        assert (mass >= top_p - 1e-6).all()
        assert (mass - least <= top_p + 1e-6).all()
        assert (least >= most_cut).all()
    assert nucleus(jnp.zeros(8), 0.5).tolist() == [True] * 4 + [False] * 4
    assert nucleus(jnp.asarray([-jnp.inf, 0.0, -jnp.inf]), 1.0)[1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_samples_follow_the_distribution(temperature, top_p):
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.06, 0.04, 0.0]))
    count = 20_000
    drawn = sample(
        jax.random.split(jax.random.key(3), count),
        jnp.broadcast_to(logits, (count, 6)),
        temperature=temperature,
        top_p=top_p,
    )
    expected = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    expected = expected * np.asarray(nucleus(logits / temperature, top_p))
    expected /= expected.sum()
    seen = np.bincount(drawn, minlength=6) / count
    assert (seen[expected == 0] == 0).all()
    spread = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(seen - expected) <= 4.5 * spread).all()


def test_a_vanishing_temperature_is_greedy():
    params = toy_params()
    cold = toy(params, PROMPTS, max_new_tokens=16, key=KEY, temperature=1e-44)
    assert cold == toy(params, PROMPTS, max_new_tokens=16, key=KEY)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_hold_a_nan_are_refused(temperature):
    params = toy_params()
    params["head"] = params["head"].at[:, 3].set(jnp.nan)
    options = dict(max_new_tokens=4, key=KEY, temperature=temperature)
    with pytest.raises(FloatingPointError, match="NaN"):
        toy(params, [[1, 2], [3]], **options)
    with pytest.raises(FloatingPointError, match="NaN"):
        list(stream(toy_forward, toy_cache, params, [1, 2], **options))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "Prompt 1 of 2 is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"top_p": 0.0}, "top_p must be above 0"),
        ([[1]], {"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ([[1]], {"top_p": float("nan")}, "top_p"),
        ([[1]], {"temperature": -0.1}, "temperature must be 0"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
    ],
)
def test_arguments_out_of_range_are_refused(prompts, options, message):
    options = {"max_new_tokens": 4, "key": KEY, **options}
    with pytest.raises(ValueError, match=message):
        toy(toy_params(), prompts, **options)
    with pytest.raises(ValueError, match=message.replace("1 of 2", "0 of 1")):
        stream(toy_forward, toy_cache, toy_params(), prompts[-1], **options)


def test_no_prompts_give_no_rows():
    assert toy(toy_params(), [], max_new_tokens=4, key=KEY) == []
