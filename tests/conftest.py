"""Eight virtual CPU devices, set before jax is imported anywhere, and fixtures shared by all."""

import os

from compiling import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = xla_flags(8, os.environ.get("XLA_FLAGS", ""))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads of PyTorch that wait for work spin, and these tests' models leave them nothing to do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jlora import topology

# For tests that compile for TPUs, where libtpu is installed: several at once, and nothing said.
for _name, _value in topology.ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


@pytest.fixture(scope="session", autouse=True)
def _compiled_programs(tmp_path_factory):
    """Keeps compiled programs on the disk, for all processes that these tests run in and start.

    Many rows of a table differ only in where a weight comes from, small operations come again in
    every file, and so do runs of equal shapes.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    # A process of a test runs each of its programs once: the small ones are not worth a file.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Lets compiled programs go after each module: thousands of tests hold gigabytes of them."""
    yield
    jax.clear_caches()
    jax.config.update("jax_enable_compilation_cache", True)  # planning and bench turn it off


@pytest.fixture
def getkey():
    """A function that gives a new PRNG key at each call."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(0), next(counter))
