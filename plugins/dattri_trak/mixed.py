"""The second moment of the rows of both sides: of the train set and of what will be asked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
from attrs import field, frozen, validators
from dattri_parts.curvatures.block_spectrum import count_rows, spans, spectrum_of
from dattri_parts.curvatures.eigenbasis import BlockBasis
from dattri_parts.curvatures.second_moment import SecondMoment, answers, foreseen, outlook
from torch import Tensor

from dattri_core import DenseBlock, Operator, Outlook, Problem, ReferencedProblem, Rows, Space


@frozen
class Mixed:
    """H = w 1/m sum_j h_j h_j^T + (1 - w) 1/n sum_i g_i g_i^T, h_j rows of reference examples.

    The first sum runs over the m reference examples of the task (``Task(reference=...)``), rows of
    its target; the second over the n train examples. Directions that all examples asked about have
    in common, such as the form of a question, then count little. Source: Chang et al. 2024,
    Scalable Influence and Fact Tracing for Large Language Model Pretraining (arXiv 2410.17413),
    section 3, R = lambda R_eval + (1 - lambda) R_train. There the two are sums over as many
    examples as were taken; here they are means, so that w does not depend on how many.

    Args:
        weight: w, of the reference examples, in [0, 1]. The paper chooses it by the task.
        block: Keep the diagonal blocks alone, one a layer.
    """

    weight: float = field(default=0.9, validator=[validators.ge(0), validators.le(1)])
    block: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"rows", "reference-rows"})

    @property
    def exact(self) -> bool:
        """Return whether nothing is left out."""
        return not self.block

    def gives(self, space: Space) -> frozenset[str]:
        """Return what its operator answers: also eigenvectors, where blocks are small."""
        return answers(space, blockwise=self.block) - {"rows", "sampled"}

    def outlook(self, space: Space, asked: frozenset[str]) -> Outlook:
        """Return what an inverse made from its eigenvectors will be."""
        return outlook(space, asked, blockwise=self.block)

    def foresee(self, problem: Problem, asked: frozenset[str]) -> Outlook:
        """Return the same where the number of rows is known."""
        return foreseen(self.fit(problem), asked, blockwise=self.block)

    def fit(self, problem: Problem) -> Operator:
        """Return the operator; rows are read when it is used."""
        assert isinstance(problem, ReferencedProblem)
        assert problem.reference is not None  # the method refused a task without reference examples
        asked = SecondMoment(problem.reference, "loss", blockwise=self.block)
        train = SecondMoment(problem, "loss", blockwise=self.block)
        return _MixedMoment(asked, train, self.weight)


@frozen(eq=False)
class _MixedMoment:
    """H = weight A + (1 - weight) B of two second moments on one space."""

    asked: SecondMoment
    train: SecondMoment
    weight: float

    @property
    def space(self) -> Space:
        """Return the space of the rows."""
        return self.train.space

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which the moments compute."""
        return self.train.dtype

    @property
    def memory(self) -> int:
        """Return the bytes that the fit may use."""
        return self.train.memory

    def apply(self, rows: Rows) -> Rows:
        """Return H g for every row g by one pass over each side."""
        asked, train = self.asked.apply(rows), self.train.apply(rows)
        return asked.map_blocks(
            lambda name, block: DenseBlock(
                self._mix(block.dense().values, train.blocks[name].dense().values)
            )
        )

    def dense(self) -> Tensor:
        """Return H in float64, ``[d, d]``."""
        return self._mix(self.asked.dense(), self.train.dense())

    @property
    def basis(self) -> BlockBasis:
        """Return the eigenvectors of every block."""
        return self._spectrum[0]

    @property
    def eigenvalues(self) -> Mapping[str, Tensor]:
        """Return the eigenvalues of every block, in float64."""
        return self._spectrum[1]

    @property
    def complete(self) -> bool:
        """Return whether the eigenvectors span every block: not where there are few rows."""
        return spans(self.space, count_rows([self.asked, self.train]))

    @cached_property
    def _spectrum(self) -> tuple[BlockBasis, dict[str, Tensor]]:
        mixed = [(self.asked, self.weight), (self.train, 1 - self.weight)]
        return spectrum_of(self.space, mixed, self.memory)

    def _mix(self, asked: Tensor, train: Tensor) -> Tensor:
        """Return the mixture in place of the first, so that no third copy is made."""
        return asked.mul_(self.weight).add_(train, alpha=1 - self.weight)
