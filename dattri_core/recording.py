"""Curvature-vector products with one vector at a time: a backward pass on a recorded graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias, TypeVar

import torch
from attrs import frozen
from torch import Tensor, nn

from dattri_core.activations import activation_bytes
from dattri_core.batch import Batch, batch_size, tensors_of
from dattri_core.blocks.finite import all_finite
from dattri_core.errors import NumericsError
from dattri_core.evaluate import Evaluator, leaves
from dattri_core.losses import Loss
from dattri_core.memory import is_out_of_memory
from dattri_core.protocols import CurvatureKind
from dattri_core.second_order import (
    differentiable_kernels,
    gradient_of,
    no_second_derivative,
    require_second_derivative,
)

T = TypeVar("T")
Named: TypeAlias = dict[str, Tensor]
Product: TypeAlias = Callable[[Named], Named]

TANGENTS = 3
"""Tangents of one activation that are alive at once: forward, backward, and a result being made."""


@frozen(eq=False)
class Recording:
    """The graph of some examples' gradients: each product with a vector is a backward pass on it.

    Args:
        evaluator: The checkpoint.
        kind: Which curvature.
        examples: How many they are.
        variables: The leaves of the graph.
        transpose: The product.
    """

    evaluator: Evaluator
    kind: CurvatureKind
    examples: int
    variables: Named
    transpose: Product

    def product(self, vector: Named) -> Named:
        """Return sum_b H_b v, for v by parameter name in the parameters' shapes."""
        with self.evaluator.session(), differentiable_kernels(self.evaluator.task.model):
            found = in_call(self.evaluator, self.variables, lambda _: self.transpose(vector))
        require_finite(found, self.kind, self.evaluator, self.examples)
        return found


def record(
    evaluator: Evaluator, batch: Batch, names: Iterable[str], kind: CurvatureKind
) -> Recording:
    """Return the graph of a batch for products with one vector at a time.

    Args:
        evaluator: The checkpoint.
        batch: Examples on the evaluator's device; the graph keeps them.
        names: Of the parameters; the others are constants.
        kind: Which curvature.

    Raises:
        InputError: As in `batch_product`.
    """
    with evaluator.session(), differentiable_kernels(evaluator.task.model):
        require_second_derivative(evaluator, batch)
        variables = leaves({name: evaluator.parameters[name] for name in names})
        transpose = graph_of(evaluator, batch, kind, variables)
        return Recording(evaluator, kind, batch_size(batch), variables, transpose)


def recording_bytes(evaluator: Evaluator, batch: Batch) -> int:
    """Return what a recording and a product on it take for each example, the example included."""
    example = sum(t[:1].numel() * t.element_size() for t in tensors_of(batch))
    with evaluator.session(), differentiable_kernels(evaluator.task.model):
        return TANGENTS * activation_bytes(evaluator, batch) + example


# --- graphs -------------------------------------------------------------------------------------
def in_call(evaluator: Evaluator, variables: Named, run: Callable[[nn.Module], T]) -> T:
    """Run passes inside of `call`: a checkpointed model recomputes activations with its weights."""
    try:
        return evaluator.call(run, variables)
    except (RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise no_second_derivative(evaluator, error) from error


def graph_of(evaluator: Evaluator, batch: Batch, kind: CurvatureKind, variables: Named) -> Product:
    """Return v -> sum_b H_b v by passes on a graph made here; to be run inside of `in_call`."""
    make = _hessian_graph if kind == "hessian" else _ggn_graph
    return in_call(evaluator, variables, lambda model: make(evaluator, batch, model, variables))


def _hessian_graph(
    evaluator: Evaluator, batch: Batch, model: nn.Module, variables: Named
) -> Product:
    total = evaluator.total_of(model, batch, "train", variables)
    gradient = gradient_of(total, variables, torch.ones_like(total), create_graph=True)
    return lambda vector: _transpose(gradient, variables, vector)


def _ggn_graph(evaluator: Evaluator, batch: Batch, model: nn.Module, variables: Named) -> Product:
    loss = evaluator.task.loss
    if not isinstance(loss, Loss):
        evaluator.outputs(variables, batch)  # raises, with the cure
    assert isinstance(loss, Loss)
    outputs = loss.forward(model, batch)
    u = {"u": torch.zeros_like(outputs, requires_grad=True)}
    pulled = gradient_of(outputs, variables, u["u"], create_graph=True)
    fixed = leaves({"out": outputs})
    slope = gradient_of(
        evaluator.criterion(fixed["out"], batch).sum(), fixed, None, create_graph=True
    )

    def product(vector: Named) -> Named:
        tangent = _transpose(pulled, u, vector)["u"]
        curved = _transpose(slope, fixed, {"out": tangent})["out"]
        return gradient_of(outputs, variables, curved, create_graph=False)

    return product


def _transpose(values: Named, at: Named, vector: Named) -> Named:
    """Return the gradient of ``sum <values, vector>``."""
    names = [name for name in values if values[name].requires_grad]
    if not names:
        return {name: torch.zeros_like(tensor) for name, tensor in at.items()}
    found = torch.autograd.grad(
        [values[name] for name in names],
        list(at.values()),
        [vector[name] for name in names],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(at, found, strict=True))


def require_finite(
    products: Named, kind: CurvatureKind, evaluator: Evaluator, examples: int
) -> None:
    """Raise `NumericsError` for products that are not finite."""
    for name, value in products.items():
        if not all_finite(value):
            raise NumericsError(
                f"{kind} product at checkpoint {evaluator.checkpoint.name!r}: not finite in "
                f"{name!r} on a batch of {examples} examples; look for a diverged checkpoint, a "
                "division by zero or a square root at zero in the second derivative, or a half "
                "precision that overflows"
            )
