"""Protocols of what some sources can do besides: each is found by its methods, never by a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from dattri_core.blocks import Block
from dattri_core.protocols import BoundSource, Sink, Source


@runtime_checkable
class OutputSource(BoundSource, Protocol):
    """A source that pulls any direction in the model's outputs back to the parameters.

    Rows of drawn labels and of the GGN's factor are made with it.
    """

    def pull(self, batch: Any, cotangent: Callable[[Tensor], Tensor], sink: Sink) -> None:
        """Hand each block of the rows J_b^T u_b to ``sink(name, block)``, as `stream` does.

        J_b is the Jacobian of the outputs of ``task.loss.forward`` at example b, and
        ``u = cotangent(outputs)``, ``[B, ...]`` like the outputs, is held constant. With the slope
        of the criterion as u they are the rows of the loss.
        """
        ...


@runtime_checkable
class EnsembleSource(Source, Protocol):
    """A source that makes several networks of one checkpoint; a fold sees each as a checkpoint.

    `bind` is given checkpoints whose ``member`` counts from 0 to ``members`` - 1.
    """

    @property
    def members(self) -> int:
        """Return how many networks it makes of each checkpoint."""
        ...


@runtime_checkable
class DataSource(Source, Protocol):
    """A source that is fitted on the train set before it gives rows, such as a refitted layer.

    The engine calls `fit` in place of `bind`, which raises a `SpecError`: a source around another
    one has a few examples only, and rows fitted to those would be other rows.
    """

    def fit(self, task: Any, checkpoint: Any, examples: Any, memory: int) -> BoundSource:
        """Fix the source to one checkpoint and the whole train set; rows are asked of any examples.

        For a plan ``examples`` are a few of the train set: the space is the same.
        """
        ...


@runtime_checkable
class StatefulSource(Source, Protocol):
    """A source whose rows know more of a checkpoint than its weights."""

    @property
    def needs(self) -> frozenset[str]:
        """Return what it asks of every checkpoint: of ``{"optimiser"}``, the state of Adam."""
        ...


@runtime_checkable
class SidedSource(Source, Protocol):
    """A source whose train rows are of another kind than its test rows, such as steps of Adam.

    No train row can then stand for a query: what an example is to itself takes a row of each kind.
    """

    @property
    def sides_differ(self) -> bool:
        """Return whether they are."""
        ...


@runtime_checkable
class HoldingSource(BoundSource, Protocol):
    """A source at one checkpoint that keeps more than weights, and works on formed rows."""

    @property
    def held(self) -> int:
        """Return the bytes that it keeps beside the model, such as moments of its parameters."""
        ...

    @property
    def beside(self) -> int:
        """Return how many formed rows of a block are alive beside a row while it is made."""
        ...


def source_needs(source: Source) -> frozenset[str]:
    """Return what a source asks of every checkpoint."""
    return source.needs if isinstance(source, StatefulSource) else frozenset()


def sides_differ(source: Any) -> bool:
    """Return whether train rows of a source, or None, are of another kind than its test rows."""
    return isinstance(source, SidedSource) and source.sides_differ


@runtime_checkable
class ReportingSource(BoundSource, Protocol):
    """A source at one checkpoint that has something to report, in ``provenance["source"]``."""

    @property
    def stats(self) -> Mapping[str, float]:
        """Return what its fit reached: iterations, the norm of a gradient..."""
        ...


@runtime_checkable
class RehearsedSource(BoundSource, Protocol):
    """A source at one checkpoint that made the train rows of its sample when it was bound."""

    def first_rows(self) -> Mapping[str, Block] | None:
        """Return the blocks of these rows and forget them; None where they are gone."""
        ...


@runtime_checkable
class MovableSource(Source, Protocol):
    """A source that can be taken from one checkpoint to other weights of the same model.

    What it learnt of the model when it was bound holds at any weights, so that the many checkpoints
    of a run need not all be looked at.
    """

    def move(self, bound: Any, checkpoint: Any) -> BoundSource:
        """Return what `bind` gives at another checkpoint, from what it gave at one."""
        ...


@runtime_checkable
class ReopenedSource(Source, Protocol):
    """A source that can leave the checks of its train rows to rows that were kept.

    Rows in a store were written by a source whose checks had passed. Where those of a few examples
    come out as they are there, in another order, no example mixes with others and nothing is
    random, which takes no passes to see; where they do not, the source is bound as ever.
    """

    def reopen(self, task: Any, checkpoint: Any, sample: Any) -> BoundSource:
        """Return what `bind` gives; equal rows rule out that its `first_rows` are wrong.

        What those do not show is to be seen to: parameters that take part in the loss in a way that
        the source does not catch, and the target.
        """
        ...
