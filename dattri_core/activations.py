"""What a pass over one example keeps in memory, measured on one."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dattri_core.batch import Batch, take, tensors_of
from dattri_core.evaluate import Evaluator, leaves

LEAST = 256
_known: WeakKeyDictionary[Evaluator, int] = WeakKeyDictionary()


def activation_bytes(evaluator: Evaluator, batch: Batch) -> int:
    """Return the bytes that a backward pass needs for one example, inputs and weights apart.

    Measured once for a checkpoint, on the first example of the batch.
    """
    known = _known.get(evaluator)
    if known is not None:
        return known
    single = take(batch, slice(0, 1))
    apart = {t.untyped_storage().data_ptr() for t in tensors_of(single)}
    apart.update(t.untyped_storage().data_ptr() for t in evaluator.state.values())
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in apart:
            kept[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    variables = leaves(evaluator.selected)

    def run(model: nn.Module) -> None:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            total = evaluator.total_of(model, single, "train", variables)
        del total

    with evaluator.session(), torch.enable_grad():
        evaluator.call(run, variables)
    _known[evaluator] = max(LEAST, sum(kept.values()))
    return _known[evaluator]
