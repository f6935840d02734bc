"""What a run begins with: mesh, `LoraConfig`, and fresh adapters that are the same each time."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jlora
from jlora import calibrated, config, devices, packing, starts
from jlora.base import Base, adapt_base, load_base
from jlora.fingerprint import fingerprint
from jlora.leaf import is_array_leaf

__all__ = [
    "Rows",
    "adapt_run",
    "calibrate_run",
    "changes_base",
    "lora_config",
    "make_mesh",
    "read_originals",
    "start_digest",
]


def lora_config(run: config.RunConfig, base: Base | None = None) -> jlora.LoraConfig:
    """The `LoraConfig` of a run; given the base, with the rows of its new tokens."""
    fields = run.lora.model_dump(exclude={"init_batches"})
    if base is not None and base.new_tokens:
        tables = ["embed_tokens"] + ["lm_head"] * (not base.model.config.tie_embeddings)
        if named := set(tables) & {*fields["rows"], *fields["train"], *fields["targets"]}:
            raise ValueError(
                f"model.new_tokens trains rows of {', '.join(tables)}: leave {sorted(named)} out "
                "of lora.rows, lora.train and lora.targets."
            )
        fields["rows"] |= dict.fromkeys(tables, base.new_tokens)
        if len(tables) > 1:
            exclude = fields["exclude"]
            fields["exclude"] = (*([exclude] if isinstance(exclude, str) else exclude), "lm_head")
    return jlora.LoraConfig(**fields)


def make_mesh(run: config.RunConfig, on: Sequence[Any]) -> Mesh | None:
    """The mesh that a run makes of devices; None for the default device.

    Raises:
      ValueError: if its sizes do not fit the devices, the rows of a batch do not fit it, or the run
        does what needs one device.
    """
    mesh = devices.make_mesh(None if run.mesh is None else run.mesh.model_dump(), on)
    if mesh is not None and run.model.calibrate:
        raise ValueError(
            "model.calibrate rounds the base on one device, and several processes make a mesh of "
            "theirs: run it in one, or leave it out."
        )
    rows = {"train.batch_size": run.train.batch_size, "eval.batch_size": run.eval.batch_size}
    devices.check_rows(mesh, rows)
    return mesh


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What a start or a base that needs data is measured on.

    Attributes:
      batches: of the run; the first ones are taken.
      origin: what tells this data and base from others.
      say: told that it is being measured, which takes its time.
    """

    batches: packing.Batches
    origin: Mapping[str, Any]
    say: Callable[[str], None]


def calibrate_run(
    run: config.RunConfig,
    base: Base,
    folder: Path,
    rows: Rows | None = None,
    *,
    other_base: bool = False,
) -> Base:
    """Rounds a run's NF4 base to its rows: once, then from a file.

    Args:
      run: the config, with `model.calibrate`.
      base: without adapters.
      folder: of the run.
      rows: to measure on, if `folder` holds no codes of such rows yet; None takes what it holds.
      other_base: as in `calibrated.load`.

    Raises:
      FileNotFoundError: if the codes are neither there nor given rows.
      ValueError: if the original weights are not there, the codes were found for another base, or
        the run has trained on others than these rows give.
    """
    file, origin = folder / calibrated.FILE, _rounded_to(run, rows)
    begun = calibrated.load(file, base, origin, other_base=other_base)
    if begun is None:
        if rows is None:
            raise FileNotFoundError(
                f"There is no {file}, which holds the base of this run, rounded to its rows. jlora "
                "train makes it again for a run that is not finished. Without it the adapter of a "
                f"finished one, {folder / 'adapter'}, goes with the original weights alone: jlora "
                "merge --error-layers 0 merges it into these."
            )
        _keep(file)
        batches = starts.calibration(rows.batches.packed(), run.model.calibrate or 0)
        rows.say(_rounding(batches, run.model.calibrate or 0))
        found = calibrated.calibrate(base, batches, _dense(run, base, "model.calibrate"))
        calibrated.save(file, base, found, origin or {})
        begun = calibrated.load(file, base, origin)
        assert begun is not None
    return begun


def _rounding(batches: Sequence[packing.Batch], wanted: int) -> str:
    tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
    few = f" (all there are, of {wanted} asked for)" * (len(batches) < wanted)
    return (
        f"Rounding the base to {len(batches)} batches{few} of {tokens:,} tokens together, "
        "model.calibrate ..."
    )


