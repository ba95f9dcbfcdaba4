"""The Hessian of the train loss."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from dattri_core import Operator, Problem, Space
from dattri_parts.curvatures.product import ProductOperator


@frozen
class Hessian:
    """H = (1/n) sum_i d^2 loss_i / d theta^2: the exact Hessian of the mean train loss.

    Indefinite away from a minimum of a model that is not convex in its parameters. Behind a
    projector P it is P H P^T. The first product of a task looks at four examples: an H that is not
    symmetric, since an operation of the model has a wrong second derivative, is refused. Used so
    by Koh and Liang 2017 (arXiv 1703.04730, equation 1).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian-product"})
    exact: ClassVar[bool] = True

    def gives(self, space: Space) -> frozenset[str]:
        """Return that its operator can be applied, on samples too, and written down."""
        return frozenset({"apply", "dense", "sampled"})

    def fit(self, problem: Problem) -> Operator:
        """Return the operator; the work is done when it is applied."""
        return ProductOperator(problem, "hessian")
