"""The generalised Gauss-Newton matrix of the train loss."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from dattri_core import Operator, Problem, Space
from dattri_parts.curvatures.product import ProductOperator


@frozen
class GGN:
    """G = (1/n) sum_i J_i^T C_i J_i: the generalised Gauss-Newton matrix of the mean train loss.

    J is the Jacobian of the model's outputs and C the Hessian of the criterion in them. Positive
    semi-definite when the criterion is convex in the outputs, and equal to the Hessian when the
    outputs are linear in the parameters. For cross-entropy it is the true Fisher matrix, with
    labels drawn from the model. Behind a projector P it is P G P^T. Source: Schraudolph 2002,
    section 3; Martens 2020 (arXiv 1412.1193), section 8.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"ggn-product"})
    exact: ClassVar[bool] = True

    def gives(self, space: Space) -> frozenset[str]:
        """Return that its operator can be applied, on samples too, and written down."""
        return frozenset({"apply", "dense", "sampled"})

    def fit(self, problem: Problem) -> Operator:
        """Return the operator; the work is done when it is applied."""
        return ProductOperator(problem, "ggn")
