"""Rotary positions (arXiv:2104.09864), and how their frequencies are stretched."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["RopeScaling", "angles", "last_positions", "rotate"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length trained first.

    Attributes:
      kind: "linear" divides every frequency by `factor`; "llama3" only the low ones; "longrope"
        (arXiv:2402.13753) each by its own number, of one list or another by the length of the text.
      factor: at least 1 (linear, llama3).
      low_freq_factor: wavelengths above `original_max_positions` over this are divided (llama3).
      high_freq_factor: wavelengths below `original_max_positions` over this are kept (llama3).
      original_max_positions: tokens the model was first trained on (llama3, longrope).
      short_factors: divisors for texts of up to `original_max_positions` tokens (longrope).
      long_factors: divisors for longer texts (longrope).
      attention_factor: multiplies the rotated queries and keys (longrope).
    """

    kind: Literal["linear", "llama3", "longrope"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "short_factors", tuple(self.short_factors))
        object.__setattr__(self, "long_factors", tuple(self.long_factors))
        if self.kind not in ("linear", "llama3", "longrope"):
            raise ValueError(f"kind must be 'linear', 'llama3' or 'longrope', got {self.kind!r}.")

    def check(self, rotary_dim: int) -> None:
        """Raises ValueError if there is not one factor for each frequency."""
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            if self.kind == "longrope" and len(factors) != rotary_dim // 2:
                raise ValueError(
                    f"{name} must have {rotary_dim // 2} numbers, one for each rotary frequency, "
                    f"got {len(factors)}."
                )


def angles(
    positions: jax.Array,
    rotary_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    last: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each position's angles.

    Args:
      positions: `Int[batch length]`.
      rotary_dim: entries of a head that are rotated.
      theta: base of the frequencies.
      scaling: how they are stretched.
      last: the last position of the text that a token is in, which chooses between the factors of
        "longrope": `Int[batch length]` or one number for all.

    Returns:
      Two of `Float32[batch length 1 rotary_dim/2]`.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    radians = 1 / np.float32(theta) ** exponents  # a token; float32 as in transformers
    scale = 1.0
    if scaling is not None and scaling.kind == "longrope":
        short, long = (
            radians / np.asarray(factors, np.float32)
            for factors in (scaling.short_factors, scaling.long_factors)
        )
        is_long = jnp.asarray(last) >= scaling.original_max_positions
        turns = jnp.where(is_long[..., None, None], long, short)
        scale = scaling.attention_factor
    else:
        turns = jnp.asarray(_stretched(radians, scaling))
    angle = positions[:, :, None, None].astype(jnp.float32) * turns
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def last_positions(positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The largest position in each token's segment, `Int[batch length]` or `Int[batch 1]`."""
    if segment_ids is None:
        return positions.max(axis=-1, keepdims=True)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    run = jnp.cumsum(starts, axis=-1)  # numbers the segments of a row from 0
    rows = jnp.arange(run.shape[0])[:, None]
    return jnp.zeros_like(positions).at[rows, run].max(positions)[rows, run]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + rotary_dim/2) of each head by the position's angles."""
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = (first * cos - second * sin, second * cos + first * sin)
    turned = jnp.concatenate(turned, axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def _stretched(radians: np.ndarray, scaling: RopeScaling | None) -> np.ndarray:
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
