"""Pages: what large tensors cost on a processor, and the batches in which they cost least.

Memory of a tensor that is larger than the allocator keeps goes back to the system when the tensor
goes, and every page of the next one is cleared first. What that takes is told in the design.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

REUSED = 32 * 2**20
"""Bytes of the largest tensor whose memory the allocator keeps for the next: glibc's own limit."""
FEW = 8
"""Rows at least that are taken at once for the sake of their memory."""
PAGE_BYTE = 64
"""Multiply-adds in the time in which the system gives one byte anew."""
NUMBER = 64
"""Multiply-adds in the time in which a number that every batch meets is read, and copied once."""
BATCH = 10**9
"""Multiply-adds in the time that a batch takes beside its examples, at least."""


def fresh_bytes(tensors: Sequence[int], batch: int) -> int:
    """Return the bytes that the system gives anew for each example of a batch.

    Args:
        tensors: Bytes of each tensor that an example makes.
        batch: Examples at a time.
    """
    return sum(size for size in tensors if size * batch > REUSED)


def reused_rows(row: int, count: int) -> int:
    """Return how many rows to take at once, in even pieces, so that their memory is reused.

    All of them where that leaves fewer than `FEW`: what they share would be done too often.

    Args:
        row: Bytes of a row in the largest tensor that is made again and again.
        count: Rows.
    """
    kept = REUSED // max(1, row)
    if kept >= count or kept < FEW:
        return count
    return -(-count // -(-count // kept))


def batch_work(tensors: Sequence[int], total: int, batch: int, each: int = 0) -> int:
    """Return the multiply-adds in the time that the cutting into batches costs.

    Args:
        tensors: Bytes of each tensor that an example makes; none: on an accelerator, whose
            allocator keeps all, so nothing is counted.
        total: Examples.
        batch: Examples at a time.
        each: Multiply-adds of what every batch does beside its examples.
    """
    if not tensors:
        return 0
    count = -(-total // max(1, batch))
    return total * fresh_bytes(tensors, batch) * PAGE_BYTE + count * (BATCH + each)


def batch_sizes(tensors: Sequence[int], total: int, most: int) -> Iterator[int]:
    """Yield the batches to be weighed, as even as can be: the largest, then ever smaller ones.

    Args:
        tensors: Bytes of each tensor that an example makes.
        total: Examples.
        most: Examples at a time for which there is memory.
    """
    count = -(-total // most)
    most = -(-total // count)
    yield most
    while most > 1 and fresh_bytes(tensors, most):
        count *= 2
        most = -(-total // count)
        yield most


def best_batch(tensors: Sequence[int], total: int, most: int, each: int = 0) -> int:
    """Return the batch that costs least; the arguments are those of `batch_work`."""
    sizes = batch_sizes(tensors, total, most)
    return min(sizes, key=lambda size: (batch_work(tensors, total, size, each), -size))
