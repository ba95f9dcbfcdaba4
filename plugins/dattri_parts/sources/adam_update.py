"""The steps of Adam that train examples cause, one by one, beside gradients of test examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

from dattri_core import (
    Block,
    BoundSource,
    Checkpoint,
    Evaluator,
    ParameterMoments,
    Role,
    Sink,
    Source,
    Space,
    SpecError,
    Task,
    source_needs,
)
from dattri_parts.sources.moments import (
    as_block,
    bind_inner,
    bytes_of,
    formed,
    matrices_of,
    plain_space,
    require_positive,
    require_single,
)
from dattri_parts.sources.per_example import PerExample

NAME = "adam-update"


@frozen
class AdamUpdate:
    """Train rows Gamma_b, the step that Adam would take from its state on example b alone.

    With g the gradient of the loss of b, m, v, t, b1, b2 and epsilon of the state of Adam at the
    checkpoint (``Task(..., optimisers=...)``) and T = t + 1 the number of the step,

        m' = (b1 m + (1 - b1) g) / (1 - b1^T),
        v' = (b2 v + (1 - b2) g^2) / (1 - b2^T),
        Gamma = m' / (root(v') + epsilon),

    entry by entry: theta - theta' over the learning rate. Weight decay is left out. Test rows are
    gradients, as the inner source gives them, so that <h_j, Gamma_i> is what the step on i takes
    off the target of j, to first order and per learning rate.

    Gamma is no linear function of g, so the loss has to be in the unit of training, where a batch
    had the mean over its tokens or examples: the loss ``"causal-lm"``, a sum over tokens, gives
    other steps than a mean. It has no factors either: rows are formed, one block at a time. And it
    is no gradient: curvatures that multiply by a Hessian or GGN, or that need factors or drawn
    labels, refuse it, and a curvature of the rows is the second moment of the steps. What a train
    example is to itself takes a row of each kind, so self-influence is refused.

    Source: Xia et al. 2024, LESS: Selecting Influential Data for Targeted Instruction Tuning,
    section 3 (arXiv 2402.04333); Kingma and Ba 2015, algorithm 1 (arXiv 1412.6980), from whose
    bias correction and epsilon outside of the root the code of LESS departs.

    Args:
        source: Gives the gradients of parameters.
    """

    source: Source = field(factory=PerExample)
    sides_differ: ClassVar[bool] = True

    @source.validator
    def _of_the_loss(self, _: object, value: Source) -> None:
        require_single(NAME, value)
        if "residual" in value.provides:
            raise SpecError(
                f"{NAME}: source gives rows of a margin, and the moments of the optimiser are of "
                "the loss; use the source 'per-example' or 'functional' inside of it"
            )

    @property
    def provides(self) -> frozenset[str]:
        """Return what the inner source provides."""
        return self.source.provides

    @property
    def needs(self) -> frozenset[str]:
        """Return what it asks of a checkpoint: the state of the optimiser."""
        return source_needs(self.source) | {"optimiser"}

    def bind(self, task: Task, checkpoint: Checkpoint, sample: Any) -> BoundAdamUpdate:
        """Bind the inner source, and lay the moments out as its blocks.

        Raises:
            SpecError: The checkpoint knows no optimiser, or the inner source gives no gradients.
            InputError: The moments do not fit the model, or a parameter was never updated; and as
                of the inner source.
            NumericsError: A moment is not finite, or rows would be divided by zero.
        """
        bindings = bind_inner(NAME, self.source, task, checkpoint, sample)
        epsilon = matrices_of(bindings, lambda own: own.epsilon)
        second = matrices_of(bindings, _second)
        roots = {name: root.sqrt() + epsilon[name] for name, root in second.items()}
        require_positive(NAME, checkpoint, roots)
        return BoundAdamUpdate(
            inner=bindings.inner,
            evaluator=bindings.evaluator,
            space=plain_space(bindings.inner.space),
            first=matrices_of(bindings, _first),
            second=second,
            first_rate=matrices_of(bindings, lambda own: _rates(own)[0]),
            second_rate=matrices_of(bindings, lambda own: _rates(own)[1]),
            epsilon=epsilon,
        )


@frozen(eq=False)
class BoundAdamUpdate:
    """`AdamUpdate` at one checkpoint; matrices are laid out as the matrix view of each block.

    Args:
        inner: Gives gradients.
        evaluator: Of the inner source.
        space: Of the steps.
        first: b1 m / (1 - b1^T), ``[O, columns]``.
        second: b2 v / (1 - b2^T), ``[O, columns]``.
        first_rate: (1 - b1) / (1 - b1^T), ``[1, columns]``.
        second_rate: (1 - b2) / (1 - b2^T), ``[1, columns]``.
        epsilon: ``[1, columns]``.
    """

    inner: BoundSource
    evaluator: Evaluator
    space: Space
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    first_rate: Mapping[str, Tensor]
    second_rate: Mapping[str, Tensor]
    epsilon: Mapping[str, Tensor]
    beside: ClassVar[int] = 3  # the gradient, its wider copy of half precision, the denominator

    @property
    def held(self) -> int:
        """Return the bytes of the moments."""
        return bytes_of(self.first, self.second)

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand over the steps that train examples cause, or gradients of test examples."""
        if role == "test":
            return self.inner.stream(batch, role, sink)

        def take(name: str, block: Block) -> None:
            spec = self.space[name]
            gradient = formed(block, spec).to(self.first[name].dtype)
            step = torch.addcmul(self.first[name], gradient, self.first_rate[name])
            root = gradient.square().mul_(self.second_rate[name]).add_(self.second[name]).sqrt_()
            step.div_(root.add_(self.epsilon[name]))
            sink(name, as_block(step, spec, block.dtype))

        return self.inner.stream(batch, role, take)


def _rates(own: ParameterMoments) -> tuple[float, float]:
    """Return (1 - b) / (1 - b^T) of both moments at the next step."""
    first, second = ((1 - beta) / (1 - beta ** (own.step + 1)) for beta in own.betas)
    return first, second


def _first(own: ParameterMoments) -> Tensor:
    beta = own.betas[0]
    return own.first.double() * (beta / (1 - beta ** (own.step + 1)))


def _second(own: ParameterMoments) -> Tensor:
    beta = own.betas[1]
    return own.second.double() * (beta / (1 - beta ** (own.step + 1)))
