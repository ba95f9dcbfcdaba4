"""How many rows a curvature has and what they take in memory, told by those of a few examples."""

from __future__ import annotations

import math

from attrs import frozen

from dattri_core import Problem, RowsOperator, format_bytes
from dattri_parts.solvers.held import groups_of, kept

EXAMPLES = 8
"""Whose rows are counted: the first of the train set."""
PRIMAL = 1.5
"""Rows for each number of a row from which the matrix of the numbers is less work and memory."""


@frozen
class Group:
    """Blocks that are inverted together.

    Args:
        size: Numbers of a row in them.
        row_bytes: Of a row as it is held.
    """

    size: int
    row_bytes: float

    def nbytes(self, rows: int) -> int:
        """Return the bytes of rows and Gram matrix, or of the second moment and its factor."""
        if rows >= PRIMAL * self.size:
            return 16 * self.size**2
        return 8 * rows**2 + int(self.row_bytes * rows)


@frozen
class Forecast:
    """What the solver 'woodbury' will hold of a curvature.

    Args:
        rows: m, of all train examples.
        groups: Blocks that are inverted together.
        available: Bytes that may be used.
        whole: Whether no row of the examples that were counted is missing.
    """

    rows: int
    groups: tuple[Group, ...]
    available: int
    whole: bool = True

    @staticmethod
    def of(operator: RowsOperator, problem: Problem) -> Forecast:
        """Read the rows of the first 8 examples; m is their mean number times that of examples.

        So a curvature of one row an example is counted exactly, and a GGN where all examples have
        as many outputs. Reading stops where the rows so far are too many for the memory already.

        Raises:
            SpecError, MemoryBudgetError: The rows cannot be had, not even of one example.
        """
        examples = min(EXAMPLES, problem.n_train)
        together = groups_of(operator)
        sizes = {
            group: sum(operator.space[name].size for name in names)
            for group, names in together.items()
        }
        held = dict.fromkeys(sizes, 0)
        read, counted, last = 0, 0, -1

        def forecast(seen: int, *, whole: bool) -> Forecast:
            # 1 / weight is the number of examples, times that of draws where labels are drawn.
            total = round(counted / max(1, seen) / operator.weight)
            groups = (Group(size, held[name] / max(1, read)) for name, size in sizes.items())
            return Forecast(total, tuple(groups), operator.memory, whole)

        for rows in operator.rows():
            if not len(rows):
                continue
            if int(rows.index[0]) < last:  # another draw of the labels
                break
            last = int(rows.index[-1])
            read, counted = read + len(rows), counted + int((rows.index < examples).sum())
            small = kept(rows)
            for group, names in together.items():
                held[group] += sum(small.blocks[name].nbytes for name in names)
            if last >= examples:
                break
            if not forecast(examples, whole=False).fits:  # whatever the others of the 8 add
                return forecast(last + 1, whole=False)
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

    def __str__(self) -> str:
        return (
            f"{'' if self.whole else 'at least '}{self.rows} rows and what inverts them take "
            f"{format_bytes(self.nbytes)}, {format_bytes(self.available)} may be used"
        )
