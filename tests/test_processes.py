"""Runs of two real processes with four devices each: killed, stopped, and resumed."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_mesh import TOLERANCE, train, write_config

from jlora import cli, report

ROOT = pathlib.Path(__file__).parents[1]


def start(folder, arguments, count):
    """Starts the processes of a run, with eight devices among them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}",
    }
    found = []
    for index in range(count):
        flags = ["--coordinator", f"localhost:{port}", "--processes", count, "--process", index]
        command = [sys.executable, "-m", "jlora.cli", "train", *arguments, *(flags * (count > 1))]
        with open(folder / f"said{index}", "w") as said:
            found.append(
                subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, env=env)
            )
    return found


def until(condition, processes):
    """Waits for a condition while all processes run."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
        time.sleep(0.001)


def said(folder, index):
    return (folder / f"said{index}").read_text()


@pytest.mark.slow
def test_a_run_of_two_processes_survives_kills_and_stops_with_the_same_losses(tmp_path):
    made, overrides = write_config(tmp_path)
    overrides.append("model.quantize=nf4")
    wanted = train(made, [*overrides, "name=one"])
    arguments = [made, *overrides, "name=two", "checkpoint.every=1", "checkpoint.keep=3"]
    saved = tmp_path / "runs" / "two" / "checkpoints"

    def newest():
        return max(
            (int(path.name) for path in saved.glob("[0-9]*") if path.name.isdigit()), default=0
        )

    processes = start(tmp_path, [*arguments, "mesh={fsdp: 4, tensor: 2}"], 2)
    try:
        until(lambda: newest() >= 3 and list(saved.glob("*.orbax-checkpoint-tmp*")), processes)
        processes[1].kill()  # in the middle of a checkpoint
        assert processes[0].wait(timeout=60) == 2, said(tmp_path, 0)
        assert "another process of this run is gone" in said(tmp_path, 0)
        whole = newest()
        assert 3 <= whole < 15

        processes = start(tmp_path, [*arguments, "mesh={data: 2, fsdp: 2, tensor: 2}"], 2)
        until(lambda: newest() >= whole + 2, processes)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(timeout=60) for process in processes] == [0, 0], said(tmp_path, 0)
        assert f"Resuming at step {whole} of 20" in said(tmp_path, 0)
        assert f"Interrupted; saved at step {newest()} of 20" in said(tmp_path, 0)
        assert "Resuming" not in said(tmp_path, 1)

        stopped = newest()
        processes = start(tmp_path, [*arguments, "mesh={data: 8, fsdp: 1}"], 1)
        assert processes[0].wait(timeout=200) == 0, said(tmp_path, 0)
        assert f"Resuming at step {stopped} of 20" in said(tmp_path, 0)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    lines = list(report.read_metrics(tmp_path / "runs" / "two" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 21))
    np.testing.assert_allclose([line["loss"] for line in lines], wanted, rtol=TOLERANCE)
    assert (tmp_path / "runs" / "two" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--processes", "2"],
            "--coordinator HOST:PORT, --processes N and --process I go together",
        ),
        (["--coordinator", "here", "--processes", "2", "--process", "0"], "takes HOST:PORT"),
        (
            ["mesh.data=3"],
            "mesh (data: 3, fsdp: -1, tensor: 1) does not fit 8 devices. Sizes that do",
        ),
        (["mesh.fsdp=8"], "train.batch_size is 2, and 8 devices share the rows"),
    ],
)
def test_what_cannot_be_is_refused_before_any_compute(tmp_path, capsys, arguments, message):
    from tiny import write_config

    assert cli.main(["train", str(write_config(tmp_path)), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert len(jax.devices()) == 8


def test_no_cluster_is_said(tmp_path):
    from tiny import write_config

    command = [sys.executable, "-m", "jlora.cli", "train", write_config(tmp_path), "--distributed"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 2
    assert "--distributed found no cluster here" in done.stderr
