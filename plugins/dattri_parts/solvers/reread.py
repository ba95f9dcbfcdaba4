"""Rows of a curvature that are read again whenever they are needed: too many to be held.

Rows stand in one order wherever they meet a Gram matrix: example by example, those of an example as
they come. So it does not matter how a reading is cut, or that each draw of labels is another pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import Block, DenseBlock, IndexedRows, NumericsError, Rows
from dattri_parts.solvers.dual import Dual, require_finite
from dattri_parts.solvers.factor import precision_of
from dattri_parts.solvers.forecast import Forecast
from dattri_parts.solvers.held import groups_of, kept
from dattri_parts.solvers.kernel import Kernel
from dattri_parts.solvers.primal import Primal
from dattri_parts.solvers.reading import add_squares
from dattri_parts.solvers.tiles import CONTRACTION_SHARE, by_example, gram_by_tiles, products_of

BESIDE = 2
"""Formed rows beside an answer while it is made: what is subtracted, in float64."""


@frozen(eq=False)
class Reread:
    """Gram matrices of rows, and the readings of all rows that apply the inverse.

    Args:
        operator: Gives the rows.
        names: Blocks of the groups whose rows meet each other.
        sides: What was made of each group.
        tiles: In how many parts the rows were held, one at a time, to meet all others.
    """

    operator: IndexedRows
    names: Mapping[str, tuple[str, ...]]
    sides: Mapping[str, Dual | Primal]
    tiles: int

    @staticmethod
    def of(operator: IndexedRows, device: torch.device, forecast: Forecast) -> Reread:
        """Read the rows in tiles: while one is held, it meets itself and all rows after it.

        With k tiles of one size every row is read (k + 1) / 2 times.

        Raises:
            MemoryBudgetError: The rows of one example do not fit beside the matrices.
            NumericsError: A row is not finite.
        """
        groups, precision = groups_of(operator), precision_of(operator)
        sides: dict[str, Dual | Primal] = {}
        duals: dict[str, tuple[str, ...]] = {}
        moments: dict[str, Tensor] = {}
        for (group, names), foretold in zip(groups.items(), forecast.groups, strict=True):
            if foretold.primal(forecast.rows):
                size = foretold.size
                moments[group] = torch.zeros(size, size, dtype=torch.float64, device=device)
            else:
                duals[group] = names
        count = _add_moments(operator, groups, moments)
        for group, moment in moments.items():
            sides[group] = Primal(operator.space.select(groups[group]), moment, count, precision)
        matrices, tiles = gram_by_tiles(operator, duals, forecast, device)
        for group, matrix in matrices.items():
            require_finite(matrix.diagonal(), duals[group])
            trace = operator.weight * float(matrix.diagonal().sum())
            kernel = Kernel.of(operator, len(matrix), trace, matrix.clone)
            size = sum(operator.space[name].size for name in duals[group])
            sides[group] = Dual({}, size, kernel, 0)
        return Reread(operator, duals, {group: sides[group] for group in groups}, tiles)

    def invert(
        self, rows: Rows, dampings: Mapping[str, float], *, spectral: bool
    ) -> dict[str, Block]:
        """Return the blocks of the groups that are not `Primal`, formed: the inverse times rows.

        With K = G G^T + damping/w I as it was computed, c = K^-1 G h, and once more for what K's
        rounding left over, c + K^-1 (G h - damping/w c - G G^T c), before h - G^T c is divided by
        damping: that difference is small where an eigenvalue is large, so that its two sides must
        be known better than to the rounding of rows in float32, which no two readings of different
        batches have in common. Sums run in float64; rows in float64 need no second time.

        Raises:
            NumericsError: There are not as many rows as at the fit.
        """
        device = next(iter(rows.blocks.values())).device
        formed = {
            name: rows.blocks[name].dense().values.to(torch.float64, copy=True)
            for names in self.names.values()
            for name in names
        }
        met, turn = self._meet(formed)
        shares: dict[str, Tensor] = {}
        for group, products in met.items():
            shares[group] = self._solve(group, products, turn, dampings, spectral=spectral)
        for total in formed.values():
            total.zero_()
        self._sum(shares, formed)
        if self.operator.dtype != torch.float64:
            again, _ = self._meet(formed)
            for group, products in met.items():
                ridge = dampings[group] / self.operator.weight
                products -= again[group].add_(shares[group], alpha=ridge)
                shares[group] = self._solve(group, products, turn, dampings, spectral=spectral)
            self._sum(shares, formed)
        found: dict[str, Block] = {}
        for group, names in self.names.items():
            for name in names:
                own = rows.blocks[name]
                answer = own.dense().values.sub(formed.pop(name)).div_(dampings[group])
                found[name] = DenseBlock(answer.to(device, own.dtype))
        return found

    def _solve(
        self,
        group: str,
        products: Tensor,
        turn: Tensor,
        dampings: Mapping[str, float],
        *,
        spectral: bool,
    ) -> Tensor:
        """Return K^-1 times products ``[m, C]`` whose rows stand as they come, in that order."""
        side = self.sides[group]
        assert isinstance(side, Dual)
        if len(products) != side.rows:
            raise NumericsError(
                f"solver 'woodbury': {len(products)} rows of the curvature, {side.rows} at the "
                "fit; the model or its data changed, fit again"
            )
        solved = torch.empty_like(products)
        solved[turn] = side.kernel.solve(products[turn], dampings[group], spectral=spectral)
        return solved

    def _meet(self, formed: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return all rows' products with vectors by group, ``[m, C]``, and their order."""
        met: dict[str, list[Tensor]] = {group: [] for group in self.names}
        came: list[Tensor] = []
        limit = self.operator.memory // CONTRACTION_SHARE
        for part in self.operator.rows():
            came.append(part.index)
            small = kept(part)
            for group, names in self.names.items():
                vectors = {name: DenseBlock(formed[name]) for name in names}
                met[group].append(products_of(small.blocks, vectors, names, limit))
            del part, small
        return {group: torch.cat(parts) for group, parts in met.items()}, by_example(came)

    def _sum(self, shares: Mapping[str, Tensor], formed: Mapping[str, Tensor]) -> None:
        """Add G^T c of coefficients c ``[m, C]``, which stand as rows come, to what is formed."""
        start = 0
        for part in self.operator.rows():
            here = slice(start, start + len(part))
            start += len(part)
            small = kept(part)
            for group, names in self.names.items():
                for name in names:
                    block = small.blocks[name].to(None, torch.float64)
                    formed[name].add_(block.combine(shares[group][here].mT))
            del part, small


def _add_moments(
    operator: IndexedRows, groups: Mapping[str, tuple[str, ...]], moments: Mapping[str, Tensor]
) -> int:
    """Add up the second moments of some groups by one reading; return how many rows there are."""
    count = 0
    for rows in operator.rows() if moments else ():
        small = kept(rows)
        count += len(rows)
        for group, moment in moments.items():
            blocks = [small.blocks[name] for name in groups[group]]
            add_squares(moment, blocks, operator.weight)
    return count
