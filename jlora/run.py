"""A run put together from its config: model, adapters, data, training, results.

The model, LoRA, the data and the training loop meet here; none of them knows of the others.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import (
    chat,
    checkpoint,
    config,
    data,
    devices,
    docstrings,
    generate,
    models,
    multihost,
    objective,
    optim,
    peft,
    process,
    report,
    starts,
    train,
)
from jlora.base import Base, adapt_base, cache_folder, check_start, load_base, load_vocabulary
from jlora.fingerprint import fingerprint, rows_of
from jlora.fresh import Rows, adapt_run, calibrate_run, lora_config, make_mesh, start_digest

__all__ = [
    "inspect",
    "make_loss",
    "make_optimizer",
    "read_data",
    "run_training",
    "save_adapter",
]

Say = Callable[[str], None]


def make_loss(
    base: Base, lora: jlora.LoraConfig, *, chunk_tokens: int | None = None
) -> train.LossFn:
    """The loss of a batch as `data.Batches` gives it; `chunk_tokens` as in `objective`."""
    return objective.make_loss(
        base.model,
        base.params,
        lora,
        chunk_tokens=chunk_tokens,
        row_parts=devices.row_parts(base.mesh),
    )


def make_optimizer(
    run: config.RunConfig, lora: jlora.LoraConfig, steps: int
) -> tuple[Any, Callable[[Any], Any]]:
    """AdamW with the run's schedule, and the schedule."""
    optim_config = run.optim
    schedule = train.learning_rate_schedule(
        optim_config.schedule,
        optim_config.learning_rate,
        steps=steps,
        warmup_steps=optim_config.warmup_steps,
        final_fraction=optim_config.final_fraction,
    )
    adamw = train.adamw(
        schedule,
        beta1=optim_config.beta1,
        beta2=optim_config.beta2,
        weight_decay=optim_config.weight_decay,
    )
    return optim.optimizer(adamw, lora), schedule


# The data


def read_data(
    run: config.RunConfig, tokenizer: chat.Tokenizer
) -> tuple[list[data.Example], list[data.Example]]:
    """Reads (training, held-out) examples."""
    options = run.data
    train_path, validation = options.train, options.validation
    if train_path == "builtin:docstrings":
        train_path, own = docstrings.write_dataset(cache_folder())
        validation = str(own) if validation is None else validation
    elif str(train_path).startswith("builtin:"):
        raise ValueError(
            f"data.train: got {train_path!r}, expected 'builtin:docstrings' or a file."
        )

    def read(path: str | Path) -> list[data.Example]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no data file {path}.")
        return data.read_examples(
            path,
            tokenizer,
            max_length=options.length,
            format=options.format,
            text_field=options.text_field,
            completions_only=options.completions_only,
            too_long=options.too_long,
        )

    held_out: float | int | list[data.Example]
    held_out = read(validation) if isinstance(validation, str) else validation or 0
    return data.split(read(train_path), held_out, run.seed)


def _digest(*parts: Sequence[data.Example]) -> str:
    """Of all tokens and masks: a resumed run must find the data it began with."""
    digest = hashlib.sha256()
    for part in parts:
        for example in part:
            digest.update(np.asarray(example.tokens, np.int32).tobytes())
            digest.update(np.asarray(example.loss_mask, np.bool_).tobytes())
        digest.update(b"|")
    return digest.hexdigest()


# Training


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """A run put together, before its first step."""

    run: config.RunConfig
    base: Base
    lora: jlora.LoraConfig
    examples: list[data.Example]
    batches: data.Batches
    held_out: list[data.Example]
    steps: int
    metadata: dict[str, Any]


def run_training(run: config.RunConfig, say: Say, on: Sequence[Any]) -> None:
    """Does what `jlora train` does: begins a run, resumes it, or says that it is finished.

    Args:
      run: from `config.load`.
      say: told what a user should know.
      on: all devices, of all processes, for the mesh of the run.
    """
    devices.check_connected()
    devices.same_everywhere("The configs", run.model_dump_json())
    folder = run.folder
    say = say if devices.is_first() else _say_nothing
    if devices.from_first(lambda: _is_finished(run, say)):
        return
    with contextlib.ExitStack() as stack:
        devices.from_first(lambda: stack.enter_context(process.lock(folder)))
        devices.check_shared(folder)
        watchdog = stack.enter_context(process.Watchdog(_whisper))
        job = _prepare(run, say, on)
        devices.from_first(lambda: config.save(folder / "config.yaml", run))
        checkpoints = checkpoint.Checkpoints(
            folder / "checkpoints", keep=run.checkpoint.keep, on_message=say
        )
        with contextlib.closing(checkpoints):
            result = _fit(job, checkpoints, watchdog, say)
            if result.reason == "interrupted":
                say(
                    f"Interrupted; saved at step {result.progress.step} of {job.steps}. "
                    "The same command resumes."
                )
                return
            trainable = _choose(job, result, checkpoints, say)
        _finish(job, result, trainable, say)


