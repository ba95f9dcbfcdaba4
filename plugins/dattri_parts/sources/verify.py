"""The check at bind: rows against plain autograd of single examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dattri_core import Block, Evaluator, Space, leaves, take
from dattri_parts.sources.blocks import parameter_values

# The allowed difference, relative to a parameter's gradient; plus a share of the whole gradient,
# for parameters whose own nearly cancels; plus a floor, where all of it is rounding.
LOOSE = {torch.float64: (1e-8, 1e-2, 1e-12), torch.float32: (1e-2, 5e-2, 1e-6)}
LOOSE_HALF = (0.2, 0.1, 1e-4)


def mismatches(
    evaluator: Evaluator,
    space: Space,
    rows: Mapping[str, Block],
    sample: Any,
    role: Any,
    examples: int,
) -> dict[str, float]:
    """Return the parameters whose rows differ from autograd, with the relative difference.

    Args:
        evaluator: The losses.
        space: The space of the rows.
        rows: The blocks of ``sample``, as few examples as a fit holds at once anyway.
        sample: A few examples.
        role: Of the loss or target.
        examples: How many of them to compare; one gradient of the model is alive at a time.
    """
    wrong: dict[str, float] = {}
    loose, share, floor = LOOSE.get(evaluator.dtype, LOOSE_HALF)
    norm = torch.linalg.vector_norm
    parameters = [view.parameter for name in rows for view in space[name].parameters]
    for b in range(examples):
        expected = single_gradient(evaluator, take(sample, slice(b, b + 1)), role)
        differences, lengths = [], []
        for name, block in rows.items():
            values = block.take(slice(b, b + 1)).dense().values
            for view in space[name].parameters:
                true = expected[view.parameter]
                got = parameter_values(space[name], view, values)[0]
                differences.append(torch.dist(got.to(true.dtype), true))
                lengths.append(norm(true))
        difference, length = torch.stack(differences), torch.stack(lengths)
        whole = norm(torch.stack([norm(gradient) for gradient in expected.values()]))
        # One wait for the device; a comparison with a number that is not finite is false.
        near = (difference <= loose * (length + share * whole) + floor).tolist()
        for at, parameter in enumerate(parameters):
            if not near[at]:
                relative = float(difference[at] / length[at].clamp_min(1e-30))
                wrong[parameter] = max(relative, wrong.get(parameter, 0.0))
    return wrong


def single_gradient(evaluator: Evaluator, example: Any, role: Any) -> dict[str, Tensor]:
    """Return the gradient of one example's loss for the selected parameters, by plain autograd.

    The same weights require gradients as in training, more than the selected ones: an activation
    checkpoint may need that.
    """
    trained = {name for name, p in evaluator.task.model.named_parameters() if p.requires_grad}
    given = leaves(
        {name: evaluator.parameters[name] for name in evaluator.parameters if name in trained}
    )

    def both_ways(model: nn.Module) -> None:
        total = evaluator.total_of(model, example, role, given)
        if total.requires_grad:
            torch.autograd.backward(total)

    with evaluator.session(), torch.inference_mode(False), torch.enable_grad():
        evaluator.call(both_ways, given)
    wide = torch.promote_types(evaluator.dtype, torch.float32)
    found = {name: given[name].grad for name in evaluator.selected}
    return {
        name: torch.zeros_like(given[name], dtype=wide) if grad is None else _dense(grad).to(wide)
        for name, grad in found.items()
    }


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
