"""The training step and the loop around it, given batches and a loss; knows no file format.

Gradients are taken with respect to the trainable tree of `jlora.split` alone, so no gradient,
moment or update of a frozen weight exists anywhere in the compiled step.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora import checkpoint, tree

__all__ = [
    "FitResult",
    "NonFiniteError",
    "Progress",
    "TrainState",
    "adamw",
    "evaluate",
    "fit",
    "init_state",
    "learning_rate_schedule",
    "make_eval_step",
    "make_train_step",
    "state_shardings",
]

Batch = Any
LossFn = Callable[[Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a training step reads and replaces.

    Attributes:
      step: `Int32[]`, optimizer steps done.
      trainable: the first tree of `jlora.split`.
      opt_state: the optimizer's state over `trainable`.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any


def init_state(trainable: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Works on `ShapeDtypeStruct`s under `jax.eval_shape`."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))


def state_shardings(
    state: TrainState, trainable: Any, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Where a state lies on a mesh: moments beside what they are moments of, counters everywhere.

    Args:
      state: from `init_state`, of arrays or of `ShapeDtypeStruct`s.
      trainable: the NamedSharding of each trainable array.
      tx: the optimizer that `state` is of.
      mesh: that of the shardings.

    Returns:
      The state with a NamedSharding in place of each array.
    """
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    opt_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        state.opt_state,
        trainable,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, trainable, opt_state)  # pyright: ignore[reportArgumentType]


