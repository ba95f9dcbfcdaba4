"""How many rows a curvature has and what they take in memory, told by those of a few examples."""

from __future__ import annotations

import math

import torch
from attrs import frozen

from dattri_core import IndexedRows, MemoryBudgetError, format_bytes, inner_work
from dattri_parts.solvers.held import groups_of, kept

EXAMPLES = 8
"""Whose rows are counted: the first of the train set."""
PRIMAL = 1.5
"""Rows for each number of a row from which the matrix of the numbers is less work and memory."""
READINGS = 2
"""Of all rows, to apply an inverse that does not hold them: to meet vectors, and to be summed.

Twice as many where rows are less than float64: once more for what rounding left over.
"""


@frozen
class Group:
    """Blocks that are inverted together.

    Args:
        size: Numbers of a row in them.
        row_bytes: Of a row as it is held.
        work: Multiply-adds of the inner product of two rows.
    """

    size: int
    row_bytes: float
    work: float = 0.0

    def primal(self, rows: int) -> bool:
        """Return whether the matrix of its numbers is smaller than that of so many rows."""
        return rows >= PRIMAL * self.size

    def matrices(self, rows: int) -> int:
        """Return the bytes of the Gram matrix, or of the second moment and its factor."""
        return 16 * self.size**2 if self.primal(rows) else 8 * rows**2

    def nbytes(self, rows: int) -> int:
        """Return the bytes of the matrices, and of the rows where those are held."""
        return self.matrices(rows) + (0 if self.primal(rows) else int(self.row_bytes * rows))