def _say_nothing(text: str) -> None:
    pass


def _whisper(text: str) -> None:
    number = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    print(f"jlora: {number}{text}", file=sys.stderr, flush=True)


def inspect(run: config.RunConfig, say: Say) -> None:
    """Does what `jlora inspect` does: shows the data and what would train."""
    job = _prepare(run, say, None, weights=False)
    if run.lora.init in starts.MEASURED:
        count = run.lora.init_batches
        ranks = " and may move ranks from one weight to another" * (run.lora.init == "eva")
        say(f"lora.init={run.lora.init} is measured on {count} batches before step 0{ranks}.")
    if count := run.model.calibrate:
        say(f"model.calibrate reads the original weights, and rounds the base to {count} batches.")
    example = data.preview(job.examples[0], job.base.tokenizer)
    say(f"The first example, with what counts in the loss in \u27e6...\u27e7:\n{example}")
    tokens = run.train.batch_size * run.train.accumulation * run.data.length
    say(f"{job.steps} steps of at most {tokens:,} tokens, into {run.folder}.")


def _is_finished(run: config.RunConfig, say: Say) -> bool:
    """Compares with what the folder holds; raises if that is another run's."""
    folder = run.folder
    saved = folder / "config.yaml"
    begun = (folder / "result.json").exists() or any((folder / "checkpoints").glob("[0-9]*"))
    if not begun or not saved.exists():
        return False
    if changed := config.differences(config.load(saved), run):
        raise ValueError(
            f"{folder} holds a run with another config:\n  "
            + "\n  ".join(changed)
            + f"\nUndo the change to resume it, or choose another name (now {run.name!r})."
        )
    if not (folder / "result.json").exists():
        return False
    result = json.loads((folder / "result.json").read_text())
    say(f"{folder} is finished: {_outcome(result)}. To train again, choose another name.")
    return True


def _outcome(result: dict[str, Any]) -> str:
    before, after = result["eval_loss_before"], result["eval_loss"]
    text = f"{result['steps']} steps"
    if before is not None:
        text += f", held-out loss {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.1f} %)"
    return f"{text}, adapter in {result['adapter']}"


def _prepare(
    run: config.RunConfig, say: Say, on: Sequence[Any] | None, *, weights: bool = True
) -> _Job:
    """Everything that can be wrong is found here, the cheapest first; without devices, no mesh."""
    mesh = None if on is None else make_mesh(run, on)
    vocabulary = load_vocabulary(run.model.path, run.model.new_tokens)
    examples, held_out = read_data(run, vocabulary.tokenizer)
    batches = data.Batches(
        examples,
        batch_size=run.train.batch_size,
        length=run.data.length,
        seed=run.seed,
        pack=run.data.pack,
    )
    steps = run.train.steps or math.ceil(
        batches.count(run.train.epochs or 1) / run.train.accumulation
    )
    make_optimizer(run, lora_config(run), steps)
    targets = sum(example.num_targets for example in examples)
    say(
        f"{len(examples):,} training examples with {sum(map(len, examples)):,} tokens, of which "
        f"{targets:,} count in the loss; {len(held_out):,} held-out examples."
    )
    load = functools.partial(
        load_base,
        run.model.path,
        dtype=run.model.dtype,
        remat=run.model.remat,
        unroll=run.model.unroll,
        quantize=run.model.formats,
        cache=run.model.cache,
        vocabulary=vocabulary,
        mesh=mesh,
    )
    # A target that matches nothing need not wait for the weights, which may take minutes.
    base = load(weights=False)
    lora = lora_config(run, base)
    check_start(lora, mesh)
    base = adapt_base(base, lora, jax.random.key(run.seed))
    peft.check(base.params, lora)
    rows = rows_of(base.params)
    say(str(jlora.summary(base.params, lora)))
    digest = _digest(examples, held_out)
    devices.same_everywhere("The training data", digest)
    metadata: dict[str, Any] = {"lora": json.loads(lora.to_json()), "data_sha256": digest}
    if weights:
        base = load()
        metadata["base"] = fingerprint(base.params, rows=rows)
        if run.model.calibrate:
            base = calibrate_run(run, base, run.folder, Rows(batches, dict(metadata), say))
            metadata["base"] = fingerprint(base.params, rows=rows)
        base, started = adapt_run(run, base, run.folder, Rows(batches, dict(metadata), say))
        if started != lora:
            metadata["lora"], lora = json.loads(started.to_json()), started
            say(str(jlora.summary(base.params, lora)))
        if lora.init != "default" or lora.variant == "vera":  # what no checkpoint holds
            metadata["start"] = start_digest(base.params)
    return _Job(run, base, lora, examples, batches, held_out, steps, metadata)