def learning_rate_schedule(
    kind: Literal["cosine", "linear", "constant"],
    learning_rate: float,
    *,
    steps: int,
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
) -> Callable[[Any], Any]:
    """Warms up linearly from 0, then decays to `final_fraction` of the peak at the last step.

    Raises:
      ValueError: if the warm-up is not shorter than the run, or `kind` is unknown.
    """
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"The warm-up of {warmup_steps} steps must be shorter than {steps} steps.")
    rest = steps - warmup_steps
    match kind:
        case "cosine":
            decay = optax.cosine_decay_schedule(learning_rate, rest, alpha=final_fraction)
        case "linear":
            decay = optax.linear_schedule(learning_rate, learning_rate * final_fraction, rest)
        case "constant":
            decay = optax.constant_schedule(learning_rate)
        case _:
            raise ValueError(f"A schedule is 'cosine', 'linear' or 'constant', got {kind!r}.")
    if not warmup_steps:
        return decay
    # The first step already moves: 1/warmup, not 0.
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def adamw(
    schedule: Callable[[Any], Any],
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) for `jlora.optimizer`; `weight_decay` is times the learning rate."""
    return optax.adamw(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay)


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, clip_norm: float | None = None
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the compiled optimizer step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> (loss_sum, token_count)` of one micro-batch.
      tx: from `jlora.optimizer`.
      clip_norm: the largest global norm, over all trainable leaves together, that a gradient keeps.

    Returns:
      `step(state, frozen, batch, key) -> (state, metrics)`. The leaves of `batch` are
      `[accumulation, ...]`: the gradients of the micro-batches are summed one after the other and
      divided once by the number of target tokens in all, so any split of a batch gives the same
      step. `state` is donated. `key` is the run's; each step and micro-batch draws its own from it.
      `metrics` holds scalars: `loss` (mean per target token), `grad_norm` (before clipping) and
      `target_tokens`.
    """

    def micro_loss(trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> Any:
        return loss_fn(tree.combine(trainable, frozen), batch, key)

    gradient = jax.value_and_grad(micro_loss, has_aux=True)

    def step(
        state: TrainState, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        step_key = jax.random.fold_in(key, state.step)

        def accumulate(totals: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, micro_batch = item
            micro_key = jax.random.fold_in(step_key, index)
            sums, grads = gradient(state.trainable, frozen, micro_batch, micro_key)
            return jax.tree.map(jnp.add, totals, (sums, grads)), None

        zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, state.trainable))
        indices = jnp.arange(len(jax.tree.leaves(batch)[0]))
        ((loss_sum, count), grads), _ = jax.lax.scan(accumulate, zeros, (indices, batch))
        per_token = 1 / jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g * per_token.astype(g.dtype), grads)
        grad_norm = optax.tree.norm(grads)
        if clip_norm is not None:
            shrink = jnp.minimum(1, clip_norm / jnp.maximum(grad_norm, 1e-30))
            grads = jax.tree.map(lambda g: g * shrink.astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss_sum * per_token, "grad_norm": grad_norm, "target_tokens": count}
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(loss_fn: LossFn) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
    """Builds the compiled `eval_step(trainable, frozen, batch) -> (loss_sum, token_count)`."""

    @jax.jit
    def eval_step(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return loss_fn(tree.combine(trainable, frozen), batch, None)

    return eval_step


def evaluate(
    eval_step: Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]],
    trainable: Any,
    frozen: Any,
    batches: Iterable[Batch],
) -> float:
    """The mean loss per target token, in nats, over all batches.

    Raises:
      ValueError: if the batches hold no target token.
    """
    sums = [eval_step(trainable, frozen, batch) for batch in batches]
    # float64 on the host: a sum over many batches in float32 would lose digits
    totals = np.asarray(jax.device_get(sums), np.float64).reshape(-1, 2).sum(axis=0)
    if totals[1] == 0:
        raise ValueError("The evaluation data holds no token that counts in the loss.")
    return float(totals[0] / totals[1])


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands: all that a resumed run needs besides the state on the device.

    Attributes:
      step: optimizer steps done.
      position: micro-batches used, which is where the data continues.
      tokens: tokens seen.
      first_loss: held-out loss before the first step.
      last_loss: held-out loss at the latest evaluation.
      best_loss: the lowest of them, and `best_step` the step it was measured at.
      stale: evaluations since the best one.
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0

    def after_step(self, micro_batches: int, tokens: int) -> "Progress":
        """The progress one optimizer step later."""
        return dataclasses.replace(
            self,
            step=self.step + 1,
            position=self.position + micro_batches,
            tokens=self.tokens + tokens,
        )

    def after_evaluation(self, loss: float) -> "Progress":
        """The progress with a held-out loss taken into account."""
        first = loss if self.first_loss is None else self.first_loss
        if self.best_loss is None or loss < self.best_loss:
            change = {"best_loss": loss, "best_step": self.step, "stale": 0}
        else:
            change = {"stale": self.stale + 1}
        return dataclasses.replace(self, first_loss=first, last_loss=loss, **change)


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is NaN or infinite; training on would spoil the adapters."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How `fit` ended.

    Attributes:
      state: after the last step.
      progress: likewise.
      reason: "finished", "early" (no better evaluation within `patience`) or "interrupted".
    """

    state: TrainState
    progress: Progress
    reason: Literal["finished", "early", "interrupted"]


def fit(
    state: TrainState,
    frozen: Any,
    *,
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    batch: Callable[[int], Batch],
    key: jax.Array,
    steps: int,
    accumulation: int = 1,
    progress: Progress | None = None,
    evaluate: Callable[[Any], float] | None = None,
    eval_every: int | None = None,
    patience: int | None = None,
    checkpoints: checkpoint.Checkpoints | None = None,
    save_every: int | None = None,
    metadata: dict[str, Any] | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
    learning_rate: Callable[[int], float] | None = None,
    count_tokens: Callable[[Batch], int] = lambda batch: 0,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    should_stop: Callable[[int], bool] = lambda step: False,
) -> FitResult:
    """Trains to `steps`, from wherever `state` and `progress` stand.

    Metrics are read one step behind the device, so reading them, and looking for NaN, never keeps
    it waiting. Before a checkpoint they are read up to the present: none is saved after a NaN.

    Args:
      state: donated.
      frozen: the second tree of `jlora.split`.
      train_step: from `make_train_step`.
      batch: gives micro-batch `position`, a tree of NumPy arrays.
      key: the run's random key; the same when it is resumed.
      steps: optimizer steps in all.
      accumulation: micro-batches a step.
      progress: of the restored checkpoint.
      evaluate: held-out loss of a trainable tree; called before the first step and after the last.
      eval_every: and each so many steps in between.
      patience: ends the run after so many evaluations without a better one.
      checkpoints: where to save; after the last step, at an interruption, and at a new best
        evaluation if `patience` is set.
      save_every: and each so many steps.
      metadata: saved along, besides `progress`.
      callbacks: each gets one dict a step, in order, with step 0 for the evaluation before.
      learning_rate: the schedule, to report its value.
      count_tokens: how many tokens of a micro-batch to report.
      place: puts a step's batch, `[accumulation, ...]` NumPy arrays, on the devices of a mesh.
      should_stop: asked before each step with the steps done; True saves and returns.

    Raises:
      NonFiniteError: naming the step, at the first NaN or infinity. The checkpoints stay good.
      CheckpointError: if a checkpoint cannot be written.
    """
    progress = progress or Progress()
    ledger = _Ledger(callbacks)

    def run_evaluation(progress: Progress) -> tuple[Progress, dict[str, float]]:
        if evaluate is None:
            return progress, {}
        ledger.resolve()
        loss = evaluate(state.trainable)
        _require_finite(progress.step, "held-out loss", loss)
        return progress.after_evaluation(loss), {"eval_loss": loss}

    def save(progress: Progress) -> None:
        if checkpoints is not None:
            record = {**(metadata or {}), "progress": dataclasses.asdict(progress)}
            best = progress.best_step if patience else None
            checkpoints.save(progress.step, state, record, best=best)

    if progress.step == 0 and evaluate is not None:
        progress, found = run_evaluation(progress)
        ledger.emit({"step": 0, "tokens": 0, **found})
    saved = progress.step
    while not (reason := _reason_to_end(progress, steps, patience)):
        if should_stop(progress.step):
            reason = "interrupted"
            break
        micro_batches = [batch(progress.position + i) for i in range(accumulation)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *micro_batches)
        state, metrics = train_step(state, frozen, place(stacked), key)
        tokens = sum(count_tokens(one) for one in micro_batches)
        rate = {} if learning_rate is None else {"learning_rate": learning_rate(progress.step)}
        progress = progress.after_step(accumulation, tokens)
        ledger.add({"step": progress.step, "tokens": progress.tokens, **rate}, metrics, tokens)
        found = {}
        if _due(progress.step, eval_every, steps):
            progress, found = run_evaluation(progress)
        new_best = bool(found) and bool(patience) and progress.stale == 0
        saving = _due(progress.step, save_every, steps) or new_best
        if found or saving:
            ledger.settle(found)
        if saving:
            save(progress)
            saved = progress.step
    ledger.settle()
    if progress.step > saved:
        save(progress)
    if checkpoints is not None:
        checkpoints.wait()
    return FitResult(state, progress, reason)


def _due(step: int, every: int | None, steps: int) -> bool:
    return step == steps or (every is not None and step % every == 0)


def _reason_to_end(
    progress: Progress, steps: int, patience: int | None
) -> Literal["finished", "early", "interrupted"] | None:
    if progress.step >= steps:
        return "finished"
    if patience is not None and progress.stale >= patience:
        return "early"
    return None


class _Ledger:
    """The metrics of the latest step, which the device may still be working on."""

    def __init__(self, callbacks: Sequence[Callable[[dict[str, Any]], None]]):
        self._callbacks = callbacks
        self._open: tuple[dict[str, Any], dict[str, jax.Array], int] | None = None
        self._line: dict[str, Any] | None = None
        self._clock: float | None = None  # None before the first step, which compiles

    def add(self, line: dict[str, Any], metrics: dict[str, jax.Array], tokens: int) -> None:
        """Takes a step's metrics once those of the step before are there and given out."""
        self.settle()
        self._open = (line, metrics, tokens)

    def resolve(self) -> None:
        """Waits for the latest step; raises if it was not finite, before anyone is told of it."""
        if self._open is None:
            return
        (line, metrics, tokens), self._open = self._open, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "grad_norm"):
            _require_finite(line["step"], name, values[name])
        now = time.perf_counter()
        if tokens and self._clock is not None:
            values["tokens_per_second"] = round(tokens / (now - self._clock), 1)
        self._clock = now
        self._line = {**line, **values, "target_tokens": int(values["target_tokens"])}

    def settle(self, extra: dict[str, Any] | None = None) -> None:
        """Waits for the latest step and gives its line out, with `extra` in it."""
        self.resolve()
        if self._line is not None:
            self.emit({**self._line, **(extra or {})})
            self._line = None
        if extra and self._clock is not None:
            self._clock = time.perf_counter()  # the evaluation's time is not the next step's

    def emit(self, line: dict[str, Any]) -> None:
        for callback in self._callbacks:
            callback(line)


def _require_finite(step: int, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(f"{name} is {value} at step {step}")
