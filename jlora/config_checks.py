"""Checks of a run's config that look at several keys at once."""

from pathlib import Path
from typing import Any

__all__ = ["check"]


def check(config: Any, path: Path) -> None:
    """Refuses what is right key by key and wrong together.

    Args:
      config: a `RunConfig`.
      path: of its file, for messages.

    Raises:
      ValueError: with the keys, and what to set instead.
    """
    train, optim, data = config.train, config.optim, config.data
    if (train.steps is None) == (train.epochs is None):
        given = "both are there (set one to null)" if train.steps else "neither is there"
        raise ValueError(f"{path}: give one of train.steps and train.epochs; {given}.")
    if train.steps is not None and optim.warmup_steps >= train.steps:
        raise ValueError(
            f"{path}: optim.warmup_steps is {optim.warmup_steps}; it must be below train.steps, "
            f"which is {train.steps}."
        )
    held_out = data.validation
    if isinstance(held_out, int | float) and (isinstance(held_out, bool) or held_out <= 0):
        raise ValueError(
            f"{path}: data.validation: got {held_out!r}, expected more than 0 or null."
        )
    has_held_out = held_out is not None or data.train.startswith("builtin:")
    if not has_held_out and (config.eval.every or config.eval.patience):
        raise ValueError(
            f"{path}: eval.every and eval.patience need held-out rows: set data.validation, for "
            "instance to 0.05."
        )
    if config.eval.patience and not config.eval.every:
        raise ValueError(f"{path}: eval.patience counts evaluations: set eval.every too.")

    if config.model.quantize_embeddings and (config.model.new_tokens or config.lora.rows):
        raise ValueError(
            f"{path}: model.new_tokens and lora.rows train rows of tables in full precision: leave "
            "out model.quantize_embeddings, or these."
        )
    if config.model.calibrate and (config.model.quantize != "nf4" or config.mesh):
        raise ValueError(
            f"{path}: model.calibrate rounds an NF4 base on one device: set model.quantize to nf4 "
            "and leave out mesh, or leave out model.calibrate."
        )
    init = config.lora.init
    if config.model.calibrate and init not in ("default", "eva", "qera", "qera_diagonal"):
        raise ValueError(
            f"{path}: lora.init={init} packs the base again, which takes the rounding of "
            "model.calibrate away: choose one of the two."
        )
    if init.startswith(("loftq", "qera")) and config.model.formats is None:
        raise ValueError(
            f"{path}: lora.init={init} makes up for the error of quantising: set model.quantize, "
            "for instance to nf4."
        )
    if init != "default" and config.lora.variant != "lora":
        how = "measures" if init == "eva" else "changes"
        both = f"lora.init={init} {how} what lora.variant={config.lora.variant} starts from"
        raise ValueError(f"{path}: {both}: choose one of the two.")
