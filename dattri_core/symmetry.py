"""Whether second derivatives of a model are right: Hessians are symmetric, and slopes of gradients.

Some operations have a wrong derivative of their backward pass (`torch._weight_norm` in several
versions of torch, functions of one's own), and what solves with products alone would not see it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import torch
from attrs import frozen
from torch import Tensor, nn

from dattri_core.batch import Batch, batch_size, take
from dattri_core.errors import InputError, NumericsError
from dattri_core.evaluate import Evaluator, leaves
from dattri_core.losses import FunctionalLoss, Loss
from dattri_core.memory import is_out_of_memory
from dattri_core.recording import Named, in_call
from dattri_core.second_order import differentiable_kernels, gradient_of
from dattri_core.task import Task

Value: TypeAlias = Callable[[nn.Module, Named], Tensor]

EXAMPLES = 4
"""That are looked at: the cost is about twenty of their gradients, once for a task."""
PAIRS = 2
"""Of random directions; one alone could miss a difference by chance."""
NOISE = 30
"""Times the rounding that is seen: a gap below it may be rounding."""
RELATIVE = 100
"""Gap of <u, H v> and <v, H u>, in roundings of |H v|, that needs no explanation."""
LEAST, MOST = 1e-10, 0.1
"""The same as a part of |H v|, at least and at most."""
STEP = 1e-6
"""Of finite differences, as a part of the length of the weights: few kinks lie within it."""
SHRINK = (0.3, 0.03)
"""Weights times these do not saturate a loss that cannot be taken apart from the model."""
NOTHING = 1e-150
"""Length of H v whose square is no number any more: a criterion so sure has no Hessian."""
FEW_DIGITS = 1e-3
"""Gap, as a part of |H v|, from which rounding is told of."""
SUM_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4}
"""By how much the loss of a batch may differ from that of its examples, as a part of their sum."""
SUM_ROUNDING_HALF = 5e-2

_log = logging.getLogger("dattri")
_sound: WeakSet[Task] = WeakSet()
_summed: WeakKeyDictionary[Evaluator, set[tuple[int, int]]] = WeakKeyDictionary()


def require_sound(evaluator: Evaluator, batch: Batch, names: Iterable[str]) -> None:
    """Raise `NumericsError` where the Hessian of a few examples is not symmetric; once for a task.

    For normal directions u and v, |<u, H v> - <v, H u>| has the size of |H - H^T|, and |H v| that
    of |H|. A gap is rounding where it is below `RELATIVE` roundings of |H v|, or `NOISE` times what
    H v changes by at weights times 1 +- a few roundings; kinks do not show, since both sides take
    the same derivative at them. A saturated criterion has few true digits, so that a gap has to
    show without it too: in the Hessian of random combinations of the outputs or, where the loss
    is a function of the parameters as a whole, at smaller weights.

    In float64, H v is compared with central differences of gradients as well, and told by a
    warning: a symmetric H may be wrong too, but a gradient may also be stopped on purpose.

    Args:
        evaluator: The checkpoint.
        batch: Examples on its device; the first few are used.
        names: Of the parameters; the others are constants.

    Raises:
        NumericsError: H is not symmetric; it names what to use instead.
    """
    if evaluator.task in _sound:
        return
    few = take(batch, slice(0, min(EXAMPLES, batch_size(batch))))
    with evaluator.session(), differentiable_kernels(evaluator.task.model):
        try:
            _Probe(evaluator, few, tuple(names)).run()
        except InputError:
            pass  # no second derivative: the product itself says so, with the cure
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    _sound.add(evaluator.task)


def require_sum(evaluator: Evaluator, batch: Batch, positions: Tensor) -> None:
    """Raise `InputError` where a loss of many examples is not their sum or mean; once for a batch.

    A scalar weighted by classes, or a mean over the tokens that are not ignored, is the plain mean
    of some examples, and of a whole batch it is not: products with its Hessian would depend on how
    examples are batched.

    Args:
        evaluator: The checkpoint; a loss that gives a number for each example is not looked at.
        batch: Examples on its device.
        positions: Of the examples, which tell batches apart, ``[B]``.

    Raises:
        InputError: The value of the batch is another one than that of its examples together.
    """
    loss = evaluator.task.loss
    batches = _summed.setdefault(evaluator, set())
    key = (int(positions[0]), len(positions)) if len(positions) else None
    if not isinstance(loss, FunctionalLoss) or key is None or key in batches:
        return
    with evaluator.session(), torch.no_grad():
        each = evaluator.per_example(None, batch, "train").double()
        whole = float(evaluator.total(None, batch, "train"))
    batches.add(key)
    allowed = SUM_ROUNDING.get(evaluator.dtype, SUM_ROUNDING_HALF) * float(each.abs().sum())
    if abs(whole - float(each.sum())) > allowed:
        raise InputError(
            f"curvature product of the loss {loss.name!r}: {len(each)} train examples together "
            f"give {whole:.6g}, and their sum one by one is {float(each.sum()):.6g} (a mean is "
            "multiplied by their number); expected the same, else products would depend on the "
            "batches; a mean that is weighted by classes or leaves out ignored labels is none of "
            f"the examples: return one number per example, [{len(each)}] (reduction='none')"
        )


@frozen
class _Gap:
    """<u, H v>, <v, H u>, the larger of |H v| and |H u|, and what rounding changes H v by."""

    there: float
    back: float
    scale: float
    noise: float | None = None

    @property
    def size(self) -> float:
        return abs(self.there - self.back)


class _Probe:
    """Products of the Hessian of a few examples with random directions."""

    def __init__(self, evaluator: Evaluator, batch: Batch, names: tuple[str, ...]) -> None:
        self.evaluator = evaluator
        self.batch = batch
        self.at = {name: evaluator.parameters[name].detach() for name in names}
        self.epsilon = evaluator.coarsest(batch, "train")

    def run(self) -> None:
        """Compare, and raise or warn.

        Raises:
            NumericsError: H is not symmetric.
        """
        for pair in range(PAIRS):
            gap = self._gap(self._loss, self.at, 2 * pair)
            if gap.noise is not None:
                self._confirm(gap, 2 * pair)
        if self.evaluator.dtype == torch.float64:
            self._compare_with_differences()

    # --- symmetry -------------------------------------------------------------------------------
    def _gap(self, value: Value, at: Named, seed: int) -> _Gap:
        """Return the gap of one pair of directions; its noise only where there is more to it."""
        right = self._product(value, at, seed)
        there, length = self._along(right, seed + 1), _length(right)
        left = self._product(value, at, seed + 1)
        gap = _Gap(there, self._along(left, seed), max(length, _length(left)))
        del left
        # Not finite: the product itself says where.
        if not math.isfinite(gap.size) or gap.size <= max(self._allowed * gap.scale, NOTHING):
            return gap
        noise = _difference(self._product(value, self._rounded_anew(at), seed), right)
        return gap if gap.size <= NOISE * noise else _Gap(there, gap.back, gap.scale, noise)

    @property
    def _allowed(self) -> float:
        return min(MOST, max(LEAST, RELATIVE * self.epsilon))

    def _confirm(self, gap: _Gap, seed: int) -> None:
        """Raise where a gap is there without what may saturate; else tell of a large one."""
        task = self.evaluator.task
        if isinstance(task.loss, Loss):
            shows = self._gap(self._outputs, self.at, seed).noise is not None
        else:
            smaller = ({n: share * v for n, v in self.at.items()} for share in SHRINK)
            shows = all(self._gap(self._loss, at, seed).noise is not None for at in smaller)
        if not shows:
            if gap.size > FEW_DIGITS * gap.scale:
                _log.warning(
                    "Hessian of the loss %r: its products have about %.0e of relative rounding "
                    "(a saturated criterion in %s); try %sthe curvature 'ggn'",
                    task.loss_name,
                    gap.size / max(gap.scale, NOTHING),
                    str(self.evaluator.dtype).removeprefix("torch."),
                    "" if self.evaluator.dtype == torch.float64 else "model.double(), or ",
                )
            return
        raise NumericsError(
            f"Hessian of the loss {task.loss_name!r} at checkpoint "
            f"{self.evaluator.checkpoint.name!r}: not symmetric: on {batch_size(self.batch)} "
            f"train examples <u, H v> = {gap.there:.6g} and <v, H u> = {gap.back:.6g} for random "
            f"u and v with |H v| = {gap.scale:.3g}, and rounding changes H v by {gap.noise:.3g}; "
            "an operation of the model has a wrong second derivative (that of weight_norm is in "
            "some versions of torch), or something random runs in it; use the curvature 'ggn', "
            "replace the operation, or leave its parameters out with parameters="
        )

    # --- finite differences ---------------------------------------------------------------------
    def _compare_with_differences(self) -> None:
        """Warn where H v is not the slope of the gradient along v, nor near it.

        Two steps that agree show that no kink lies within them; where they do not, nothing is said.
        """
        right = self._product(self._loss, self.at, 0)
        size = _length(self.at) or 1.0
        step = STEP * size / max(1.0, math.sqrt(sum(value.numel() for value in self.at.values())))
        wide, narrow = self._slope(step), self._slope(step / 2)
        doubt = 20 * _difference(wide, narrow)
        gap, length = _difference(narrow, right), _length(narrow)
        if gap > max(0.01 * max(length, _length(right)), doubt):
            _log.warning(
                "Hessian of the loss %r: its product with a random direction is not the slope of "
                "the gradient (by finite differences; they differ by %.3g of %.3g): an operation "
                "of the model has a wrong second derivative, or a gradient is stopped by detach()",
                self.evaluator.task.loss_name,
                gap,
                length,
            )

    def _slope(self, step: float) -> Named:
        """Return (g(weights + step v) - g(weights - step v)) / (2 step)."""
        ahead, behind = (self._gradient(self._moved(sign * step)) for sign in (1, -1))
        return {name: (ahead[name] - behind[name]) / (2 * step) for name in ahead}

    def _gradient(self, at: Named) -> Named:
        variables = leaves(at)

        def run(model: nn.Module) -> Named:
            return gradient_of(self._loss(model, variables), variables, None, create_graph=False)

        return in_call(self.evaluator, variables, run)

    # --- products and directions ----------------------------------------------------------------
    def _loss(self, model: nn.Module, variables: Named) -> Tensor:
        return self.evaluator.total_of(model, self.batch, "train", variables)

    def _outputs(self, model: nn.Module, variables: Named) -> Tensor:
        """Return <outputs, u> for a normal u."""

        def cotangent(outputs: Tensor) -> Tensor:
            generator = torch.Generator(outputs.device).manual_seed(0)
            drawn = torch.randn(outputs.shape, generator=generator, device=outputs.device)
            return drawn.to(outputs)

        return self.evaluator.pulled_of(model, self.batch, cotangent)

    def _product(self, value: Value, at: Named, seed: int) -> Named:
        """Return the Hessian of a value times the direction of a seed."""
        variables = leaves(at)

        def run(model: nn.Module) -> Named:
            gradient = gradient_of(value(model, variables), variables, None, create_graph=True)
            parts = [(gradient[n] * v).sum().float() for n, v in self._direction(seed)]
            along = torch.stack(parts).sum()  # differentiated only: its own digits are not read
            return gradient_of(along, variables, None, create_graph=False)

        return in_call(self.evaluator, variables, run)

    def _direction(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Yield a normal direction by parameter; drawn again where it is used again."""
        generator = torch.Generator(self.evaluator.device).manual_seed(seed)
        for name, value in self.at.items():
            like = torch.promote_types(value.dtype, torch.float32)
            drawn = torch.randn(
                value.shape, generator=generator, dtype=like, device=self.evaluator.device
            )
            yield name, drawn.to(value)

    def _along(self, values: Named, seed: int) -> float:
        total = sum((values[n].double() * d.double()).sum() for n, d in self._direction(seed))
        return float(total)

    def _moved(self, step: float) -> Named:
        return {name: self.at[name] + step * v for name, v in self._direction(0)}

    def _rounded_anew(self, at: Named) -> Named:
        """Return weights times 1 +- 4 roundings, of the coarsest dtype of the forward pass."""
        moved = {}
        for name, signs in self._direction(2 * PAIRS):
            value = at[name]
            rounding = 4 * max(torch.finfo(value.dtype).eps, self.epsilon)
            moved[name] = value * (1 + rounding * signs.sign())
        return moved


def _length(values: Named) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))


def _difference(left: Named, right: Named) -> float:
    return _length({name: left[name] - right[name] for name in left})
