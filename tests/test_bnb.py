"""Folders that bitsandbytes quantised to NF4: bit for bit what it holds, or refused by name."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora import models
from jlora.models import hf
from jlora.quant import NF4Array

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,  # the second level of 128 * 3 scales has a part of a group
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def write(folder, *, dtype="float32", double=True, storage="uint8", kind="nf4", skip=None, **shape):
    """Quantises a random model with bitsandbytes; returns it, and the folder that was written."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **shape}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    dtype = getattr(torch, dtype)
    model.to(dtype).save_pretrained(folder / "dense")
    quantised = transformers.LlamaForCausalLM.from_pretrained(
        folder / "dense",
        dtype=dtype,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=getattr(torch, storage),
            llm_int8_skip_modules=skip,
        ),
    )
    quantised.save_pretrained(folder / "packed")
    return quantised, folder / "packed"


def packed_leaves(params):
    leaves = jlora.lora.leaves_by_path(params)
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, NF4Array)}


@pytest.mark.parametrize(
    ("dtype", "double", "storage"),
    [
        ("float32", True, "uint8"),
        ("float32", False, "uint8"),
        ("bfloat16", True, "uint8"),
        ("bfloat16", True, "bfloat16"),
        ("float16", False, "float32"),
    ],
)
def test_leaves_hold_the_bits_of_bitsandbytes(tmp_path, dtype, double, storage):
    model, folder = write(tmp_path, dtype=dtype, double=double, storage=storage)
    _, params = models.load(folder)
    leaves = packed_leaves(params)
    assert len(leaves) == 7
    for path, leaf in leaves.items():
        assert leaf.dtype == jnp.dtype(dtype)
        module = path.removeprefix("layers/").removesuffix("/kernel").replace("/", ".")
        for layer in range(SHAPE["num_hidden_layers"]):
            weight = model.get_submodule(f"model.layers.{layer}.{module}").weight
            state = weight.quant_state
            codes = weight.data.reshape(-1).view(torch.uint8).numpy()
            np.testing.assert_array_equal(leaf.codes[layer].reshape(-1), codes)
            np.testing.assert_array_equal(leaf.absmax[layer].reshape(-1), state.absmax.numpy())
            if double:
                np.testing.assert_array_equal(leaf.absmax_scale[layer], state.state2.absmax.numpy())
                assert leaf.absmax_offset[layer] == state.offset.item()
            expected = bitsandbytes.functional.dequantize_4bit(weight.data, state)
            np.testing.assert_array_equal(
                jlora.dequantize(leaf)[layer].T.astype("float32"), expected.float().numpy()
            )
    # Loading the dense weights in this format gives the same.
    if double and dtype == "bfloat16":
        again = models.load(tmp_path / "dense", quantize="nf4")[1]
        for path, leaf in packed_leaves(again).items():
            np.testing.assert_array_equal(leaf.codes, leaves[path].codes)


