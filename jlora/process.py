"""The process around a run: it stops in good order, and no other writes to the same folder."""

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["StopSignal", "Watchdog", "lock"]

Say = Callable[[str], None]


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into an answer to `fit`; the second Ctrl-C ends at once.

    Args:
      say: told once that the run is stopping.
      agreed: with several processes, whether all of them are to stop, since one of them got a
        SIGTERM; told the how-many-th question this is, for the first may come at any step. Its own
        handler stays in place.
    """

    def __init__(self, say: Say, *, agreed: Callable[[int], bool] | None = None):
        self._say = say
        self._agreed = agreed
        self._seen = False
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def __call__(self, step: int) -> bool:
        """Whether the run is to stop after so many steps; to be asked by all processes alike."""
        self._asked += 1
        return self._seen if self._agreed is None else self._agreed(self._asked)

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM) if self._agreed is None else (signal.SIGINT,):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self._seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._seen = True
        if self._agreed is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        self._say("Stopping: this step is finished and saved first. Ctrl-C again stops at once.")


class Watchdog:
    """Reports when a run has not gone on for a while, and where in the program it hangs.

    A disk or a network that does not answer, or another process that does not come to the same
    place, raises nothing: the run just stands still.
    """

    def __init__(self, say: Say, *, patience: float = 600.0):
        """Prepares; nothing is watched before `__enter__`.

        Args:
          say: told of a stop, once until the run goes on.
          patience: seconds without a step before that.
        """
        self._say = say
        self._patience = patience
        self._main = threading.get_ident()
        self._last: tuple[float, int | None] = (time.monotonic(), None)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __call__(self, step: int) -> None:
        """The run has come to this step."""
        self._last = (time.monotonic(), step)

    def __enter__(self) -> "Watchdog":
        self._last = (time.monotonic(), self._last[1])
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        reported = None
        while not self._done.wait(self._patience / 10):
            last = self._last
            waited = time.monotonic() - last[0]
            if waited < self._patience or last == reported:
                continue
            reported = last
            frames = traceback.extract_stack(sys._current_frames().get(self._main))
            places = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-4:]]
            since = "the start" if last[1] is None else f"step {last[1]}"
            self._say(
                f"No step for {waited:.0f} s after {since}; the program is at "
                f"{' > '.join(places)}. It goes on waiting."
            )


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
