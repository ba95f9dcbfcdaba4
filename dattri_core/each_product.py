"""The curvature of each example times one vector, many examples at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import Tensor
from torch.func import vmap

from dattri_core.activations import activation_bytes
from dattri_core.batch import Batch, batch_size, map_tensors, take, tensors_of
from dattri_core.evaluate import Evaluator
from dattri_core.memory import is_out_of_memory
from dattri_core.products import PRODUCTS, WORK_LIMIT, batch_product
from dattri_core.protocols import CurvatureKind
from dattri_core.recording import TANGENTS, Named, require_finite
from dattri_core.second_order import differentiable_kernels, require_second_derivative

_log = logging.getLogger("dattri")
_refusing: WeakSet[Evaluator] = WeakSet()


def each_product(
    evaluator: Evaluator,
    batch: Batch,
    vector: Mapping[str, Tensor],
    kind: CurvatureKind,
    *,
    limit: int = WORK_LIMIT,
) -> Named:
    """Return H_b v for every example b of a batch.

    A model that refuses ``torch.func.vmap`` over examples has them taken one after another.

    Args:
        evaluator: The checkpoint.
        batch: Examples on the evaluator's device.
        vector: v by parameter name; parameters left out are constants.
        kind: Which curvature; see `batch_product`.
        limit: Bytes for intermediates; the work runs in slices of examples.

    Returns:
        By parameter name, ``[B, *parameter shape]``.

    Raises:
        InputError, NumericsError: As `batch_product`.
    """
    examples = batch_size(batch)
    pieces: list[Named] = []
    with evaluator.session(), differentiable_kernels(evaluator.task.model):
        require_second_derivative(evaluator, batch)
        rows = 2 * sum(v.numel() * v.element_size() for v in vector.values())
        size = max(1, limit // (rows + TANGENTS * activation_bytes(evaluator, batch)))
        for first in range(0, examples, size):
            part = take(batch, slice(first, first + size))
            found = None
            if evaluator not in _refusing:
                found = _side_by_side(evaluator, part, vector, kind)
            pieces.append(_in_turn(evaluator, part, vector, kind) if found is None else found)
            require_finite(pieces[-1], kind, evaluator, batch_size(part))
    return {name: torch.cat([piece[name] for piece in pieces]) for name in vector}


def _side_by_side(
    evaluator: Evaluator, batch: Batch, vector: Mapping[str, Tensor], kind: CurvatureKind
) -> Named | None:
    """Return the products of a batch; None where the model refuses it."""
    primals = {name: evaluator.parameters[name] for name in vector}

    def one(example: list[Tensor]) -> Named:
        rest = iter(example)
        single = map_tensors(lambda _: next(rest).unsqueeze(0), batch)
        return PRODUCTS[kind](evaluator, single, primals)(dict(vector))

    try:
        with torch.no_grad():
            found: Named = vmap(one)(list(tensors_of(batch)))
        return found
    except (RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        _refusing.add(evaluator)
        _log.info(
            "%s products of single examples run one after another, since the model refuses "
            "torch.func.vmap (%s)",
            kind,
            str(error).strip().splitlines()[0] if str(error) else type(error).__name__,
        )
        return None


def _in_turn(
    evaluator: Evaluator, batch: Batch, vector: Mapping[str, Tensor], kind: CurvatureKind
) -> Named:
    single = {name: value.unsqueeze(0) for name, value in vector.items()}
    found = [
        batch_product(evaluator, take(batch, slice(b, b + 1)), single, kind)
        for b in range(batch_size(batch))
    ]
    return {name: torch.cat([product[name] for product in found]) for name in vector}
