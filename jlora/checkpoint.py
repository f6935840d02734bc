"""Checkpoints of a run: trainable tree, optimizer state, where it stood; never the frozen base.

Orbax writes them asynchronously, each into a folder that appears under its step number only when it
is complete. A checksum of every array goes along, so that a file that was damaged later is noticed
on reading and the checkpoint before it is taken.
"""

import dataclasses
import errno
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jlora.multihost import all_agree

__all__ = ["CheckpointError", "Checkpoints", "Restored"]

_log = logging.getLogger(__name__)
_PARTIAL = ".orbax-checkpoint-tmp"
_DAMAGED = ".damaged"


class CheckpointError(OSError):
    """A checkpoint could not be written, or none of those there could be read."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` found.

    Attributes:
      step: the step it was saved at.
      tree: with the structure of the template.
      metadata: as it was given to `save`.
    """

    step: int
    tree: Any
    metadata: dict[str, Any]


@dataclasses.dataclass
class _LatestAndBest:
    """An Orbax preservation policy: the last `keep` checkpoints, and the best one."""

    keep: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        oldest_kept = len(checkpoints) - self.keep
        return [i >= oldest_kept or info.step == self.best for i, info in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints in one folder.

    >>> checkpoints = Checkpoints("runs/first/checkpoints", keep=3)
    >>> checkpoints.save(100, state, {"position": 400})
    >>> checkpoints.wait()
    >>> checkpoints.restore(state).step
    100
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        *,
        keep: int = 3,
        read_only: bool = False,
        on_message: Callable[[str], None] = _log.warning,
    ):
        """Opens the folder and clears away what an interrupted save left in it.

        Args:
          folder: made if it is not there, unless `read_only`.
          keep: how many of the newest checkpoints stay, at least 1; the best one stays besides.
          read_only: only restore. For looking at a run that another process may be writing.
          on_message: told when a damaged checkpoint is skipped.

        Raises:
          ValueError: if `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}.")
        self.folder = pathlib.Path(folder).absolute()
        self._read_only = read_only
        self._on_message = on_message
        self._policy = _LatestAndBest(keep)
        self._begun: int | None = None
        if read_only and not self.folder.is_dir():
            raise FileNotFoundError(f"There is no checkpoint folder {self.folder}.")
        if not read_only:
            self._clear_partial()
            all_agree(True)  # none begins before the first process has cleared the folder
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                preservation_policy=None if read_only else self._policy,
                save_decision_policy=_SAVE_ALWAYS,
            ),
        )

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: Any, metadata: Mapping[str, Any], *, best: int | None = None
    ) -> None:
        """Starts saving; returns once the arrays may be changed or donated.

        Args:
          step: steps done so far; the name of the checkpoint.
          state: any pytree of arrays.
          metadata: anything that JSON can hold.
          best: the step of the checkpoint to keep whatever its age.

        Raises:
          CheckpointError: if this save, or the one before it that was still being written, failed.
        """
        self.wait()
        arrays = _by_name(state)
        self._policy.best = best
        self._begun = step
        record = {
            "user": dict(metadata),
            "arrays": {name: _describe(array) for name, array in arrays.items()},
            "checksums": _checksums(arrays),
        }
        self._guard(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays), metadata=ocp.args.JsonSave(record)
                ),
            ),
        )

    def wait(self) -> None:
        """Blocks until what `save` started is on disk.

        Raises:
          CheckpointError: if it could not be written.
        """
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits, then frees the threads behind the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if not self._read_only:
                self._clear_partial()

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata of one checkpoint, as it was given to `save`."""
        return self._record(step)["user"]

    def restore(
        self,
        template: Any,
        *,
        step: int | None = None,
        expect: Mapping[str, Any] | None = None,
    ) -> Restored | None:
        """Reads the newest checkpoint that is whole.

        A damaged one is reported, moved aside to `<step>.damaged` and the one before it is tried.
        One that could not be read for another reason (a process that is gone, memory, a disk that
        does not answer) stays what it is.

        Args:
          template: a tree of arrays or `ShapeDtypeStruct`s with the structure to restore.
          step: reads this checkpoint instead of the newest.
          expect: entries that the metadata must hold, compared before any array is read.

        Returns:
          The state, or None if the folder holds no checkpoint.

        Raises:
          ValueError: if the metadata or the arrays differ from what is expected; says where.
          CheckpointError: if there are checkpoints but none can be read, now or when last tried.
        """
        candidates = self.steps()[::-1] if step is None else [step]
        for candidate in candidates:
            try:
                record = _on_all(lambda candidate=candidate: self._record(candidate))
                self._compare(candidate, record, template, expect or {})
                state = self._read(candidate, record, template)
            except _Mismatch as error:
                raise ValueError(str(error)) from None
            except Exception as error:
                if _may_pass(error):
                    raise CheckpointError(
                        f"Could not read the checkpoint of step {candidate} in {self.folder}: "
                        f"{_reason(error)}. It is left as it is; once that is mended, the run "
                        "resumes from it."
                    ) from error
                self._set_aside(candidate, error)
            else:
                return Restored(candidate, state, record["user"])
        aside = [path.stem for path in self.folder.glob(f"[0-9]*{_DAMAGED}")]
        if candidates or (aside and step is None):
            found = sorted({*candidates, *map(int, aside)})
            raise CheckpointError(
                f"None of the checkpoints {found} in {self.folder} can be read. "
                "Delete the folder to start the run anew."
            )
        return None

    def _record(self, step: int) -> dict[str, Any]:
        restored = self._manager.restore(
            step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
        )
        return restored["metadata"]

    def _read(self, step: int, record: dict[str, Any], template: Any) -> Any:
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))
            for name, leaf in _by_name(template).items()
        }
        restored = _on_all(
            lambda: self._manager.restore(
                step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))
            )
        )
        arrays = restored["arrays"]
        found = _checksums(arrays)
        wrong = [name for name, value in record["checksums"].items() if found[name] != value]
        if wrong:
            raise OSError(f"checksum of {wrong[0]} is wrong, the files were changed or damaged")
        return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in wanted])

    def _compare(
        self, step: int, record: dict[str, Any], template: Any, expect: Mapping[str, Any]
    ) -> None:
        user = record["user"]
        normal = json.loads(json.dumps(dict(expect)))
        differences = [
            line for name in normal for line in _differences(name, user.get(name), normal[name])
        ]
        if not differences:
            wanted = {name: _describe(leaf) for name, leaf in _by_name(template).items()}
            differences = _array_differences(record["arrays"], wanted)
        if differences:
            shown = differences[:8] + ["..."] * (len(differences) > 8)
            raise _Mismatch(
                f"The checkpoint of step {step} in {self.folder} belongs to another run:\n  "
                + "\n  ".join(shown)
                + "\nUndo the change to resume it, or give this run a name of its own."
            )

    def _set_aside(self, step: int, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        message = f"The checkpoint of step {step} in {self.folder} cannot be read and is skipped"
        if not self._read_only:
            aside = self.folder / f"{step}{_DAMAGED}"
            if jax.process_index() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(step)).rename(aside)
            all_agree(True)
            self._manager.reload()
            message += f" (kept as {aside.name})"
        self._on_message(f"{message}: {type(error).__name__}: {reason}")

    def _clear_partial(self) -> None:
        # Not by Orbax's own option: that works in the background, under a save of the same step.
        if jax.process_index() > 0:
            return
        for partial in self.folder.glob(f"*{_PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)

    def _guard(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            self._clear_partial()
            whole = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"Could not save the checkpoint of step {self._begun} in {self.folder}: "
                f"{_reason(error)}. Complete checkpoints, untouched: {whole}. "
                "Once that is mended, the run resumes from the newest."
            ) from error


def _on_all(read: Callable[[], Any]) -> Any:
    """What `read` returns, if it succeeds on every process; else all of them raise."""
    try:
        value, failure = read(), None
    except Exception as error:
        value, failure = None, error
    if all_agree(failure is None):
        return value
    failure = failure or OSError("another process cannot read its part")
    if all_agree(not _may_pass(failure)) or _may_pass(failure):
        raise failure
    raise CheckpointError(str(failure)) from failure


def _may_pass(error: Exception) -> bool:
    """Whether an error says nothing of the files: the next start may read them well."""
    lost_process_or_memory = isinstance(error, jax.errors.JaxRuntimeError | MemoryError)
    # Orbax and TensorStore give what they find wrong in a file other types, or no number.
    system = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)
    return lost_process_or_memory or system or isinstance(error, CheckpointError)


