"""What to adapt and how: the settings of a LoRA transform, as JSON in both directions."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.tree import Pattern

__all__ = ["Axis", "LoraConfig", "first_match"]

Axis = Literal["stack", "in", "out"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how. Frozen, hashable, and JSON in both directions.

    A pattern without `/` or `*` names a path segment exactly, one with them is a glob over the
    whole path, and `re.compile(...)` is a regex searched in it. Every pattern must match.

    Attributes:
      rank: of the update; `a` has `rank` columns and `b` as many rows.
      alpha: the update is scaled by `alpha / rank`.
      targets: patterns of the weights to adapt. `"all-linear"` is every leaf that is only used in
        matrix products, which needs `fn` and `args` in `init`.
      exclude: patterns of weights to leave alone, whatever `targets` says.
      rank_pattern: from patterns to ranks that replace `rank`; a weight must not get two.
      alpha_pattern: from patterns to alphas that replace `alpha`.
      dropout: the share of the low-rank branch's inputs that is zeroed while `adapt` has a key.
      rank_stabilized: scale by `alpha / sqrt(rank)` (rsLoRA, arXiv:2312.03732).
      train: patterns of leaves that train whole: norms, heads, biases.
      rows: from patterns to numbers of rows that train alone, `{"embed_tokens": (49152, 49153)}`:
        rows of a table `[vocab, d]`, or columns of a matrix whose path ends in `kernel`.
      axes: from patterns to the role of each axis, `"in"`, `"out"` or `"stack"`, for weights of
        more than two axes where `init` gets no function to read the roles from, for instance
        `{"*/q_proj/kernel": ("stack", "in", "out")}`.
      init: how an adapter starts: `"default"` changes nothing; `"pissa"`, `"pissa_niter_16"`,
        `"olora"`, `"loftq"` and `"loftq_iter_5"` are in `jlora.variants`, and change the base too.
      variant: what a leaf stands for: `"lora"`, `"dora"` (`jlora.dora`), or `"vera"`
        (`jlora.vera`), which has one rank, no `alpha` and ranks in the hundreds.
      dtype: of `a` and `b`. In bfloat16 an update of 2e-4 rounds away once |b| passes 0.06.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: Sequence[Pattern] = ("all-linear",)
    exclude: Sequence[Pattern] = ()
    rank_pattern: Any = ()  # a mapping, kept as pairs, which can be hashed
    alpha_pattern: Any = ()
    dropout: float = 0.0
    rank_stabilized: bool = False
    train: Sequence[Pattern] = ()
    rows: Any = ()
    axes: Any = ()
    init: str = "default"
    dtype: str = "float32"
    variant: str = "lora"

    def __post_init__(self) -> None:
        for field in ("targets", "exclude", "train"):
            object.__setattr__(self, field, _as_patterns(getattr(self, field)))
        for field in ("rank_pattern", "alpha_pattern", "axes", "rows"):
            object.__setattr__(self, field, _as_pairs(getattr(self, field)))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        for rank in (self.rank, *(rank for _, rank in self.rank_pattern)):
            if not isinstance(rank, int | np.integer) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}.")
        for alpha in (self.alpha, *(alpha for _, alpha in self.alpha_pattern)):
            if not alpha > 0:
                raise ValueError(f"alpha must be above 0, got {alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}.")
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating-point type, got {self.dtype!r}.")
        if self.variant != "lora" and self.init != "default":
            raise ValueError(
                f"init={self.init!r} changes the base, and variant={self.variant!r} measures the "
                "base: they cannot be combined. Choose one of the two."
            )
        if self.variant == "vera" and (
            self.rank_pattern or self.alpha_pattern or self.rank_stabilized
        ):
            raise ValueError(
                "variant='vera' shares one pair of projections between all weights and does not "
                "scale: leave rank_pattern, alpha_pattern and rank_stabilized out."
            )
        for pattern, numbers in self.rows:
            whole = all(isinstance(n, int | np.integer) and n >= 0 for n in numbers)
            if not whole or not numbers or len(set(numbers)) < len(numbers):
                raise ValueError(
                    f"rows for {pattern!r} must be different whole numbers of at least 0, got "
                    f"{numbers!r}."
                )
        for pattern, roles in self.axes:
            unknown = set(roles) - {"stack", "in", "out"}
            if unknown or not {"in", "out"} <= set(roles):
                raise ValueError(
                    f"axes for {pattern!r} must name each axis 'stack', 'in' or 'out', with at "
                    f"least one 'in' and one 'out', got {tuple(roles)}."
                )

    def rank_of(self, path: str) -> int:
        """The rank of the adapter at `path`."""
        return first_match(self.rank_pattern, path, self.rank)

    def scaling_of(self, path: str) -> float:
        """What the update at `path` is scaled by."""
        rank = self.rank_of(path)
        alpha = first_match(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def trains_whole(self, path: str) -> bool:
        """Whether `train` names the leaf at `path`."""
        return any(tree.matches(pattern, path) for pattern in self.train)

    def to_json(self) -> str:
        """A JSON object with every field; `from_json` reads it back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(fields, default=_regex_to_json, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "LoraConfig":
        """Reads what `to_json` wrote.

        Raises:
          ValueError: for a field that this version does not know.
        """
        fields = json.loads(text, object_hook=_regex_from_json)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(fields) - known:
            raise ValueError(
                f"Unknown LoraConfig fields {sorted(unknown)}; known: {sorted(known)}."
            )
        return cls(**fields)


def _as_patterns(patterns: Any) -> tuple[Pattern, ...]:
    return (patterns,) if isinstance(patterns, str | re.Pattern) else tuple(patterns)


def _as_pairs(pairs: Any) -> tuple[tuple[Pattern, Any], ...]:
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    return tuple((key, tuple(v) if isinstance(v, list | tuple) else v) for key, v in items)


def first_match(pairs: Iterable[tuple[Pattern, Any]], path: str, default: Any) -> Any:
    """The value of the first pattern that matches a path."""
    return next((value for pattern, value in pairs if tree.matches(pattern, path)), default)


def _regex_to_json(value: Any) -> dict[str, Any]:
    return {"regex": value.pattern, "flags": value.flags}


def _regex_from_json(value: dict[str, Any]) -> Any:
    return re.compile(value["regex"], value["flags"]) if set(value) == {"regex", "flags"} else value
