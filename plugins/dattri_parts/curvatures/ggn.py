"""The generalised Gauss-Newton matrix of the train loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core import Operator, Problem, RandomStream, Rows, Space
from dattri_parts.curvatures.product import ProductOperator
from dattri_parts.curvatures.second_moment import SecondMoment


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

    def needs_for(self, asked: frozenset[str]) -> frozenset[str]:
        """Return that a solver that asks for rows alone needs no products."""
        return frozenset({"ggn-rows"}) if asked == {"rows"} else self.needs

    def gives(self, space: Space) -> frozenset[str]:
        """Return that it can be applied, on samples too, written down, and read as rows."""
        return frozenset({"apply", "dense", "rows", "sampled"})

    def fit(self, problem: Problem) -> Operator:
        """Return the operator; the work is done when it is applied."""
        return GGNOperator(ProductOperator(problem, "ggn"), SecondMoment(problem, "ggn"))


@frozen(eq=False)
class GGNOperator:
    """The same matrix twice: by its products, and as rows J_i^T f_k of the factors of C_i."""

    products: ProductOperator
    moment: SecondMoment
    blockwise: ClassVar[bool] = False

    @property
    def space(self) -> Space:
        """Return the space of the problem's rows."""
        return self.products.space

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the rows."""
        return self.products.dtype

    def precision(self) -> float:
        """Return the rounding of a product by the dtypes in which the model computes."""
        return self.products.precision()

    @property
    def memory(self) -> int:
        """Return the bytes that the fit may use."""
        return self.products.memory

    @property
    def n_train(self) -> int:
        """Return the number of train examples."""
        return self.products.n_train

    @property
    def random(self) -> RandomStream:
        """Return the stream of random numbers of the fit."""
        return self.products.random

    def apply(self, rows: Rows) -> Rows:
        """Return G g for every row g, by products."""
        return self.products.apply(rows)

    def apply_on(self, rows: Rows, index: Tensor) -> Rows:
        """Return G g for every row g, G the mean over the examples at some positions."""
        return self.products.apply_on(rows, index)

    def kept(
        self, name: str, part: Any, make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return what a solver computes of this operator, from disk where fits are kept."""
        return self.products.kept(name, part, make)

    def apply_each(self, rows: Rows, index: Tensor) -> Rows:
        """Return H_i g of one row g for the examples at some positions, one row for each."""
        return self.products.apply_each(rows, index)

    def dense(self) -> Tensor:
        """Return G in float64, ``[d, d]``, by products."""
        return self.products.dense()

    def live_dense(self) -> tuple[Tensor, Tensor]:
        """Return the coordinates whose row of G is not zero, and G among them, by products."""
        return self.products.live_dense()

    @property
    def weight(self) -> float:
        """Return 1 / n."""
        return self.moment.weight

    def own_part(self) -> GGNOperator:
        """Return the operator whose rows are those that this process reads."""
        moment = self.moment.own_part()
        return self if moment is self.moment else evolve(self, moment=moment)

    def rows(self) -> Iterator[Rows]:
        """Read the rows r with G = 1/n sum r r^T."""
        return self.moment.rows()

    def rows_of(self, index: Tensor) -> Iterator[Rows]:
        """Read those of the examples at some positions."""
        return self.moment.rows_of(index)
