"""The training step on random weights of a given shape: speed and memory of this machine.

The step is the one of a run: `jlora.init`, `adapt` on the decoder, the chunked cross-entropy and
AdamW. Only the weights and tokens are random, and the weights are made on the device, in place.

Model flops, of which the utilisation is a share, count what the mathematics of a LoRA step asks
for, whatever the program computes again:

    projections, head     4 * parameters * tokens          forward, and the gradient of the input
    adapters              6 * parameters * tokens          the same, and their own gradient
    attention            12 * layers * heads * head_dim * pairs

where `pairs` is how many (query, key) pairs the causal mask and the segments let through, and each
takes two products forward and four backward.
"""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import hardware, objective, optim, quant, shapes, train, tree
from jlora.leaf import is_array_leaf
from jlora.models import decoder, weights

__all__ = [
    "BASES",
    "Settings",
    "decoder_config",
    "measure",
    "model_flops",
    "random_params",
    "table",
]

BASES = ("bfloat16", "float32", "nf4", "int8", "float8")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      shape: a name in `shapes.NAMES`, or the path of a config.json.
      base: the format of the frozen weights, one of `BASES`; quantised ones compute in bfloat16.
      embeddings: a quantised format of the embedding and an untied head; None for the dtype that
        is computed in.
      remat: as in `DecoderConfig`.
      unroll: likewise.
      batch: rows of a micro-batch.
      length: tokens of a row.
      segments: packed examples in a row, of equal length; a row of one is not masked by segments.
      rank: of the adapters.
      variant: of the adapters, as in `LoraConfig`; model flops count those of "lora".
      targets: the adapted weights.
      head_chunk: tokens that go through the head together; None as in a run.
      accumulation: micro-batches of a step.
      steps: optimizer steps of a repetition.
      repetitions: timed one after the other, after `warm_up` steps.
      warm_up: steps before the first repetition.
    """

    shape: str = "1b"
    base: str = "bfloat16"
    embeddings: str | None = None
    remat: str = "none"
    unroll: int = 1
    batch: int = 4
    length: int = 2048
    segments: int = 1
    rank: int = 16
    variant: str = "lora"
    targets: tuple[str, ...] = _PROJECTIONS
    head_chunk: int | None = None
    accumulation: int = 1
    steps: int = 5
    repetitions: int = 3
    warm_up: int = 2

    def __post_init__(self):
        if self.base not in BASES:
            raise ValueError(f"base must be one of {list(BASES)}, got {self.base!r}.")
        if self.embeddings is not None and self.embeddings not in quant.FORMATS:
            raise ValueError(
                f"embeddings must be one of {list(quant.FORMATS)}, got {self.embeddings!r}."
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}.")
        if self.length % self.segments:
            raise ValueError(
                f"length {self.length} is no multiple of segments {self.segments}: segments are of "
                "equal length."
            )

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.accumulation * self.batch * self.length


def decoder_config(settings: Settings) -> decoder.DecoderConfig:
    """The shape to measure.

    Raises:
      ValueError: if there is no such shape.
    """
    config = shapes.decoder_config(settings.shape)
    dtype = "float32" if settings.base == "float32" else "bfloat16"
    return dataclasses.replace(config, dtype=dtype, remat=settings.remat, unroll=settings.unroll)


def measure(settings: Settings, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Compiles the step and runs it.

    Args:
      settings: what to measure.
      say: told what is being done.

    Returns:
      The settings and what was found, as `json.dumps` takes it; times in seconds, sizes in bytes.

    Raises:
      ValueError: if something in the settings cannot be, or the device's memory does not do.
    """
    config = decoder_config(settings)
    lora = jlora.LoraConfig(
        rank=settings.rank,
        alpha=2.0 * settings.rank,
        targets=settings.targets,
        variant=settings.variant,
    )
    with _memory_explained(settings):
        say(f"Making weights of the shape {settings.shape!r} ({settings.base}) ...")
        model = decoder.Decoder(config)
        state, frozen, step = _prepare(model, settings, lora)
        batch = _batch(config, settings)
        key = jax.random.key(1)
        say("Compiling ...")
        started = time.perf_counter()
        lowered = step.lower(state, frozen, batch, key)
        traced = time.perf_counter()
        compiled = lowered.compile()
        compile_time = time.perf_counter() - traced
        held = {
            "frozen_bytes": _bytes(frozen),
            "trainable_bytes": _bytes(state.trainable),
            "frozen_parameters": _count(decoder.param_shapes(config)),
            "trainable_parameters": _count(state.trainable),
        }
        say(f"Running {settings.repetitions} times {settings.steps} steps ...")
        times, losses = _run(compiled, state, frozen, batch, key, settings)
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError(f"The loss is not finite on random weights: {losses}.")
    return _result(config, settings, compiled, times, losses) | {
        "trace_seconds": round(traced - started, 2),
        "compile_seconds": round(compile_time, 2),
        **held,
    }


