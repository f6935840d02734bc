"""`jlora bench` on a shape of a second: what it reports, and that its count of flops is right."""

import json

import jax
import jax.numpy as jnp
import pytest

from jlora import bench, cli, hardware
from jlora.models.decoder import Decoder

SMALL = ("--shape", "tiny", "--batch", "2", "--length", "32", "--rank", "4", "--steps", "1")


def run(capsys, *arguments):
    """The exit code, stdout and stderr of a command."""
    code = cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_a_measurement_is_a_table_and_one_line_of_json(capsys, tmp_path, base):
    file = tmp_path / "bench.jsonl"
    options = ("--base", base, "--repetitions", "2", "--json", str(file))
    code, out, _ = run(capsys, *SMALL, *options)
    assert code == 0
    *shown, line = out.splitlines()
    assert any("tokens/s" in text for text in shown)
    result = json.loads(line)
    assert json.loads(file.read_text()) == result
    assert len(result["tokens_per_second"]) == 2
    assert result["utilisation"] is None  # of a CPU nobody gives a peak
    assert result["frozen_bytes"] == result["frozen_parameters"] * (4 if base == "float32" else 2)
    assert result["temp_bytes"] > 0
    assert abs(result["first_loss"] - 5.545) < 0.1  # log(256): random weights know nothing


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "9b"], ["'9b'", "8b", "config.json"]),
        (["--base", "int3"], ["'int3'", "nf4"]),
        (["--remat", "some"], ["'some'", "full"]),
        (["--batch", "0"], ["batch", "0"]),
        (["--segments", "3"], ["segments 3"]),
        (["--unroll", "0"], ["unroll", "0"]),
        ([*SMALL, "--targets", "q_porj"], ["q_porj", "q_proj"]),
    ],
)
def test_a_mistake_ends_with_one_message_and_code_2(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert not out
    assert "Traceback" not in err
    assert all(word in err for word in words)


@pytest.mark.parametrize(("base", "bits"), [("nf4", 4.127), ("int8", 8), ("float8", 8)])
def test_a_quantised_base_is_made_of_plausible_numbers(base, bits):
    model = Decoder(bench.decoder_config(bench.Settings(shape="tiny", base=base)))
    params = bench.random_params(model, base)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    dense = kernel.materialise().astype(jnp.float32)
    assert dense.shape == (2, 64, 128)
    assert 0.01 < dense.std() < 0.06  # 0.02 for a dense base
    assert abs(8 * sum(x.nbytes for x in jax.tree.leaves(kernel)) / dense.size - bits) < 0.6
    assert params["lm_head"]["kernel"].dtype == jnp.bfloat16
    packed = bench.random_params(model, base, "int8")
    for table in (packed["lm_head"]["kernel"], packed["embed_tokens"]["embedding"]):
        assert 0.01 < table.materialise().astype(jnp.float32).std() < 0.06
        assert sum(x.nbytes for x in jax.tree.leaves(table)) == 256 * 64 + 256 * 4


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "int8", "float8"])
@pytest.mark.parametrize(("remat", "unroll"), [("none", 1), ("full", 2)])
@pytest.mark.filterwarnings("error")  # such as that a dense weight is built
def test_a_quantised_base_is_measured(base, remat, unroll):
    settings = bench.Settings(
        shape="tiny", base=base, remat=remat, unroll=unroll, batch=1, length=16, rank=4, steps=1,
        repetitions=1, embeddings="int8" if unroll > 1 else None,
    )  # fmt: skip
    assert abs(bench.measure(settings)["last_loss"] - 5.545) < 0.2


def test_flops_are_those_counted_by_hand():
    config = bench.decoder_config(bench.Settings(shape="tiny"))
    settings = bench.Settings(
        shape="tiny", batch=3, length=8, segments=2, rank=2, targets=("q_proj",), accumulation=2
    )
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k and v, o, the three of the MLP
    tokens = 2 * 3 * 8
    pairs = 2 * 3 * 2 * (1 + 2 + 3 + 4)
    expected = 4 * (2 * layer + 64 * 256) * tokens  # two layers and the head
    expected += 6 * 2 * (64 * 2 + 2 * 64) * tokens
    expected += 12 * 2 * 64 * pairs
    assert bench.model_flops(config, settings) == expected


def test_a_device_is_found_by_the_beginning_of_its_name():
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert hardware.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert hardware.peak_flops("NVIDIA L40S") == 362e12
    assert hardware.peak_flops("TPU v5 lite") == 197e12
    assert hardware.peak_flops("TPU v5p") == 459e12
    assert hardware.peak_flops("cpu") is None


@pytest.mark.parametrize("segments", [1, 2])
def test_flops_are_near_those_that_xla_counts(segments):
    """XLA counts elementwise work and masked scores too, up to a quarter more at this size; it
    leaves out the gradient of the first layer's input, which nothing needs."""
    settings = bench.Settings(
        shape="tiny", base="float32", length=64, segments=segments, rank=8, head_chunk=1024,
        unroll=2, steps=1, repetitions=1,
    )  # fmt: skip
    result = bench.measure(settings)
    assert 0.95 < result["xla_flops"] / result["model_flops"] < 1.25


def test_running_out_of_memory_says_what_to_change(capsys, monkeypatch):
    def prepare(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(bench, "_prepare", prepare)
    code, _, err = run(capsys, *SMALL)
    assert code == 2
    assert "--remat full" in err
    assert "--base nf4" in err
