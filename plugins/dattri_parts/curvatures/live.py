"""Eigenvectors of second moments of which some coordinates are never used."""

from __future__ import annotations

import torch
from torch import Tensor

SHARE = 0.75
"""Of the entries of a matrix: a larger part of it is not taken out, which then saves little time,
and with its eigenvectors and the matrix takes more memory than the whole with its own.
"""


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[k]``, rising but for rounding, and eigenvectors ``[k, k]``.

    A coordinate whose row is zero (a pixel that is always black, a dead unit) is its own
    eigenvector, of the eigenvalue 0: where there are many, the others are decomposed without them.

    Args:
        matrix: A sum of squares, ``[k, k]``, symmetric; several, ``[G, k, k]``, are decomposed
            whole.

    Raises:
        torch.linalg.LinAlgError: The decomposition fails.
    """
    live = matrix.ne(0).any(dim=-1)
    if matrix.dim() != 2 or int(live.sum()) ** 2 > SHARE * len(live) ** 2:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    used, idle = live.nonzero()[:, 0], (~live).nonzero()[:, 0]
    found, turned = torch.linalg.eigh(matrix[used[:, None], used])
    first = len(idle)
    vectors = turned.new_zeros(len(live), len(live))
    vectors[idle, torch.arange(first, device=idle.device)] = 1
    vectors[used, first:] = turned
    return torch.cat([found.new_zeros(first), found]), vectors
