"""Compiles a run's training step for hardware that is not here, and says whether it fits.

The step is the one that `jlora train` runs, on abstract arrays: no weight is read and nothing is
computed. What is reported is the compiler's own account of it.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
from jlora import (
    config,
    fresh,
    hardware,
    hlo,
    packing,
    shapes,
    sharding,
    topology,
    train,
    tree,
)
from jlora import run as runs
from jlora.base import Base, adapt_base, check_start
from jlora.leaf import is_array_leaf
from jlora.models import attention, bnb, decoder, gguf, hub, weights

__all__ = [
    "Model",
    "Plan",
    "dense_leaves",
    "device_bytes",
    "format_of",
    "make_mesh",
    "measure",
    "placed",
    "prepare",
    "read_model",
]

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape of a base model, and where it was found."""

    config: decoder.DecoderConfig
    source: str
    packed: bool = False
    file: Path | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of a run's step; bytes and collectives are those of one device.

    Attributes:
      target: the hardware's name.
      device_kind: as JAX names it.
      num_devices: of the mesh.
      jax: the version that compiled it.
      model: where the model's shape is from.
      parameters: of the base.
      trainable: of the adapters and what trains beside them.
      mesh: devices along each axis.
      quantize: formats of the base, or None.
      remat: what the backward pass computes again.
      rows: of a micro-batch, over all devices.
      accumulation: micro-batches a step.
      length: tokens of a row.
      fits: whether the compiler took the program.
      frozen_bytes: of the base's weights.
      state_bytes: of adapters, moments and counters.
      argument_bytes: of all that the step is given, as the compiler lays it out; of a program that
        it refused, the sum of the sizes.
      peak_bytes: the most that is held at once; of a refused program, what it would need.
      memory_bytes: that a program may use; None if not known.
      memory_source: what these bytes are.
      more_memory: a setting of the environment with which it may use more, and the bytes then.
      attention: "splash" or "cudnn", or why it runs without kernels.
      collectives: by kind; none of a refused program.
      exact_counts: whether the turns of each loop around a collective are known.
      model_flops: of a step, over all devices, as `shapes.step_flops` counts them on full rows.
      floor_seconds: what these take at the devices' published peak; None if that is not known.
      trace_seconds: to trace and lower the step here.
      compile_seconds: to compile it here.
    """

    target: str
    device_kind: str
    num_devices: int
    jax: str
    model: str
    parameters: int
    trainable: int
    mesh: dict[str, int]
    quantize: str | None
    remat: str
    rows: int
    accumulation: int
    length: int
    fits: bool
    frozen_bytes: int
    state_bytes: int
    argument_bytes: int
    peak_bytes: int
    memory_bytes: int | None
    memory_source: str
    more_memory: tuple[str, int] | None
    attention: str
    collectives: dict[str, hlo.Total]
    exact_counts: bool
    model_flops: float
    floor_seconds: float | None
    trace_seconds: float
    compile_seconds: float

    @property
    def headroom_bytes(self) -> int | None:
        """What is left of a device's memory, below 0 if that does not do."""
        return None if self.memory_bytes is None else self.memory_bytes - self.peak_bytes

    def to_json(self) -> str:
        """One line of JSON."""
        values = dataclasses.asdict(self) | {"headroom_bytes": self.headroom_bytes}
        return json.dumps(values)


def read_model(run: config.RunConfig, shape: str | None = None) -> Model:
    """The shape of a run's model, for which its weights need not be here.

    Args:
      run: whose `model.path` is a folder with a config.json, a `.gguf` file, or a name: then the
        config.json is looked for in the Hugging Face cache, Llama 3 is known, and the hub is asked.
      shape: a name in `shapes.NAMES` or the path of a config.json, to use in place of all that.

    Raises:
      ValueError: if there is no such shape, or the model's is nowhere to be found.
    """
    path = run.model.path
    if shape is not None:
        return Model(shapes.decoder_config(shape), f"the shape {shape}")
    known = shapes.of_model(path)
    file = None if known and not Path(path).exists() else hub.config_file(path)
    if file is None and known:
        return Model(shapes.decoder_config(known), f"{path}, whose shape is {known}")
    if file is None:
        raise ValueError(
            f"No config.json of {path!r} is here or to be had from the hub. Give its shape: "
            f"--shape with one of {', '.join(shapes.NAMES)}, or with the path of a config.json."
        )
    if file.suffix.lower() == ".gguf":
        return Model(gguf.shapes(file)[0], str(file), file=file)
    packed = bnb.is_packed(json.loads(file.read_text(encoding="utf-8")), str(file))
    return Model(shapes.decoder_config(str(file)), str(file), packed)