@frozen
class Forecast:
    """What the solver 'woodbury' will hold of a curvature, or read again.

    Args:
        rows: m, of all train examples.
        groups: Blocks that are inverted together.
        available: Bytes that may be used.
        examples: Of the train set.
        applied: Readings of all rows that apply the inverse where rows are not held.
        whole: Whether no row of the examples that were counted is missing.
    """

    rows: int
    groups: tuple[Group, ...]
    available: int
    examples: int
    applied: int = READINGS
    whole: bool = True

    @staticmethod
    def of(operator: IndexedRows) -> Forecast:
        """Read the rows of the first 8 examples; m is their mean number times that of examples.

        So a curvature of one row an example is counted exactly, and a GGN where all examples have
        as many outputs. Reading stops where the rows so far are too many for the memory already.

        Raises:
            SpecError, MemoryBudgetError: The rows cannot be had, not even of one example.
        """
        n_train = operator.n_train
        examples = min(EXAMPLES, n_train)
        together = groups_of(operator)
        held = dict.fromkeys(together, 0)
        work = dict.fromkeys(together, 0.0)
        read, last = 0, -1
        applied = READINGS * (1 if operator.dtype == torch.float64 else 2)

        def forecast(seen: int, *, whole: bool) -> Forecast:
            total = round(read / max(1, seen) * n_train)
            groups = (
                Group(
                    sum(operator.space[name].size for name in names),
                    held[group] / max(1, read),
                    work[group],
                )
                for group, names in together.items()
            )
            return Forecast(total, tuple(groups), operator.memory, n_train, applied, whole)

        for rows in operator.rows_of(torch.arange(examples)):
            if not len(rows):
                continue
            last = max(last, int(rows.index[-1]))
            read += len(rows)
            small = kept(rows)
            for group, names in together.items():
                blocks = [small.blocks[name] for name in names]
                held[group] += sum(block.nbytes for block in blocks)
                if not work[group]:
                    many = max(1, n_train * len(rows) // examples)
                    pairs = sum(inner_work(block, many, many) for block in blocks)
                    work[group] = pairs / many**2
            sofar = forecast(last + 1, whole=False)
            if not sofar.possible:  # whatever the others of the 8 add
                return sofar
        return forecast(examples, whole=True)

    @property
    def nbytes(self) -> int:
        """Return the most that is held at once: at the end, or before a group's rows are summed."""
        turns = (math.ceil(PRIMAL * group.size) - 1 for group in self.groups)
        counts = {self.rows, *(turn for turn in turns if turn <= self.rows)}
        return max(sum(group.nbytes(count) for group in self.groups) for count in counts)

    @property
    def fits(self) -> bool:
        """Return whether that may be used."""
        return self.nbytes <= self.available

    @property
    def held(self) -> int:
        """Return the bytes that are kept after the fit."""
        if not self.fits:
            return self.matrix_bytes
        return sum(group.nbytes(self.rows) for group in self.groups)

    @property
    def base(self) -> int:
        """Return of how many held rows an answer is a combination."""
        return self.rows if self._duals else 0

    # --- rows that are read again ---------------------------------------------------------------
    @property
    def _duals(self) -> list[Group]:
        return [group for group in self.groups if not group.primal(self.rows)]

    @property
    def matrix_bytes(self) -> int:
        """Return the bytes of all matrices where rows are not held: each Gram matrix twice."""
        twice = len(self._duals) * 8 * self.rows**2
        return sum(group.matrices(self.rows) for group in self.groups) + twice

    @property
    def room(self) -> int:
        """Return the bytes for the rows of a tile."""
        return self.available - self.matrix_bytes

    @property
    def example_bytes(self) -> float:
        """Return the bytes of the rows of one example, so far as their products are taken."""
        return sum(group.row_bytes for group in self._duals) * self.rows / max(1, self.examples)

    @property
    def streams(self) -> bool:
        """Return whether the matrices and the rows of one example may be held."""
        return self.example_bytes <= self.room

    @property
    def possible(self) -> bool:
        """Return whether rows are held, or may be read again."""
        return self.fits or self.streams

    @property
    def tiles(self) -> int:
        """Return in how many tiles rows meet each other."""
        return max(1, math.ceil(self.examples / self.tile))

    @property
    def tile(self) -> int:
        """Return how many examples have their rows held at once, in tiles of one size."""
        most = max(1, int(self.room // max(1.0, self.example_bytes)))
        return math.ceil(self.examples / math.ceil(self.examples / most)) if self.examples else 1

    @property
    def readings(self) -> float:
        """Return how often a row is read to fit: while it is held, and while an earlier tile is."""
        return (self.tiles + 1) / 2

    @property
    def pairs(self) -> float:
        """Return the multiply-adds of all inner products of rows."""
        return sum(group.work for group in self._duals) * self.rows**2 / 2

    @property
    def way(self) -> str:
        """Return what it takes in one line: the bytes, the readings and the products."""
        products = f"about {self.pairs:.1e} multiply-adds for their inner products"
        if self.fits:
            return f"{self.rows} rows are held ({format_bytes(self.nbytes)}), {products}"
        rows = format_bytes(self.example_bytes * self.examples)
        return (
            f"{self.rows} rows ({rows}) are not held but read again: "
            f"{self.readings:g} times to fit, in {self.tiles} tiles of {self.tile} examples, and "
            f"{self.applied} times for each group of queries, whose answers are formed (store= "
            f"keeps rows that have passed a projector, which are computed once then); {products}"
        )

    def __str__(self) -> str:
        """Return why it cannot be: the least that it takes, and what may be used."""
        least = min(self.nbytes, self.matrix_bytes + self.example_bytes)
        return (
            f"{'' if self.whole else 'at least '}{self.rows} rows and what inverts them take "
            f"{format_bytes(least)}, {format_bytes(self.available)} may be used"
        )


def refusal(why: str) -> MemoryBudgetError:
    """Return the error of rows that do not fit, with what would."""
    return MemoryBudgetError(
        f"solver 'woodbury': {why}; give a larger memory=, a curvature with fewer rows ('fisher' "
        "has one an example, 'ggn' one for each output), a projector, or the solver 'cg', "
        "'datainf' or a spectral curvature"
    )
