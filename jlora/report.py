"""What a run shows and leaves behind: metrics.jsonl, the progress bar, loss.png, samples.md."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

__all__ = [
    "MetricsLog",
    "ProgressReport",
    "Sample",
    "plot_losses",
    "read_metrics",
    "write_samples",
    "write_text",
]

Line = dict[str, Any]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file whole or not at all."""
    _write_whole(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_metrics(path: str | os.PathLike[str]) -> Iterator[Line]:
    """The lines of a metrics.jsonl; ends at one that a killed process left half-written."""
    path = Path(path)
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                return
            if not isinstance(line, dict) or "step" not in line:
                return
            yield line


class MetricsLog:
    """Appends to metrics.jsonl, one line a step."""

    def __init__(self, path: str | os.PathLike[str], *, resume_at: int | None):
        """Opens the file, cut to what came before.

        Args:
          path: of the file.
          resume_at: the step of the restored checkpoint: later lines will be written again. None
            starts an empty file.
        """
        kept = [
            json.dumps(line) + "\n"
            for line in read_metrics(path)
            if resume_at is not None and line["step"] <= resume_at
        ]
        self.path = path
        write_text(path, "".join(kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def __call__(self, line: Line) -> None:
        """Writes one line; it is in the file when this returns.

        Raises:
          OSError: if the disk does not take it, with the file's name.
        """
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # it would try to write the line again
                self._file.close()
            raise OSError(
                f"Could not write step {line['step']} to {self.path}: {error.strerror}. The "
                "checkpoints are untouched; once that is mended, the run resumes from the newest."
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class ProgressReport:
    """Shows each step: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, steps: int, *, start: int = 0, every_seconds: float = 10.0):
        """Prepares; nothing is shown before `__enter__`.

        Args:
          steps: in all.
          start: steps done before this process.
          every_seconds: between plain lines; one with a held-out loss is always printed.
        """
        self._steps = steps
        self._start = start
        self._every_seconds = every_seconds
        self._console = rich.console.Console(highlight=False)
        self._bar: rich.progress.Progress | None = None
        self._first: tuple[float, int] | None = None  # when, and at which step: the first compiles
        self._printed_at = 0.0
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.fields[shown]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "train", total=steps, completed=start, shown="compiling"
            )

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def __call__(self, line: Line) -> None:
        """Shows a line of metrics."""
        step, now = line["step"], time.monotonic()
        shown = _shown(line)
        if step > self._start and self._first is None:
            self._first = now, step
        elif self._first is not None and step < self._steps:
            since, first = self._first
            shown += f"  {_clock((now - since) / (step - first) * (self._steps - step))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
            if "eval_loss" in line:
                self.say(f"step {step}: held-out loss {line['eval_loss']:.4f}")
        elif (
            "eval_loss" in line
            or step in (self._start + 1, self._steps)
            or now - self._printed_at >= self._every_seconds
        ):
            self._printed_at = now
            self.say(f"step {step}/{self._steps}  {shown}")


def _shown(line: Line) -> str:
    parts = [
        ("loss", "loss {:.4f}"),
        ("eval_loss", "held-out {:.4f}"),
        ("learning_rate", "lr {:.1e}"),
        ("grad_norm", "grad norm {:.2g}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
    ]
    return "  ".join(text.format(line[name]) for name, text in parts if name in line)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plot_losses(path: str | os.PathLike[str], lines: Sequence[Line], *, title: str = "") -> None:
    """Draws training loss, its running mean, and held-out loss over the steps."""
    from matplotlib.figure import Figure  # takes half a second

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    trained = [(line["step"], line["loss"], line.get("target_tokens", 1)) for line in lines
               if "loss" in line]  # fmt: skip
    if trained:
        steps, losses, _ = zip(*trained, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, a step")
        axes.plot(steps, _running_mean(trained), color="tab:blue", label="training, running mean")
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held-out")
    axes.set(xlabel="step", ylabel="loss (nats per target token)", title=title)
    axes.grid(alpha=0.3)
    if trained or held_out:
        axes.legend()
    _write_whole(Path(path), lambda partial: figure.savefig(partial, dpi=120))


def _running_mean(trained: Sequence[tuple[int, float, float]]) -> list[float]:
    """Over a twentieth of the steps, at least five, weighted by target tokens."""
    width = max(5, len(trained) // 20)
    means = []
    for end in range(1, len(trained) + 1):
        window = trained[max(0, end - width) : end]
        weight = sum(count for _, _, count in window)
        means.append(sum(loss * count for _, loss, count in window) / max(weight, 1))
    return means


@dataclasses.dataclass(frozen=True)
class Sample:
    """One held-out prompt and its answers."""

    prompt: str
    reference: str
    before: str
    after: str


def write_samples(path: str | os.PathLike[str], samples: Sequence[Sample], *, note: str) -> None:
    """Writes samples.md: each prompt, the answers before and after training, and the reference."""
    parts = [f"# Before and after\n\n{note}\n"]
    for number, sample in enumerate(samples, 1):
        parts.append(f"## {number}\n")
        for name in ("prompt", "before", "after", "reference"):
            parts.append(f"**{name.capitalize()}**\n\n{_fenced(getattr(sample, name))}\n")
    write_text(path, "\n".join(parts))


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.strip()}\n{fence}"
