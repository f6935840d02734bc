"""NF4 against bitsandbytes, bit for bit, and against the figures that are known of it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora import nf4


@pytest.fixture(scope="module")
def bnb():
    """bitsandbytes' functions on CPU, which are the reference."""
    logging.disable(logging.WARNING)  # it reports a kernel that is only used for products
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is the reference: pip install jlora[parity]"
    )
    logging.disable(logging.NOTSET)
    return functional


def packed_by_reference(bnb, w, dtype="float32"):
    """Codes, absmax and the parts of the second level, as bitsandbytes stores `[out, in]`."""
    import torch

    tensor = torch.from_numpy(np.array(w, np.float32)).to(getattr(torch, dtype))
    codes, double = bnb.quantize_4bit(tensor, blocksize=64, compress_statistics=True,
                                      quant_type="nf4")  # fmt: skip
    same, single = bnb.quantize_4bit(tensor, blocksize=64, compress_statistics=False,
                                     quant_type="nf4")  # fmt: skip
    assert torch.equal(codes, same)
    rows = len(w)
    return {
        "codes": codes.numpy().reshape(rows, -1),
        "absmax": single.absmax.numpy().reshape(rows, -1),
        "absmax codes": double.absmax.numpy().reshape(rows, -1),
        "scales": double.state2.absmax.numpy(),
        "offset": double.offset.numpy(),
        "single": bnb.dequantize_4bit(codes, single).float().numpy(),
        "double": bnb.dequantize_4bit(codes, double).float().numpy(),
    }


def packed_here(w, dtype="float32"):
    parts = _packed_here(jnp.asarray(w, dtype))
    return {name: np.asarray(part) for name, part in parts.items()}


@jax.jit
def _packed_here(w):
    dtype = w.dtype
    codes, absmax = nf4.pack(w)
    absmax_codes, scales, offset = nf4.compress(absmax)
    restored = nf4.restore(absmax_codes, scales, offset)
    return {
        "codes": codes,
        "absmax": absmax,
        "absmax codes": absmax_codes,
        "scales": scales,
        "offset": offset,
        "single": nf4.unpack(codes, absmax, dtype).astype(jnp.float32),
        "double": nf4.unpack(codes, restored, dtype).astype(jnp.float32),
    }


def assert_bit_equal(got, wanted, names=None):
    for name in names or wanted:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_outliers(shape):
    w = draw(shape)
    w[3, 5], w[7, 100], w[-1, -1] = 1000.0, -300.0, 1e-30
    return w


def with_zero_blocks(shape):
    w = draw(shape)
    w[:4] = 0  # whole rows, and single blocks
    w[9, 64:128] = 0
    return w


def tiny_and_huge(shape):
    return draw(shape) * np.exp2(np.linspace(-12, 12, shape[0], dtype=np.float32))[:, None]


