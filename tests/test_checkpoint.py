"""Checkpoints: what comes back, what is skipped, what is refused, and a disk that is full."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import checkpoint, train

LORA = jlora.LoraConfig(rank=2, targets=("kernel",))


def make_state(seed=0, rank=2):
    params = {"mlp/~/linear": {"kernel": jax.random.normal(jax.random.key(seed), (30, 20))}}
    lora = jlora.LoraConfig(rank=rank, targets=("kernel",))
    trainable, _ = jlora.split(jlora.init(jax.random.key(seed), params, lora), lora)
    return train.init_state(trainable, jlora.optimizer(optax.adamw(1e-3), lora))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def messages():
    return []


@pytest.fixture
def checkpoints(tmp_path, messages):
    with_folder = checkpoint.Checkpoints(tmp_path / "ck", keep=3, on_message=messages.append)
    yield with_folder
    with_folder.close()


def save(checkpoints, *steps, **options):
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step}, **options)
        checkpoints.wait()


def largest_file(folder):
    return max((p for p in pathlib.Path(folder).rglob("*") if p.is_file()), key=os.path.getsize)


def test_what_is_saved_comes_back_bit_equal(checkpoints):
    state = make_state()
    metadata = {"position": 3, "loss": 0.1, "lora": json.loads(LORA.to_json())}
    checkpoints.save(7, state, metadata)
    restored = checkpoints.restore(jax.eval_shape(lambda: state))
    assert (restored.step, restored.metadata) == (7, metadata)
    assert checkpoints.metadata(7) == metadata
    assert_equal(restored.tree, state)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool"]
)
def test_every_dtype_comes_back_bit_equal(checkpoints, dtype):
    tree = {
        "x": (jnp.arange(24).reshape(2, 3, 4) % 3).astype(dtype),
        "scalar": jnp.zeros((), dtype),
    }
    checkpoints.save(1, tree, {})
    assert_equal(checkpoints.restore(tree).tree, tree)


def test_nan_comes_back_as_it_was(checkpoints):
    tree = {"x": jnp.array([jnp.nan, jnp.inf, -0.0])}
    checkpoints.save(1, tree, {})
    assert checkpoints.restore(tree).tree["x"].tobytes() == tree["x"].tobytes()


def test_sharded_arrays_come_back_on_their_devices(checkpoints):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tree = {"x": jax.device_put(jnp.arange(32.0), sharding)}
    checkpoints.save(1, tree, {})
    restored = checkpoints.restore(tree).tree
    assert restored["x"].sharding == sharding
    one_device = checkpoints.restore({"x": jnp.zeros(32)}).tree
    assert_equal(restored, one_device)


def test_saving_leaves_the_frozen_base_out(checkpoints):
    state = make_state()
    checkpoints.save(1, state, {})
    checkpoints.wait()
    record = json.loads((checkpoints.folder / "1" / "metadata" / "metadata").read_text())
    assert len(record["arrays"]) == len(jax.tree.leaves(state))
    assert "float32[30, 20]" not in record["arrays"].values()


def test_arrays_may_be_donated_as_soon_as_save_returns(checkpoints):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    for step in range(1, 6):
        tree = {"x": jax.random.normal(jax.random.key(step), (700, 700))}
        expected = np.array(tree["x"])
        checkpoints.save(step, tree, {})
        jax.block_until_ready(spoil(tree))
        np.testing.assert_array_equal(checkpoints.restore({"x": expected}).tree["x"], expected)


def test_only_the_last_are_kept(checkpoints):
    save(checkpoints, 1, 2, 3, 4, 5)
    assert checkpoints.steps() == [3, 4, 5]
    assert checkpoints.latest() == 5


def test_the_best_is_kept_besides(checkpoints):
    save(checkpoints, 1, 2, 3, 4, 5, best=1)
    assert checkpoints.steps() == [1, 3, 4, 5]


def test_an_empty_folder_restores_nothing(checkpoints):
    assert checkpoints.restore(make_state()) is None
    assert checkpoints.latest() is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "lost", "no metadata"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(checkpoints, messages, damage):
    save(checkpoints, 1, 2)
    folder = checkpoints.folder / "2"
    victim = largest_file(folder / "arrays")
    data = bytearray(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        # In each file and not only the largest: which of them is read depends on Orbax's layout.
        for file in (f for f in (folder / "arrays").rglob("d/*") if f.is_file()):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 0x40
            file.write_bytes(data)
    elif damage == "emptied":
        victim.write_bytes(b"")
    elif damage == "lost":
        shutil.rmtree(folder / "arrays")
    else:
        (folder / "metadata" / "metadata").write_text('{"user": ')
    restored = checkpoints.restore(make_state())
    assert restored.step == 1
    assert_equal(restored.tree, make_state(1))
    assert len(messages) == 1
    assert "step 2" in messages[0]
    assert "skipped" in messages[0]
    save(checkpoints, 2)  # the run comes by here again
    assert checkpoints.restore(make_state()).step == 2


def test_values_that_changed_on_disk_are_noticed_by_their_checksum(checkpoints, monkeypatch):
    """A file system may hand out other bytes that still decode."""
    save(checkpoints, 1, 2)
    read = checkpoints._manager.restore

    def altered(step, **options):
        restored = read(step, **options)
        arrays = restored.get("arrays")
        if step == 2 and arrays is not None:
            name = next(name for name in arrays if name.endswith(".a"))
            arrays[name] = arrays[name].at[0, 0].add(1e-6)
        return restored

    monkeypatch.setattr(checkpoints._manager, "restore", altered)
    assert checkpoints.restore(make_state()).step == 1


def test_all_damaged_is_an_error_and_not_a_fresh_start(checkpoints):
    save(checkpoints, 1)
    shutil.rmtree(checkpoints.folder / "1" / "arrays")
    for _ in range(2):  # nor is the next start one, which finds them moved aside
        with pytest.raises(checkpoint.CheckpointError, match=r"None of the checkpoints \[1\]"):
            checkpoints.restore(make_state())


@pytest.mark.parametrize(
    "failure",
    [
        jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer"),
        MemoryError(),
        OSError(errno.EIO, "Input/output error"),
    ],
)
def test_what_says_nothing_of_the_files_leaves_them_where_they_are(
    checkpoints, monkeypatch, failure
):
    save(checkpoints, 1, 2)
    read = checkpoints._manager.restore

    def fail(step, **options):
        if "arrays" in options["args"]:
            raise failure
        return read(step, **options)

    monkeypatch.setattr(checkpoints._manager, "restore", fail)
    with pytest.raises(checkpoint.CheckpointError, match=r"step 2 .* left as it is"):
        checkpoints.restore(make_state())
    monkeypatch.setattr(checkpoints._manager, "restore", read)
    assert checkpoints.restore(make_state()).step == 2


def test_what_a_killed_save_left_is_cleared_away(tmp_path):
    first = checkpoint.Checkpoints(tmp_path)
    save(first, 1)
    first.close()
    partial = tmp_path / "2.orbax-checkpoint-tmp" / "arrays.orbax-checkpoint-tmp"
    partial.mkdir(parents=True)
    (partial / "half").write_text("x")
    again = checkpoint.Checkpoints(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]
    assert again.latest() == 1
    save(again, 2)
    assert again.steps() == [1, 2]
    again.close()


def test_reading_only_leaves_the_folder_alone(tmp_path):
    writing = checkpoint.Checkpoints(tmp_path)
    save(writing, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    reading = checkpoint.Checkpoints(tmp_path, read_only=True)
    assert reading.restore(make_state()).step == 1
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists()
    reading.close()
    writing.close()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.Checkpoints(tmp_path / "nowhere", read_only=True)


def test_another_config_is_refused_and_what_differs_is_said(checkpoints):
    lora = json.loads(LORA.to_json())
    checkpoints.save(1, make_state(), {"lora": lora, "data": "abc"})
    changed = {**lora, "rank": 4, "targets": ["kernel", "head"]}
    with pytest.raises(ValueError) as error:
        checkpoints.restore(make_state(rank=4), expect={"lora": changed, "data": "abc"})
    assert "lora.rank: was 2, now 4" in str(error.value)
    assert "lora.targets: was ['kernel'], now ['kernel', 'head']" in str(error.value)
    assert "alpha" not in str(error.value)
    assert checkpoints.steps() == [1]  # refused, not set aside


def test_other_arrays_are_refused_and_named(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(ValueError, match=r"was float32\[30, 2\], now float32\[30, 3\]"):
        checkpoints.restore(make_state(rank=3))
    with pytest.raises(ValueError, match=r"opt_state.* in the checkpoint only"):
        checkpoints.restore(dataclasses.replace(make_state(), opt_state=None))


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        checkpoint.Checkpoints(tmp_path, keep=0)


def big_state(step):
    return {"x": jax.random.normal(jax.random.key(step), (1000, 500))}  # 2 MB, incompressible


def fill(checkpoints):
    for step in range(1, 40):
        checkpoints.save(step, big_state(step), {})


def test_a_full_disk_is_an_error_and_earlier_checkpoints_stay(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        checkpoints = checkpoint.Checkpoints(folder / "ck", keep=100)
        with pytest.raises(checkpoint.CheckpointError) as error:
            fill(checkpoints)
        steps, message = checkpoints.steps(), str(error.value)
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= 2
        assert f"step {len(steps) + 1}" in message
        assert "no space left on the disk" in message
        restored = checkpoints.restore(big_state(1))
        assert restored.step == steps[-1]
        assert_equal(restored.tree, big_state(steps[-1]))
        checkpoints.close()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_that_may_not_grow_is_an_error_too(tmp_path):
    resource = pytest.importorskip("resource")
    checkpoints = checkpoint.Checkpoints(tmp_path / "ck", keep=100)
    checkpoints.save(1, {"x": jnp.zeros(3)}, {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        checkpoints.save(2, big_state(2), {})
        with pytest.raises(checkpoint.CheckpointError, match=r"step 2 .* size allowed"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.steps() == [1]
    checkpoints.save(2, big_state(2), {})
    checkpoints.close()
    assert checkpoint.Checkpoints(tmp_path / "ck").latest() == 2