_SAVE_ALWAYS = checkpoint_managers.FixedIntervalPolicy(1)


class _Mismatch(Exception):
    pass


def _by_name(state: Any) -> dict[str, Any]:
    """The leaves under names that stay the same whatever classes the tree is made of."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    # Haiku has slashes in its names; a file system and a JSON reader need not meet them.
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]
    return {name.replace("/", "|"): leaf for name, (_, leaf) in zip(names, flat, strict=True)}


def _describe(array: Any) -> str:
    return f"{array.dtype.name}{list(array.shape)}"


def _sharding(leaf: Any) -> Any:
    found = getattr(leaf, "sharding", None)
    return found or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _checksums(arrays: dict[str, Any]) -> dict[str, int]:
    return {name: int(value) for name, value in jax.device_get(_weighted_sums(arrays)).items()}


@jax.jit
def _weighted_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Per array the sum of its words times odd weights, modulo 2**32: exact on any sharding."""
    return {name: _weighted_sum(array) for name, array in arrays.items()}


def _weighted_sum(array: jax.Array) -> jax.Array:
    words = array
    if jnp.issubdtype(array.dtype, jnp.bool_):
        words = array.astype(jnp.uint8)
    width = min(words.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(words, f"uint{8 * width}").astype(jnp.uint32)
    weight, stride = jnp.uint32(1), 2
    for axis in reversed(range(words.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        weight = weight + index * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words * weight, dtype=jnp.uint32)


def _differences(name: str, saved: Any, given: Any) -> list[str]:
    if isinstance(saved, dict) and isinstance(given, dict):
        keys = [*saved, *(key for key in given if key not in saved)]
        return [
            line
            for key in keys
            for line in _differences(f"{name}.{key}", saved.get(key), given.get(key))
        ]
    return [] if saved == given else [f"{name}: was {saved!r}, now {given!r}"]


def _array_differences(saved: dict[str, str], given: dict[str, str]) -> list[str]:
    lines = [f"{name}: in the checkpoint only" for name in saved if name not in given]
    lines += [f"{name}: not in the checkpoint" for name in given if name not in saved]
    for name, shape in saved.items():
        if name in given and given[name] != shape:
            lines.append(f"{name}: was {shape}, now {given[name]}")
    return lines


def _reason(error: BaseException) -> str:
    """The first cause that says what the file system did, in one line."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(str(one) for one in chain)
    for told, plain in (
        ("No space left on device", "no space left on the disk"),
        ("File too large", "a file grew beyond the size allowed here"),
        ("Disk quota exceeded", "the disk quota is used up"),
        ("Permission denied", "permission denied"),
        ("Read-only file system", "the file system is read-only"),
        ("Gloo", "another process of this run is gone"),
        ("coordination service", "another process of this run is gone"),
    ):
        if told in text:
            return plain
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
