"""What options of the command line take, checked before any work begins."""

import argparse
from collections.abc import Sequence
from typing import TextIO

__all__ = ["append", "count", "file"]


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def file(path: str) -> TextIO:
    """A file to append to, for `append`; one that cannot be is refused now."""
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None


def append(file: TextIO | None, lines: Sequence[str]) -> None:
    """Writes lines to the end of a file, if there is one, and closes it."""
    if file is not None:
        with file:
            file.writelines(line + "\n" for line in lines)
