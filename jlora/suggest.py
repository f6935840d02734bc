"""Settings with which a run fits hardware: tried by compiling, the likely ones first.

What is changed: the mesh, the format of the base, what the backward pass computes again, and how a
step's rows are divided into micro-batches. The rows of a step stay as many, unless a mesh wants
more of them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jlora import config, plan, sharding, topology
from jlora.models import decoder, weights

__all__ = ["Suggestion", "suggest"]

Say = Callable[[str], None]
_FORMATS = (None, "int8", "nf4")  # from most memory to least


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A change of a run's config, and the plan of the run with it.

    Attributes:
      overrides: as the command line takes them.
      plan: of the run with them.
    """

    overrides: tuple[str, ...]
    plan: plan.Plan


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """One way to run.

    Attributes:
      overrides: as the command line takes them.
      changes: formats that the base is packed further down, then other settings that differ.
      settings: the sizes of the mesh, and the rows of a micro-batch.
      memory: bytes of a device that it takes, roughly.
      traffic: bytes that a device receives a step, roughly.
    """

    overrides: tuple[str, ...]
    changes: tuple[int, int]
    settings: tuple[int, ...]
    memory: float
    traffic: float


def suggest(
    load: Callable[[Sequence[str]], config.RunConfig],
    model: plan.Model,
    target: topology.Target,
    refused: plan.Plan | None,
    say: Say,
    *,
    want: int = 3,
    tries: int = 8,
) -> list[Suggestion]:
    """Looks for settings that fit.

    Args:
      load: gives the run with overrides such as `model.remat=full`.
      model: from `plan.read_model`.
      target: from `topology.tpus` or `gpus.gpus`.
      refused: the plan of the run as it is, if that does not fit.
      say: told of each try.
      want: ends at so many that fit.
      tries: ends after compiling so many.

    Returns:
      Those that fit, of the formats nearest to the run's own first, and then the least sent.
    """
    run = load(())
    waiting = sorted(_candidates(run, model, target), key=lambda c: (c.changes, c.traffic))
    found: list[tuple[tuple[int, int], Suggestion]] = []
    underestimate = 1.0
    if refused is not None:
        waiting = [c for c in waiting if (c.changes, c.settings) != ((0, 0), _settings(refused))]
    for _ in range(tries):
        limit = math.inf if target.memory_bytes is None else target.memory_bytes
        waiting = [c for c in waiting if c.memory * underestimate <= limit]
        if not waiting or len(found) == want:
            break
        candidate = waiting.pop(0)
        say(f"Trying {' '.join(candidate.overrides)} ...")
        made = plan.measure(load(candidate.overrides), model, target)
        if made.fits:
            found.append((candidate.changes, Suggestion(candidate.overrides, made)))
            say(f"  fits: {made.peak_bytes / 2**30:.1f} GiB of each device.")
        else:
            # Others that are estimated in the same way take as much more than that.
            underestimate = max(underestimate, made.peak_bytes / candidate.memory)
            say(f"  does not fit: {made.peak_bytes / 2**30:.1f} GiB of each device.")
    found.sort(key=lambda one: (one[0], _traffic(one[1].plan)))
    return [suggestion for _, suggestion in found]


def _traffic(made: plan.Plan) -> int:
    return sum(total.bytes for total in made.collectives.values())


def _settings(made: plan.Plan) -> tuple[int, ...]:
    return (*made.mesh.values(), made.rows)


def _candidates(
    run: config.RunConfig, model: plan.Model, target: topology.Target
) -> Iterator[_Candidate]:
    count = len(target.devices)
    current = plan.format_of(run, model)
    below = _FORMATS[_FORMATS.index(current) :] if current in _FORMATS else (current,)
    if model.packed:
        below = (current,)
    policies = dict.fromkeys((run.model.remat, "full"))
    rows = run.train.batch_size * run.train.accumulation
    for (steps, fmt), remat, tensor in itertools.product(
        enumerate(below), policies, _tensor_parts(model, count)
    ):
        parts = count // tensor
        for data in dict.fromkeys((target.slices, 1, parts)):
            if parts % data or parts % target.slices:
                continue
            mesh = {"data": data, "fsdp": parts // data, "tensor": tensor}
            for batch in _batches(rows, parts, run.train.batch_size):
                yield _estimate(run, model, target, mesh, batch, (steps, fmt, remat))


def _tensor_parts(model: plan.Model, count: int) -> list[int]:
    heads, kv_heads = model.config.num_heads, model.config.num_kv_heads
    sizes = (1, 2, 4, 8)
    return [n for n in sizes if count % n == 0 and heads % n == 0 and kv_heads % n == 0]


def _batches(rows: int, parts: int, most: int) -> list[int]:
    """Rows of a micro-batch: multiples of the parts that divide the step's; else one each."""
    fitting = [n for n in range(parts, rows + 1, parts) if rows % n == 0 and n <= most]
    return fitting[::-1][:4] or [parts]


@functools.cache
def _abstract(shape: decoder.DecoderConfig, fmt: Any, embeddings: Any) -> Any:
    return weights.abstract(shape, {"layers": fmt, "embeddings": embeddings})


def _estimate(
    run: config.RunConfig,
    model: plan.Model,
    target: topology.Target,
    sizes: dict[str, int],
    batch: int,
    form: tuple[int, str | None, str],
) -> _Candidate:
    steps, fmt, remat = form
    rows = run.train.batch_size * run.train.accumulation
    accumulation = max(1, rows // batch)
    shape = dataclasses.replace(model.config, dtype="bfloat16")
    params = _abstract(shape, fmt, run.model.quantize_embeddings)
    mesh = sharding.make_mesh(sizes, target.devices)
    stored = plan.device_bytes(plan.placed(params, mesh))
    tensor, parts = sizes["tensor"], sizes["data"] * sizes["fsdp"]
    stream = 2 * batch // parts * run.data.length * shape.hidden_size  # bytes of a layer's input
    layer = 2 * sum(math.prod(x.shape) for x in plan.dense_leaves(params)) / shape.num_layers
    # Of a layer that is not computed again, about so many arrays of the stream's width are kept.
    widths = (
        1 if remat in ("full", "offload") else 8 + 4 * shape.intermediate_size / shape.hidden_size
    )
    kept = widths * shape.num_layers * stream / tensor
    logits = 8 * min(1024, batch // parts * run.data.length) * shape.vocab_size / tensor
    memory = stored + kept + logits + (layer / tensor if sizes["fsdp"] > 1 else 0)
    # Weights are gathered forward, again, and backward; a stream is exchanged about 8 times.
    gathered = 3 * shape.num_layers * layer / tensor if sizes["fsdp"] > 1 else 0
    exchanged = 8 * shape.num_layers * stream if tensor > 1 else 0
    given = {
        **{f"mesh.{name}": size for name, size in sizes.items()},
        "model.quantize": fmt,
        "model.remat": remat,
        "train.batch_size": batch,
        "train.accumulation": accumulation,
    }
    before = {
        "model.quantize": plan.format_of(run, model),
        "model.remat": run.model.remat,
        "train.batch_size": run.train.batch_size,
        "train.accumulation": run.train.accumulation,
    }
    changed = {k: v for k, v in given.items() if k.startswith("mesh") or before[k] != v}
    return _Candidate(
        tuple(f"{key}={value}" for key, value in changed.items()),
        (steps, int(remat != run.model.remat)),
        (*sizes.values(), batch),
        memory,
        accumulation * (gathered + exchanged),
    )
