"""Whole runs on meshes of eight devices: the losses, and what lies where."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import tiny

import jlora
from jlora import base, config, models, objective, report, run, sharding, train
from jlora.models import decoder

MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]
# In float32 sums of another order change a loss of about 5 in its last places, and 20 steps of Adam
# carry that on.
TOLERANCE = 5e-5


def write_config(folder, **sections):
    """A run of 20 steps on a model whose weights four devices can share in blocks of 64."""
    made = tiny.write_config(folder)
    shape = dataclasses.replace(
        models.shapes(folder / "model")[0].config, hidden_size=256, intermediate_size=256,
        num_heads=8, num_kv_heads=2, head_dim=32,
    )  # fmt: skip
    keys = iter(jax.random.split(jax.random.key(7), 64))
    params = jax.tree.map(
        lambda leaf: 0.1 * jax.random.normal(next(keys), leaf.shape), decoder.param_shapes(shape)
    )
    # Rows with one to nine targets: a mean of the devices' means would be another loss.
    rows = [
        {"messages": [{"role": "user", "content": str(n)},
                      {"role": "assistant", "content": "aaaaaaaaa"[: 1 + n % 9]}]}
        for n in range(24)
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models.save(
        folder / "model", decoder.Decoder(shape), params, tokenizer_files=tiny.tokenizer_files()
    )
    overrides = [
        "train.steps=20", "train.batch_size=8", "data.pack=false", "eval.every=null",
        "data.validation=null", "data.length=32",
        "lora.targets=[q_proj, v_proj, o_proj, down_proj]",
        "eval.samples=0", "checkpoint.every=50",
        *(f"{key}={value}" for key, value in sections.items()),
    ]  # fmt: skip
    return made, overrides


def losses_of(made, overrides, steps=20):
    """The loss of each step of a run."""
    loaded = config.load(made, overrides)
    run.run_training(loaded, lambda text: None, jax.devices())
    lines = list(report.read_metrics(loaded.folder / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("variant", ["lora", "dora", "vera"])
def test_adapters_made_on_a_mesh_are_those_of_one_device(variant, tmp_path):
    write_config(tmp_path)
    lora = jlora.LoraConfig(rank=4, targets=("q_proj", "down_proj"), variant=variant)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2}, jax.devices())
    one, spread = (
        base.adapt_base(base.load_base(str(tmp_path / "model"), mesh=on), lora, jax.random.key(1))
        for on in (None, mesh)
    )
    assert jax.tree.structure(spread.params) == jax.tree.structure(one.params)
    for got, wanted in zip(jax.tree.leaves(spread.params), jax.tree.leaves(one.params)):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
        assert got.sharding.mesh == mesh


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "remat"), [("null", "none"), ("nf4", "full")])
def test_twenty_steps_have_the_losses_of_one_device(tmp_path, quantize, remat):
    made, overrides = write_config(tmp_path)
    overrides += [f"model.quantize={quantize}", f"model.remat={remat}"]
    wanted = losses_of(made, [*overrides, "name=one"])
    assert wanted[-1] < wanted[0] - 0.5
    for sizes in MESHES:
        data, fsdp, tensor = sizes
        mesh = f"mesh={{data: {data}, fsdp: {fsdp}, tensor: {tensor}}}"
        got = losses_of(made, [*overrides, mesh, f"name=m{data}{fsdp}{tensor}"])
        np.testing.assert_allclose(got, wanted, rtol=TOLERANCE, err_msg=str(sizes))


@pytest.mark.parametrize(
    ("variant", "quantize", "tensor"),
    [("dora", "null", 2), ("dora", "nf4", 4), ("vera", "nf4", 2), ("lora", "embeddings", 2)],
)
def test_variants_have_the_losses_of_one_device(tmp_path, variant, quantize, tensor):
    made, overrides = write_config(tmp_path)
    key = {"embeddings": "model.quantize_embeddings=int8"}.get(
        quantize, f"model.quantize={quantize}"
    )
    overrides += [key, f"lora.variant={variant}", "train.steps=3"]
    wanted = losses_of(made, [*overrides, "name=one"], steps=3)
    mesh = f"mesh={{fsdp: -1, tensor: {tensor}}}"
    got = losses_of(made, [*overrides, mesh, "name=mesh"], steps=3)
    np.testing.assert_allclose(got, wanted, rtol=TOLERANCE)


def compiled_step(quantize, mesh):
    """The HLO of a training step on a decoder whose kernels have shapes of their own."""
    shape = decoder.DecoderConfig(
        vocab_size=96, hidden_size=128, intermediate_size=192, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=32, tie_embeddings=False, remat="full", dtype="float32",
    )  # fmt: skip
    model = decoder.Decoder(shape, sharding.Activations(mesh))
    lora = jlora.LoraConfig(rank=4, targets="layers/*_proj/kernel")

    def make(params, key):
        seen = {"fn": lambda p, t: model.apply({"params": p}, t), "args": (np.zeros((1, 8), int),)}
        if quantize:
            params = jlora.quantize(params, quantize, targets=lora.targets, **seen)
        return jlora.init(key, params, lora, **seen)

    def put(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    params = jax.eval_shape(make, decoder.param_shapes(shape), jax.random.key(0))
    where = sharding.shardings(params, mesh, sharding.DECODER_RULES)
    trainable, frozen = jlora.split(jax.tree.map(put, params, where), lora)
    tx = jlora.optimizer(train.adamw(lambda step: 1e-3), lora)
    state = jax.eval_shape(lambda t: train.init_state(t, tx), trainable)
    places = jax.tree.map(lambda x: x.sharding, trainable)
    state = jax.tree.map(put, state, train.state_shardings(state, places, tx, mesh))
    rows = sharding.batch_sharding(mesh, leading=1)
    batch = {
        name: jax.ShapeDtypeStruct((2, 8, 16), kind, sharding=rows)
        for name, kind in (("tokens", int), ("targets", int), ("loss_mask", np.float32))
    }
    loss_fn = objective.make_loss(model, params, lora)
    step = train.make_train_step(loss_fn, tx, clip_norm=1.0)
    return step.lower(state, frozen, batch, jax.random.key(0)).compile().as_text()


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_weights_are_gathered_as_they_are_stored_and_only_factors_are_summed(quantize):
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2}, jax.devices())
    text = compiled_step(quantize, mesh)
    kernels = {(128, 128), (128, 64), (128, 192), (192, 128)}

    def shapes(kind):
        for line in re.findall(rf"= (.*?) {kind}\(", text):
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]+)\]", line):
                sizes = tuple(int(n) for n in sizes.split(",") if int(n) > 1)
                yield dtype, sizes

    gathered = set(shapes("all-gather"))
    whole = {sizes for dtype, sizes in gathered if dtype == "f32"} & kernels
    packed = {(128, 64), (64, 64), (192, 64), (128, 96)}
    if quantize:
        assert not whole
        assert {sizes for dtype, sizes in gathered if dtype == "u8"} >= packed
    else:
        assert whole == kernels
    summed = {sizes for kind in ("all-reduce", "reduce-scatter") for _, sizes in shapes(kind)}
    factors = {(d, 4) for d in (64, 128, 192)} | {(4, d) for d in (64, 128, 192)}
    assert summed & factors
    assert not any(set(sizes) <= {64, 96, 128, 192} and len(sizes) == 2 for sizes in summed), summed
