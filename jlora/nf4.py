"""The arithmetic of NF4 with double quantisation (arXiv:2305.14314), to the bit of bitsandbytes.

A weight is a matrix `[..., rows, columns]` whose rows are cut into blocks of 64. A block keeps its
largest absolute value (absmax) and four bits for each element: the nearest of 16 quantiles of the
normal distribution, scaled to ±absmax. The second level keeps each absmax in eight bits, as its
distance from the mean of all, in groups of 256 that run on from row to row.
"""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "BLOCK",
    "CODE",
    "DYNAMIC_MAP",
    "GROUP",
    "compress",
    "num_groups",
    "pack",
    "restore",
    "restore_rows",
    "unpack",
]

BLOCK = 64  # elements that share an absmax
GROUP = 256  # absmax values that share a scale at the second level

CODE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_THRESHOLDS = (CODE[:-1] + CODE[1:]) / 2


def _dynamic_map() -> np.ndarray:
    """The 256 sorted values of the second level (arXiv:2110.02861), float32."""
    values = [0.0, 1.0]
    for exponent in range(7):
        items = 2**exponent + 1
        # From both ends towards the middle, each bound rounded once: as the reference's linspace.
        start, index = float(np.float32(0.1)), np.arange(items)
        step = float(np.float32(1 - np.float32(0.1)) / np.float32(items - 1))
        bounds = np.where(index < items // 2, start + step * index, 1 - step * (items - 1 - index))
        bounds = bounds.astype(np.float32)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * means
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.array(values, np.float32))


