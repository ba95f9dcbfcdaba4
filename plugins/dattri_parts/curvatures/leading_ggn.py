"""The Gauss-Newton matrix of the leading directions of every example's outputs."""

from __future__ import annotations

from typing import ClassVar

from attrs import field, frozen, validators

from dattri_core import Operator, Outlook, Problem, Space
from dattri_parts.curvatures.second_moment import SecondMoment, answers, foreseen, outlook


@frozen
class LeadingGGN:
    """G_r = (1/n) sum_i J_i^T C_i^(r) J_i, C_i^(r) = sum_k<=r lambda_k v_k v_k^T.

    J_i is the Jacobian of the model's outputs, and C_i^(r) the best approximation of rank r of the
    criterion's Hessian in them, from its largest eigenvalues. G_r never exceeds the generalised
    Gauss-Newton matrix, and is it at r = the number of outputs; between, it costs r n rows where
    the whole takes (outputs - 1) n, so that it can be inverted exactly in the dual ('woodbury').
    Nothing is drawn. A classifier that is sure, or torn between two classes, has one direction that
    counts: sqrt(p_a p_b) (e_a - e_b).

    Where eigenvalues are equal, as those of squared error are, which of them come first is
    arbitrary: give as many columns as outputs. For examples of at most 1024 outputs; those of a
    language model have more, for which 'fisher' draws labels. Source: the rows of the whole matrix
    in the dual are those of Dangel, Tatzel and Hennig 2022 (ViViT, arXiv 2106.02624); what the
    truncation is worth was measured here, docs/ablations.md.

    Args:
        columns: r.
        block: Keep the diagonal blocks alone, one a layer.
    """

    columns: int = field(default=1, validator=validators.ge(1))
    block: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"leading-rows"})
    exact: ClassVar[bool] = False

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
        return SecondMoment(problem, "leading", self.columns, blockwise=self.block)