def _fit(
    job: _Job, checkpoints: checkpoint.Checkpoints, watchdog: process.Watchdog, say: Say
) -> train.FitResult:
    run, lora, mesh = job.run, job.lora, job.base.mesh
    tx, schedule = make_optimizer(run, lora, job.steps)
    trainable, frozen = jlora.split(job.base.params, lora)
    state = _fresh_state(trainable, tx, mesh)
    progress = train.Progress()
    restored = checkpoints.restore(state, expect=job.metadata)
    if restored is not None:
        state = restored.tree
        progress = train.Progress(**restored.metadata["progress"])
        say(f"Resuming at step {restored.step} of {job.steps}.")
    loss_fn = make_loss(job.base, lora, chunk_tokens=run.train.head_chunk_tokens)
    place = devices.put_rows(mesh, leading=1)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(job.steps)), np.float64)
    resumed_at = None if restored is None else restored.step
    with contextlib.ExitStack() as stack:
        shown: list[Any] = []
        if devices.is_first():
            log = report.MetricsLog(run.folder / "metrics.jsonl", resume_at=resumed_at)
            shown = [stack.enter_context(contextlib.closing(log))]
            shown.append(stack.enter_context(report.ProgressReport(job.steps, start=progress.step)))
        speak = shown[-1].say if shown else say
        stop = stack.enter_context(process.StopSignal(speak, agreed=devices.stop_together()))
        profile = devices.Profile(run.folder / "profile", run.train.profile)
        stack.enter_context(contextlib.closing(profile))

        def before_step(step: int) -> bool:
            watchdog(step)
            profile(step)
            return stop(step)

        stack.enter_context(_explained(checkpoints))
        return train.fit(
            state,
            frozen,
            train_step=train.make_train_step(loss_fn, tx, clip_norm=run.optim.clip_norm),
            batch=job.batches.batch,
            key=jax.random.fold_in(jax.random.key(run.seed), 1),
            steps=job.steps,
            accumulation=run.train.accumulation,
            progress=progress,
            evaluate=_evaluation(job, loss_fn, frozen),
            eval_every=run.eval.every,
            patience=run.eval.patience,
            checkpoints=checkpoints,
            save_every=run.checkpoint.every,
            metadata=job.metadata,
            callbacks=shown,
            learning_rate=lambda step: float(rates[step]),
            count_tokens=lambda batch: int(np.count_nonzero(batch["segment_ids"])),
            place=place,
            should_stop=before_step,
        )


def _fresh_state(trainable: Any, tx: Any, mesh: Any) -> train.TrainState:
    """The state before the first step, beside the weights."""
    make = functools.partial(train.init_state, tx=tx)
    # Copies, because the state is donated and the originals answer the "before" of samples.md.
    if mesh is None:
        return make(jax.tree.map(jnp.copy, trainable))
    where = jax.tree.map(lambda x: x.sharding, trainable)
    where = train.state_shardings(jax.eval_shape(make, trainable), where, tx, mesh)
    return jax.jit(make, out_shardings=where)(trainable)


@contextlib.contextmanager
def _explained(checkpoints: checkpoint.Checkpoints) -> Iterator[None]:
    """Adds to a NaN's message what is left and what to do."""
    try:
        yield
    except train.NonFiniteError as error:
        checkpoints.wait()
        last = checkpoints.latest()
        kept = "there is no checkpoint yet" if last is None else f"step {last} is the last saved"
        raise train.NonFiniteError(
            f"{error}. The run ends here, before it is saved: {kept}. Lower optim.learning_rate, "
            "warm up longer (optim.warmup_steps), or compute in float32 (model.dtype=float32)."
        ) from None


def _evaluation(job: _Job, loss_fn: train.LossFn, frozen: Any) -> Callable[[Any], float] | None:
    if not job.held_out:
        return None
    held_out = data.Batches(
        job.held_out,
        batch_size=job.run.eval.batch_size or job.run.train.batch_size,
        length=job.run.data.length,
        seed=0,
        shuffle=False,
        pack=job.run.data.pack,
    )
    batches = list(held_out.epoch())[: job.run.eval.batches]
    eval_step = train.make_eval_step(loss_fn)
    place = devices.put_rows(job.base.mesh)
    return lambda trainable: train.evaluate(eval_step, trainable, frozen, map(place, batches))


