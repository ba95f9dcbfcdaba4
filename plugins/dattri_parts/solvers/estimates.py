"""Numbers of an operator that are known by products only: its mean eigenvalue."""

from __future__ import annotations

import torch
from torch import Tensor

from dattri_core import Operator, RandomStream, Rows

PROBES = 32
"""Random vectors of the estimate of the trace."""


def mean_eigenvalue(operator: Operator, device: torch.device) -> float:
    """Return an estimate of trace(H) / d: the mean of z^T H z / d over random signs z.

    Its standard error is sqrt(2 / 32) |off-diagonal of H| / d. Source: Hutchinson 1990.
    """
    generator = RandomStream(0, "trace").generator("signs")
    size = operator.space.dim
    signs = torch.randint(0, 2, (PROBES, size), generator=generator) * 2 - 1
    step = max(1, operator.memory // (6 * 8 * size))
    total = 0.0
    for part in torch.split(signs, min(step, PROBES)):
        flat = part.to(device=device, dtype=operator.dtype)
        probes = Rows.from_flat(operator.space, flat, torch.arange(len(part)))
        total += _overlap(probes, operator.apply(probes))
    return total / (PROBES * size)


def _overlap(left: Rows, right: Rows) -> float:
    products: Tensor = left.to(dtype=torch.float64).pair_inner(right.to(dtype=torch.float64))
    return float(products.sum())
