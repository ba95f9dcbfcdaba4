"""Examples of unequal length: that padding to the length of others changes nothing.

Batches are formed anew, as large as memory allows, so an example is padded to another length in
another run. Where its loss or its row depends on that, scores do too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dattri_core.batch import Batch, move, take, tensors_of
from dattri_core.errors import InputError
from dattri_core.evaluate import Evaluator
from dattri_core.problem import collect
from dattri_core.protocols import BoundSource, Role
from dattri_core.rows import Rows
from dattri_core.stream import Examples

LOOSE_ROWS = {torch.float64: 1e-6, torch.float32: 5e-2}
"""By how much a row may differ, relative to it: a unit at a kink may fall on either side."""
LOOSE_HALF = 0.3
FLOOR = 1e-6
"""Length of a row up to which it is rounding, times the root of the numbers in it and the unit."""
CURE = (
    "mask padding in the model and in the loss (an attention mask, and position_ids where padding "
    "comes first; a mean over the tokens that are there, not over the padded length), or pad all "
    "examples to one length in the data set"
)


def require_unpadded(
    evaluator: Evaluator,
    examples: Examples,
    index: Tensor,
    sample: Batch,
    role: Role,
    rows: tuple[BoundSource, Rows] | None = None,
) -> None:
    """Compare examples alone with the same examples padded to the length of others.

    Nothing is computed where examples have one length. Of batches that can only be read in turn no
    example is had alone.

    Args:
        evaluator: The losses at a checkpoint.
        examples: The data.
        index: Positions of the sample, ``[B]``.
        sample: Examples in one batch, on the device.
        role: Of the loss or target.
        rows: The source, and the rows of the sample; None compares values alone.

    Raises:
        InputError: A value differs, or the row of the shortest example does.
    """
    if examples.kind != "items":
        return
    apart: dict[int, Batch] = {}
    for at, position in enumerate(index.tolist()):
        single = move(examples.alone(position), evaluator.device)
        if _shapes(single) != _shapes(take(sample, slice(at, at + 1))):
            apart[at] = single
    if not apart:
        return
    which = f"{'loss' if role == 'train' else 'target'} {_name(evaluator, role)!r}"
    with evaluator.session(), torch.no_grad():
        padded = evaluator.per_example(None, sample, role)
        for at, single in apart.items():
            value = evaluator.per_example(None, single, role)
            if not evaluator.is_near(value[:1], padded[at : at + 1], sample, role):
                if (value[0] - padded[at]).abs() <= evaluator.rounding(sample, role)[at]:
                    continue
                raise InputError(
                    f"{which}: depends on padding: {examples.name} example {int(index[at])} has "
                    f"{value[0].item():.6g} alone and {padded[at].item():.6g} padded to the length "
                    f"of others, so scores would depend on the sizes of batches; {CURE}"
                )
    if rows is None:
        return
    shortest = min(apart, key=lambda at: sum(t.numel() for t in tensors_of(apart[at])))
    source, held = rows
    here = index[shortest : shortest + 1]
    try:
        fresh = collect(source, apart[shortest], here, role, evaluator.device)
    except InputError:  # what the source does not take is said of a batch that has it
        return
    with evaluator.session(), torch.no_grad():
        unit = evaluator.unit(sample, role)
    off = _distance(fresh, held.take(slice(shortest, shortest + 1)), FLOOR * unit)
    if off <= LOOSE_ROWS.get(evaluator.dtype, LOOSE_HALF):
        return
    if off > LOOSE_HALF or evaluator.coarsest(sample, role) < torch.finfo(torch.float16).eps:
        raise InputError(
            f"{which}: its gradient depends on padding: the row of {examples.name} example "
            f"{int(here)} alone differs by {off:.1e} of its length from that of the same example "
            f"padded to the length of others; {CURE}"
        )


def _distance(fresh: Rows, held: Rows, least: float) -> float:
    """Return the length of the difference of two rows, relative to that of the second.

    A row of ``least`` times the root of its numbers, or shorter, counts as one of that length.
    """
    apart = length = floor = 0.0
    for name, block in fresh.blocks.items():
        one, other = (b.dense().values.double() for b in (block, held.blocks[name]))
        apart += float((one - other).square().sum())
        length += float(other.square().sum())
        floor += least**2 * other.numel()
    return float((apart / max(length, floor)) ** 0.5)


def _name(evaluator: Evaluator, role: Role) -> str:
    task = evaluator.task
    return task.loss_name if role == "train" or task.target is None else task.target_name


def _shapes(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors_of(batch)]
