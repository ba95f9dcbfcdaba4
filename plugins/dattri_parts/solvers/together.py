"""Rows that several processes read, a part of the train set each, and hold all of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from dattri_core import PartedRows, Processes, RowsOperator, processes_now

T = TypeVar("T")


def own_part(operator: RowsOperator) -> tuple[RowsOperator, Processes | None]:
    """Return the rows that this process is to read, and the processes that read the others."""
    processes = processes_now()
    if processes is None or not isinstance(operator, PartedRows):
        return operator, None
    own = operator.own_part()
    return own, None if own is operator else processes


def joined(processes: Processes, parts: Sequence[T], device: torch.device) -> list[T]:
    """Return blocks, rows or tensors of all processes, in the order of the train set."""
    movable: Sequence[Any] = parts
    sent = [part.to("cpu", None) for part in movable]
    return [part.to(device, None) for some in processes.gathered(sent) for part in some]
