"""The table of what trains, to look at before a run."""

import dataclasses
from typing import Any

import jax

from jlora.lora import LoraArray, LoraConfig, count_parameters, leaves_by_path
from jlora.quant import QuantArray, format_of
from jlora.rows import RowsArray

__all__ = ["Summary", "summary"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What trains and what does not; `str` gives the table.

    Attributes:
      rows: one (path, shape, role, trainable parameters) for each adapter and each leaf that trains
        whole.
      trainable: parameters that train.
      frozen: parameters that do not.
      trainable_bytes: of the former, as stored.
      frozen_bytes: of the latter, as stored.
      packed_bytes: the share of the latter in each quantised format, as (format, bytes).
    """

    rows: tuple[tuple[str, tuple[int, ...], str, int], ...]
    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int
    packed_bytes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        cells = [("weight", "shape", "trains", "parameters")]
        cells += [(path, str(list(shape)), how, f"{n:,}") for path, shape, how, n in self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = [
            "  ".join(
                [*(cell.ljust(w) for cell, w in zip(row[:3], widths)), row[3].rjust(widths[3])]
            )
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        share = 100 * self.trainable / (self.trainable + self.frozen)
        packed = "".join(f", {_megabytes(n)} of it in {fmt}" for fmt, n in self.packed_bytes)
        total = (
            f"{self.trainable:,} trainable parameters ({_megabytes(self.trainable_bytes)}), "
            f"{self.frozen:,} frozen ({_megabytes(self.frozen_bytes)}{packed}): "
            f"{share:.3f} % train."
        )
        return "\n".join([*lines, total])


def _stored_bytes(leaf: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaf))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def summary(params: Any, config: LoraConfig) -> Summary:
    """The table to look at before a run: matched paths, shapes, ranks, parameters and bytes.

    Args:
      params: a tree from `init`, of arrays or of `ShapeDtypeStruct`s.
      config: the config it was made with.
    """
    rows = []
    for path, leaf in leaves_by_path(params).items():
        if isinstance(leaf, LoraArray):
            how = f"rank {leaf.rank}, scaling {leaf.scaling:g}"
            how = how if type(leaf) is LoraArray else f"{leaf.kind}, {how}"
            if isinstance(leaf.w, QuantArray):
                how += f", on {format_of(leaf.w)}"
            rows.append((path, leaf.shape, how, leaf.num_trained()))
        elif isinstance(leaf, RowsArray):
            how = f"{len(leaf.indices)} {'columns' if leaf.axis else 'rows'}"
            rows.append((path, leaf.shape, how, leaf.rows.size))
        elif config.trains_whole(path):
            rows.append((path, tuple(leaf.shape), "whole", leaf.size))
    trainable, frozen = count_parameters(params, config)
    trainable_bytes, frozen_bytes = count_parameters(params, config, _stored_bytes)
    return Summary(
        tuple(rows), trainable, frozen, trainable_bytes, frozen_bytes, _packed_bytes(params)
    )


def _packed_bytes(params: Any) -> tuple[tuple[str, int], ...]:
    sizes: dict[str, int] = {}
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantArray)):
        if isinstance(leaf, QuantArray):
            fmt = format_of(leaf)
            sizes[fmt] = sizes.get(fmt, 0) + _stored_bytes(leaf)
    return tuple(sizes.items())