def test_logits_are_those_of_the_dequantised_model(tmp_path):
    quantised, folder = write(tmp_path)
    model, params = models.load(folder)
    tokens = np.random.default_rng(1).integers(0, 97, (2, 20))
    logits = jlora.adapt(lambda p, t: model.apply({"params": p}, t))(params, jnp.asarray(tokens))
    dense = model.apply({"params": jlora.dequantize(params)}, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, dense, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        expected = quantised.dequantize(torch.float32)(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_packed_folder_is_looked_at_and_loaded_in_another_dtype(tmp_path):
    _, folder = write(tmp_path, dtype="bfloat16")
    for dtype in (None, "float32"):
        for quantize in (None, "nf4"):
            model, shapes = models.shapes(folder, dtype=dtype, quantize=quantize)
            loaded, params = models.load(folder, dtype=dtype, quantize=quantize)
            assert model == loaded
            assert jax.tree.structure(shapes) == jax.tree.structure(params)
            for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(params), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert {leaf.dtype for leaf in packed_leaves(params).values()} == {jnp.dtype("float32")}


def test_blocks_that_run_from_row_to_row_are_dequantised_exactly(tmp_path, caplog):
    model, folder = write(tmp_path, intermediate_size=160)
    with caplog.at_level(logging.WARNING, "jlora"):
        _, params = models.load(folder)
    assert "layers/mlp/down_proj/kernel is kept dense" in caplog.text
    assert len(packed_leaves(params)) == 6
    kernel = params["layers"]["mlp"]["down_proj"]["kernel"]
    for layer in range(2):
        weight = model.model.layers[layer].mlp.down_proj.weight
        state = weight.quant_state
        # As one long row, which its CPU kernel decodes right.
        state.shape = torch.Size((1, 128 * 160))
        expected = bitsandbytes.functional.dequantize_4bit(weight.data, state).numpy()
        np.testing.assert_array_equal(kernel[layer].T.reshape(1, -1), expected)


def test_a_stack_of_which_one_layer_was_left_out_is_dense(tmp_path, caplog):
    skip = ["model.layers.0.mlp.up_proj", "lm_head"]
    model, folder = write(tmp_path, skip=skip)
    _, params = models.load(folder)
    assert "layers/mlp/up_proj/kernel is kept dense" in caplog.text
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    plain, weight = (model.model.layers[i].mlp.up_proj.weight for i in range(2))
    np.testing.assert_array_equal(kernel[0].T, plain.detach().numpy())
    expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    np.testing.assert_array_equal(kernel[1].T, expected.numpy())


def test_it_trains_as_a_base(tmp_path):
    _, folder = write(tmp_path)
    model, params = models.load(folder)
    config = jlora.LoraConfig(rank=2, targets=("q_proj",))
    tokens = jnp.zeros((1, 4), jnp.int32)

    def apply(params, tokens):
        return model.apply({"params": params}, tokens)

    params = jlora.init(jax.random.key(0), params, config, fn=apply, args=(tokens,))
    trainable, frozen = jlora.split(params, config)
    grads = jax.grad(lambda t: jlora.adapt(apply)(jlora.combine(t, frozen), tokens).sum())(
        trainable
    )
    assert np.abs(grads["layers"]["self_attn"]["q_proj"]["kernel"].b).max() > 0


# What is not read


def edit_config(folder, **changes):
    file = folder / "config.json"
    data = json.loads(file.read_text())
    data["quantization_config"] |= changes
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, r"8 bits \(LLM\.int8\)"),
        ({"bnb_4bit_quant_type": "fp4"}, "fp4 in 4 bits"),
        ({"quant_method": "gptq"}, "quant_method='gptq'"),
    ],
)
def test_other_formats_are_refused_and_what_is_read_is_named(tmp_path, changes, message):
    _, folder = write(tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(NotImplementedError, match=message) as error:
        models.load(folder)
    assert "load_in_4bit and bnb_4bit_quant_type='nf4'" in str(error.value)


def test_fp4_weights_are_refused_whatever_the_config_says(tmp_path):
    _, folder = write(tmp_path, kind="fp4")
    edit_config(folder, bnb_4bit_quant_type="nf4")
    with pytest.raises(NotImplementedError, match="quantised to 'fp4'; only nf4"):
        models.load(folder)


def test_packed_weights_are_not_quantised_to_something_else(tmp_path):
    _, folder = write(tmp_path)
    with pytest.raises(ValueError, match=r"in nf4 already.*'int8'"):
        models.load(folder, quantize="int8")


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


NAME = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "no scales": (lambda t: t.pop(f"{NAME}.absmax"), f"lacks {NAME}.absmax"),
    "no weight": (lambda t: t.pop(NAME), f"lacks {NAME}"),
    "other map": (lambda t: t[f"{NAME}.quant_map"].__setitem__(3, 0.5), "bitsandbytes' own maps"),
    "few codes": (lambda t: t.update({NAME: t[NAME][:-1]}), "sizes"),
    "few scales": (lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"][:-1]}), "sizes"),
    "no text": (
        lambda t: t.update({f"{NAME}.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)}),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_are_named(tmp_path, damage):
    change, message = DAMAGES[damage]
    _, folder = write(tmp_path)
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as error:
        hf.load(folder)
    assert NAME in str(error.value)
    assert "model.safetensors" in str(error.value)


def test_a_packed_folder_that_lacks_a_layer_says_which(tmp_path):
    _, folder = write(tmp_path)
    edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith(NAME)])
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        hf.load(folder)