def measure(run: config.RunConfig, model: Model, target: topology.Target) -> Plan:
    """Compiles the step of a run for hardware and reads off what it takes.

    Args:
      run: from `config.load`.
      model: from `read_model`.
      target: from `topology.tpus` or `gpus.gpus`.

    Returns:
      The plan, also of a program that the compiler refuses because it takes too much memory.

    Raises:
      ValueError: if the run cannot be on these devices, such as for its mesh.
    """
    started = time.perf_counter()
    base, step, arguments = prepare(run, model, target)
    mesh = base.mesh
    assert mesh is not None
    with jax.set_mesh(mesh):
        lowered = step.trace(*arguments).lower(lowering_platforms=(target.platform,))
        traced = time.perf_counter()
        compiled, refused = None, None
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            refused = topology.out_of_memory(error)
            if refused is None:
                raise
    ended = time.perf_counter()
    state, frozen, *_ = arguments
    found = [] if compiled is None else hlo.collectives(compiled.as_text())
    given = device_bytes(arguments)
    peak = refused[0] if refused else 0
    if compiled is not None:
        analysis = compiled.memory_analysis()
        given = analysis.argument_size_in_bytes
        peak = _peak(analysis)
    memory = refused[1] if refused else target.memory_bytes
    flops = _flops(run, base)
    speed = hardware.peak_flops(target.kind)
    return Plan(
        target=target.name,
        device_kind=target.kind,
        num_devices=mesh.size,
        jax=jax.__version__,
        model=model.source,
        parameters=sum(math.prod(x.shape) for x in dense_leaves(base.params)),
        trainable=sum(math.prod(x.shape) for x in jax.tree.leaves(state.trainable)),
        mesh=dict(mesh.shape),
        quantize=weights.describe(_formats(run, model)),
        remat=run.model.remat,
        rows=run.train.batch_size,
        accumulation=run.train.accumulation,
        length=run.data.length,
        fits=compiled is not None and (memory is None or peak <= memory),
        frozen_bytes=device_bytes(frozen),
        state_bytes=device_bytes(state),
        argument_bytes=given,
        peak_bytes=peak,
        memory_bytes=memory,
        memory_source=target.memory_source,
        more_memory=target.more_memory,
        attention=_attention(run, base.model.config, target.platform, mesh),
        collectives=hlo.totals(found),
        exact_counts=all(one.is_exact for one in found),
        model_flops=flops,
        floor_seconds=None if speed is None else flops / speed / mesh.size,
        trace_seconds=round(traced - started, 2),
        compile_seconds=round(ended - traced, 2),
    )


def make_mesh(run: config.RunConfig, target: topology.Target) -> jax.sharding.Mesh:
    """The mesh that a run makes of a target's devices; of one device if it asks for none.

    Raises:
      ValueError: if the run's sizes do not fit the devices, their slices or the rows of a batch.
    """
    if run.mesh is not None:
        sharding.axis_sizes(run.mesh.model_dump(), len(target.devices), target.slices)
    mesh = fresh.make_mesh(run, target.devices)
    return sharding.make_mesh({}, target.devices[:1]) if mesh is None else mesh


def prepare(
    run: config.RunConfig, model: Model, target: topology.Target
) -> tuple[Base, Any, tuple[train.TrainState, Any, Any, Any]]:
    """The base, the step of `train.make_train_step`, and the step's arguments.

    Takes what `measure` does. All arrays are `ShapeDtypeStruct`s; the arguments' have shardings.
    """
    mesh = make_mesh(run, target)
    base, lora = _adapted(run, model, mesh)
    params = placed(base.params, mesh)
    trainable, frozen = jlora.split(params, lora)
    # Of a run in epochs only the data says how many steps it has; the schedule's end is a constant.
    tx, _ = runs.make_optimizer(run, lora, run.train.steps or run.optim.warmup_steps + 1)
    state = jax.eval_shape(functools.partial(train.init_state, tx=tx), trainable)
    places = jax.tree.map(lambda x: x.sharding, trainable)
    state = jax.tree.map(_placed, state, train.state_shardings(state, places, tx, mesh))
    rows = packing.collate([], run.train.batch_size, run.data.length)
    at = sharding.batch_sharding(mesh, leading=1)

    def stacked(x: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (run.train.accumulation, *x.shape)
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=at)

    batch = jax.tree.map(stacked, rows)
    # What is chosen on accelerators; here the backend is a CPU.
    chunk = run.train.head_chunk_tokens or 1024
    loss_fn = runs.make_loss(base, lora, chunk_tokens=chunk)
    step = train.make_train_step(loss_fn, tx, clip_norm=run.optim.clip_norm)
    return base, step, (state, frozen, batch, jax.eval_shape(lambda: jax.random.key(0)))


