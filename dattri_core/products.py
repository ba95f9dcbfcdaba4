"""Curvature-vector products of the train loss on one batch, many vectors at once.

Both curvatures are made of reverse passes only, so that every operation with a second derivative
takes part: H v is the transpose of d grad / d theta times v (H is symmetric), and J v, which the
GGN J^T C J needs, is the transpose of u -> J^T u times v.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.func import grad, vjp, vmap

from dattri_core.activations import activation_bytes
from dattri_core.batch import Batch, batch_size, take
from dattri_core.batched import shared_operands
from dattri_core.evaluate import Evaluator, leaves
from dattri_core.memory import is_out_of_memory
from dattri_core.protocols import CurvatureKind
from dattri_core.recording import TANGENTS, Named, Product, graph_of, in_call, require_finite
from dattri_core.second_order import differentiable_kernels, require_second_derivative

WORK_LIMIT = 32 * 2**20
"""Bytes of tangents at once: about what a processor's cache and allocator keep warm."""
WEIGHTS = 8
"""Vectors, each with its product, in the bytes that a processor takes where weights are large: each
slice reads and adds them once more, whatever few examples it has."""
FEW = 8
"""Vectors that make matrix products large enough to run near the machine's rate."""

_log = logging.getLogger("dattri")
_refusing: WeakSet[Evaluator] = WeakSet()


@frozen
class Slices:
    """How many vectors and examples one step of a product takes."""

    vectors: int
    examples: int


def batch_product(
    evaluator: Evaluator,
    batch: Batch,
    vectors: Mapping[str, Tensor],
    kind: CurvatureKind,
    *,
    limit: int = WORK_LIMIT,
    out: Named | None = None,
) -> Named:
    """Return sum_b H_b v for every vector v, over the examples b of a batch.

    ``"hessian"``: H_b is the Hessian of the loss of example b. ``"ggn"``: H_b = J_b^T C_b J_b, with
    J_b the Jacobian of the model's outputs and C_b the Hessian of the criterion in them
    (Schraudolph 2002). The result does not depend on how the work is sliced, up to rounding.

    Args:
        evaluator: The checkpoint.
        batch: Examples on the evaluator's device.
        vectors: By parameter name, ``[C, *parameter shape]``; parameters left out are constants.
        kind: Which curvature.
        limit: Bytes for intermediates; the work runs in slices of vectors and examples.
        out: Tensors to write the products to, instead of new ones; what they held is lost.

    Returns:
        By parameter name, ``[C, *parameter shape]``; ``out`` where it was given.

    Raises:
        InputError: A GGN of a loss that is not split in outputs and criterion, or a model whose
            backward pass cannot be differentiated.
        NumericsError: A product is not finite.
    """
    count = len(next(iter(vectors.values())))
    total = out
    if total is None:
        total = {name: torch.empty_like(value) for name, value in vectors.items()}
    examples = batch_size(batch)
    with evaluator.session(), differentiable_kernels(evaluator.task.model):
        require_second_derivative(evaluator, batch)
        size = plan_slices(evaluator, batch, vectors, limit)
        with shared_operands(vectors, size.vectors, size.examples):
            for first in range(0, examples, size.examples):
                part = take(batch, slice(first, first + size.examples))
                work = _Work(evaluator, part, vectors, kind, total, size.vectors, count, first == 0)
                if evaluator in _refusing or not _run_vectorised(work):
                    _run_looped(work)
    return total


