"""Work on a batch that is done on its halves when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from dattri_core.batch import Batch, batch_size, take
from dattri_core.errors import MemoryBudgetError
from dattri_core.memory import is_out_of_memory

T = TypeVar("T")


def halved(
    work: Callable[[Tensor, Batch], T], index: Tensor, batch: Batch, what: str
) -> Iterator[T]:
    """Yield the result of work on a batch; when memory runs out, of its halves, down to examples.

    Raises:
        MemoryBudgetError: One example alone is too much.
    """
    made: list[T] = []
    failed: BaseException | None = None
    try:
        made.append(work(index, batch))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = error.with_traceback(None)  # its frames hold the memory that ran out
    if failed is None:
        yield made.pop()  # not held while the next is made
        return
    count = batch_size(batch)
    if count == 1:
        raise MemoryBudgetError(
            f"{what}: out of memory with a single example ({failed}); give a smaller memory=, "
            "attribute fewer parameters, or use a projector"
        ) from failed
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for part in (slice(0, count // 2), slice(count // 2, count)):
        yield from halved(work, index[part], take(batch, part), what)


def halving(work: Callable[[Tensor, Batch], None], index: Tensor, batch: Batch, what: str) -> None:
    """Do work that returns nothing as `halved` does."""
    for _ in halved(work, index, batch, what):
        pass
