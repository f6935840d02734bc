"""Reads the collectives off a compiled program's text: what, how often a step, how many bytes.

XLA says the same thing in several ways, and the text is no documented interface. What is read here:

    %x = bf16[..] all-gather(...)                        as it is
    all-gather-start / all-gather-done                   the start counts
    async-start(...), calls=%c                           the operation is in %c
    fusion(...), kind=kCustom, calls=%c                  likewise; an all-reduce in a %c named
                                                         all-reduce-scatter is a reduce-scatter
    while(...), condition=%c, body=%b                    %b runs as often as %c's constant says, or
                                                         the loop's known_trip_count

A TPU's program spreads one asynchronous gather over several fusions, each of which repeats it with
the same channel: those are one. A weight's gather may also be a ring of collective-permutes.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

__all__ = ["Collective", "Total", "collectives", "totals"]

_KINDS = (
    "ragged-all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter",
    "all-to-all", "all-gather", "all-reduce",
)  # fmt: skip
_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_OPERATION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) (" + "|".join(_KINDS) + r")(-start)?\("
)
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLS = re.compile(
    r"(?:calls|to_apply|branch_computations|called_computations|true_computation|false_computation)"
    r"=\{?(%?[\w.\-]+(?:, *%?[\w.\-]+)*)\}?"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), *body=%?([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'known_trip_count":?\{"n":"(\d+)"')
_CONSTANT = re.compile(r"[su](?:32|64)\[\](?:\{[^}]*\})? constant\((\d+)\)")

Shape = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of a program.

    Attributes:
      kind: such as "all-gather".
      shapes: the dtype and sizes of each array that a device gets out of it.
      executions: times a run of the program, as the loops around it say. A conditional's branches
        all count.
      is_exact: whether the number of turns of each loop around it was found; else those count one.
    """

    kind: str
    shapes: tuple[Shape, ...]
    executions: int
    is_exact: bool = True

    @property
    def bytes(self) -> int:
        """Of what one device gets out of it, over all executions; not what goes over the wire."""
        return self.executions * sum(_size(shape) for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Total:
    """All collectives of a kind: `operations` in the program, `executions` and `bytes` a run."""

    operations: int
    executions: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, `compiled.as_text()`, in the order of the text."""
    return list(_Reader(text).read())


def totals(found: Iterable[Collective]) -> dict[str, Total]:
    """The sums of each kind, the most bytes first."""
    sums: dict[str, Total] = {}
    for one in found:
        old = sums.get(one.kind, Total(0, 0, 0))
        sums[one.kind] = Total(
            old.operations + 1, old.executions + one.executions, old.bytes + one.bytes
        )
    return dict(sorted(sums.items(), key=lambda item: -item[1].bytes))


class _Reader:
    def __init__(self, text: str):
        self._bodies, self._entry = _computations(text)
        self._seen: set[tuple[object, ...]] = set()

    def read(self) -> Iterator[Collective]:
        yield from self._visit(self._entry, (), 1, True)

    def _visit(
        self, name: str, loops: tuple[str, ...], executions: int, is_exact: bool
    ) -> Iterator[Collective]:
        """What a computation does, inside these loops' bodies."""
        for line in self._bodies.get(name, ()):
            if (match := _OPERATION.match(line)) is not None:
                kind = match.group(3)
                if kind == "all-reduce" and "all-reduce-scatter" in name:
                    kind = "reduce-scatter"
                channel = _CHANNEL.search(line)
                # Each step of a ring is an operation of its own, with the channel of the others.
                shared = channel is not None and kind != "collective-permute"
                identity = channel.group(1) if channel and shared else (name, match.group(1))
                key = (loops, kind, identity)
                if key not in self._seen:
                    self._seen.add(key)
                    shapes = _results(match.group(2), match.group(3), bool(match.group(4)))
                    yield Collective(kind, shapes, executions, is_exact)
            elif (match := _WHILE.search(line)) is not None:
                condition, body = match.groups()
                known = _KNOWN_TRIPS.search(line)
                trips = int(known.group(1)) if known else _trips(self._bodies.get(condition, ()))
                yield from self._visit(
                    body,
                    (*loops, body),
                    executions * (1 if trips is None else trips),
                    is_exact and trips is not None,
                )
            else:
                for group in _CALLS.findall(line):
                    for called in group.split(","):
                        inner = called.strip().lstrip("%")
                        yield from self._visit(inner, loops, executions, is_exact)


def _computations(text: str) -> tuple[Mapping[str, list[str]], str]:
    """The lines of each computation, and the name of the first to run."""
    bodies: dict[str, list[str]] = {}
    current: list[str] | None = None
    entry = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")):
            if (match := _HEAD.match(line)) is not None:
                current = bodies[match.group(2)] = []
                if match.group(1):
                    entry = match.group(2)
        # Only this ends one: a kernel's metadata may hold line breaks and begin lines with braces.
        elif line.rstrip() == "}":
            current = None
        elif current is not None:
            current.append(line)
    return bodies, entry


def _trips(condition: Iterable[str]) -> int | None:
    """The bound of a counted loop from 0, where its condition shows no other constant."""
    lines = list(condition)
    root = next((line for line in lines if line.lstrip().startswith("ROOT")), "")
    constants = [int(number) for line in lines for number in _CONSTANT.findall(line)]
    counted = "direction=LT" in root or " fusion(" in root
    return constants[0] if counted and len(constants) == 1 else None


def _results(text: str, kind: str, is_start: bool) -> tuple[Shape, ...]:
    """What a device gets, from the operation's type."""
    shapes = tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _SHAPE.findall(text)
    )
    if not is_start or kind == "all-reduce" or len(shapes) < 2:
        return shapes
    if kind == "collective-permute":  # (input, output, two counters)
        return shapes[1:2]
    return shapes[len(shapes) // 2 :]  # ((inputs), (outputs))


def _size(shape: Shape) -> int:
    dtype, sizes = shape
    bits = _BITS.get(dtype)
    if bits is None:
        digits = re.match(r"[sufc](\d+)", dtype)  # f8e4m3fn too
        bits = int(digits.group(1)) if digits else 0
    count = 1
    for size in sizes:
        count *= size
    return -(-count * bits // 8)
