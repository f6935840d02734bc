"""Hardware that is not here, to compile for: what it is; TPU slices, with libtpu installed."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

__all__ = ["ENVIRONMENT", "Target", "out_of_memory", "set_up", "tpus"]

_NAME = re.compile(r"(v4|v5e|v5p|v6e|tpu7x):(\d+(?:x\d+){1,2})")
_LONGEST = {2: 16, 3: 32}  # chips along an axis of a pod; the compiler aborts far beyond them
# What libtpu wants to know of the machine around a TPU; here there is none. To be set before it.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_EXCEEDS = re.compile(r"([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Target:
    """The hardware to compile for.

    Attributes:
      name: such as "v5p:4x4x4".
      platform: "tpu" or "cuda", for which programs are lowered.
      devices: to build a mesh of.
      memory_bytes: of one device, that a program may use; None if that is not known.
      memory_source: what these bytes are.
      more_memory: a setting of the environment with which it may use more, and the bytes then.
      slices: that the devices are in: slices of TPUs, hosts of GPUs. The network between them is
        slower than the one within.
    """

    name: str
    platform: str
    devices: Sequence[Any]
    memory_bytes: int | None
    memory_source: str = ""
    more_memory: tuple[str, int] | None = None
    slices: int = 1

    @property
    def kind(self) -> str:
        """Of each device, as JAX names it."""
        return self.devices[0].device_kind


def set_up() -> None:
    """Makes a process that only compiles: it runs on the CPU and takes no device from another."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # XLA's remarks on a program that takes too much would stand in the report; errors are raised.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    jax.config.update("jax_platforms", "cpu")
    # What is compiled for devices that are not here can be written to a cache and not read back.
    jax.config.update("jax_enable_compilation_cache", False)


def tpus(name: str, slices: int = 1) -> Target:
    """A TPU topology.

    Args:
      name: a generation and the chips along each axis, such as "v5p:4x4x4" or "v5e:2x4".
      slices: of that size each, with a data-centre network between them.

    Raises:
      ValueError: if there is no such topology, or no libtpu to compile for it.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"--topology is a TPU's generation and its chips along each axis, such as v5e:2x4, "
            f"v5p:4x4x4, v6e:4x4 or tpu7x:2x2x1; got {name!r}. (What gcloud calls v5litepod-8 is "
            "v5e:2x4; its v5p-128 has 128 cores, which is 64 chips, v5p:4x4x4.)"
        )
    generation, sizes = match.groups()
    chips = [int(size) for size in sizes.split("x")]
    if max(chips) > _LONGEST[len(chips)]:
        raise ValueError(
            f"There is no TPU topology {name!r}: an axis has at most {_LONGEST[len(chips)]} chips."
        )
    options: dict[str, Any] = {}
    if max(chips) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # as JAX runs it: one device to a chip
    if slices > 1:
        options["num_slices"] = slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        text = str(error)
        if "TPU support not installed" in text or "libtpu" in text.lower():
            raise ValueError(
                "Planning for TPUs compiles with libtpu, which is not installed. It needs no TPU: "
                f'pip install "jax[tpu]=={jax.__version__}"'
            ) from None
        raise ValueError(
            f"There is no TPU topology {name!r}: {text.splitlines()[0]}. The chips come in blocks "
            "of 2x2 (v5e, v6e) or 2x2x1 (v4, v5p, tpu7x)."
        ) from None
    shown = name if slices == 1 else f"{slices} slices of {name}"
    source = "what the compiler lets a program use"
    return Target(shown, "tpu", found, _memory_limit(found[0]), source, slices=slices)


def _memory_limit(device: Any) -> int | None:
    """Bytes of a TPU's memory that a program may use, or None if the compiler does not say.

    The compiler names them when it refuses a program, so it is asked for one that cannot be.
    """
    huge = jax.ShapeDtypeStruct(
        (2**40,), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    try:
        jax.jit(jnp.negative).trace(huge).lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        found = out_of_memory(error)
        return None if found is None else found[1]
    return None


def out_of_memory(error: Exception) -> tuple[int, int] | None:
    """(bytes needed, bytes there are) if a compiler refused a program for its memory, or None."""
    match = _EXCEEDS.search(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or match is None:
        return None
    needed, unit, available, other = match.groups()
    return int(float(needed) * _UNITS[unit]), int(float(available) * _UNITS[other])
