"""What is learned of a model on the sample and holds for every batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import define, field
from torch import nn

from dattri_core import InputError
from dattri_parts.sources.axes import CallLayout
from dattri_parts.sources.fallback import Fallback


@define(eq=False)
class Habits:
    """What was learned of the modules on the sample and holds for every batch."""

    layouts: Mapping[str, Mapping[nn.Module, Sequence[CallLayout]]]
    fallbacks: dict[nn.Module, Fallback] = field(factory=dict)
    copied: set[nn.Module] = field(factory=set)  # whose inputs are written into later
    detached: set[nn.Module] = field(factory=set)  # whose outputs are views, written into later
    complete: dict[str, set[nn.Module]] = field(factory=dict)  # whose every call reports
    recomputed: dict[str, set[nn.Module]] = field(factory=lambda: {"train": set(), "test": set()})
    starters: tuple[nn.Module, ...] = ()  # modules that start the graph for reentrant checkpoints
    refused: set[nn.Module] = field(factory=set)  # whose shared outputs are not to be repeated


class UnseenCallError(InputError):
    """A module is called in the forward pass as it was on no example that was looked at."""

    def __init__(self, module: nn.Module, message: str) -> None:
        super().__init__(message)
        self.module = module


class WrittenInputError(Exception):
    """The input of a module was changed in place after the module ran."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class WrittenOutputError(Exception):
    """The output of a module is a view that was changed in place after the module ran."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