def _keep(file: Path) -> None:
    """Refuses to find codes again over those that a run has trained on."""
    if file.exists() and any((file.parent / "checkpoints").glob("[0-9]*")):
        raise ValueError(
            f"{file} was measured on other rows or another base model than this run has now, and "
            "its checkpoints come from it (model.calibrate). Undo the change of the data or of the "
            "model, or choose another name for a run of its own."
        )


def _rounded_to(run: config.RunConfig, rows: Rows | None) -> dict[str, Any] | None:
    """What codes are found on and with; None without rows."""
    if rows is None:
        return None
    keys = ("model.calibrate", "model.dtype", "data.length", "train.batch_size", "seed")
    counts = config.what_counts(run)
    return {key: counts[key] for key in keys} | {
        name: rows.origin[name] for name in ("base", "data_sha256")
    }


def _origin(run: config.RunConfig, rows: Rows | None) -> dict[str, Any] | None:
    """What a start is measured on and with; None without rows."""
    if rows is None:
        return None
    sections = ("model", "data", "lora", "seed", "train")
    counts = config.what_counts(run).items()
    return {key: x for key, x in counts if key.split(".")[0] in sections} | dict(rows.origin)


def adapt_run(
    run: config.RunConfig, base: Base, folder: Path, rows: Rows | None = None
) -> tuple[Base, jlora.LoraConfig]:
    """Puts a run's fresh adapters into its base: each time the same.

    What needs no data is made again from the seed; what was measured is in the run's folder.

    Args:
      run: the config.
      base: without adapters.
      folder: of the run.
      rows: to measure on, if `folder` holds no start of such rows yet; None takes what it holds.

    Returns:
      The base, and the config of its adapters, whose ranks a start may have moved.

    Raises:
      FileNotFoundError: if the start is measured, and neither there nor given rows.
      ValueError: if `lora.init` needs original weights and there are none.
    """
    lora, key = lora_config(run, base), jax.random.key(run.seed)
    if lora.init not in starts.MEASURED:
        return adapt_base(base, lora, key, originals=read_originals(run, base)), lora

    def adapt(lora: jlora.LoraConfig) -> Base:
        return adapt_base(base, lora, key)

    file, origin = folder / starts.FILE, _origin(run, rows)
    begun = starts.load(file, adapt, origin)
    if begun is None:
        if rows is None:
            raise FileNotFoundError(
                f"There is no {file}, from which lora.init={lora.init} begins. jlora train of the "
                "same run measures it again."
            )
        batches = starts.calibration(rows.batches, run.lora.init_batches)
        rows.say(f"Measuring the start, lora.init={lora.init}, on {len(batches)} batches ...")
        plain = dataclasses.replace(lora, init="default")
        fresh = adapt(plain)
        start = starts.measure(
            lora.init, key, fresh, plain, batches, lambda: read_originals(run, base)
        )
        starts.save(file, start, origin or {})
        # Read back like any later time, so that the run's first steps and its last agree.
        begun = starts.load(file, adapt, origin)
        assert begun is not None
    return begun


def changes_base(run: config.RunConfig) -> bool:
    """Whether a run's adapter is one for other weights than the original ones."""
    return run.lora.init not in ("default", "eva")


def read_originals(run: config.RunConfig, base: Base) -> Any:
    """The weights before quantising, where `lora.init` starts from them; else None."""
    if not changes_base(run) or run.model.formats is None:
        return None
    return _dense(run, base, f"lora.init={run.lora.init!r}")


def _dense(run: config.RunConfig, base: Base, setting: str) -> Any:
    """The weights before quantising, which a setting needs."""
    dense = load_base(run.model.path, dtype=run.model.dtype, vocabulary=base.vocabulary).params
    if any(map(is_array_leaf, jlora.lora.leaves_by_path(dense).values())):
        raise ValueError(
            f"{setting} starts from the weights before they were quantised, and {run.model.path} "
            "holds them quantised only. Take the original model, or leave this setting out."
        )
    return dense


def start_digest(params: Any) -> dict[str, str]:
    """Of a base that an initialiser changed and of the factors, to the bit."""
    bits = {
        f"{path}.{name}": jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        for path, leaf in jlora.lora.leaves_by_path(params).items()
        if isinstance(leaf, jlora.LoraArray)
        for name, x in leaf.present().items()
    }
    return fingerprint(params) | fingerprint(bits)
