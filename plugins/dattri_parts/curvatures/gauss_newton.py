"""The second moment of the rows as they come to the inverse Hessian."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from dattri_core import Operator, Outlook, Problem, Space
from dattri_parts.curvatures.second_moment import SecondMoment, answers, foreseen, outlook


@frozen
class GaussNewton:
    """H = (1/n) sum_i g_i g_i^T: the second moment of the train rows after the stages so far.

    Of gradients of the loss it is the empirical Fisher matrix (Kunstner et al. 2019, arXiv
    1905.12558), also called the outer-product Gauss-Newton approximation; of a sketch P g it is
    that matrix in the sketch, P H P^T, which TRAK (Park et al. 2023, arXiv 2303.14186, equation 13)
    and LoGra (Choe et al. 2024, arXiv 2405.13954) invert. Any rows will do, features too.

    Args:
        block: Keep the diagonal blocks alone, one a layer.
    """

    block: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"rows"})

    @property
    def exact(self) -> bool:
        """Return whether nothing is left out."""
        return not self.block

    def gives(self, space: Space) -> frozenset[str]:
        """Return what its operator answers: also eigenvectors, where blocks are small."""
        return answers(space, blockwise=self.block)

    def outlook(self, space: Space, asked: frozenset[str]) -> Outlook:
        """Return what an inverse made from its eigenvectors or its rows will be."""
        return outlook(space, asked, blockwise=self.block)

    def foresee(self, problem: Problem, asked: frozenset[str]) -> Outlook:
        """Return the same where the number of rows is known."""
        return foreseen(self.fit(problem), asked, blockwise=self.block)

    def fit(self, problem: Problem) -> Operator:
        """Return the operator; rows are read when it is used."""
        return SecondMoment(problem, "loss", blockwise=self.block)