DYNAMIC_MAP = _dynamic_map()
# The reference looks the code of a value in [-1, 1] up on a grid of 65536 steps: the nearest one
# but within half a step of a threshold.
_GRID = np.arange(65536) / 32767.5 - 1
_CODE_ON_GRID = np.searchsorted((DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / 2, _GRID).astype(np.uint8)


def pack(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises a matrix to four bits an element.

    Args:
      w: `Float[*stack rows columns]`, with a whole number of blocks in `columns`.

    Returns:
      `UInt8[*stack rows columns/2]`, the first of two elements in the high nibble, and absmax,
      `Float32[*stack rows columns/64]`.
    """
    blocks = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, BLOCK)
    absmax = jnp.abs(blocks).max(axis=-1)
    # The reciprocal of more than 2**126 is too small for backends that take subnormals for zero.
    down, _ = _range(absmax)
    inverse = 1 / (jnp.where(absmax > 0, absmax, 1) * down)
    scaled = jnp.clip((blocks * down[..., None]) * inverse[..., None], -1, 1)
    return pair(nearest(scaled).reshape(w.shape)), absmax


def nearest(scaled: jax.Array) -> jax.Array:
    """The places in `CODE`, `UInt8`, of what is nearest to values in [-1, 1]."""
    # Strictly above a threshold: a tie takes the lower code.
    return jnp.asarray(sum((scaled > t).astype(jnp.uint8) for t in _THRESHOLDS))


def pair(nibbles: jax.Array) -> jax.Array:
    """Two places in `CODE` a byte, along the last axis, the first of them in the high nibble."""
    pairs = nibbles.reshape(*nibbles.shape[:-1], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def unpack(codes: jax.Array, absmax: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrix of `pack`'s results: `code * absmax` in float32, rounded once to `dtype`."""
    # One expression per element, without a concatenation, so that it fuses into one loop.
    nibbles = (codes[..., None] >> jnp.array([4, 0], jnp.uint8)) & 15
    values = jnp.asarray(CODE).at[nibbles].get(mode="promise_in_bounds")
    values = values.reshape(*absmax.shape, BLOCK) * absmax[..., None]
    return values.reshape(*codes.shape[:-1], -1).astype(dtype)


def num_groups(rows: int, blocks: int) -> int:
    """How many groups of the second level a matrix of so many rows and blocks a row has."""
    return -(-rows * blocks // GROUP)


def compress(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantises the absmax values of one matrix to eight bits.

    Args:
      absmax: `Float32[rows blocks]`.

    Returns:
      `UInt8[rows blocks]`, the largest distance from the mean in each group `Float32[groups]`, and
      the mean `Float32[]`.
    """
    offset = _mean(absmax.reshape(-1))
    flat = (absmax - offset).reshape(-1)
    groups = num_groups(*absmax.shape)
    padded = jnp.pad(flat, (0, groups * GROUP - flat.size)).reshape(groups, GROUP)
    largest = jnp.abs(padded).max(axis=-1)
    down, _ = _range(largest)
    divisor = jnp.broadcast_to((jnp.where(largest > 0, largest, 1) * down)[:, None], padded.shape)
    # Of a divisor that many share, XLA's CPU backend would take the rounded reciprocal instead.
    scaled = (padded * down[:, None]) / jax.lax.optimization_barrier(divisor)
    place = jnp.floor((scaled + 1) * 32767.5 + 0.5).astype(jnp.int32)
    codes = jnp.asarray(_CODE_ON_GRID).at[place].get(mode="promise_in_bounds")
    return codes.reshape(-1)[: flat.size].reshape(absmax.shape), largest, offset


def restore(codes: jax.Array, largest: jax.Array, offset: jax.Array) -> jax.Array:
    """The absmax values of `compress`'s results, `Float32[*stack rows blocks]`.

    Args:
      codes: `UInt8[*stack rows blocks]`.
      largest: `Float32[*stack groups]`.
      offset: `Float32[*stack]`.
    """
    rows, blocks = codes.shape[-2:]
    group = _group_of(jnp.arange(rows)[:, None], jnp.arange(blocks), blocks)
    scales = largest.at[..., group].get(mode="promise_in_bounds")
    return _restored(codes, scales, offset[..., None, None])


def restore_rows(
    codes: jax.Array, largest: jax.Array, offset: jax.Array, rows: jax.Array
) -> jax.Array:
    """The absmax values of some rows: `Float32[*rows blocks]`, for one matrix."""
    blocks = codes.shape[-1]
    group = _group_of(rows[..., None], jnp.arange(blocks), blocks)
    return _restored(codes[rows], largest.at[group].get(mode="promise_in_bounds"), offset)


def _group_of(rows: jax.Array, blocks: jax.Array, blocks_per_row: int) -> jax.Array:
    return (rows * blocks_per_row + blocks) // GROUP


def _restored(codes: jax.Array, scales: jax.Array, offset: jax.Array) -> jax.Array:
    distance = jnp.asarray(DYNAMIC_MAP).at[codes].get(mode="promise_in_bounds") * scales
    # The reference rounds before it adds. The bounds, which change no value, keep the compiler from
    # making one fused multiply-add of the two.
    return jnp.clip(distance, -scales, scales) + offset


def _mean(x: jax.Array) -> jax.Array:
    """The mean, from a sum that is rounded once, whatever the backend.

    The reference adds in float32, in an order that depends on the processor: its mean of float32
    weights can differ in the last place.
    """
    down, up = _range(x.max())  # or the sum would overflow
    x = x * down
    size = 1 << max(0, x.size - 1).bit_length()
    high = jnp.pad(x, (0, size - x.size))
    low = jnp.zeros_like(high)
    while size > 1:
        size //= 2
        a, b = high[:size], high[size:]
        high = a + b
        part = high - a
        low = low[:size] + low[size:] + ((a - (high - part)) + (b - part))
    # Counted, not written down: by a constant, XLA multiplies with its rounded reciprocal.
    count = (x == x).sum().astype(jnp.float32)
    return (high[0] + low[0]) / count * up


def _range(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Powers of two to take large values down and up again with; 1 for others, to the bit."""
    is_large = largest > 2.0**90
    return jnp.where(is_large, 2.0**-64, 1.0), jnp.where(is_large, 2.0**64, 1.0)
