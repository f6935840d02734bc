"""Examples to batches: first-fit packing, and an endless sequence of batches with random access.

Knows tokens and masks, no text. Rows hold several examples, told apart by `segment_ids`; the model
attends inside a segment only, so a packed row trains exactly what its examples would alone.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

__all__ = ["Batch", "Batches", "Example", "collate", "pack"]

Batch: TypeAlias = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenised example.

    Attributes:
      tokens: `Int32[n]`.
      loss_mask: `Bool[n]`, True where predicting the token counts; the first never is predicted.
      source: where it was read, as "file:line".
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """How many tokens of this example count in the loss."""
        return int(np.count_nonzero(self.loss_mask[1:]))


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Packs examples into rows of at most `length` tokens, each into the first row that has room.

    Args:
      examples: in the order to place them.
      length: tokens a row holds.

    Returns:
      The rows. Every example is in exactly one, whole; within a row the given order is kept.

    Raises:
      ValueError: if an example is longer than a row.
    """
    _refuse_long(examples, length)
    # First-fit leaves at most one row half empty, so this many rows always suffice.
    most = min(len(examples), 2 * sum(map(len, examples)) // max(length, 1) + 1)
    size = 1 << max(most - 1, 0).bit_length()
    room = [length] * (2 * size)  # a max-tree over rows: room[1] is the root, room[size + i] row i
    rows: list[list[Example]] = []
    for example in examples:
        need, node = len(example), 1
        while node < size:
            node *= 2
            if room[node] < need:
                node += 1
        row = node - size
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        room[node] -= need
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            largest = left if left > right else right
            if room[node] == largest:
                break
            room[node] = largest
    return rows


def collate(rows: Sequence[Sequence[Example]], batch_size: int, length: int) -> Batch:
    """Lays rows of examples out as arrays `[batch_size, length]`; what is left over stays zero.

    `targets` are the tokens shifted by one inside each segment, `loss_mask` (float32) says which of
    them count, `segment_ids` number a row's examples from 1 (0 is padding), `positions` restart at
    each segment. A segment's last token has no target.
    """
    batch: Batch = {
        name: np.zeros((batch_size, length), np.float32 if name == "loss_mask" else np.int32)
        for name in ("tokens", "targets", "loss_mask", "segment_ids", "positions")
    }
    for i, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, 1):
            end = start + len(example)
            batch["tokens"][i, start:end] = example.tokens
            batch["targets"][i, start : end - 1] = example.tokens[1:]
            batch["loss_mask"][i, start : end - 1] = example.loss_mask[1:]
            batch["segment_ids"][i, start:end] = segment
            batch["positions"][i, start:end] = np.arange(len(example))
            start = end
    return batch


class Batches:
    """An endless, deterministic sequence of batches over epochs, read by index.

    Each epoch holds every example once: shuffled by (seed, epoch), then packed. Rows of one epoch
    are followed by those of the next without padding in between, so all batches are full, and how
    many fit an epoch may differ by one or two. `batch(i)` depends on nothing but the arguments and
    `i`: a run resumed at `i` sees what an uninterrupted one would.

    >>> batches = Batches(examples, batch_size=8, length=256, seed=0)
    >>> batches.batch(1000)["tokens"].shape
    (8, 256)
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        length: int,
        seed: int,
        shuffle: bool = True,
        pack: bool = True,
    ):
        """Checks the arguments; packing happens on first use of an epoch.

        Args:
          examples: at least one, none longer than `length`.
          batch_size: rows in a batch.
          length: tokens in a row.
          seed: of the shuffle, not negative.
          shuffle: whether each epoch has its own order; without, all epochs are alike.
          pack: whether rows share examples; without, each example has a row of its own.

        Raises:
          ValueError: for an empty data set, a size below 1, a negative seed or a long example.
        """
        if not examples:
            raise ValueError("There are no examples to make batches of: the data set is empty.")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("length", length, 2),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        _refuse_long(examples, length)
        self.batch_size = batch_size
        self.length = length
        self._examples = examples
        self._seed = seed
        self._shuffle = shuffle
        self._pack = pack
        self._starts = [0]  # the first row of each epoch, as far as epochs have been looked at
        # Two, because a batch may take rows from the end of one epoch and the start of the next.
        self._cached_rows = functools.lru_cache(maxsize=2)(self._make_rows)

    def _rows(self, epoch: int) -> list[list[Example]]:
        return self._cached_rows(epoch if self._shuffle else 0)

    def _make_rows(self, epoch: int) -> list[list[Example]]:
        examples = self._examples
        if self._shuffle:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(examples))
            examples = [examples[i] for i in order]
        return pack(examples, self.length) if self._pack else [[example] for example in examples]

    def _epoch_start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            rows = self._rows(len(self._starts) - 1 if self._pack else 0)
            self._starts.append(self._starts[-1] + len(rows))
        return self._starts[epoch]

    def _find(self, row: int) -> tuple[int, int]:
        """Which epoch a row of the endless sequence is in, and which row of that epoch."""
        while self._starts[-1] <= row:
            self._epoch_start(len(self._starts))
        epoch = bisect.bisect_right(self._starts, row) - 1
        return epoch, row - self._starts[epoch]

    def batch(self, index: int) -> Batch:
        """Returns micro-batch `index`, counted from 0 over all epochs; all rows are full.

        Arrays are `[batch_size, length]`: see `collate` for what each holds.
        """
        if index < 0:
            raise ValueError(f"A batch index starts at 0, got {index}.")
        first = index * self.batch_size
        places = [self._find(row) for row in range(first, first + self.batch_size)]
        rows = [self._rows(epoch)[row] for epoch, row in places]
        return collate(rows, self.batch_size, self.length)

    def packed(self) -> "Batches":
        """The same examples in rows that they share, with hardly any padding."""
        if self._pack:
            return self
        return Batches(
            self._examples,
            batch_size=self.batch_size,
            length=self.length,
            seed=self._seed,
            shuffle=self._shuffle,
        )

    def count(self, epochs: float) -> int:
        """How many batches show the examples `epochs` times, e.g. 0.5 or 3; at least 1."""
        if not epochs > 0:
            raise ValueError(f"epochs must be above 0, got {epochs}.")
        whole = math.floor(epochs)
        rows = float(self._epoch_start(whole))
        if epochs > whole:
            rows += (epochs - whole) * (self._epoch_start(whole + 1) - rows)
        return max(1, math.ceil(rows / self.batch_size))

    @property
    def per_epoch(self) -> int:
        """Batches that hold the first epoch, the last of them completed from the second."""
        return self.count(1)

    def epoch(self, number: int = 0) -> Iterator[Batch]:
        """Iterates once over all examples, for evaluation; the last batch is padded with zeros."""
        rows = self._rows(number)
        for first in range(0, len(rows), self.batch_size):
            yield collate(rows[first : first + self.batch_size], self.batch_size, self.length)


def _refuse_long(examples: Sequence[Example], length: int) -> None:
    for example in examples:
        if len(example) > length:
            raise ValueError(
                f"{example.source}: an example of {len(example)} tokens does not fit rows "
                f"of {length}. Raise the length, or drop or truncate long examples on reading."
            )
