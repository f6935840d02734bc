"""Accelerators, as their makers publish them: the peak of a bfloat16 product."""

import dataclasses

__all__ = ["Accelerator", "find", "peak_flops"]


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A kind of device, one of those that JAX counts.

    Attributes:
      kind: how its `device_kind` begins.
      peak_flops: dense bfloat16 flops a second.
      per_chip: devices that JAX sees of one chip.
    """

    kind: str
    peak_flops: float
    per_chip: int = 1


# The first whose kind begins a device's own counts.
_ACCELERATORS = (
    Accelerator("NVIDIA B200", 2250e12),
    Accelerator("NVIDIA H200", 989e12),
    Accelerator("NVIDIA H100 PCIe", 756e12),
    Accelerator("NVIDIA H100 NVL", 835e12),
    Accelerator("NVIDIA H100", 989e12),
    Accelerator("NVIDIA A100", 312e12),
    Accelerator("NVIDIA L40S", 362e12),
    Accelerator("NVIDIA L4", 121e12),
    # cloud.google.com/tpu/docs/system-architecture-tpu-vm; of two to a chip, half the chip's
    Accelerator("TPU7x", 2307e12 / 2, per_chip=2),
    Accelerator("TPU v6", 918e12),
    Accelerator("TPU v5 lite", 197e12),
    Accelerator("TPU v5e", 197e12),
    Accelerator("TPU v5", 459e12),
    Accelerator("TPU v4", 275e12),
)


def find(device_kind: str) -> Accelerator | None:
    """What is known of a device of this kind, or None if nothing is."""
    kind = device_kind.lower()
    return next((one for one in _ACCELERATORS if kind.startswith(one.kind.lower())), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 flops a second of a device, or None for one that is not in the table."""
    found = find(device_kind)
    return None if found is None else found.peak_flops