MATRICES = {
    "normal": draw((64, 256)),
    "one block": draw((1, 64)),
    "a group that ends inside a row": draw((33, 576)),
    "groups that straddle many rows": draw((129, 192)),
    "outliers": with_outliers((64, 256)),
    "zero blocks": with_zero_blocks((64, 256)),
    "a wide range": tiny_and_huge((64, 256)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MATRICES)
def test_16_bit_weights_are_stored_and_restored_to_the_bit(bnb, name, dtype):
    w = MATRICES[name]
    got, wanted = packed_here(w, dtype), packed_by_reference(bnb, w, dtype)
    names = set(wanted)
    if name == "one block":  # 0/0 in the reference: its code says nothing
        names -= {"absmax codes"}
    if name == "a wide range":  # the sum of absmax is not exact, so its order shows
        names -= {"offset", "scales", "double"}
        np.testing.assert_array_max_ulp(got["offset"], wanted["offset"], 2)
    assert_bit_equal(got, wanted, names)


@pytest.mark.parametrize("name", MATRICES)
def test_float32_weights_are_equal_but_for_the_order_of_one_sum(bnb, name):
    """The mean of absmax: torch's order of adding in float32 depends on the processor."""
    w = MATRICES[name]
    got, wanted = packed_here(w), packed_by_reference(bnb, w)
    assert_bit_equal(got, wanted, ["codes", "absmax", "single"])
    np.testing.assert_array_max_ulp(got["offset"], wanted["offset"], 2)
    largest = np.abs(wanted["absmax"]).max()
    np.testing.assert_allclose(got["double"], wanted["double"], rtol=0, atol=4e-7 * largest)


def test_float32_weights_are_equal_to_the_bit_where_the_means_are(bnb):
    equal = 0
    for seed in range(30):
        w = draw((32, 192), seed)
        got, wanted = packed_here(w), packed_by_reference(bnb, w)
        if got["offset"] == wanted["offset"]:
            equal += 1
            assert_bit_equal(got, wanted)
    assert equal >= 3


def test_float32_weights_on_a_coarse_grid_are_equal_to_the_bit(bnb):
    w = np.round(draw((64, 576)) * 512) / 512  # all sums of absmax are exact
    assert_bit_equal(packed_here(w), packed_by_reference(bnb, w))


def around(values):
    values = np.asarray(values, np.float32)
    up, down = (np.nextafter(values, np.float32(end)) for end in (np.inf, -np.inf))
    return np.stack([values, up, down]).ravel()


@pytest.mark.parametrize("absmax", [1.0, 0.5, 3.0, 1e-3])
def test_ties_on_thresholds_take_the_lower_code(bnb, absmax):
    middles = (nf4.CODE[:-1] + nf4.CODE[1:]) / 2
    values = np.concatenate([around(middles), around(nf4.CODE)])  # 93 values
    w = np.zeros((2, 64), np.float32)
    w[0, 1:], w[1, 1 : 1 + len(values) - 63] = values[:63], values[63:]
    w = np.clip(w, -1, 1) * np.float32(absmax)
    w[:, 0] = absmax
    assert_bit_equal(packed_here(w), packed_by_reference(bnb, w), ["codes", "absmax", "single"])
    if absmax == 1.0:  # nothing was rounded on the way
        codes = np.asarray(nf4.pack(jnp.asarray(w))[0])[0]
        nibbles = np.stack([codes >> 4, codes & 15], -1).ravel()
        np.testing.assert_array_equal(nibbles[1:16], np.arange(15))
        np.testing.assert_array_equal(nibbles[16:31], np.arange(1, 16))  # one bit above


def test_the_maps_are_those_of_the_reference(bnb):
    np.testing.assert_array_equal(nf4.DYNAMIC_MAP, bnb.create_dynamic_map().numpy())
    np.testing.assert_array_equal(nf4.CODE, bnb.get_4bit_type("nf4", device="cpu").numpy())


def test_the_second_level_codes_any_value_as_the_reference_does(bnb):
    """Also next to thresholds, where its table of 65536 steps is not the nearest code."""
    import torch

    middles = (nf4.DYNAMIC_MAP[:-1] + nf4.DYNAMIC_MAP[1:]) / 2
    sweep = np.concatenate([around(middles), np.linspace(-1, 1, 50_001, dtype=np.float32)])
    sweep = np.clip(sweep, -1, 1)
    pairs = np.stack([sweep, -sweep], -1).ravel()  # so that the mean is exactly zero
    groups = np.zeros((-(-len(pairs) // 254), 256), np.float32)
    groups[:, 0], groups[:, 1] = 1, -1  # each group's scale is 1
    groups[:, 2:].flat[: len(pairs)] = pairs
    drawn = np.exp(draw((4096, 128), 1))  # other scales, no powers of two
    code = torch.from_numpy(nf4.DYNAMIC_MAP)
    for values in (groups, np.concatenate([drawn, -drawn], axis=1)):
        wanted, state = bnb.quantize_blockwise(torch.from_numpy(values), code=code, blocksize=256)
        for compress in (nf4.compress, jax.jit(nf4.compress)):
            codes, scales, offset = compress(jnp.asarray(values))
            assert offset == 0
            np.testing.assert_array_equal(scales, state.absmax.numpy())
            np.testing.assert_array_equal(codes, wanted.numpy())


@pytest.mark.parametrize("double", [False, True])
def test_the_error_on_normal_weights_is_the_known_one(double):
    w = draw((1024, 1024))
    codes, absmax = nf4.pack(jnp.asarray(w))
    if double:
        absmax = nf4.restore(*nf4.compress(absmax))
    got = np.asarray(nf4.unpack(codes, absmax, jnp.float32))
    error = np.abs(got - w)
    # bitsandbytes' own table: 0.072798 ± 0.000074 and 0.203339 ± 0.000340 at block size 64, three
    # deviations of one draw; the second level adds less than that.
    assert abs(error.mean() - 0.072798) < 3 * 0.000074
    assert abs((error / np.abs(w)).mean() - 0.203339) < 3 * 0.000340
    assert abs(np.linalg.norm(error) / np.linalg.norm(w) - 0.0920) < 2e-4


SHAPES = [(1, 1), (1, 5), (5, 1), (3, 9), (40, 13)]  # rows and blocks


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=st.sampled_from(SHAPES), exponent=st.integers(-60, 60), seed=st.integers(0, 100))
def test_what_is_restored_is_near_what_was_stored(shape, exponent, seed):
    rows, blocks = shape
    w = draw((rows, 64 * blocks), seed) * np.float32(2.0**exponent)
    got = packed_here(w)
    absmax = got["absmax"]
    assert got["codes"].shape == (rows, 32 * blocks)
    by_block, wanted = (x.reshape(rows, blocks, 64) for x in (got["single"], w))
    # No code is further than half the widest gap from a value, and a block's largest is kept.
    gap = np.diff(nf4.CODE).max() / 2 + 1e-6
    assert np.all(np.abs(by_block - wanted) <= gap * absmax[..., None])
    np.testing.assert_allclose(np.abs(by_block).max(-1), absmax, rtol=1e-6)
    parts = got["absmax codes"], got["scales"], got["offset"]
    restored = np.asarray(nf4.restore(*map(jnp.asarray, parts)))
    assert np.abs(restored - absmax).max() <= 0.0071 * got["scales"].max() + 1e-6 * absmax.max()
    some = np.array([0, rows - 1, 0])
    np.testing.assert_array_equal(nf4.restore_rows(*map(jnp.asarray, parts), some), restored[some])


def test_jit_and_vmap_change_no_bit():
    stack = jnp.asarray(draw((3, 5, 576)))

    def store_and_restore(w):
        codes, absmax = nf4.pack(w)
        parts = nf4.compress(absmax)
        return codes, *parts, nf4.unpack(codes, nf4.restore(*parts), jnp.float32)

    eager = [store_and_restore(w) for w in stack]
    mapped = jax.jit(lambda stack: jax.lax.map(store_and_restore, stack))
    for run in (mapped, jax.jit(jax.vmap(store_and_restore))):
        for got, wanted in zip(run(stack), zip(*eager)):
            np.testing.assert_array_equal(got, jnp.stack(wanted))


@pytest.mark.parametrize("magnitude", [1e38, 3.4e38])
@pytest.mark.parametrize("everywhere", [False, True])
def test_the_largest_float32_weights_are_stored_like_others(bnb, magnitude, everywhere):
    """But for the second level as bitsandbytes does, where the sum of its scales overflows."""
    w = draw((32, 128), 5)
    w = w / np.abs(w).max()
    if not everywhere:
        w[1:] *= np.float32(2.0**-100)
    unit = np.float32(2.0 ** np.floor(np.log2(magnitude)))
    got, small = packed_here(w * unit), packed_here(w)
    for name in ("single", "double"):
        np.testing.assert_array_equal(got[name], small[name] * unit)
    w = w * np.float32(magnitude)
    assert_bit_equal(packed_here(w), packed_by_reference(bnb, w), ["codes", "absmax", "single"])
