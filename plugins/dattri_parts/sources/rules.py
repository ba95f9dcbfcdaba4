"""The layer rule: how a third party teaches `per-example` the gradient of its own module class."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from typing_extensions import Protocol

from dattri_core import Block, BlockSpec, default_registry


class LayerRule(Protocol):
    """The per-example gradient of one module class, from one call of the module.

    Register it under the qualified name of the class:
    ``registry.part("layer_rule", "my_package.layers.MyLinear", "my_plugin.rules:MyRule")``. It then
    serves that class and every subclass that keeps its ``forward``; the nearest class of the MRO
    wins. A module takes one tensor and gives one tensor; what a rule declines, ``torch.func`` does.
    Every rule is checked against autograd on a few examples before it is used.
    """

    @property
    def leading(self) -> bool:
        """Return whether only axis 0 may count examples (an image's axis 1 counts channels)."""
        ...

    def spec(self, name: str, module: nn.Module, trained: Mapping[str, str]) -> BlockSpec | None:
        """Return the block of the parameters ``trained``, or None to decline.

        Args:
            name: The name to give the block.
            module: The module.
            trained: The module's own parameter names to take part (``"weight"``), each with the
                name that the model gives it (``"layers.0.weight"``), which is the one to put in a
                `ParameterView`.
        """
        ...

    def rows(
        self, module: nn.Module, trained: Mapping[str, str], inputs: Tensor, grads: Tensor
    ) -> Block:
        """Return the N rows of one call.

        Args:
            module: The module, with the weights of the checkpoint.
            trained: As in `spec`.
            inputs: What the module was called with, ``[N, ...]``.
            grads: The gradient of the summed loss at its output, ``[N, ...]``.
        """
        ...


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule of the nearest class of the MRO that has one, or None.

    A class that computes something else than the class with the rule does (another ``forward``) has
    another gradient, so that the rule does not serve it.
    """
    registry = default_registry()
    known = set(registry.names("layer_rule"))
    for cls in type(module).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in known:
            kept = all(
                getattr(type(module), method, None) is getattr(cls, method, None)
                for method in ("forward", "_conv_forward")
            )
            if not kept or "forward" in vars(module):
                return None
            rule: LayerRule = registry.make("layer_rule", name)
            return rule
    return None
