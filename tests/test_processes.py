"""Runs of two real processes with four devices each: killed, stopped, and resumed."""

import json
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
import tiny
from compiling import xla_flags
from test_mesh import TOLERANCE, losses_of, write_config

from jlora import cli, process, report

ROOT = pathlib.Path(__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(folder, arguments, count, each=((), ())):
    """Starts the processes of a run, with eight devices among them, and arguments for each."""
    port = free_port()
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(8 // count),
    }
    found = []
    for index in range(count):
        flags = ["--coordinator", f"localhost:{port}", "--processes", count, "--process", index]
        command = [sys.executable, "-m", "jlora.cli", "train", *arguments, *(flags * (count > 1))]
        command += each[index]
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
        assert all(one.poll() is None for one in processes)
        time.sleep(0.001)


def said(folder, index):
    return (folder / f"said{index}").read_text()


@pytest.mark.slow
def test_a_run_of_two_processes_survives_kills_and_stops_with_the_same_losses(tmp_path):
    made, overrides = write_config(tmp_path)
    overrides += ["model.quantize=nf4", "model.remat=full"]
    wanted = losses_of(made, [*overrides, "name=one"])
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

        again = [*arguments, "mesh={data: 2, fsdp: 2, tensor: 2}"]
        processes = start(tmp_path, again, 2)
        until(lambda: "Resuming" in said(tmp_path, 0), processes)
        for one in processes:
            one.send_signal(signal.SIGTERM)  # before the first step, which compiles
        assert [one.wait(timeout=60) for one in processes] == [0, 0], said(tmp_path, 0)
        assert f"Interrupted; saved at step {newest()} of 20" in said(tmp_path, 0)
        whole = newest()

        processes = start(tmp_path, again, 2)
        until(lambda: newest() >= whole + 2, processes)
        for one in processes:
            one.send_signal(signal.SIGTERM)
        assert [one.wait(timeout=60) for one in processes] == [0, 0], said(tmp_path, 0)
        assert f"Resuming at step {whole} of 20" in said(tmp_path, 0)
        assert f"Interrupted; saved at step {newest()} of 20" in said(tmp_path, 0)
        assert "Resuming" not in said(tmp_path, 1)

        stopped = newest()
        last = [*arguments, "mesh={data: 8, fsdp: 1}", f"train.profile={stopped}"]
        processes = start(tmp_path, last, 1)
        assert processes[0].wait(timeout=200) == 0, said(tmp_path, 0)
        assert f"Resuming at step {stopped} of 20" in said(tmp_path, 0)
    finally:
        for one in processes:
            one.kill()
            one.wait()
    lines = list(report.read_metrics(tmp_path / "runs" / "two" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 21))
    np.testing.assert_allclose([line["loss"] for line in lines], wanted, rtol=TOLERANCE)
    folder = tmp_path / "runs" / "two"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert list((folder / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_device(tmp_path):
    made, overrides = write_config(tmp_path)
    wanted = losses_of(made, [*overrides, "name=one"])
    processes = start(tmp_path, [made, *overrides, "name=two", "mesh={fsdp: -1, tensor: 2}"], 2)
    assert [one.wait(timeout=200) for one in processes] == [0, 0], said(tmp_path, 0)
    lines = report.read_metrics(tmp_path / "runs" / "two" / "metrics.jsonl")
    np.testing.assert_allclose([line["loss"] for line in lines], wanted, rtol=TOLERANCE)


def test_processes_with_other_configs_refuse_each_other(tmp_path):
    made, overrides = write_config(tmp_path)
    first, second = ["train.steps=20"], ["train.steps=10"]
    processes = start(tmp_path, [made, *overrides], 2, each=[first, second])
    assert [one.wait(timeout=60) for one in processes] == [2, 2], said(tmp_path, 0)
    for index in range(2):
        assert "The configs differ between the processes of this run" in said(tmp_path, index)
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()


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


def test_a_backend_that_is_not_here_is_one_message(tmp_path):
    command = [sys.executable, "-m", "jlora.cli", "train", tiny.write_config(tmp_path)]
    env = os.environ | {"JAX_PLATFORMS": "rocm", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert "Unable to initialize backend 'rocm'" in done.stderr
    assert "Set JAX_PLATFORMS" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_stands_still_is_reported_once_with_its_place():
    heard = []
    with process.Watchdog(heard.append, patience=0.2) as watchdog:
        for step in range(5):  # goes on: nothing to report
            watchdog(step)
            time.sleep(0.05)
        assert not heard
        wait_for_the_disk(1.0)
    (told,) = heard
    assert "after step 4" in told
    assert "wait_for_the_disk" in told


def wait_for_the_disk(seconds):
    time.sleep(seconds)


def test_no_cluster_is_said(tmp_path):
    from tiny import write_config

    command = [sys.executable, "-m", "jlora.cli", "train", write_config(tmp_path), "--distributed"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 2
    assert "--distributed found no cluster here" in done.stderr


_MEASURE = (
    tiny.MEASURE_PEAK
    + """
import json, sys
import jax
from jax.experimental import multihost_utils
from jlora import models, sharding

index, port, folder, fmt = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
jax.distributed.initialize(f"localhost:{port}", 2, index)
mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2}, jax.devices())
place = sharding.placement(mesh, sharding.DECODER_RULES)

def load():
    return jax.block_until_ready(models.load(folder, quantize=fmt, sharding=place)[1])

load()  # what the compiler takes is its own; the arrays are freed
multihost_utils.sync_global_devices("loaded")
before = number("/proc/self/io", "rchar")
params, peak = peak_of(load)
read = number("/proc/self/io", "rchar") - before
held = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
print(json.dumps(["measured", read, peak, held]))
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("fmt", [None, "nf4"])
def test_each_process_reads_and_holds_its_part_of_the_weights(tmp_path, fmt):
    """On CPU, host and device memory are one: both together are bounded."""
    size = tiny.write_large_model(tmp_path / "model", layers=8)
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(4),
        **tiny.FREE_AT_ONCE,
    }
    port, arguments = free_port(), [str(tmp_path / "model"), json.dumps(fmt)]
    commands = [[sys.executable, "-c", _MEASURE, str(i), str(port), *arguments] for i in range(2)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=env) for c in commands]
    for one in processes:
        output, _ = one.communicate(timeout=300)
        assert one.returncode == 0
        line = next(line for line in output.splitlines() if line.startswith('["measured"'))
        _, read, peak, held = json.loads(line)
        assert size / 2 < read < 1.1 * size / 2 + tiny.LARGEST_TENSOR
        assert peak < 1.1 * held + tiny.LARGEST_TENSOR
        assert held < size * (0.51 if fmt is None else 0.25)
