"""1 / (x + s) for many shifts s from few functions of x: interpolation in pieces, error known.

Between a and b take p Chebyshev nodes x_k and the polynomial in x through the values there. With
w(x) = prod_k (x - x_k) it misses f(x) = 1 / (x + s) by exactly f(x) w(x) / w(-s), so that its
relative error is at most 1 / T_p(z), where z = (r + 1) / (r - 1), r = (b + s) / (a + s) and T_p is
the Chebyshev polynomial: a matter of the ratio r alone, largest at the smallest shift.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor

ROUNDINGS = 8
"""Relative error that is allowed, in roundings of the numbers that are summed: 1e-6 in float32."""
MOST = 10
"""Nodes of a piece at most; more never pay."""
CELLS = 4000
"""Places at which pieces may begin."""
FINE = 8
"""Such places within the reach of one piece."""
WIDE = 0.03
"""Logarithm of a ratio r: the fewest nodes that reach so far make the scale of the cells."""
OVERHEAD = 16
"""What a piece costs beside its products, in columns."""


@frozen(eq=False)
class Piece:
    """A run of sorted numbers, and functions of them that give f at every shift.

    Args:
        start: The first one.
        stop: The one after the last.
        terms: Functions: p; or one for each shift, where the piece is not interpolated.
        coefficients: What each function is worth at each shift, ``[shifts, terms]``; None: each
            shift has its own.
    """

    start: int
    stop: int
    terms: int
    coefficients: Tensor | None


@frozen(eq=False)
class Pieces:
    """f(x) = 1 / (x + s) on sorted numbers, for several shifts.

    Args:
        values: x, ascending, ``[n]`` in float64.
        shifts: s, ``[m]`` in float64.
        pieces: That cover all numbers, in order.
    """

    values: Tensor
    shifts: Tensor
    pieces: tuple[Piece, ...]

    @property
    def columns(self) -> int:
        """Return how many products all shifts take: one for each number and function."""
        return sum((piece.stop - piece.start) * piece.terms for piece in self.pieces)

    def functions(self, piece: Piece, start: int, stop: int) -> Tensor:
        """Return the functions of a piece on some of its numbers, ``[terms, stop - start]``."""
        values = self.values[start:stop]
        if piece.coefficients is None:
            return 1 / (values + self.shifts.unsqueeze(1))
        return _lagrange(_scaled(values, *self._ends(piece)), piece.terms)

    def _ends(self, piece: Piece) -> tuple[Tensor, Tensor]:
        return self.values[piece.start], self.values[piece.stop - 1]


def pieces_of(values: Tensor, shifts: Tensor, dtype: torch.dtype) -> Pieces:
    """Choose the pieces that take the fewest products.

    Args:
        values: x, ascending, ``[n]`` in float64.
        shifts: s, ``[m]`` in float64, any order.
        dtype: In which products are summed; sets the error that is allowed.
    """
    count = len(shifts)
    if not len(values):
        return Pieces(values, shifts, ())
    least = values + shifts.min()
    tolerance = ROUNDINGS * torch.finfo(dtype).eps
    if count == 1 or not float(least[0]) > 0:
        return Pieces(values, shifts, (Piece(0, len(values), count, None),))
    chosen = _cheapest(least.log(), count, tolerance)
    return Pieces(values, shifts, tuple(_piece(values, shifts, *run) for run in chosen))


def reach(terms: int, tolerance: float) -> float:
    """Return log((b + s) / (a + s)) of the longest piece that p nodes serve to a relative error."""
    z = math.cosh(math.acosh(1 / tolerance) / terms)
    return 2 * math.atanh(1 / z)


def _piece(values: Tensor, shifts: Tensor, start: int, stop: int, terms: int) -> Piece:
    if terms >= len(shifts):
        return Piece(start, stop, len(shifts), None)
    low, high = values[start], values[stop - 1]
    nodes = (low + high) / 2 + (high - low) / 2 * _nodes(terms).to(values)
    return Piece(start, stop, terms, 1 / (nodes + shifts.unsqueeze(1)))


def _nodes(terms: int) -> Tensor:
    """Return the Chebyshev nodes between -1 and 1."""
    return torch.cos((torch.arange(terms, dtype=torch.float64) + 0.5) * math.pi / terms)


def _scaled(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return numbers between ``low`` and ``high`` as numbers between -1 and 1."""
    half = (high - low) / 2
    return (values - (low + high) / 2) / half if half > 0 else torch.zeros_like(values)


def _lagrange(places: Tensor, terms: int) -> Tensor:
    """Return the polynomials that are 1 at one node and 0 at the others, ``[terms, n]``."""
    nodes = _nodes(terms).to(places)
    found = places.new_ones(terms, len(places))
    for k in range(terms):
        for j in range(terms):
            if j != k:
                found[k] *= (places - nodes[j]) / (nodes[k] - nodes[j])
    return found


# --- which pieces ---------------------------------------------------------------------------------
def _cheapest(places: Tensor, count: int, tolerance: float) -> list[tuple[int, int, int]]:
    """Return (start, stop, terms) of the pieces, by dynamic programming over where one may end.

    A piece costs a product for each of its numbers and functions, and for each function what it
    takes to add it to every shift.

    Args:
        places: log(x + smallest shift), ascending.
        count: Shifts.
        tolerance: Relative error.
    """
    reaches = {terms: reach(terms, tolerance) for terms in range(1, min(count, MOST + 1))}
    bounds = _bounds(places, reaches)
    starts = places[bounds[:-1]].tolist()
    stops = places[torch.tensor(bounds[1:]) - 1].tolist()
    windows: dict[int, deque[tuple[float, int]]] = {terms: deque() for terms in (*reaches, count)}
    cost, came = [0.0], [(0, 0)]
    for end, stop in enumerate(stops, 1):
        best, chosen = math.inf, (0, 0)
        for terms, window in windows.items():  # the least cost[i] - terms bounds[i] within reach
            worth = cost[end - 1] - terms * bounds[end - 1]
            while window and window[-1][0] >= worth:
                window.pop()
            window.append((worth, end - 1))
            if terms < count:
                while window and stop - starts[window[0][1]] > reaches[terms]:
                    window.popleft()
            if not window:
                continue
            least, begin = window[0]
            # Functions of its own at each shift are added to that one alone.
            total = least + terms * bounds[end] + OVERHEAD + terms * (count if terms < count else 1)
            if total < best:
                best, chosen = total, (begin, terms)
        cost.append(best)
        came.append(chosen)
    return list(_walked(came, bounds))[::-1]


def _walked(
    came: Sequence[tuple[int, int]], bounds: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, terms) of the chosen pieces, the last first."""
    end = len(came) - 1
    while end:
        begin, terms = came[end]
        yield bounds[begin], bounds[end], terms
        end = begin


def _bounds(places: Tensor, reaches: dict[int, float]) -> list[int]:
    """Return where pieces may begin, and the end: a grid, finer where one node is enough."""
    low, span = float(places[0]), float(places[-1] - places[0])
    scale = next((far for far in reaches.values() if far >= WIDE), max(reaches.values()))
    width = max(scale / FINE, span / CELLS)
    first = [low + far for far in reaches.values()]
    grid = torch.tensor([*first, *(low + width * k for k in range(1, int(span / width) + 2))])
    grid = grid.to(places)
    inside = torch.searchsorted(places, grid, right=True)
    ends = torch.tensor([0, len(places)], device=inside.device)
    return [int(at) for at in torch.unique(torch.cat([inside, ends]))]
