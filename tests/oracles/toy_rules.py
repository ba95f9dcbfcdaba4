"""A layer of a third party, its rule, and one that is wrong."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen
from dattri_parts.sources.layers.linear import LinearRule
from torch import Tensor, nn


class Twice(nn.Linear):
    """A third party's layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@frozen
class TwiceRule:
    """Its rule."""

    leading = False
    inner: LinearRule = field(factory=LinearRule)

    def spec(self, name: str, module: nn.Module, trained: Any) -> Any:
        return self.inner.spec(name, module, trained)

    def rows(self, module: nn.Module, trained: Any, inputs: Tensor, grads: Tensor) -> Any:
        return self.inner.rows(module, trained, inputs, grads * 2)


@frozen
class WrongRule(TwiceRule):
    """Forgets the factor."""

    def rows(self, module: nn.Module, trained: Any, inputs: Tensor, grads: Tensor) -> Any:
        return self.inner.rows(module, trained, inputs, grads)
