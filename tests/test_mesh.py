"""Whole runs on meshes of eight devices: the losses, and what lies where."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from jlora import config, models, report, run
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


def train(made, overrides):
    """The loss of each step of a run."""
    loaded = config.load(made, overrides)
    run.run_training(loaded, lambda text: None, jax.devices())
    lines = list(report.read_metrics(loaded.folder / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 21))
    return [line["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["null", "nf4"])
def test_twenty_steps_have_the_losses_of_one_device(tmp_path, quantize):
    made, overrides = write_config(tmp_path)
    overrides.append(f"model.quantize={quantize}")
    wanted = train(made, [*overrides, "name=one"])
    assert wanted[-1] < wanted[0] - 0.5
    for sizes in MESHES:
        data, fsdp, tensor = sizes
        mesh = f"mesh={{data: {data}, fsdp: {fsdp}, tensor: {tensor}}}"
        got = train(made, [*overrides, mesh, f"name=m{data}{fsdp}{tensor}"])
        np.testing.assert_allclose(got, wanted, rtol=TOLERANCE, err_msg=str(sizes))
