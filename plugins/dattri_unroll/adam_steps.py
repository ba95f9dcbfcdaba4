"""Steps of Adam: their derivative entry by entry, and whether the recorded ones are his."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import frozen
from dattri_parts.solvers.rowwise import Named
from torch import Tensor

from dattri_core import (
    AdamRule,
    Checkpoint,
    InputError,
    ParameterMoments,
    Space,
    from_parameters,
)

ROUNDING = 8
"""Units in the last place by which numbers may differ besides the tolerance."""
Moments = Mapping[str, ParameterMoments]


@frozen(eq=False)
class AdamStep:
    """A step of Adam with its numbers entry by entry, as `AdamRule` names them.

    Args:
        rule: Of the run.
        rates: eta, by parameter.
        slope: d, by parameter, float64 like all others; read off m' and m.
        first: m'.
        second: v'.
        root: sqrt(v' / (1 - b2^t)).
        turns: By parameter, (1 - b1^t, 1 - b2^t).
    """

    rule: AdamRule
    rates: Mapping[str, float]
    slope: Mapping[str, Tensor]
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    root: Mapping[str, Tensor]
    turns: Mapping[str, tuple[float, float]]

    @classmethod
    def of(
        cls,
        name: str,
        checkpoint: Checkpoint,
        before: Moments,
        after: Moments,
        device: torch.device,
    ) -> AdamStep:
        """Return the step between moments before it, empty at the first, and after it.

        Raises:
            InputError: A parameter took no part in the step.
        """
        step = checkpoint.step
        assert step is not None
        rule = step.adam
        assert rule is not None
        beta1, beta2 = rule.betas
        slope, first, second, root, turns = {}, {}, {}, {}, {}
        for key, own in after.items():
            at = before[key].step if key in before else 0
            if own.step != at + 1:
                raise InputError(
                    f"{name}: in the step from {checkpoint.name!r} Adam went from its step {at} to "
                    f"{own.step} in the parameter {key!r}, expected one more; every parameter that "
                    "is attributed takes part in every step: leave it out with "
                    f"parameters='!{key}', or zero its gradient in place of setting it to None"
                )
            first[key], second[key] = (m.to(device).double() for m in (own.first, own.second))
            held = torch.zeros_like(first[key])
            if key in before:
                held = before[key].first.to(device).double()
            slope[key] = (first[key] - beta1 * held) / (1 - beta1)
            turns[key] = (1 - beta1**own.step, 1 - beta2**own.step)
            root[key] = (second[key] / turns[key][1]).sqrt()
        rates = {key: (checkpoint.learning_rate or 0.0) * step.rate_of(key) for key in after}
        return cls(rule, rates, slope, first, second, root, turns)

    def move(self, key: str) -> Tensor:
        """Return what Adam takes off a parameter, without decoupled weight decay."""
        scale = self.root[key] + self.rule.epsilon
        return self.rates[key] * self.first[key] / self.turns[key][0] / scale

    def through(
        self, space: Space, psi: Named, first: Named | None, second: Named | None
    ) -> tuple[Named, Named, Named]:
        """Return what d of the step meets, given what its weights and its moments meet.

        With mu and nu, less the derivatives in m' and v' of what later steps make of them,

            mu = mu + a psi,  a = eta / ((1 - b1^t) D),  D = sqrt(v' / (1 - b2^t)) + epsilon,
            nu = nu - b psi,  b = a m' / (2 D sqrt(v' (1 - b2^t))), 0 where v' is,
            u = (1 - b1) mu + 2 (1 - b2) d nu,

        and b1 mu and b2 nu are those of the step before.

        Args:
            space: Of the rows; its entries are parameters.
            psi: ``[C, ...]`` by block; only read.
            first: mu, None after the last step; written over.
            second: nu, likewise.

        Returns:
            u in new tensors, b1 mu and b2 nu.
        """
        beta1, beta2 = self.rule.betas
        near, bend = {}, {}
        for key, root in self.root.items():
            turn1, turn2 = self.turns[key]
            scale = root + self.rule.epsilon
            near[key] = self.rates[key] / (turn1 * scale)
            below = 2 * turn2 * root * scale
            bend[key] = torch.where(root > 0, near[key] * self.first[key] / below, 0.0)
        like = next(iter(psi.values()))
        a, b, d = (rows_of(space, values, like) for values in (near, bend, self.slope))
        met, firsts, seconds = {}, {}, {}
        for name, values in psi.items():
            step = a[name] * values
            mu = step if first is None else first[name].add_(step)
            step = b[name] * values
            nu = step.neg_() if second is None else second[name].sub_(step)
            met[name] = torch.add((1 - beta1) * mu, nu * d[name], alpha=2 * (1 - beta2))
            firsts[name], seconds[name] = mu.mul_(beta1), nu.mul_(beta2)
        return met, firsts, seconds


def rows_of(space: Space, values: Mapping[str, Tensor], like: Tensor) -> Named:
    """Return numbers by parameter as one row, ``[1, ...]`` by block, in dtype and device."""
    single = {name: value.to(like).unsqueeze(0) for name, value in values.items()}
    rows = from_parameters(space, single, torch.zeros(1, dtype=torch.long))
    return {name: block.dense().values for name, block in rows.blocks.items()}


def require_adam_step(
    name: str,
    step: AdamStep,
    before: Moments,
    slope: Mapping[str, Tensor],
    weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    checkpoint: Checkpoint,
    tolerance: float,
) -> None:
    """Raise unless moments and weights after a step are those that Adam makes of its batch.

    Args:
        name: Of the method, for errors.
        step: As recorded.
        before: Moments before it.
        slope: d of the batch, by parameter, in float64.
        weights: Before and after the step.
        checkpoint: Whose step it is.
        tolerance: Largest |got - expected| / |expected| to accept, of the gradient, the second
            moments and the move of the weights.

    Raises:
        InputError: They are others.
    """
    assert checkpoint.step is not None
    beta1, beta2 = step.rule.betas
    gaps, sizes, slacks = [0.0] * 3, [0.0] * 3, [0.0] * 3

    def compare(at: int, got: Tensor, expected: Tensor, rounded: Tensor, scale: float) -> None:
        gaps[at] += float((got - expected).square().sum())
        sizes[at] += float(expected.square().sum())
        slacks[at] += float(rounded.double().square().sum()) * scale**2

    for key, theta in weights[0].items():
        own = before.get(key)
        rounding = ROUNDING * torch.finfo(theta.dtype).eps
        compare(0, step.slope[key], slope[key], step.first[key], rounding / (1 - beta1))
        held = torch.zeros_like(step.second[key])
        if own is not None:
            held = own.second.to(held)
        second = beta2 * held + (1 - beta2) * slope[key].square()
        compare(1, step.second[key], second, second, rounding)
        start = theta.double()
        decay = checkpoint.step.decay_of(key) if step.rule.decoupled else 0.0
        move = step.move(key) + step.rates[key] * decay * start
        compare(2, start - weights[1][key].double(), move, start, rounding)
    words = ("gradient that its first moments show is", "second moments are", "weights end")
    for gap, size, slack, what in zip(gaps, sizes, slacks, words, strict=True):
        if not gap**0.5 <= tolerance * size**0.5 + slack**0.5:
            raise InputError(
                f"{name}: the step recorded at {checkpoint.name!r} is not that of Adam on its "
                f"batch: the {what} {gap**0.5:.3g} from what the mean gradient of the task's loss "
                f"gives, of a length of {size**0.5:.3g}; the train set must be the one that was "
                "trained on, in its order, and the loss the one that was minimised, a mean over "
                "the batch (else record its scale), without dropout, batch statistics or clipping "
                "that was not recorded; "
                f"where this is known, dattri.method({name!r}, tolerance=...) accepts it"
            )
