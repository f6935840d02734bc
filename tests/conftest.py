"""Eight virtual CPU devices, set before jax is imported anywhere, and fixtures shared by all."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import itertools

import jax
import pytest


@pytest.fixture
def getkey():
    """A function that gives a new PRNG key at each call."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(0), next(counter))
