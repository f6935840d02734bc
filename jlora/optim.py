"""Optimizers over the labels of an adapted tree: short compositions of optax."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora.leaf import is_array_leaf
from jlora.lora import LoraArray, LoraConfig, labels
from jlora.quant import QuantArray

__all__ = ["lora_fa", "lora_plus", "optimizer"]

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
        transformation, or for a quantised weight.

    >>> tx = optimizer(optax.adamw(2e-4), LoraConfig(targets=("q_proj", "v_proj")))
    """
    if not isinstance(tx, Mapping):
        one: dict[Any, Any] = {"trainable": tx, "frozen": optax.set_to_zero()}
        by_label = optax.multi_transform(one, functools.partial(_trainable_or_frozen, config))
        return _refuse_quantised(by_label)
    if unknown := set(tx) - set(_LABELS):
        raise ValueError(f"Unknown labels {sorted(unknown)}; known labels are {_LABELS}.")
    transforms: dict[Any, Any] = {"frozen": optax.set_to_zero(), **tx}

    def checked_labels(tree: Any) -> Any:
        named = labels(tree, config)
        if missing := set(jax.tree.leaves(named)) - set(transforms):
            raise ValueError(
                f"The tree has arrays labelled {sorted(missing)}, and the optimizer has no "
                f"transformation for them: it has {sorted(transforms)}."
            )
        return named

    return _refuse_quantised(optax.multi_transform(transforms, checked_labels))


def _refuse_quantised(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    def init(params: Any) -> Any:
        leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantArray))
        for leaf in leaves:
            if isinstance(leaf, QuantArray) and jax.tree.leaves(leaf):
                raise ValueError(
                    f"The optimizer got a quantised weight ({type(leaf).__name__} {leaf.shape}), "
                    "which has no gradient. Give it the trainable tree: trainable, frozen = "
                    "jlora.split(params, config); tx.init(trainable)."
                )
        return tx.init(params)

    return optax.GradientTransformation(init, tx.update)


def _trainable_or_frozen(config: LoraConfig, tree: Any) -> Any:
    return jax.tree.map(
        lambda name: "frozen" if name == "frozen" else "trainable", labels(tree, config)
    )


def lora_plus(
    make_tx: Callable[[Any], optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    config: LoraConfig,
    *,
    ratio: float,
) -> optax.GradientTransformation:
    """Trains `b` with a learning rate `ratio` times that of `a` (LoRA+, arXiv:2402.12354).

    Args:
      make_tx: builds the optimizer for one learning rate or schedule, e.g. `optax.adamw`.
      learning_rate: per step, for `a` and for leaves that train whole; a number or a schedule.
      config: the config that the tree was made with.
      ratio: at least 1. The authors' examples use 16 to 20, with a lower `learning_rate` than
        without; they give no single value, so there is no default.

    Raises:
      ValueError: if `ratio` is below 1.

    >>> tx = lora_plus(optax.adamw, 1e-4, LoraConfig(), ratio=16)
    """
    if not ratio >= 1:
        raise ValueError(f"ratio must be at least 1, got {ratio!r}.")
    if callable(learning_rate):
        slow, fast = make_tx(learning_rate), make_tx(lambda step: ratio * learning_rate(step))
    else:
        slow, fast = make_tx(learning_rate), make_tx(ratio * learning_rate)
    named = {"lora_a": slow, "magnitude": slow, "full": slow, "lora_b": fast}
    return optimizer(named, config)


def lora_fa(
    tx: optax.GradientTransformation, config: LoraConfig, *, damping: float = 1e-8
) -> optax.GradientTransformation:
    """Freezes `a` and trains `b` with preconditioned gradients (LoRA-FA, arXiv:2308.03303).

    The gradient of `b` becomes `inv(a.T @ a + damping) @ grad / scaling**2`: then a plain step of
    `a @ b` is the dense one projected onto what `a` spans. `tx` applies after it.

    Args:
      tx: for `b` and for leaves that train whole; PEFT uses AdamW with `eps=1e-6`, added before the
        bias correction, and decays weights after the step instead of with it.
      config: the config that the tree was made with.
      damping: added to the diagonal of `a.T @ a`.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("lora_fa needs the parameters: call tx.update(grads, state, params).")
        conditioned = jax.tree.map(
            lambda grad, leaf: _precondition(grad, leaf, damping),
            updates,
            params,
            is_leaf=is_array_leaf,
        )
        return conditioned, state

    precondition = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    named = {"lora_a": optax.set_to_zero(), "magnitude": tx, "full": tx, "lora_b": tx}
    return optax.chain(precondition, optimizer(named, config))


def _precondition(grad: Any, leaf: Any, damping: float) -> Any:
    if not isinstance(leaf, LoraArray):
        return grad
    if leaf.arrays["b"][0] == "frozen":
        raise ValueError(
            f"lora_fa freezes a and trains b, and {leaf.kind} trains neither: use jlora.optimizer."
        )
    stack = leaf.a.shape[: leaf.roles.count("stack")]
    a = leaf.a.reshape(*stack, -1, leaf.rank).astype(jnp.float32)
    gram = jnp.einsum("...ir,...is->...rs", a, a, precision="highest")
    b = grad.b.reshape(*stack, leaf.rank, -1).astype(jnp.float32)
    solved = jnp.linalg.solve(gram + damping * jnp.eye(leaf.rank), b) / leaf.scaling**2
    return dataclasses.replace(grad, b=solved.reshape(grad.b.shape).astype(grad.b.dtype))
