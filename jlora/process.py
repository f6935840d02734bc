"""The process around a run: it stops in good order, and no other writes to the same folder."""

import contextlib
import fcntl
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["StopSignal", "lock"]

Say = Callable[[str], None]


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into an answer to `fit`; the second Ctrl-C ends at once."""

    def __init__(self, say: Say):
        self._say = say
        self._seen = False
        self._previous: dict[int, Any] = {}

    def __call__(self, step: int) -> bool:
        """Whether the run is to stop after so many steps."""
        return self._seen

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self._seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._seen = True
        self._say("Stopping: this step is finished and saved first. Ctrl-C again stops at once.")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps a second process from writing to the same run; the kernel lets go of a killed one's."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is training in {folder}.") from None
        yield
