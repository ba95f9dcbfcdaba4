"""The Fisher information matrix, from rows of drawn labels or of those of the data."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen, validators

from dattri_core import Operator, Outlook, Problem, RowKind, Space, SpecError
from dattri_parts.curvatures.second_moment import SecondMoment, answers, foreseen, outlook


@frozen
class Fisher:
    """F = (1/n) sum_i E[g g^T]: the Fisher information matrix of the model at the train inputs.

    With ``kind="sampled"`` g is the gradient of the loss at labels that are drawn from the model,
    the mean over ``draws`` of them: an unbiased estimate of the Fisher matrix, which for a negative
    log likelihood is the generalised Gauss-Newton matrix. With ``"empirical"`` the labels are those
    of the data: the empirical Fisher matrix, another matrix (Kunstner et al. 2019, arXiv
    1905.12558), the same as the curvature 'gauss-newton' of gradients of the loss.

    Args:
        kind: Which labels.
        draws: Labels drawn for each example; the estimate's variance falls as 1 / draws.
        block: Keep the diagonal blocks alone, one a layer.
    """

    kind: Literal["sampled", "empirical"] = field(
        default="sampled", validator=validators.in_(("sampled", "empirical"))
    )
    draws: int = field(default=1, validator=validators.ge(1))
    block: bool = False

    def __attrs_post_init__(self) -> None:
        if self.kind == "empirical" and self.draws != 1:
            raise SpecError(
                f"curvature 'fisher': got draws={self.draws} with kind='empirical', which draws no "
                "labels; leave draws at 1, or give kind='sampled'"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Return which rows it reads."""
        return frozenset({"fisher-rows" if self.kind == "sampled" else "rows"})

    @property
    def exact(self) -> bool:
        """Return whether nothing is drawn or left out."""
        return self.kind == "empirical" and not self.block

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
        rows: RowKind = "fisher" if self.kind == "sampled" else "loss"
        return SecondMoment(problem, rows, self.draws, blockwise=self.block)
