"""GPUs that are not here, to compile for with JAX's CUDA plugin, which needs none."""

import dataclasses
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from jlora import topology

__all__ = ["KINDS", "Gpu", "gpus"]

_NAME = re.compile(r"([a-z][a-z0-9-]*):(?:([1-9]\d*)x)?([1-9]\d*)")
# Newer first; JAX refuses both together.
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_FRACTION = 0.75  # that JAX takes where neither is set
_MOST = 0.9  # leaves the CUDA context, NCCL's buffers and the kernels' code a tenth


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU, as XLA has it described.

    Attributes:
      kind: as JAX names it.
      capability: of compute, major and minor.
      memory_bytes: as CUDA counts them.
      bandwidth: of the memory, bytes a second.
      cores: multiprocessors.
      lanes: 32-bit floating-point units of each.
      clock_ghz: at its highest.
      l2_bytes: of the cache that all share.
      shared_bytes: of memory that a multiprocessor's threads share.
      per_host: at most.
    """

    kind: str
    capability: tuple[int, int]
    memory_bytes: int
    bandwidth: int
    cores: int
    lanes: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int
    per_host: int = 8


_A100 = Gpu(
    "NVIDIA A100-SXM4-40GB", (8, 0), 42331013120, 1555200000000, 108, 64, 1.41, 41943040, 167936, 16
)
_H100 = Gpu(
    "NVIDIA H100 80GB HBM3", (9, 0), 84942979072, 3352320000000, 132, 128, 1.98, 52428800, 233472
)
# As the OpenXLA project describes them to its compiler (xla/backends/gpu/target_config/specs), but
# for the H200's memory: what is given there is its nominal size, and CUDA counts 139.8 GiB.
KINDS = {
    "a100-40g": _A100,
    "a100-80g": dataclasses.replace(
        _A100, kind="NVIDIA A100-SXM4-80GB", memory_bytes=85100068864, bandwidth=2039040000000
    ),
    "h100": _H100,
    "h200": dataclasses.replace(
        _H100, kind="NVIDIA H200", memory_bytes=150109106995, bandwidth=4800000000000
    ),
    "b200": Gpu(
        "NVIDIA B200", (10, 0), 191514411008, 7672320000000, 148, 128, 1.965, 132644864, 233472
    ),
}


def gpus(name: str) -> topology.Target:
    """GPUs of one kind, on one host or several.

    Args:
      name: the kind and how many, such as "h100:8" for those of one host and "h100:4x8" for four
        hosts of eight.

    Raises:
      ValueError: if there are no such GPUs, or no CUDA plugin to compile for them.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            "--gpus is a kind and how many of them one host has, such as h100:8, or hosts and how "
            f"many each has, such as h100:4x8; got {name!r}."
        )
    kind, hosts, count = match.group(1), int(match.group(2) or 1), int(match.group(3))
    if kind not in KINDS:
        raise ValueError(f"--gpus knows {', '.join(KINDS)}; got {kind!r}.")
    gpu = KINDS[kind]
    if count > gpu.per_host:
        raise ValueError(
            f"A host has at most {gpu.per_host} {kind}; got {name!r}. Several hosts are "
            f"{kind}:HOSTSx{gpu.per_host}, such as {kind}:4x{gpu.per_host}."
        )
    devices = _devices(gpu, hosts, count)
    return topology.Target(name, "cuda", devices, *_memory(gpu), slices=hosts)


def _devices(gpu: Gpu, hosts: int, count: int) -> Any:
    try:
        return topologies.get_topology_desc(
            "gpus", "cuda", topology=f"1x{hosts}x{count}", target_config=_description(gpu)
        ).devices
    except NotImplementedError:
        raise ValueError(
            "Planning for GPUs compiles with JAX's CUDA plugin, which is not installed. It needs "
            f'no GPU: pip install "jax[cuda12]=={jax.__version__}"'
        ) from None


def _memory(gpu: Gpu) -> tuple[int, str, tuple[str, int] | None]:
    """Bytes that JAX takes of a GPU's, what they are, and how to have it take more."""
    name = next((name for name in _FRACTIONS if os.environ.get(name)), None)
    try:
        fraction = _FRACTION if name is None else float(os.environ[name])
    except ValueError:
        raise ValueError(f"{name} is a share of the GPU's memory, such as 0.9.") from None
    why = name or f"what JAX takes unless {_FRACTIONS[0]} says more"
    source = f"{100 * fraction:.0f} % of the GPU's {gpu.memory_bytes / 2**30:.1f} GiB, {why}"
    more = (f"{name or _FRACTIONS[0]}={_MOST}", int(_MOST * gpu.memory_bytes))
    return int(fraction * gpu.memory_bytes), source, more if fraction < _MOST else None


def _description(gpu: Gpu) -> str:
    """A `GpuTargetConfigProto` of XLA as text."""
    major, minor = gpu.capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.kind}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          device_memory_size: {gpu.memory_bytes}
          memory_bandwidth: {gpu.bandwidth}
          core_count: {gpu.cores}
          fpus_per_core: {gpu.lanes}
          clock_rate_ghz: {gpu.clock_ghz}
          l2_cache_size: {gpu.l2_bytes}
          shared_memory_per_core: {gpu.shared_bytes}
          shared_memory_per_block_optin: {gpu.shared_bytes - 1024}
          shared_memory_per_block: 49152
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
    """
