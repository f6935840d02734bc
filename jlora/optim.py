"""Optimizers over the labels of an adapted tree: short compositions of optax."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import optax

from jlora.lora import LoraConfig, labels

__all__ = ["optimizer"]

_LABELS = ("lora_a", "lora_b", "magnitude", "full", "frozen")


def optimizer(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    config: LoraConfig,
) -> optax.GradientTransformation:
    """An `optax.multi_transform` over the labels of the tree; frozen arrays never move.

    Used on the trainable tree of `jlora.split`, no state or update of a frozen weight exists. On
    the whole tree, which some training loops insist on, frozen arrays get zero updates and no
    moments, but their gradients were computed.

    Args:
      tx: one transformation for everything that trains, so that a global-norm clip inside it sees
        all of it; or a mapping from label to transformation. Labels are `lora_a`, `lora_b`,
        `magnitude`, `full` and `frozen`; `frozen` defaults to `optax.set_to_zero`.
      config: the config that the tree was made with.

    Raises:
      ValueError: for an unknown label, or, on `init`, for an array whose label has no
        transformation.

    >>> tx = optimizer(optax.adamw(2e-4), LoraConfig(targets=("q_proj", "v_proj")))
    """
    if not isinstance(tx, Mapping):
        one = {"trainable": tx, "frozen": optax.set_to_zero()}
        return optax.multi_transform(one, functools.partial(_trainable_or_frozen, config))
    if unknown := set(tx) - set(_LABELS):
        raise ValueError(f"Unknown labels {sorted(unknown)}; known labels are {_LABELS}.")
    transforms = {"frozen": optax.set_to_zero(), **tx}

    def checked_labels(tree: Any) -> Any:
        named = labels(tree, config)
        if missing := set(jax.tree.leaves(named)) - set(transforms):
            raise ValueError(
                f"The tree has arrays labelled {sorted(missing)}, and the optimizer has no "
                f"transformation for them: it has {sorted(transforms)}."
            )
        return named

    return optax.multi_transform(transforms, checked_labels)


def _trainable_or_frozen(config: LoraConfig, tree: Any) -> Any:
    return jax.tree.map(
        lambda name: "frozen" if name == "frozen" else "trainable", labels(tree, config)
    )
