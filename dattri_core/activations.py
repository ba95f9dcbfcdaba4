"""What a pass over one example keeps in memory, measured on one."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dattri_core.batch import Batch, strided_parts, take, tensors_of
from dattri_core.blocks import map_tensors
from dattri_core.evaluate import Evaluator, leaves
from dattri_core.rows import Rows

LEAST = 256
_known: WeakKeyDictionary[Evaluator, tuple[int, ...]] = WeakKeyDictionary()


def activation_bytes(evaluator: Evaluator, batch: Batch) -> int:
    """Return the bytes that a backward pass needs for one example, inputs and weights apart.

    Measured once for a checkpoint, on the first example of the batch.
    """
    return total_bytes(activation_sizes(evaluator, batch))


def activation_sizes(evaluator: Evaluator, batch: Batch) -> tuple[int, ...]:
    """Return the bytes of each tensor among them; also measured once."""
    known = _known.get(evaluator)
    if known is None:
        known = _known[evaluator] = measured_sizes(evaluator, batch)
    return known


def total_bytes(sizes: tuple[int, ...]) -> int:
    """Return the bytes of all of them, `LEAST` at least."""
    return max(LEAST, sum(sizes))


def measured_sizes(evaluator: Evaluator, batch: Batch) -> tuple[int, ...]:
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
    return tuple(kept.values())


def tensors_made(raw: Rows, activations: Sequence[int]) -> tuple[int, ...]:
    """Return the bytes of each tensor of one example, none on an accelerator; see `pages`.

    Args:
        raw: Rows of a few examples as the source gives them.
        activations: Bytes of each tensor that a pass keeps for one.
    """
    made = list(activations)

    def note(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            made.append(tensor.nbytes // max(1, len(raw)))
        return tensor

    raw.map_blocks(lambda _, block: map_tensors(block, note))
    return tuple(made) if len(made) > len(activations) else ()


def _storages(tensor: Tensor) -> dict[int, int]:
    """Return the bytes of the memory that a tensor lies in, by address; several of a sparse one."""
    storages = [part.untyped_storage() for part in strided_parts(tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