def _prepare(
    model: decoder.Decoder, settings: Settings, lora: jlora.LoraConfig
) -> tuple[train.TrainState, Any, Any]:
    """The state, the frozen tree and the step."""
    params = random_params(model, settings.base, settings.embeddings)

    def apply(params: Any, tokens: jax.Array) -> Any:
        return model.apply({"params": params}, tokens)

    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jlora.init(jax.random.key(0), params, lora, fn=apply, args=(tokens,))
    loss_fn = objective.make_loss(model, params, lora, chunk_tokens=settings.head_chunk)
    tx = optim.optimizer(train.adamw(lambda step: 1e-4), lora)
    trainable, frozen = jlora.split(params, lora)
    return train.init_state(trainable, tx), frozen, train.make_train_step(loss_fn, tx)


def _batch(config: decoder.DecoderConfig, settings: Settings) -> dict[str, jax.Array]:
    shape = (settings.accumulation, settings.batch, settings.length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=-1),
        "loss_mask": np.ones(shape, np.float32),
    }
    if settings.segments > 1:
        each = settings.length // settings.segments
        index = np.arange(settings.length, dtype=np.int32)
        batch["segment_ids"] = np.broadcast_to(1 + index // each, shape)
        batch["positions"] = np.broadcast_to(index % each, shape)
    return jax.device_put(batch)


def _run(
    step: Any, state: Any, frozen: Any, batch: Any, key: jax.Array, settings: Settings
) -> tuple[list[float], list[float]]:
    """Seconds of each repetition, and every loss, each read while the next step is under way."""
    losses: list[float] = []

    def run(steps: int) -> float:
        nonlocal state
        started = time.perf_counter()
        waiting = None
        for _ in range(steps):
            state, metrics = step(state, frozen, batch, key)
            if waiting is not None:
                losses.append(float(waiting))
            waiting = metrics["loss"]
        if waiting is not None:
            losses.append(float(waiting))
        jax.block_until_ready(state)
        return time.perf_counter() - started

    run(settings.warm_up)
    return [run(settings.steps) for _ in range(settings.repetitions)], losses


# Weights


def random_params(model: decoder.Decoder, base: str, embeddings: str | None = None) -> Any:
    """Norms are one and other numbers uniform with a standard deviation of 0.02.

    A quantised weight gets random codes; its scales are those of a small matrix of such numbers.
    """
    formats: Any = {"layers": base if base in quant.FORMATS else None, "embeddings": embeddings}
    params = weights.abstract(model.config, formats)
    matrix = 0.02 * jax.random.normal(jax.random.key(0), (512, 512), jnp.dtype(model.config.dtype))
    seeds = iter(range(1, 1 << 20))

    def fill(path: str, leaf: Any) -> Any:
        if not is_array_leaf(leaf):
            return _filled(leaf, next(seeds), (1.0, 0.0) if path.endswith("scale") else (0.0, 0.02))
        sample = jax.tree.leaves(quant.quantize({"w": matrix}, quant.format_of(leaf)))
        parts, treedef = jax.tree.flatten(leaf)
        filled = [
            _filled(part, next(seeds), _typical(like))
            for part, like in zip(parts, sample, strict=True)
        ]
        return jax.tree.unflatten(treedef, filled)

    return tree.map_with_path(fill, params, is_leaf=is_array_leaf)


def _typical(like: jax.Array) -> tuple[float, float]:
    """Mean and deviation to draw the numbers of such an array from; scales are all the mean."""
    numbers = like.astype(jnp.float32)
    return (0.0, float(numbers.std())) if like.dtype.itemsize == 1 else (float(numbers.mean()), 0.0)


def _filled(like: Any, seed: int, typical: tuple[float, float]) -> jax.Array:
    return _fill(like.shape, jnp.dtype(like.dtype).name, np.uint32(seed), *map(np.float32, typical))


@jax.jit(static_argnums=(0, 1))
def _fill(
    shape: tuple[int, ...], dtype: str, seed: jax.Array, mean: jax.Array, deviation: jax.Array
) -> jax.Array:
    """Random bits of an integer type, or uniform numbers.

    The bits are a hash of the index, so that the whole is one elementwise program without
    temporaries; a good generator would hold several times the memory of the largest weight.
    """
    bits = jnp.broadcast_to(seed * np.uint32(0x9E3779B9), shape)
    for axis in range(len(shape)):
        bits = bits ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    if jnp.issubdtype(dtype, jnp.integer):
        return bits.astype(dtype)
    unit = (bits >> 8).astype(jnp.float32) * np.float32(2**-23) - 1  # in [-1, 1)
    return (mean + deviation * np.float32(math.sqrt(3)) * unit).astype(dtype)


def _bytes(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# What is reported


def model_flops(config: decoder.DecoderConfig, settings: Settings) -> float:
    """Model flops of one optimizer step, as `shapes.step_flops` counts them."""
    leaves = decoder.param_shapes(dataclasses.replace(config, unroll=1))
    adapters = {
        path: math.prod(leaf.shape[:-2]) * settings.rank * sum(leaf.shape[-2:])
        for path, leaf in zip(tree.leaf_paths(leaves), jax.tree.leaves(leaves))
        if any(tree.matches(pattern, path) for pattern in settings.targets)
    }
    each = settings.length // settings.segments
    rows = settings.accumulation * settings.batch * settings.segments
    pairs = rows * shapes.attention_pairs(config, each)
    return shapes.step_flops(config, adapters, tokens=settings.tokens, pairs=pairs)


def _result(
    config: decoder.DecoderConfig,
    settings: Settings,
    compiled: Any,
    times: Sequence[float],
    losses: Sequence[float],
) -> dict[str, Any]:
    device = jax.local_devices()[0]
    step_times = [seconds / settings.steps for seconds in times]
    median = statistics.median(step_times)
    flops = model_flops(config, settings)
    peak = hardware.peak_flops(device.device_kind) if config.dtype == "bfloat16" else None
    analysis = compiled.memory_analysis()
    stats = device.memory_stats() or {}
    return {
        **dataclasses.asdict(settings),
        "unroll": min(config.unroll, config.num_layers),
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "jlora": jlora.__version__,
        "step_seconds": [round(seconds, 5) for seconds in step_times],
        "step_seconds_median": round(median, 5),
        "tokens_per_second": [round(settings.tokens / seconds, 1) for seconds in step_times],
        "tokens_per_second_median": round(settings.tokens / median, 1),
        "model_flops": flops,
        "xla_flops": (compiled.cost_analysis() or {}).get("flops"),  # a loop's body counts once
        "utilisation": None if peak is None else round(flops / median / peak, 4),
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "argument_bytes": getattr(analysis, "argument_size_in_bytes", None),
        "temp_bytes": getattr(analysis, "temp_size_in_bytes", None),
        "output_bytes": getattr(analysis, "output_size_in_bytes", None),
        "alias_bytes": getattr(analysis, "alias_size_in_bytes", None),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }


def table(result: dict[str, Any]) -> str:
    """The result as lines of text for a reader."""

    def size(name: str) -> str:
        value = result[name]
        if value is None:
            return "not known"
        return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"

    rates = ", ".join(f"{rate:,.0f}" for rate in result["tokens_per_second"])
    used = result["utilisation"]
    rows = {
        "step": f"{result['step_seconds_median']:.4f} s",
        "tokens/s": f"{result['tokens_per_second_median']:,.0f}   ({rates})",
        "model flops": f"{result['model_flops'] / 1e12:.4g} TFLOP a step"
        + ("" if used is None else f", {100 * used:.1f} % of the peak in bfloat16"),
        "peak memory": size("peak_bytes"),
        "program": f"arguments {size('argument_bytes')}, temporaries {size('temp_bytes')}, "
        f"outputs {size('output_bytes')}, of which {size('alias_bytes')} in place of arguments",
        "weights": f"{size('frozen_bytes')} for {result['frozen_parameters']:,} parameters; "
        f"{result['trainable_parameters']:,} train",
        "compile": f"{result['compile_seconds']:.1f} s, after {result['trace_seconds']:.1f} s of "
        "tracing",
        "loss": f"{result['first_loss']} -> {result['last_loss']}",
    }
    embeddings = f" (embeddings {result['embeddings']})" if result["embeddings"] else ""
    head = (
        f"{result['shape']} {result['base']}{embeddings}, remat {result['remat']}, "
        f"unroll {result['unroll']}, "
        f"{result['accumulation']} x {result['batch']} x {result['length']} tokens, "
        f"{result['segments']} segment(s) a row, {result['variant']} of rank {result['rank']}\n"
        f"{result['device']} ({result['backend']}), jax {result['jax']}"
    )
    return "\n".join([head, *(f"  {name:<12} {value}" for name, value in rows.items())])


@contextlib.contextmanager
def _memory_explained(settings: Settings) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
            raise
        changes = ["a smaller --batch or --length"]
        if settings.remat != "full":
            changes.append("--remat full")
        if settings.base in ("bfloat16", "float32"):
            changes.append("--base nf4")
        changes.append(f"a --head-chunk below {settings.head_chunk or 1024}")
        raise ValueError(
            f"out of memory. Try {', '.join(changes[:-1])} or {changes[-1]}.\n"
            f"{text.splitlines()[0]}"
        ) from None