def _choose(
    job: _Job, result: train.FitResult, checkpoints: checkpoint.Checkpoints, say: Say
) -> Any:
    """The trained leaves to keep: the last, or with `eval.patience` the best."""
    best = result.progress.best_step
    if result.reason == "early":
        say(f"Stopped at step {result.progress.step}: no better evaluation since step {best}.")
    if not job.run.eval.patience or best == result.progress.step:
        return result.state.trainable
    if not best:
        say("No evaluation was better than the one before training; keeping the last step.")
        return result.state.trainable
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), result.state
    )
    restored = checkpoints.restore(template, step=best)
    assert restored is not None
    say(f"Taking the adapter of step {best}, the best on held-out rows.")
    return restored.tree.trainable


def _finish(job: _Job, result: train.FitResult, trainable: Any, say: Say) -> None:
    """Writes what a run leaves; result.json last, which marks it finished."""
    run, folder, progress = job.run, job.run.folder, result.progress
    _, frozen = jlora.split(job.base.params, job.lora)
    samples = []
    if run.eval.samples and job.held_out:
        samples = _samples(job, jlora.combine(trainable, frozen))
    trained = jlora.combine(multihost.to_host(trainable), frozen)
    outcome = {
        "steps": progress.step,
        "tokens": progress.tokens,
        "reason": result.reason,
        "eval_loss_before": progress.first_loss,
        "eval_loss": progress.best_loss if run.eval.patience else progress.last_loss,
        "best_step": progress.best_step,
        "adapter": str(folder / "adapter"),
    }

    def write() -> None:
        adapter, lora = trained, job.lora
        if lora.init != "default":  # of weights, only the shapes matter here
            initial = job.base.params
            adapter, lora = jlora.variants.to_plain_lora(initial, trained, lora, base=initial)
        recorded = job.metadata["base"]
        save_adapter(folder / "adapter", job.base, adapter, lora, recorded=recorded)
        lines = list(report.read_metrics(folder / "metrics.jsonl"))
        report.plot_losses(folder / "loss.png", lines, title=run.name)
        if samples:
            note = (
                f"Held-out prompts that training never saw, answered greedily by {run.model.path} "
                f"and by the same model with the adapter of this run ({job.steps} steps)."
            )
            report.write_samples(folder / "samples.md", samples, note=note)
        report.write_text(folder / "result.json", json.dumps(outcome, indent=2) + "\n")

    devices.from_first(write)
    say(f"Done: {_outcome(outcome)}.")


def save_adapter(
    folder: Path,
    base: Base,
    params: Any,
    lora: jlora.LoraConfig,
    *,
    recorded: Any = None,
    serve: bool = False,
) -> None:
    """Writes a PEFT folder, with the tokenizer beside the adapter if tokens were added.

    `params`, `lora`, `recorded` and `serve` are the tree, the config, the `base` and the `serve` of
    `peft.save`.
    """
    named = {"base_model": base.name, "revision": models.revision(base.name)}
    peft.save(folder, params, lora, **named, base=recorded, serve=serve)
    if base.new_tokens:  # as PEFT's users keep a tokenizer beside such an adapter
        for name, text in base.vocabulary.files.items():
            report.write_text(folder / name, text)


def _samples(job: _Job, trained: Any) -> list[report.Sample]:
    """Answers greedily with fresh adapters, which is the base, and with the trained ones."""
    tokenizer, count = job.base.tokenizer, job.run.eval.samples
    chosen = job.held_out[:: max(1, len(job.held_out) // count)][:count]
    cuts = [_prompt_length(example) for example in chosen]
    prompts = [example.tokens[:cut].tolist() for example, cut in zip(chosen, cuts, strict=True)]
    before, after = (
        generate.generate(
            job.base.forward,
            job.base.init_cache,
            params,
            prompts,
            max_new_tokens=job.run.eval.sample_tokens,
            key=jax.random.key(0),
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
        )
        for params in (job.base.params, trained)
    )
    return [
        report.Sample(
            prompt=tokenizer.decode(prompts[i]),
            reference=tokenizer.decode(chosen[i].tokens[cuts[i] :].tolist()),
            before=tokenizer.decode(before[i]),
            after=tokenizer.decode(after[i]),
        )
        for i in range(len(chosen))
    ]


def _prompt_length(example: data.Example) -> int:
    """Up to the first trained token; for plain text, where all are, the first half."""
    trained = np.flatnonzero(example.loss_mask[1:]) + 1
    first = int(trained[0]) if len(trained) else len(example)
    return first if first > 1 else max(1, len(example) // 2)
