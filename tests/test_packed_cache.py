"""Packed weights kept on disk: read back bit for bit, and made again when in doubt."""

import os
import warnings

import jax
import numpy as np
import pytest
import test_gguf
import tiny

from jlora import models
from jlora.models import gguf, hf, packed_cache


@pytest.fixture
def folder(tmp_path):
    return tiny.write_model(tmp_path / "model", layers=3)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def only_file(cache):
    (file,) = cache.iterdir()  # and nothing half-written beside it
    return file


def assert_bit_equal(given, expected):
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("fmt", ["nf4", "int8", "float8"])
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_the_second_load_reads_only_the_kept_file(tmp_path, cache, monkeypatch, kind, fmt, dtype):
    path = tmp_path / ("model.gguf" if kind == "gguf" else "model")
    if kind == "gguf":
        test_gguf.write(path, test_gguf.make_weights())
    else:
        tiny.write_model(path)
    options = {"dtype": dtype, "quantize": fmt}
    model, expected = models.load(path, **options)
    first = models.load(path, **options, cache=cache)[1]
    assert_bit_equal(first, expected)
    monkeypatch.setattr(
        hf if kind == "hf" else gguf, "load", lambda *args, **kwargs: pytest.fail("read")
    )
    again, second = models.load(path, **options, cache=cache)
    assert again == model
    assert_bit_equal(second, expected)
    stored = sum(x.nbytes for x in jax.tree.leaves(expected))
    assert stored < only_file(cache).stat().st_size < stored + 20_000


def test_formats_dtypes_and_bases_have_files_of_their_own(tmp_path, folder, cache):
    other = tiny.write_model(tmp_path / "elsewhere" / "model")
    models.load(folder, quantize="nf4", cache=cache)
    models.load(folder, quantize="int8", cache=cache)
    models.load(folder, quantize="int8", dtype="bfloat16", cache=cache)
    models.load(other, quantize="int8", cache=cache)
    for embeddings in ("int8", "nf4", "int8"):
        formats = {"layers": "int8", "embeddings": embeddings}
        given = models.load(folder, quantize=formats, cache=cache)[1]
        assert_bit_equal(given, models.load(folder, quantize=formats)[1])
    assert len(list(cache.iterdir())) == 6


def change_base(folder, file):
    """Other weights of the same size and time."""
    weights = folder / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=times)


def flip(folder, file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def of_earlier_version(folder, file):
    data = file.read_bytes()
    assert b'"version": "1"' in data
    file.write_bytes(data.replace(b'"version": "1"', b'"version": "0"'))


DAMAGES = {
    "another base": change_base,
    "a flipped bit": flip,
    "cut short": lambda folder, file: os.truncate(file, file.stat().st_size - 100),
    "empty": lambda folder, file: os.truncate(file, 0),
    "no such format": lambda folder, file: file.write_bytes(b"x" * 1000),
    "an earlier version": of_earlier_version,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_stale_or_damaged_file_is_made_again_with_one_note(folder, cache, damage):
    models.load(folder, quantize="nf4", cache=cache)
    file = only_file(cache)
    DAMAGES[damage](folder, file)
    expected = models.load(folder, quantize="nf4")[1]
    with pytest.warns(UserWarning, match="it is made again") as notes:
        given = models.load(folder, quantize="nf4", cache=cache)[1]
    assert len(notes) == 1
    assert str(file) in str(notes[0].message)
    assert_bit_equal(given, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_bit_equal(models.load(folder, quantize="nf4", cache=cache)[1], expected)
    assert only_file(cache) == file


def test_a_base_that_cannot_be_kept_is_loaded_all_the_same(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.warns(UserWarning, match="could not be kept"):
        given = models.load(folder, quantize="nf4", cache=tmp_path / "file" / "cache")[1]
    assert_bit_equal(given, models.load(folder, quantize="nf4")[1])


def test_a_write_that_fails_leaves_nothing(folder, cache, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_cache.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        models.load(folder, quantize="nf4", cache=cache)
    assert not list(cache.iterdir())


def test_what_is_not_quantised_is_not_kept(folder, cache):
    models.load(folder, cache=cache)
    assert not cache.exists()
