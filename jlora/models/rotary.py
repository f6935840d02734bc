"""Rotary positions (arXiv:2104.09864), and how their frequencies are stretched."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["RopeScaling", "angles", "rotate"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length trained first.

    Attributes:
      kind: "linear" divides every frequency by `factor`; "llama3" only the low ones.
      factor: at least 1.
      low_freq_factor: wavelengths above `original_max_positions` over this are divided (llama3).
      high_freq_factor: wavelengths below `original_max_positions` over this are kept (llama3).
      original_max_positions: tokens the model was first trained on (llama3).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"kind must be 'linear' or 'llama3', got {self.kind!r}.")


def angles(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each position's angles, float32 `[batch length 1 head_dim/2]`."""
    turns = jnp.asarray(_frequencies(head_dim, theta, scaling))
    angle = positions[:, :, None, None].astype(jnp.float32) * turns
    return jnp.cos(angle), jnp.sin(angle)


def _frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Rotary frequencies, radians a token, `[head_dim/2]`; float32 as in transformers."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    radians = 1 / np.float32(theta) ** exponents
    if scaling is None:
        return radians
    scaled = radians / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return scaled
    # Turns within the first training length; between the two factors the two are blended.
    turns = scaling.original_max_positions * radians / np.float32(2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return (1 - smooth) * scaled + smooth * radians


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + head_dim/2) of each head by the position's angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
