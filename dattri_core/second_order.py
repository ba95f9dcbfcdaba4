"""What a model's second derivatives need: plain kernels, room for activations, and to exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dattri_core.batch import Batch, take
from dattri_core.errors import InputError
from dattri_core.evaluate import Evaluator, leaves

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_looked_at: WeakSet[Evaluator] = WeakSet()


@contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Choose plain kernels where the fused ones have no second derivative.

    So that of an embedding with ``sparse=True``, whose gradient comes as indices and values.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    backends: Any = torch.backends
    cudnn, onednn = backends.cudnn, backends.mkldnn
    before = cudnn.enabled, onednn.enabled
    sparse = [m for m in model.modules() if isinstance(m, _TABLES) and m.sparse]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            if recurrent:
                cudnn.enabled = onednn.enabled = False
            for module in sparse:
                module.sparse = False
            yield
        finally:
            for module in sparse:
                module.sparse = True
            cudnn.enabled, onednn.enabled = before


def require_second_derivative(evaluator: Evaluator, batch: Batch) -> None:
    """Raise `InputError` for a function whose second derivative torch would take to be zero.

    And for a gradient that is scaled by what else is in the batch. Looked at once for a checkpoint,
    on the first example of the batch.
    """
    if evaluator in _looked_at:
        return
    _require_unscaled(evaluator)
    variables = leaves(evaluator.selected)

    def run(model: nn.Module) -> None:
        total = evaluator.total_of(model, take(batch, slice(0, 1)), "train", variables)
        with suppress(RuntimeError):  # it comes back, with its cure, when the product is taken
            gradient = gradient_of(total, variables, None, create_graph=True)
            _require_twice_differentiable(evaluator, gradient)

    evaluator.call(run, variables)
    _looked_at.add(evaluator)


def _require_twice_differentiable(evaluator: Evaluator, gradient: dict[str, Tensor]) -> None:
    waiting = [value.grad_fn for value in gradient.values()]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise no_second_derivative(evaluator, "an autograd.Function is @once_differentiable")
        waiting.extend(following for following, _ in node.next_functions)


def _require_unscaled(evaluator: Evaluator) -> None:
    """Raise `InputError` for an embedding whose gradient is divided by counts of the batch."""
    model = evaluator.task.model
    selected = {id(p) for name, p in model.named_parameters() if name in evaluator.selected}
    for path, module in model.named_modules():
        if not isinstance(module, _TABLES) or not module.scale_grad_by_freq:
            continue
        if id(module.weight) in selected:
            raise InputError(
                f"curvature product of the loss {evaluator.task.loss_name!r}: "
                f"{type(module).__name__} {path!r} has scale_grad_by_freq=True, which divides its "
                "gradient by how often a batch names an index, so that products would depend on "
                "the batches; set it to False, leave its weight out with parameters=, or use a "
                "curvature of rows ('if-woodbury', 'if-ekfac')"
            )


def no_second_derivative(evaluator: Evaluator, reason: object) -> InputError:
    """Return the refusal of a model that cannot be differentiated twice."""
    return InputError(
        f"curvature product of the loss {evaluator.task.loss_name!r}: the model has no second "
        f"derivative in torch ({reason}); replace the operation that is named (checkpointing needs "
        "use_reentrant=False), leave its parameters out with parameters=, or use a method without "
        "curvature products"
    )


def gradient_of(
    value: Tensor, at: dict[str, Tensor], cotangent: Tensor | None, *, create_graph: bool
) -> dict[str, Tensor]:
    """Return the gradient of ``<value, cotangent>``, zero where value does not depend on it."""
    if not value.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in at.items()}
    found = torch.autograd.grad(
        value,
        list(at.values()),
        cotangent,
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(at, found, strict=True))
