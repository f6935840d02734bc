"""The loss of a decoder with adapters, however its layers are rolled and rematerialised."""

import dataclasses
import functools
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import objective
from jlora.models.decoder import Decoder, DecoderConfig, param_shapes

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
LORA = jlora.LoraConfig(rank=3, alpha=6, targets=("all-linear",), exclude=("lm_head",))
ROWS, LENGTH = 2, 20


@functools.cache
def adapted():
    """Parameters whose adapters are not fresh, and a batch."""
    shapes = param_shapes(CONFIG)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for leaf in leaves]
    )
    params = initialised(params, CONFIG)
    trainable, frozen = jlora.split(params, LORA)
    moved = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), trainable)
    tokens = rng.integers(0, 61, (ROWS, LENGTH)).astype(np.int32)
    mask = rng.integers(0, 2, tokens.shape).astype(np.float32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_mask": mask}
    return moved, frozen, batch


def initialised(params, config):
    def apply(params, tokens):
        return Decoder(config).apply({"params": params}, tokens)

    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jlora.init(jax.random.key(0), params, LORA, fn=apply, args=(tokens,))


def gradient(chunk_tokens=None, **changes):
    """The compiled loss and gradient of the adapters, and its arguments."""
    trainable, frozen, batch = adapted()
    model = Decoder(dataclasses.replace(CONFIG, **changes))
    params = jlora.combine(trainable, frozen)
    loss_fn = objective.make_loss(model, params, LORA, chunk_tokens=chunk_tokens)

    def loss(trainable, frozen, batch):
        total, count = loss_fn(jlora.combine(trainable, frozen), batch, None)
        return total / count

    return jax.jit(jax.value_and_grad(loss)), (trainable, frozen, batch)


@functools.cache
def expected():
    step, arguments = gradient()
    return step(*arguments)


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [("none", 3), ("full", 9), ("attention", 2), ("offload", 1)],
)
@pytest.mark.filterwarnings("error")  # such as that a dense weight is built
def test_loss_and_gradient_are_those_of_the_plain_loop(remat, unroll):
    step, arguments = gradient(remat=remat, unroll=unroll)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        step(*arguments),
        expected(),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("error")
def test_a_quantised_head_is_restored_once_and_not_for_each_chunk(tied):
    trainable, frozen, batch = adapted()
    axes = {"embed_tokens": ("out", "in"), "lm_head": ("in", "out")}
    params = jlora.combine(trainable, frozen)
    if tied:
        del axes["lm_head"], params["lm_head"]
    packed = jlora.quantize(params, "int8", targets=list(axes), axes=axes)
    model = Decoder(dataclasses.replace(CONFIG, tie_embeddings=tied))

    def loss(trainable, frozen):
        params = jlora.combine(trainable, frozen)
        loss_fn = objective.make_loss(model, params, LORA, chunk_tokens=4)
        return loss_fn(params, batch, None)[0]

    step = jax.jit(jax.value_and_grad(loss))
    lora = dataclasses.replace(LORA, exclude=()) if tied else LORA
    arguments = jlora.split(packed, lora)
    dense = {**params, **jlora.dequantize({name: packed[name] for name in axes})}
    given, wanted = (
        jax.tree.leaves(step(*halves)) for halves in (arguments, jlora.split(dense, lora))
    )
    for got, expected in zip(given, wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    shape = "61,16" if tied else "16,61"
    bodies = [str(eqn.params["jaxpr"]) for eqn in equations(jax.make_jaxpr(step)(*arguments))
              if eqn.primitive.name == "scan"]  # fmt: skip
    chunks = [body for body in bodies if f"f32[{shape}]" in body]
    assert chunks
    assert not any("i8[61,16]" in body for body in bodies)


def equations(closed):
    for eqn in closed.jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from equations(value)


@pytest.mark.parametrize("chunk_tokens", [1, 64, 4096])
def test_the_chunk_of_the_head_changes_nothing(chunk_tokens):
    step, arguments = gradient(chunk_tokens=chunk_tokens)
    np.testing.assert_allclose(step(*arguments)[0], expected()[0], rtol=1e-6)


def test_the_unrolled_gradient_has_no_loop_and_no_stacked_activation():
    """Its gain is that nothing is copied into and out of such stacks."""
    stacked = re.compile(rf"\[3,{ROWS},{LENGTH},")
    step, arguments = gradient(chunk_tokens=4096)
    looped = step.lower(*arguments).compile().as_text()
    assert " while(" in looped
    assert stacked.search(looped)
    step, arguments = gradient(chunk_tokens=4096, unroll=3)
    unrolled = step.lower(*arguments).compile().as_text()
    assert " while(" not in unrolled
    assert not stacked.search(unrolled)


def test_unrolling_does_not_undo_rematerialisation():
    """XLA merges what is computed twice, unless a barrier stands between."""
    products = {}
    for remat in ("none", "full"):
        step, arguments = gradient(chunk_tokens=4096, unroll=3, remat=remat)
        text = step.lower(*arguments).compile().as_text()
        products[remat] = len(re.findall(r"op_name=\"[^\"]*dot_general\"", text))
    assert products["full"] > products["none"]


def test_an_unrolled_model_is_adapted_like_a_rolled_one():
    shapes = param_shapes(CONFIG)
    for remat in ("none", "full"):
        unrolled = dataclasses.replace(CONFIG, unroll=3, remat=remat)
        assert param_shapes(unrolled) == shapes
        assert initialised(shapes, unrolled) == initialised(shapes, CONFIG)


def test_a_bfloat16_head_is_never_multiplied_in_float32():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), param_shapes(config)
    )
    params = initialised(shapes, config)
    trainable, frozen = jlora.split(params, LORA)
    loss_fn = objective.make_loss(Decoder(config), params, LORA, chunk_tokens=8)
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype)
        for name, dtype in {
            "tokens": jnp.int32,
            "targets": jnp.int32,
            "loss_mask": "float32",
        }.items()
    }

    def loss(trainable, frozen, batch):
        return loss_fn(jlora.combine(trainable, frozen), batch, None)[0]

    lowered = jax.jit(jax.grad(loss)).lower(trainable, frozen, batch).as_text()
    of_head = [line for line in lowered.splitlines() if "dot_general" in line and "x61" in line]
    assert len(of_head) >= 2  # forward and back
    for line in of_head:
        operands = line.rsplit(" : ", 1)[1].split(" -> ")[0]
        assert "f32>" not in operands.replace("bf16>", ""), line
