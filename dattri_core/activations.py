"""What a pass over one example keeps in memory, measured on one."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dattri_core.batch import Batch, strided_parts, take, tensors_of
from dattri_core.evaluate import Evaluator, leaves

LEAST = 256
_known: WeakKeyDictionary[Evaluator, int] = WeakKeyDictionary()


def activation_bytes(evaluator: Evaluator, batch: Batch) -> int:
    """Return the bytes that a backward pass needs for one example, inputs and weights apart.

    Measured once for a checkpoint, on the first example of the batch.
    """
    known = _known.get(evaluator)
    if known is None:
        known = _known[evaluator] = measured_bytes(evaluator, batch)
    return known


def measured_bytes(evaluator: Evaluator, batch: Batch) -> int:
    """Return the same for the first example of this batch."""
    single = take(batch, slice(0, 1))
    apart: dict[int, int] = {}
    for given in (*tensors_of(single), *evaluator.state.values()):
        apart.update(_storages(given))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.update((at, size) for at, size in _storages(tensor).items() if at not in apart)
        return tensor

    variables = leaves(evaluator.selected)

    def run(model: nn.Module) -> None:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            total = evaluator.total_of(model, single, "train", variables)
        del total

    with evaluator.session(), torch.enable_grad():
        evaluator.call(run, variables)
    return max(LEAST, sum(kept.values()))


def _storages(tensor: Tensor) -> dict[int, int]:
    """Return the bytes of the memory that a tensor lies in, by address; several of a sparse one."""
    storages = [part.untyped_storage() for part in strided_parts(tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
