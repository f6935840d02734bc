"""A run that is there: its base model with what it trained."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import jlora
from jlora import checkpoint, config, peft, train
from jlora.base import Base, adapt_base, load_base
from jlora.quant import QuantArray
from jlora.run import lora_config, make_optimizer

__all__ = ["is_run", "load_run", "load_to_merge"]

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
) -> tuple[Base, jlora.LoraConfig]:
    """Loads the base model of a run with its adapter: the result, or the newest checkpoint's.

    Args:
      folder: of the run.
      say: told which checkpoint is used if the run is not finished.
      dtype: of the base; None for that of the run.
      quantized: False gives the base's own weights to a run that quantised them.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no config.yaml.")
    run = config.load(folder / "config.yaml")
    base = load_base(
        run.model.path,
        dtype=dtype or run.model.dtype,
        quantize=run.model.quantize if quantized else None,
        cache=run.model.cache,
    )
    if (folder / "result.json").exists():
        params, lora = peft.load(folder / "adapter", base.params)
        return dataclasses.replace(base, params=params), lora
    lora = lora_config(run)
    base = adapt_base(base, lora, jax.random.key(run.seed))
    trainable, frozen = jlora.split(base.params, lora)
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
    params = jlora.combine(restored.tree.trainable, frozen)
    return dataclasses.replace(base, params=params), lora


def load_to_merge(
    folder: str | os.PathLike[str], say: Say, *, into: str | None = None
) -> tuple[Base, jlora.LoraConfig, str]:
    """Loads a run for merging, and a remark on what its adapter is merged into.

    Args:
      folder: of the run.
      say: as in `load_run`.
      into: for a run on quantised weights: "original" for those before quantising, "dequantized"
        for those that training saw; None for the former where there are such.

    Raises:
      ValueError: if there are no such weights.
    """
    base, lora = load_run(folder, say, quantized=into == "dequantized")
    fmt = config.load(Path(folder) / "config.yaml").model.quantize
    is_packed = _has_packed(base.params)
    if into == "original" and is_packed:
        raise ValueError(
            f"{base.name} holds its weights in 4 bits only, so there are no original ones. Merge "
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
        f"in {fmt}. --into dequantized merges it into those."
    )
    return base, lora, remark


def _has_packed(params: Any) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantArray))
    return any(isinstance(leaf, QuantArray) for leaf in leaves)
