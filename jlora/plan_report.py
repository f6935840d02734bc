"""A plan as a table, and what to change where it does not fit."""

import io

import rich.box
import rich.console
import rich.table

from jlora import hardware
from jlora.plan import Plan

__all__ = ["advice", "table"]


def table(plan: Plan) -> str:
    """The plan as a table for a reader."""
    found = hardware.find(plan.device_kind)
    two = " (a chip is two)" if found is not None and found.per_chip == 2 else ""
    mesh = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    step = f"a step of {plan.accumulation} x {plan.rows} x {plan.length} tokens"
    rows = {
        "hardware": f"{plan.target}: {plan.num_devices} x {plan.device_kind}{two}",
        "model": f"{plan.parameters:,} parameters, {plan.trainable:,} train ({plan.model})",
        "run": f"mesh {mesh}; base {plan.quantize or 'not quantised'}; remat {plan.remat}; {step}",
        "attention": plan.attention,
    }
    needed = "" if plan.fits else " would be needed"
    memory = {
        "arguments": f"{_size(plan.argument_bytes)}, of which weights {_size(plan.frozen_bytes)}, "
        f"adapters and moments {_size(plan.state_bytes)}",
        "peak": f"{_size(plan.peak_bytes)}{needed}",
    }
    if plan.memory_bytes is not None and plan.headroom_bytes is not None:
        share = 100 * plan.headroom_bytes / plan.memory_bytes
        memory["head-room"] = (
            f"{_size(plan.headroom_bytes)} of {_size(plan.memory_bytes)} ({share:.0f} %): "
            f"{plan.memory_source}"
        )
    rows |= {f"{name} a device": value for name, value in memory.items()}
    for kind, total in plan.collectives.items():
        times = "" if plan.exact_counts else "at least "
        rows[kind] = (
            f"{times}{total.executions:,} a step ({total.operations} in the program), "
            f"{_size(total.bytes)} to each device"
        )
    rows["model flops"] = f"{plan.model_flops / 1e12:,.4g} TFLOP a step"
    if plan.floor_seconds is not None:
        tokens = plan.accumulation * plan.rows * plan.length
        rows["floor"] = (
            f"{plan.floor_seconds:.3g} s a step, {tokens / plan.floor_seconds:,.0f} tokens/s, at "
            "the published peak in bfloat16; no run reaches it"
        )
    rows["compiled"] = (
        f"in {plan.compile_seconds:.0f} s, after {plan.trace_seconds:.0f} s of tracing, by jax "
        f"{plan.jax}"
    )
    shown = rich.table.Table(box=rich.box.SIMPLE, show_header=False, pad_edge=False)
    for name, value in rows.items():
        shown.add_row(name, value)
    out = io.StringIO()
    rich.console.Console(file=out, width=110, color_system=None).print(shown)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join([*(line for line in lines if line), _verdict(plan)])


def _verdict(plan: Plan) -> str:
    if not plan.fits:
        return "Does not fit."
    if plan.headroom_bytes is None:
        return "Compiles; how much memory there is, is not known."
    tight = plan.memory_bytes is not None and plan.headroom_bytes < 0.05 * plan.memory_bytes
    return "Fits, with less than 5 % to spare: expect surprises." if tight else "Fits."


def advice(plan: Plan, *, num_devices: int) -> list[str]:
    """What to change, the most effective first; nothing where the plan fits.

    Args:
      plan: of the run as it is.
      num_devices: that there are, used or not.
    """
    if plan.fits:
        return []
    lines = []
    memory = plan.memory_bytes or 0
    if plan.num_devices < num_devices:
        lines.append(f"mesh: it uses 1 of {num_devices} devices; set mesh.fsdp=-1.")
    if plan.frozen_bytes + plan.state_bytes > 0.9 * memory:
        what = f"the weights alone take {_size(plan.frozen_bytes)} of each device's {_size(memory)}"
        if plan.quantize is None:
            lines.append(f"model.quantize=nf4: {what}; nf4 is about a quarter of that.")
        if plan.mesh["data"] > 1:
            lines.append("mesh.data=1: copies of the model share no memory; give fsdp the devices.")
        if not lines:
            lines.append(f"more devices: {what}.")
    if plan.remat not in ("full", "offload"):
        lines.append("model.remat=full: activations are computed again.")
    if plan.more_memory is not None and plan.peak_bytes <= plan.more_memory[1]:
        setting, more = plan.more_memory
        lines.append(f"{setting} in the environment of the run: it may then use {_size(more)}.")
    parts = plan.mesh["data"] * plan.mesh["fsdp"]
    if plan.rows > parts:
        fewer = max(parts, plan.rows // 2 // parts * parts)
        lines.append(f"train.batch_size={fewer}, with train.accumulation raised by as much.")
    elif plan.length > 1024:
        lines.append("data.length: shorter rows; or a larger mesh.tensor, which cuts them.")
    return lines


def _size(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if abs(size) >= 2**23 else f"{size / 2**20:,.3f} MiB"
