"""The devices and processes of a run: the mesh, and what goes to it.

With several processes each holds a part of every array. All of them run the same program on the
same batches, in step; the first of them writes files and speaks.
"""

import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jlora import sharding
from jlora.multihost import all_agree

__all__ = [
    "Profile",
    "check_connected",
    "check_rows",
    "check_shared",
    "from_first",
    "is_first",
    "leave",
    "make_mesh",
    "put_rows",
    "row_parts",
    "same_everywhere",
    "start",
    "stop_together",
]


# Processes


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    automatic: bool = False,
) -> None:
    """Connects the processes of a run; to be called before anything asks JAX for a device.

    Args:
      coordinator: host and port that the first process listens on.
      processes: how many there are.
      process: the number of this one, from 0.
      automatic: ask the cluster for all of that: a TPU pod, SLURM, Open MPI or Kubernetes.

    Raises:
      ValueError: if only some of the three are given, or no cluster is found.
      RuntimeError: if the others do not come within five minutes.
    """
    given = (coordinator, processes, process)
    if not automatic and given == (None, None, None):
        return
    if not automatic and None in given:
        raise ValueError("--coordinator HOST:PORT, --processes N and --process I go together.")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator takes HOST:PORT, got {coordinator!r}.")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as error:
        if automatic:
            raise ValueError(
                f"--distributed found no cluster here ({error}) It knows TPU pods, SLURM (inside "
                "srun), Open MPI and Kubernetes; elsewhere give --coordinator, --processes and "
                "--process to each process."
            ) from None
        raise
    if not is_first():  # all would say the same
        logging.getLogger("jlora").setLevel(logging.ERROR)


def leave(code: int, *, patience: float = 10.0) -> None:
    """Ends this process, if it is one of several, though the others may not come to the end.

    Args:
      code: to exit with.
      patience: seconds to wait for them; JAX itself would wait for minutes and then abort.
    """
    if not jax.distributed.is_initialized():
        return
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(patience)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this process writes files and speaks."""
    return jax.process_index() == 0


def check_connected() -> None:
    """Raises ValueError if this is one of several processes that do not know of each other."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"This is one of {jax.process_count()} processes of a pod. Start each of them with "
            "the same command and --distributed."
        )


def stop_together() -> Callable[[int], bool] | None:
    """For `process.StopSignal`: whether all stop now. None where there is one process.

    It takes how often it was asked, from 1. JAX's own handler of SIGTERM tells the other processes,
    and they agree on the first question that none of them has asked yet.
    """
    return multihost_utils.reached_preemption_sync_point if jax.process_count() > 1 else None


def from_first(fn: Callable[[], Any]) -> Any:
    """What `fn` returns on the first process, on all of them; where it raises, all raise.

    Args:
      fn: called on the first process alone; returns what JSON can hold.
    """
    if jax.process_count() == 1:
        return fn()
    outcome, failure = {}, None
    if is_first():
        try:
            outcome = {"value": fn()}
        except Exception as error:
            outcome, failure = {"error": str(error)}, error
    outcome = _broadcast(outcome)
    if failure is not None:
        raise failure
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]


def _broadcast(value: Any) -> Any:
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: min(size, len(text))] = text[:size]
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))


def same_everywhere(what: str, value: str) -> None:
    """Raises ValueError on every process if `value` is not the same on all."""
    if not all_agree(from_first(lambda: value) == value):
        raise ValueError(
            f"{what} differ between the processes of this run: start each with the same command, "
            "the same files, and the same versions of Python and of what is installed."
        )


def check_shared(folder: Path) -> None:
    """Raises ValueError on every process if they do not all see the same folder."""
    if jax.process_count() == 1:
        return
    note = folder / ".shared"

    def leave() -> str:
        token = secrets.token_hex(8)
        note.write_text(token)
        return token

    token = from_first(leave)
    until = time.monotonic() + 20  # a network's file system may show a new file late
    while not (seen := note.exists() and note.read_text() == token) and time.monotonic() < until:
        time.sleep(0.2)
        if note.parent.exists():
            os.listdir(note.parent)  # makes some of them look again
    if not all_agree(bool(seen)):
        raise ValueError(
            f"{folder} is not one folder for all processes: put output on a disk that they share."
        )


# Devices


def make_mesh(sizes: Mapping[str, int] | None, devices: Sequence[Any]) -> Mesh | None:
    """The mesh of a run; None for the default device, where nothing is asked and one process runs.

    Raises:
      ValueError: as `sharding.make_mesh` does.
    """
    if sizes is None:
        if len({device.process_index for device in devices}) <= 1:
            return None
        sizes = {"fsdp": -1}
    return sharding.make_mesh(sizes, devices)


def row_parts(mesh: Mesh | None) -> int:
    """Into how many parts a mesh cuts the rows of a batch."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(mesh: Mesh | None, sizes: Mapping[str, int | None]) -> None:
    """Refuses batches whose rows a mesh does not divide.

    Args:
      mesh: of the run.
      sizes: rows of a batch by the name of the key that says so; None is not looked at.
    """
    parts = row_parts(mesh)
    for name, rows in sizes.items():
        if mesh is not None and rows is not None and rows % parts:
            raise ValueError(
                f"{name} is {rows}, and {parts} devices share the rows of a batch (mesh: data "
                f"{mesh.shape['data']} x fsdp {mesh.shape['fsdp']}): make it a multiple of "
                f"{parts}, such as {-(-rows // parts) * parts}, or give more devices to tensor."
            )


def put_rows(mesh: Mesh | None, *, leading: int = 0) -> Callable[[Any], Any]:
    """A function that puts a batch of NumPy arrays on a mesh, of each process its rows alone.

    Args:
      mesh: None leaves batches as they are.
      leading: axes before the rows.
    """
    if mesh is None:
        return lambda batch: batch
    where = sharding.batch_sharding(mesh, leading=leading)

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return lambda batch: jax.tree.map(put, batch)


class Profile:
    """Traces three steps of a run on the first process."""

    def __init__(self, folder: Path, start: int | None, *, steps: int = 3):
        """Prepares.

        Args:
          folder: for the trace.
          start: steps done before the first that is traced; None for no trace.
          steps: to trace.
        """
        self._folder = folder
        self._span = None if start is None else range(start, start + steps)
        self._running = False

    def __call__(self, step: int) -> None:
        """To be called before each step with the steps done."""
        wanted = self._span is not None and step in self._span and is_first()
        if wanted and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._running and not wanted:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is open."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
