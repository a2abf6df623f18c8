"""How long the rows of a run are: what a plan needs to know of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Rows(Protocol):
    """How long the rows of a run are. Tokens are what a pass reads; labels are those that count in the loss."""

    @property
    def count(self) -> int:
        """Training rows."""

    @property
    def mean_tokens(self) -> float:
        """Tokens of a row, on average."""

    def heaviest(self, rows: float) -> tuple[float, float]:
        """Tokens and labels that a batch of so many rows may hold at most."""

    def held_out(self, rows: int) -> tuple[float, float]:
        """The same for so many rows of an evaluation."""

    def passes(self, rows: float) -> Sequence[float]:
        """Tokens of each pass over so many rows, in some order."""

    @property
    def longest(self) -> tuple[float, float]:
        """Tokens of the longest row, trained and held out; padding fills every row of a batch up to it."""


@dataclass(frozen=True)
class AverageRows:
    """Rows of which only the average is known; no evaluation is planned for.

    Attributes:
        shared: tokens that all rows begin with and that a pass reads once (`packing.shared_prefix`).
    """

    count: int = 3729
    mean_tokens: float = 60.6
    label_share: float = 0.33
    shared: int = 0

    def heaviest(self, rows: float) -> tuple[float, float]:
        """Tokens and labels of an average batch."""
        return self.passes(rows)[0], rows * self.mean_tokens * self.label_share

    def held_out(self, rows: int) -> tuple[float, float]:
        """Nothing."""
        return 0.0, 0.0

    def passes(self, rows: float) -> Sequence[float]:
        """One average pass."""
        return [rows * self.mean_tokens - self.shared * max(rows - 1, 0)]

    @property
    def longest(self) -> tuple[float, float]:
        """The average again."""
        return self.mean_tokens, 0.0


#: The lengths of the role-play rows in `benchmarks/lengths.json`.
ROLE_PLAY = AverageRows()


@dataclass(frozen=True)
class RealRows:
    """Tokens and labels of each training row and of each held-out row.

    Attributes:
        shared: tokens that all training rows begin with and that a pass reads once (`packing.shared_prefix`).
    """

    tokens: Sequence[int]
    labels: Sequence[int]
    held_out_tokens: Sequence[int] = ()
    held_out_labels: Sequence[int] = ()
    shared: int = 0

    @classmethod
    def of(cls, train: Any, held_out: dict[str, Any]) -> RealRows:
        """The lengths of data sets with the columns `input_ids` and `labels`, as notebook 04 saves them."""

        def count(rows: Any) -> tuple[list[int], list[int]]:
            return list(map(len, rows["input_ids"])), [sum(i != -100 for i in labels) for labels in rows["labels"]]

        parts = list(map(count, held_out.values()))
        held = [[size for part in parts for size in part[kind]] for kind in (0, 1)]
        return cls(*count(train), *held)

    @property
    def count(self) -> int:
        """Training rows."""
        return len(self.tokens)

    @property
    def mean_tokens(self) -> float:
        """Tokens of a row, on average."""
        return sum(self.tokens) / len(self.tokens)

    def heaviest(self, rows: float) -> tuple[float, float]:
        """The longest rows together, because `packing.SimilarLengths` puts rows of similar length into one step."""
        count = max(1, round(rows))
        return sum_of_largest(self.tokens, count) - self.saved(count), sum_of_largest(self.labels, count)

    def saved(self, rows: int) -> int:
        """How many tokens a pass over so many rows does not read again."""
        return self.shared * (rows - 1)

    def held_out(self, rows: int) -> tuple[float, float]:
        """The longest held-out rows together: they are read in the order of the file, where they may be neighbours."""
        if not self.held_out_tokens:
            return 0.0, 0.0
        return sum_of_largest(self.held_out_tokens, rows), sum_of_largest(self.held_out_labels, rows)

    def passes(self, rows: float) -> Sequence[float]:
        """Rows of similar length together, as they are trained; the last pass, which is not full, left out."""
        sizes, step = sorted(self.tokens), max(1, round(rows))
        parts = [sizes[i : i + step] for i in range(0, len(sizes) - step + 1, step)] or [sizes]
        return [float(sum(part) - self.saved(len(part))) for part in parts]

    @property
    def longest(self) -> tuple[float, float]:
        """Tokens of the longest row, trained and held out."""
        return max(self.tokens), max(self.held_out_tokens, default=0)


def sum_of_largest(sizes: Sequence[int], count: int) -> float:
    """How much the largest rows hold together; with too few rows the longest is counted again."""
    return float(sum(sorted(sizes, reverse=True)[:count]) + max(0, count - len(sizes)) * max(sizes))
