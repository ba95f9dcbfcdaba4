"""Toy second moments, read as rows or summed by parts: right without a fault, broken with one."""

from __future__ import annotations

import torch
from attrs import define, field, frozen
from toy_world_parts import ToyMatrix

from dattri_core import Rows, summed


@frozen
class ToySummed:
    """The mean of g g^T, which several processes may read in parts."""

    fault: str = ""
    needs = frozenset({"rows"})
    exact = False

    def gives(self, space):
        return frozenset({"apply", "dense"})

    def fit(self, problem):
        def read(part):
            size, count = problem.space.dim, 0
            total = torch.zeros(size, size, dtype=torch.float64, device=problem.device)
            for rows in part.rows():
                flat = rows.flat().double()
                total, count = total + flat.T @ flat, count + len(rows)
            # Broken: a sum of means, each over its own part.
            return {"moment": total / max(1, count if self.fault else problem.n_train)}

        return ToyMatrix("", problem.space, summed(problem, read)["moment"])


@frozen
class ToySquares:
    """The diagonal of the GGN from its rows, of which an example has as many as it needs."""

    fault: str = ""
    needs = frozenset({"ggn-rows"})
    exact = False

    def gives(self, space):
        return frozenset({"apply", "dense"})

    def fit(self, problem):
        parts = [rows.flat().double().square() for rows in problem.rows(kind="ggn")]
        squares = torch.cat(parts)
        # Broken: a mean over rows in place of examples.
        count = len(squares) if self.fault == "means" else problem.n_train
        return ToyMatrix("", problem.space, torch.diag(squares.sum(0) / count))


@frozen
class ToyMoment:
    """The mean of g g^T, or its diagonal blocks, as rows."""

    fault: str = ""
    blockwise: bool = False
    needs = frozenset({"rows"})
    exact = False

    def gives(self, space):
        return frozenset({"apply", "rows"})

    def fit(self, problem):
        return ToyMomentOperator(self.fault, problem, self.blockwise)


@define(eq=False)
class ToyMomentOperator:
    fault: str
    problem: object
    blockwise: bool
    readings: list = field(factory=list)
    dtype = torch.float64
    memory = 2**28

    @property
    def space(self):
        return self.problem.space

    @property
    def weight(self):
        return (1.5 if self.fault == "weight" else 1) / self.problem.n_train

    def rows(self):
        self.readings.append(None)
        turn = -1.0 if self.fault == "sign" and len(self.readings) > 1 else 1.0
        for rows in self.problem.rows():
            yield rows.scale(torch.full((len(rows),), turn, dtype=rows.dtype, device=rows.device))

    def apply(self, rows):
        total = torch.zeros(len(rows), self.space.dim, dtype=torch.float64, device=rows.device)
        names = [(name,) for name in self.space.names] if self.blockwise else [self.space.names]
        for part in self.problem.rows():
            for some in names:
                mine, given = (r.select(some).to(dtype=torch.float64) for r in (part, rows))
                there = torch.cat([torch.full((s.size,), s.name in some) for s in self.space])
                total[:, there] += mine.inner(given).T @ mine.flat() / self.problem.n_train
        return Rows.from_flat(self.space, total.to(rows.dtype), rows.index, rows.aux)
