"""The check at bind: rows against plain autograd of single examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from attrs import frozen
from torch import Tensor, nn

from dattri_core import Block, Evaluator, Space, leaves, take
from dattri_parts.sources.blocks import parameter_values

Named: TypeAlias = dict[str, Tensor]

# The allowed difference, relative to a parameter's gradient; plus a share of the whole gradient,
# for parameters whose own nearly cancels; plus a floor, where all of it is rounding, as a part of
# the gradient at weights that do not saturate the loss.
LOOSE = {torch.float64: (1e-8, 1e-2, 1e-12), torch.float32: (1e-2, 5e-2, 1e-6)}
LOOSE_HALF = (0.2, 0.1, 1e-4)
SHRINK = (1.0, 0.3, 0.03)
UNIT = 0.1
"""Gradient of a loss in units of 1, or more: a larger one raises no floor."""
LEAST = {torch.float64: 1e-13}
"""Floor in any unit: the whole gradient may be rounding of inputs, as that of a norm of one feature
is, and no loss is in a unit so small. In float32 some are, and such a gradient is refused."""


@frozen
class Mismatches:
    """What differs from autograd.

    Args:
        wrong: Parameters whose rows do, with the relative difference.
        mixed: Whether the gradient of an example's own loss is another one among others, too.
    """

    wrong: Mapping[str, float]
    mixed: bool = False

    def and_(self, other: Mismatches) -> Mismatches:
        """Return both together."""
        names = {**self.wrong, **other.wrong}
        wrong = {k: max(self.wrong.get(k, 0.0), other.wrong.get(k, 0.0)) for k in names}
        return Mismatches(wrong, self.mixed or other.mixed)


def mismatches(
    evaluator: Evaluator,
    space: Space,
    rows: Mapping[str, Block],
    batch: Any,
    role: Any,
    places: Sequence[Sequence[int]],
) -> Mismatches:
    """Return the parameters whose rows differ from autograd.

    An example whose row differs from its gradient alone gets a second look, at the gradient of its
    own loss in the batch. Rounding depends on the shape of a batch, and a unit near a kink (of a
    ReLU, of a maximum over alike pixels) may fall on either side: gradients then differ by
    percents where losses do not differ at all. In one batch the rounding is the same.

    Args:
        evaluator: The losses; that none depends on the other examples has been seen to.
        space: The space of the rows.
        rows: The blocks of the places compared, in their order.
        batch: A few examples.
        role: Of the loss or target.
        places: For each example compared, where it stands in the batch; at several places where
            the batch holds it several times. One gradient of the model is alive at a time.
    """
    seen = Mismatches({})

    def alone(model: nn.Module, given: Named, b: int) -> Tensor | None:
        return evaluator.total_of(model, take(batch, slice(b, b + 1)), role, given)

    def among_others(model: nn.Module, given: Named, b: int) -> Tensor | None:
        values = evaluator.values(model, batch, role, given)
        return values[b] if values.dim() else None  # of a functional loss there is only the sum

    row = 0
    for where in places:
        first = _gradient(evaluator, partial(alone, b=where[0]))
        assert first is not None
        for b in where:
            own = {
                view.parameter: parameter_values(
                    space[name], view, block.take(slice(row, row + 1)).dense().values
                )[0]
                for name, block in rows.items()
                for view in space[name].parameters
            }
            row += 1
            off = _far(evaluator, own, first)
            second = _gradient(evaluator, partial(among_others, b=b)) if off else None
            mixed = False
            if second is not None:
                found = _far(evaluator, own, second)
                off = {name: off[name] for name in off if name in found}
                mixed = bool(off) and bool(_far(evaluator, second, first))
            if off:
                floor = _floor(evaluator, partial(alone, b=b))
                near = first if second is None else second
                found = _far(evaluator, own, near, floor)
                off = {name: off[name] for name in off if name in found}
                mixed = mixed and bool(_far(evaluator, near, first, floor))
            seen = seen.and_(Mismatches(off, mixed))
    return seen


def _far(
    evaluator: Evaluator,
    own: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    floor: float = 0.0,
) -> dict[str, float]:
    """Return the parameters of one row that differ from a gradient, and by how much."""
    loose, share, _ = LOOSE.get(evaluator.dtype, LOOSE_HALF)
    norm = torch.linalg.vector_norm
    parameters = list(own)
    differences, lengths = [], []
    for name, got in own.items():
        true = expected[name]
        differences.append(torch.dist(got.to(true.dtype), true))
        lengths.append(norm(true))
    difference, length = torch.stack(differences), torch.stack(lengths)
    whole = norm(torch.stack([norm(gradient) for gradient in expected.values()]))
    # One wait for the device; a comparison with a number that is not finite is false.
    near = (difference <= loose * (length + share * whole) + floor).tolist()
    return {
        parameter: float(difference[at] / length[at].clamp_min(1e-30))
        for at, parameter in enumerate(parameters)
        if not near[at]
    }


def _floor(evaluator: Evaluator, objective: Callable[[nn.Module, Named], Tensor | None]) -> float:
    """Return up to what a difference may be the rounding of a loss that is sure.

    Of the slope p - 1 of a softmax a few roundings of 1 are left, in the unit of the loss: a loss
    over a million is as right or wrong as the loss. Smaller weights make it unsure.
    """
    lengths = []
    for share in SHRINK:
        found = _gradient(evaluator, objective, share)
        lengths += [float(torch.linalg.vector_norm(g)) for g in (found or {}).values()]
    *_, floor = LOOSE.get(evaluator.dtype, LOOSE_HALF)
    finite = [length for length in lengths if math.isfinite(length)]
    least = LEAST.get(evaluator.dtype, 0.0)
    return max(least, floor * min(1.0, max(finite, default=1.0) / UNIT))


def _gradient(
    evaluator: Evaluator,
    objective: Callable[[nn.Module, Named], Tensor | None],
    share: float = 1.0,
) -> Named | None:
    """Return the gradient of an objective for the selected parameters, by plain autograd.

    The same weights require gradients as in training, more than the selected ones: an activation
    checkpoint may need that. None where the objective is. They are multiplied by a share.
    """
    trained = {name for name, p in evaluator.task.model.named_parameters() if p.requires_grad}
    given = leaves(
        {n: share * p if share != 1 else p for n, p in evaluator.parameters.items() if n in trained}
    )

    def both_ways(model: nn.Module) -> bool:
        total = objective(model, given)
        if total is not None and total.requires_grad:
            torch.autograd.backward(total)
        return total is not None

    with evaluator.session(), torch.inference_mode(False), torch.enable_grad():
        if not evaluator.call(both_ways, given):
            return None
    wide = torch.promote_types(evaluator.dtype, torch.float32)
    found = {name: given[name].grad for name in evaluator.selected}
    return {
        name: torch.zeros_like(given[name], dtype=wide) if grad is None else _dense(grad).to(wide)
        for name, grad in found.items()
    }


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
