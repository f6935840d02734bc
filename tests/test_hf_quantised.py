"""Bases that are quantised as they are read: equal to quantising them later, in less memory."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_gguf
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora import models, quant
from jlora.models import decoder, hf, weights

FORMATS = ["nf4", "int8", "float8"]
CONFIG = decoder.DecoderConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,  # no whole number of blocks: rows of down_proj are padded
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qkv_bias=True,
    family="qwen2",
)


def random_params(config, dtype="float32"):
    leaves, treedef = jax.tree.flatten(decoder.param_shapes(config))
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(0, 0.2, leaf.shape), dtype) for leaf in leaves]
    return jax.tree.unflatten(treedef, arrays)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "model"
    hf.save(directory, CONFIG, random_params(CONFIG, "bfloat16"), tiny.tokenizer_files())
    return directory


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    test_gguf.write(path, test_gguf.make_weights(bias=True), kind=test_gguf.Kind.Q8_0)
    return path


def quantise_later(path, fmt, dtype):
    model, params = models.load(path, dtype=dtype)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    exclude = () if model.config.tie_embeddings else ("lm_head",)

    def apply(params, tokens):
        return model.apply({"params": params}, tokens)

    return jlora.quantize(params, fmt, exclude=exclude, fn=apply, args=(tokens,))


def assert_equal_trees(given, expected):
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if not isinstance(b, jax.ShapeDtypeStruct):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
@pytest.mark.parametrize("fmt", FORMATS)
def test_loading_in_a_format_equals_quantising_what_was_loaded(folder, fmt, dtype):
    _, params = models.load(folder, dtype=dtype, quantize=fmt)
    assert_equal_trees(params, quantise_later(folder, fmt, dtype))
    leaves = jlora.lora.leaves_by_path(params)
    packed = {path for path, leaf in leaves.items() if isinstance(leaf, jlora.quant.QuantArray)}
    assert packed == {
        f"layers/{part}/kernel"
        for part in (*(f"self_attn/{x}_proj" for x in "qkvo"), "mlp/gate_proj", "mlp/up_proj",
                     "mlp/down_proj")
    }  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_gguf_file_is_quantised_alike(gguf_file, fmt):
    _, params = models.load(gguf_file, quantize=fmt)
    assert_equal_trees(params, quantise_later(gguf_file, fmt, None))


def with_tables(params, fmt):
    axes = {"embed_tokens": ("out", "in"), "lm_head": ("in", "out")}
    targets = [name for name in axes if name in params]
    axes = {name: axes[name] for name in targets}
    return jlora.quantize(params, fmt, targets=targets, axes=axes)


@pytest.mark.parametrize(("fmt", "layers"), [("int8", "nf4"), ("float8", None), ("nf4", None)])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_packed_where_asked_for(tmp_path, gguf_file, fmt, layers, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    hf.save(tmp_path / "model", config, random_params(config, "bfloat16"), tiny.tokenizer_files())
    for path in (tmp_path / "model", gguf_file):
        formats = {"layers": layers, "embeddings": fmt}
        model, params = models.load(path, quantize=formats)
        assert_equal_trees(params, with_tables(models.load(path, quantize=layers)[1], fmt))
        assert_equal_trees(params, models.shapes(path, quantize=formats)[1])
        tokens = jnp.asarray([[1, 5, 96, 0]])

        def apply(params, model=model, tokens=tokens):
            return model.apply({"params": params}, tokens)

        # The products are those of the restored tables, whose rows are looked up one by one.
        logits = jlora.adapt(apply, on_unsupported="error")(params)
        np.testing.assert_allclose(
            logits, jax.jit(apply)(jlora.dequantize(params)), rtol=1e-5, atol=1e-5
        )


def test_int8_tables_change_the_logits_little(folder):
    model, params = models.load(folder, dtype="float32")
    packed = models.load(folder, dtype="float32", quantize={"embeddings": "int8"})[1]

    @jlora.adapt
    def apply(params):
        return model.apply({"params": params}, jnp.arange(90)[None])

    exact, given = apply(params), apply(packed)
    # A code is off by half of one of 127 steps of the row's largest element: 0.3 % of these rows.
    assert 1e-4 < jnp.linalg.norm(given - exact) / jnp.linalg.norm(exact) < 0.02


@pytest.mark.parametrize("dtype", ["bfloat16", None])
@pytest.mark.parametrize("fmt", [*FORMATS, None])
def test_shapes_are_those_of_what_is_loaded(folder, gguf_file, fmt, dtype):
    for path in (folder, gguf_file):
        model, shapes = models.shapes(path, dtype=dtype, quantize=fmt)
        loaded, params = models.load(path, dtype=dtype, quantize=fmt)
        assert model == loaded
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))
        assert_equal_trees(params, shapes)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("fmt", [*FORMATS, None])
def test_weights_go_where_they_belong_on_a_mesh(folder, fmt, kind):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=devices, axis_types=types)

    def place(path, shape):
        if path.endswith("/kernel") and len(shape) == 3:
            contracted = "data" if "down_proj" not in path else None  # 96 is no block each
            return NamedSharding(mesh, PartitionSpec(None, contracted, "model"))
        if path == "lm_head/kernel":
            return NamedSharding(mesh, PartitionSpec("data", None))
        return None if path == "norm/scale" else NamedSharding(mesh, PartitionSpec())

    _, params = models.load(folder, quantize=fmt, sharding=place)
    assert_equal_trees(params, models.load(folder, quantize=fmt)[1])
    both = {"layers": fmt, "embeddings": fmt}
    packed = models.load(folder, quantize=both, sharding=place)[1]
    assert_equal_trees(packed, models.load(folder, quantize=both)[1])
    if fmt is not None and fmt != "nf4":  # whose 64 columns are one block
        codes = packed["lm_head"]["kernel"].codes
        assert codes.addressable_shards[0].data.shape == (97, 32)
    leaves = jlora.lora.leaves_by_path(params)
    assert len(leaves["norm/scale"].devices()) == 1
    assert leaves["lm_head/kernel"].addressable_shards[0].data.shape == (32, 97)
    gate = leaves["layers/mlp/gate_proj/kernel"]
    for array in jax.tree.leaves(gate):
        assert array.sharding.mesh == mesh
    if fmt is None:
        assert gate.addressable_shards[0].data.shape == (3, 32, 48)
    else:
        columns = 32  # in NF4 these are all 64, whose one block is not cut
        assert gate.codes.addressable_shards[0].data.shape == (3, 48, columns)


def test_a_format_that_is_not_there_is_refused_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(hf._Tensor, "read", lambda self: pytest.fail("read a weight"))
    for function in (models.load, models.shapes):
        with pytest.raises(ValueError, match=r"one of \['float8', 'int8', 'nf4'\].*'fp4'"):
            function(folder, quantize="fp4")
        with pytest.raises(ValueError, match=r"one of \['float8', 'int8', 'nf4'\].*'fp4'"):
            function(folder, quantize={"embeddings": "fp4"})
        with pytest.raises(ValueError, match=r"\['layers', 'embeddings'\], got \['head'\]"):
            function(folder, quantize={"head": "int8"})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_no_scale_can_store_is_refused_by_name_and_layer(tmp_path, value):
    params = tiny.random_params(CONFIG)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    params["layers"]["mlp"]["up_proj"]["kernel"] = kernel.at[1, 2, 3].set(value)
    hf.save(tmp_path / "model", CONFIG, params, tiny.tokenizer_files())
    with pytest.raises(ValueError, match=r"'layers/mlp/up_proj/kernel', layer 1, holds NaN or inf"):
        models.load(tmp_path / "model", quantize="nf4")
    models.load(tmp_path / "model")
    params["layers"]["mlp"]["up_proj"]["kernel"] = kernel
    params["embed_tokens"]["embedding"] = params["embed_tokens"]["embedding"].at[3, 3].set(value)
    hf.save(tmp_path / "model", CONFIG, params, tiny.tokenizer_files())
    with pytest.raises(ValueError, match="'embed_tokens/embedding' holds NaN or inf"):
        models.load(tmp_path / "model", quantize={"embeddings": "int8"})


def test_a_quantised_model_is_saved_only_after_merging(folder, tmp_path):
    model, params = models.load(folder, quantize="nf4")
    with pytest.raises(ValueError, match=r"q_proj/kernel is .* NF4Array.*jlora\.merge_params"):
        models.save(tmp_path / "out", model, params)
    models.save(tmp_path / "out", model, jlora.merge_params(params))
    assert_equal_trees(models.load(tmp_path / "out")[1], jlora.dequantize(params))


def test_nothing_of_earlier_tensors_is_left_on_the_device(folder, monkeypatch):
    """When a tensor is read, only what is loaded so far lives: no dense weight of before."""
    seen = []
    read = hf._Tensor.read

    def spy(self):
        seen.append(sum(x.nbytes for x in jax.live_arrays()) - before)
        return read(self)

    monkeypatch.setattr(hf._Tensor, "read", spy)
    before = sum(x.nbytes for x in jax.live_arrays())
    _, params = models.load(folder, quantize="nf4")
    packed = sum(x.nbytes for x in jax.tree.leaves(params))
    assert len(seen) > 3 * CONFIG.num_layers
    assert max(seen) <= packed


_MEASURE = (
    tiny.MEASURE_PEAK
    + """
import sys
import jax
from jlora import models

folder, fmt = sys.argv[1:]

def load():
    return jax.block_until_ready(models.load(folder, quantize=fmt)[1])

load()  # what the compiler takes is its own; the arrays are freed
params, peak = peak_of(load)
print(peak, sum(x.nbytes for x in jax.tree.leaves(params)))
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_loading_takes_the_packed_size_and_one_tensor(tmp_path, fmt):
    """On CPU, host and device memory are one: both together are bounded."""
    dense = tiny.write_large_model(tmp_path / "model", layers=16)
    env = os.environ | tiny.FREE_AT_ONCE
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "model"), fmt]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    peak, packed = map(int, done.stdout.split())
    assert peak < packed + 2 * tiny.LARGEST_TENSOR + 16e6
    assert packed + 2 * tiny.LARGEST_TENSOR + 16e6 < 0.8 * dense  # so that the bound says something


def test_what_is_loaded_in_a_format_is_said_in_one_place(folder):
    _, params = models.load(folder, quantize="nf4")
    for path, leaf in jlora.lora.leaves_by_path(params).items():
        assert isinstance(leaf, quant.QuantArray) == (weights.format_at(path, "nf4") is not None)
