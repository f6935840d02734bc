"""`jlora bench` on a shape of a second: what it reports, and that its count of flops is right."""

import json

import pytest

from jlora import bench, cli

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
        ([*SMALL, "--targets", "q_porj"], ["q_porj", "q_proj"]),
    ],
)
def test_a_mistake_ends_with_one_message_and_code_2(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert not out
    assert "Traceback" not in err
    assert all(word in err for word in words)


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
    assert bench.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert bench.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert bench.peak_flops("NVIDIA L40S") == 362e12
    assert bench.peak_flops("TPU v5 lite") == 197e12
    assert bench.peak_flops("TPU v5p") == 459e12
    assert bench.peak_flops("cpu") is None