def plan_slices(
    evaluator: Evaluator, batch: Batch, vectors: Mapping[str, Tensor], limit: int = WORK_LIMIT
) -> Slices:
    """Return how many vectors and examples to take at once so that a product fits ``limit`` bytes.

    A step holds, for each of its vectors, the vector and its product, and for each pair of a vector
    and an example `TANGENTS` tangents of the activations. Examples come first, since each slice of
    them has a graph of its own, but not at the price of fewer than `FEW` vectors at once, as long
    as their tangents outweigh the vectors. A processor takes no more than it keeps warm, or than
    large weights need; where half of that holds `FEW` vectors with all examples, it is as fast
    within it.
    """
    count, examples = len(next(iter(vectors.values()))), batch_size(batch)
    each = 2 * sum(v[0].numel() * v.element_size() for v in vectors.values()) if count else 1
    pair = TANGENTS * activation_bytes(evaluator, batch)
    if evaluator.device.type == "cpu":
        limit = min(limit, max(WORK_LIMIT, WEIGHTS * each))
        if FEW * (each + examples * pair) <= limit // 2:
            limit //= 2
    chunk = min(count, limit // (each + examples * pair))
    if chunk < min(count, FEW):
        some = min(examples, math.ceil(2 * each / pair))
        chunk = min(count, FEW, limit // (each + some * pair))
    chunk = _even(count, max(1, chunk))
    left = max(0, limit - chunk * each)
    return Slices(chunk, _even(examples, max(1, left // (chunk * pair))))


@frozen
class _Work:
    """One slice of examples, all vectors, and where their products go."""

    evaluator: Evaluator
    batch: Batch
    vectors: Mapping[str, Tensor]
    kind: CurvatureKind
    total: Named
    chunk: int
    count: int
    fresh: bool  # nothing is in ``total`` yet

    @property
    def primals(self) -> Named:
        return {name: self.evaluator.parameters[name] for name in self.vectors}

    def add(self, products: Named, where: slice) -> None:
        """Add the products of some vectors to the total."""
        require_finite(products, self.kind, self.evaluator, batch_size(self.batch))
        for name, value in products.items():
            if self.fresh:
                self.total[name][where] = value
            else:
                self.total[name][where] += value


# --- all vectors of a chunk at once -------------------------------------------------------------
def _run_vectorised(work: _Work) -> bool:
    """Add the products by ``torch.func``; return False when the model refuses it, nothing added."""
    started = False
    try:
        product = vmap(PRODUCTS[work.kind](work.evaluator, work.batch, work.primals))
        for first in range(0, work.count, work.chunk):
            where = slice(first, first + work.chunk)
            with (
                torch.no_grad()
            ):  # else the pass records a graph of its own, for a third derivative
                result = product({k: v[where] for k, v in work.vectors.items()})
            started = True
            work.add(result, where)
    except (RuntimeError, NotImplementedError) as error:
        if started or is_out_of_memory(error):
            raise
        _refusing.add(work.evaluator)
        _log.warning(
            "%s products run one vector at a time, since the model refuses torch.func (%s)",
            work.kind,
            str(error).strip().splitlines()[0] if str(error) else type(error).__name__,
        )
        return False
    return True


def hessian_product(evaluator: Evaluator, batch: Batch, primals: Named) -> Product:
    """Return v -> sum_b H_b v for the Hessians H_b, by ``torch.func``."""

    def total(parameters: Named) -> Tensor:
        return evaluator.total(parameters, batch, "train")

    _, transpose = _reverse(grad(total), primals)
    return transpose


def ggn_product(evaluator: Evaluator, batch: Batch, primals: Named) -> Product:
    """Return v -> sum_b H_b v for H_b = J_b^T C_b J_b, by ``torch.func``."""
    outputs, pull = _reverse(lambda parameters: evaluator.outputs(parameters, batch), primals)
    # u -> J^T u is linear, so its derivative is the same everywhere: its transpose is J.
    _, push = _reverse(pull, torch.zeros_like(outputs))
    _, curve = _reverse(grad(lambda out: evaluator.criterion(out, batch).sum()), outputs)

    def product(vector: Named) -> Named:
        found: Named = pull(curve(push(vector)))
        return found

    return product


PRODUCTS: Mapping[CurvatureKind, Callable[[Evaluator, Batch, Named], Product]] = {
    "hessian": hessian_product,
    "ggn": ggn_product,
}
"""How the product with one vector is made of a batch, which ``vmap`` takes with many."""


def _reverse(function: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return f(x) and v -> J(x)^T v."""
    answer: Any = vjp(function, at)
    return answer[0], lambda cotangent: answer[1](cotangent)[0]


# --- one vector at a time -----------------------------------------------------------------------
def _run_looped(work: _Work) -> None:
    """Add the products by plain double backward: any model with second derivatives."""
    variables = leaves(work.primals)
    product = graph_of(work.evaluator, work.batch, work.kind, variables)

    def run(_: nn.Module) -> None:
        for row in range(work.count):
            result = product({k: v[row] for k, v in work.vectors.items()})
            work.add({k: v.unsqueeze(0) for k, v in result.items()}, slice(row, row + 1))

    in_call(work.evaluator, variables, run)


def _even(count: int, most: int) -> int:
    """Return the size of equal pieces of ``count`` that are no larger than ``most``."""
    pieces = -(-count // max(1, most))
    return max(1, -(-count // max(1, pieces)))