def placed(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """`ShapeDtypeStruct`s of a decoder with the shardings of a run on this mesh."""
    where = sharding.shardings(params, mesh, sharding.DECODER_RULES)
    return jax.tree.map(_placed, params, where)


def device_bytes(arrays: Any) -> int:
    """Of the parts that one device holds of arrays with shardings."""
    total = 0
    for x in jax.tree.leaves(arrays):
        if x.sharding is not None:
            bits = 4 if "int4" in str(x.dtype) else 8 * x.dtype.itemsize
            total += math.prod(x.sharding.shard_shape(x.shape)) * bits // 8
    return total


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def format_of(run: config.RunConfig, model: Model) -> Any:
    """The format of a run's linear layers: what it asks for, or what the model's files are in."""
    return run.model.quantize or ("nf4" if model.packed else None)


def _formats(run: config.RunConfig, model: Model) -> weights.Formats:
    return {"layers": format_of(run, model), "embeddings": run.model.quantize_embeddings}


def _adapted(
    run: config.RunConfig, model: Model, mesh: jax.sharding.Mesh
) -> tuple[Base, jlora.LoraConfig]:
    """The base with fresh adapters, nothing of it more than a shape."""
    dtype = "bfloat16" if run.model.dtype == "auto" else run.model.dtype
    quantize = _formats(run, model)
    options = {"dtype": dtype, "remat": run.model.remat, "unroll": run.model.unroll}
    settled = dataclasses.replace(model.config, **options)
    if model.file is None:
        params = weights.abstract(settled, quantize)
    else:
        params = gguf.shapes(model.file, dtype, quantize=quantize)[1]
    if run.model.new_tokens:
        raise NotImplementedError("jlora plan knows no new tokens: leave out model.new_tokens.")
    lora = fresh.lora_config(run)
    check_start(lora, mesh if mesh.size > 1 else None)
    lora = dataclasses.replace(lora, init="default")  # others change numbers and no shapes
    network = decoder.Decoder(settled, place=sharding.Activations(mesh))
    no_tokens: Any = None
    base = Base(run.model.path, network, params, no_tokens, mesh)
    return adapt_base(base, lora, jax.random.key(run.seed)), lora


def dense_leaves(params: Any) -> list[jax.ShapeDtypeStruct]:
    """The weights that a tree's leaves stand for."""
    leaves = jax.tree.leaves(params, is_leaf=is_array_leaf)
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]


def _flops(run: config.RunConfig, base: Base) -> float:
    adapters = {}

    def count(path: str, leaf: Any) -> None:
        if isinstance(leaf, jlora.LoraArray):
            a, b = jax.eval_shape(leaf.product_factors)
            adapters[path] = math.prod(a.shape) + math.prod(b.shape)

    tree.map_with_path(count, base.params, is_leaf=is_array_leaf)
    rows = run.train.batch_size * run.train.accumulation
    model: decoder.DecoderConfig = base.model.config
    pairs = rows * shapes.attention_pairs(model, run.data.length)
    return shapes.step_flops(model, adapters, tokens=rows * run.data.length, pairs=pairs)


def _attention(
    run: config.RunConfig, model: decoder.DecoderConfig, platform: str, mesh: Any
) -> str:
    rows = (run.train.batch_size, run.data.length)

    def heads(count: int) -> Any:
        return jax.ShapeDtypeStruct((*rows, count, model.head_dim), model.dtype)

    reason = attention.without_kernels(
        platform,
        heads(model.num_heads),
        heads(model.num_kv_heads),
        segment_ids=jax.ShapeDtypeStruct(rows, np.int32),
        softcap=model.attention_softcap,
        mesh=mesh,
    )
    return attention.KERNELS[platform] if reason is None else f"without kernels: {reason}"


def _peak(analysis: Any) -> int:
    """The most memory that a program holds, by the compiler's account."""
    peak = getattr(analysis, "peak_memory_in_bytes", 0)
    together = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    together += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return peak or together
