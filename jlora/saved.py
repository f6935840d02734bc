"""A run that is there: its base model with what it trained."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import checkpoint, config, peft, train
from jlora.base import Base, load_base, load_vocabulary
from jlora.fingerprint import check_base, rows_of
from jlora.fresh import adapt_run, calibrate_run, changes_base, read_originals
from jlora.merging import MergeError, logit_errors
from jlora.models import weights
from jlora.quant import QuantArray, pack_weight
from jlora.run import make_optimizer, save_adapter
from jlora.targets import leaves_by_path

__all__ = ["export", "is_run", "load_run", "load_to_merge", "logits_report", "merge_report"]

Say = Callable[[str], None]


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether this is the folder of a run."""
    folder = Path(folder)
    return (folder / "config.yaml").is_file() and not (folder / "config.json").exists()


def load_run(
    folder: str | os.PathLike[str],
    say: Say,
    *,
    dtype: str | None = None,
    quantized: bool = True,
    plain: bool = False,
    other_base: bool = False,
) -> tuple[Base, jlora.LoraConfig]:
    """Loads the base model of a run with its adapter: the result, or the newest checkpoint's.

    Args:
      folder: of the run.
      say: told which checkpoint is used if the run is not finished.
      dtype: of the base; None for that of the run.
      quantized: False gives the base's own weights to a run that quantised them.
      plain: of a run whose `lora.init` changed the base, the adapter for the original weights
        instead of the model that training saw. So it is with `quantized=False`.
      other_base: take the model at the run's path even if it is not what the run trained on.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no config.yaml.")
    run = config.load(folder / "config.yaml")
    if dtype is not None:
        run = run.model_copy(update={"model": run.model.model_copy(update={"dtype": dtype})})
    changed, finished = changes_base(run), (folder / "result.json").exists()
    plain = plain or not quantized
    packs = quantized or (changed and not finished)  # a checkpoint goes with what training saw
    base = load_base(
        run.model.path,
        dtype=run.model.dtype,
        quantize=run.model.formats if packs else None,
        cache=run.model.cache,
        vocabulary=load_vocabulary(run.model.path, run.model.new_tokens),
    )
    if packs and run.model.calibrate:
        base = calibrate_run(run, base, folder, other_base=other_base)
    if finished:
        params, saved_lora = peft.load(folder / "adapter", base.params, other_base=other_base)
        if not changed or plain or not _has_packed(base.params):
            return dataclasses.replace(base, params=params), saved_lora
        initial, lora = adapt_run(run, base, folder)
        params = jlora.variants.from_plain_lora(initial.params, params)
        return dataclasses.replace(base, params=params), lora
    initial, lora = adapt_run(run, base, folder)
    restored = _restore(folder, run, lora, initial.params, say)
    if not other_base:
        rows = rows_of(initial.params)
        check_base(folder, run.model.path, restored.metadata["base"], base.params, rows=rows)
    params = jlora.combine(restored.tree.trainable, jlora.split(initial.params, lora)[1])
    if changed and plain:
        originals = read_originals(run, base)
        params, lora = jlora.variants.to_plain_lora(initial.params, params, lora, base=originals)
    return dataclasses.replace(base, params=params), lora


def _restore(
    folder: Path, run: config.RunConfig, lora: jlora.LoraConfig, initial: Any, say: Say
) -> checkpoint.Restored:
    """The newest checkpoint of a run that began with this tree."""
    trainable, _ = jlora.split(initial, lora)
    if not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"The run {folder} has no checkpoint yet.")
    with contextlib.closing(
        checkpoint.Checkpoints(folder / "checkpoints", read_only=True, on_message=say)
    ) as checkpoints:
        tx, _ = make_optimizer(run, lora, run.train.steps or run.optim.warmup_steps + 1)
        template = train.init_state(trainable, tx)
        restored = checkpoints.restore(template, expect={"lora": json.loads(lora.to_json())})
    if restored is None:
        raise FileNotFoundError(f"The run {folder} has no checkpoint yet.")
    say(f"{folder} is not finished: using its checkpoint of step {restored.step}.")
    return restored


def export(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    say: Say,
    *,
    other_base: bool = False,
    serve: bool = False,
) -> None:
    """Writes a run's adapter as a PEFT folder, with the tokenizer beside it if tokens were added.

    Args:
      folder: of the run.
      output: the folder to write.
      say: as in `load_run`.
      other_base: as in `load_run`.
      serve: as in `jlora.peft.save`.
    """
    loaded, lora = load_run(folder, say, plain=True, other_base=other_base)
    save_adapter(Path(output), loaded, loaded.params, lora, serve=serve)


def load_to_merge(
    folder: str | os.PathLike[str],
    say: Say,
    *,
    into: str | None = None,
    other_base: bool = False,
) -> tuple[Base, jlora.LoraConfig, str]:
    """Loads a run for merging, and a remark on what its adapter is merged into.

    Args:
      folder: of the run.
      say: as in `load_run`.
      into: for a run on quantised weights: "original" for those before quantising, "dequantized"
        for those that training saw; None for the former where there are such.
      other_base: as in `load_run`.

    Raises:
      ValueError: if there are no such weights.
    """
    base, lora = load_run(folder, say, quantized=into == "dequantized", other_base=other_base)
    model = config.load(Path(folder) / "config.yaml").model
    fmt = weights.describe(model.formats)
    how = f"{fmt}, calibrated" if model.calibrate else fmt
    is_packed = _has_packed(base.params)
    if into == "original" and is_packed:
        raise ValueError(
            f"{base.name} holds its weights quantised, so there are no original ones. Merge "
            "with --into dequantized, or leave --into out."
        )
    if into == "dequantized" and not is_packed:
        raise ValueError(f"The base of {folder} is not quantised: leave --into out.")
    if is_packed:
        return base, lora, " The adapter was merged into the dequantised weights it was trained on."
    if fmt is None:
        return base, lora, ""
    remark = (
        f" The adapter was merged into the original weights of {base.name}; it was trained on them "
        f"quantised ({how}). --into dequantized merges it into those."
    )
    return base, lora, remark


_LEGEND = """\
Norms are relative: update to the weight, rounding (of all these layers, and of the worst) to the
merged weight; to the update: erased and noise, the part of it that packing the merged weights again
would take away, and all that this would change; shift, from what training saw to the original."""


def merge_report(
    folder: str | os.PathLike[str], params: Any, layers: int, *, other_base: bool = False
) -> str | None:
    """Says what merging a run on a quantised base costs, for each weight; None for another run.

    Args:
      folder: of the run.
      params: from `load_to_merge`: over the packed weights, or over the original ones.
      layers: the most layers of a stack to measure on, evenly spaced; 0 for none at all.
      other_base: as in `load_run`.
    """
    run = config.load(Path(folder) / "config.yaml")
    formats = run.model.formats
    is_packed = _has_packed(params)
    if layers < 0:
        raise ValueError(f"--error-layers must be at least 0, got {layers}.")
    if layers < 1 or not (formats or is_packed):
        return None
    trained = {}
    own = run.lora.init != "default" or run.model.calibrate
    if own and not is_packed:  # then what training saw cannot be packed from the originals
        base = load_run(folder, lambda text: None, other_base=other_base)[0]
        trained = leaves_by_path(base.params)
    rows = []
    for path, leaf in leaves_by_path(params).items():
        if not isinstance(leaf, jlora.LoraArray):
            continue
        leaf, base = _some_layers(leaf, layers), None
        fmt = None if is_packed else weights.format_at(path, formats)
        if path in trained:
            # Over the originals a start's adapter is another than over the base it left.
            own_base = leaf if run.lora.init != "default" else leaf.w
            base, leaf = {path: own_base}, _some_layers(trained[path], layers)
        elif fmt is not None:
            base = {path: leaf.w}  # and beside it what training saw
            axes = weights.axes_at(path, leaf.ndim)
            leaf = dataclasses.replace(leaf, w=pack_weight(leaf.w, axes, fmt))
        rows += jlora.merge_error({path: leaf}, base=base).rows
    return (
        f"\nWhat merging costs, on {layers} layers at most:\n{MergeError(tuple(rows))}\n{_LEGEND}"
    )


def logits_report(
    folder: str | os.PathLike[str], loaded: Base, text: str, *, other_base: bool = False
) -> str:
    """Says what merging changes in the logits of a text, beside the model that training saw.

    Args:
      folder: of the run.
      loaded: from `load_to_merge`.
      text: the sample, not empty; special tokens only where it spells them.
      other_base: as in `load_run`.
    """
    tokens = loaded.tokenizer.encode(text)
    trained, on_original = loaded.params, None
    if config.load(Path(folder) / "config.yaml").model.formats and not _has_packed(trained):
        trained = load_run(folder, lambda text: None, other_base=other_base)[0].params
        on_original = lambda: loaded.params  # noqa: E731

    def forward(params: Any, tokens: jax.Array) -> Any:
        return loaded.model.apply({"params": params}, tokens)

    errors = logit_errors(trained, on_original, forward, (jnp.asarray([tokens]),))
    return f"\nIn the logits of {len(tokens)} tokens:\n{MergeError((), tuple(errors))}"


def _some_layers(leaf: jlora.LoraArray, count: int) -> jlora.LoraArray:
    """The leaf with `count` layers of its stack, first and last among them."""
    if "stack" not in leaf.axes:
        return leaf
    place = leaf.axes.index("stack")
    depth = leaf.shape[place]
    # One of the middle where there is room for one alone.
    chosen = np.linspace(0, depth - 1, count) if count > 1 else np.array([depth // 2])
    chosen = np.unique(chosen.round().astype(int))
    if isinstance(leaf.w, QuantArray):
        w = jax.tree.map(lambda x: x[chosen], leaf.w)
    else:
        w = jnp.take(leaf.w, chosen, axis=place)
    return dataclasses.replace(leaf, w=w, **leaf.of_layers(chosen))


def _has_packed(params: Any) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantArray))
    return any(isinstance(leaf, QuantArray) for leaf in leaves)
