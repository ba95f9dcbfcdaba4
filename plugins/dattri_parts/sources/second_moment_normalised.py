"""Rows of both sides in units of the optimiser: divided by the root of its second moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from attrs import field, frozen, validators
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

NAME = "second-moment-normalised"


@frozen
class SecondMomentNormalised:
    """Rows g / (root(v / (1 - b2^t)) + epsilon) of both sides, entry by entry.

    v, t, b2 and epsilon are those of Adam at the checkpoint (``Task(..., optimisers=...)``), so
    that rows are divided by what Adam divided its last step by. The bias correction is one factor
    where all parameters took as many steps, which a cosine does not see. An entry that never had a
    gradient is divided by epsilon alone: give a larger one where such entries, as of words that
    were never read, would make up whole rows.

    Rows are formed, one block at a time: a quotient of a sum of outer products has no factors. They
    are gradients in other coordinates than the parameters, so curvatures that multiply by a Hessian
    or GGN, or that need factors or drawn labels, refuse them; a curvature of the rows is their
    second moment. A sketch of matrices takes them as such: ``dattri.method("trackstar",
    source="second-moment-normalised")`` is TrackStar with the correction of its paper.

    Source: Chang et al. 2024, Scalable Influence and Fact Tracing for Large Language Model
    Pretraining, section 3 (arXiv 2410.17413), where v is that of Adafactor.

    Args:
        source: Gives the gradients of parameters.
        epsilon: Added to the root; None: that of the optimiser.
    """

    source: Source = field(factory=PerExample)
    epsilon: float | None = field(default=None, validator=validators.optional(validators.ge(0)))

    @source.validator
    def _single(self, _: object, value: Source) -> None:
        require_single(NAME, value)

    @property
    def provides(self) -> frozenset[str]:
        """Return what the inner source provides."""
        return self.source.provides

    @property
    def needs(self) -> frozenset[str]:
        """Return what it asks of a checkpoint: the state of the optimiser."""
        return source_needs(self.source) | {"optimiser"}

    def bind(self, task: Task, checkpoint: Checkpoint, sample: Any) -> BoundNormalised:
        """Bind the inner source, and lay the second moments out as its blocks.

        Raises:
            SpecError: The checkpoint knows no optimiser, or the inner source gives no gradients.
            InputError: The moments do not fit the model, or a parameter was never updated; and as
                of the inner source.
            NumericsError: A moment is not finite, or rows would be divided by zero.
        """
        bindings = bind_inner(NAME, self.source, task, checkpoint, sample)
        roots = matrices_of(bindings, self._root)
        require_positive(NAME, checkpoint, roots)
        space = plain_space(bindings.inner.space)
        return BoundNormalised(bindings.inner, bindings.evaluator, space, roots)

    def _root(self, own: ParameterMoments) -> Tensor:
        corrected = own.second.double() / (1 - own.betas[1] ** own.step)
        return corrected.sqrt() + (own.epsilon if self.epsilon is None else self.epsilon)


@frozen(eq=False)
class BoundNormalised:
    """`SecondMomentNormalised` at one checkpoint.

    Args:
        inner: Gives gradients.
        evaluator: Of the inner source.
        space: Of the quotients.
        roots: What rows are divided by, ``[O, columns]`` as the matrix view of each block.
    """

    inner: BoundSource
    evaluator: Evaluator
    space: Space
    roots: Mapping[str, Tensor]
    beside: ClassVar[int] = 2  # the gradient, and its quotient before it is rounded to half

    @property
    def held(self) -> int:
        """Return the bytes of the moments."""
        return bytes_of(self.roots)

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand over the quotients of a batch, of either side."""

        def take(name: str, block: Block) -> None:
            spec = self.space[name]
            sink(name, as_block(formed(block, spec) / self.roots[name], spec, block.dtype))

        return self.inner.stream(batch, role, take)
