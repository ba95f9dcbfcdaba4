"""Protocols of what some parts can do besides: each is found by its methods, never by a class.

Those of sources are in `source_capabilities`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from dattri_core.protocols import (
    CurvatureKind,
    Damping,
    Inverse,
    LinearMap,
    Operator,
    Problem,
    Projector,
    RandomStream,
    Scorer,
    Solver,
)
from dattri_core.rows import Rows
from dattri_core.space import Space


@runtime_checkable
class DataProjector(Projector, Protocol):
    """A sketch that may have to be fitted on the train set."""

    @property
    def needs(self) -> frozenset[str]:
        """Return what `fit` asks of the `Problem`; empty: `build` makes the map without data."""
        ...

    def fit(self, problem: Problem) -> LinearMap:
        """Return the map for the space of the problem, fitted on the whole train set."""
        ...


@runtime_checkable
class AdditiveMap(LinearMap, Protocol):
    """A map that mixes blocks and is a sum over them: P g = sum_k P_k g_k.

    ``map`` of rows that hold a part of the blocks is that part of the sum, in the same space, so
    that a sketch of whole rows takes them a block at a time.
    """

    @property
    def additive(self) -> bool:
        """Return whether this map is such a sum."""
        ...


def is_additive(step: LinearMap) -> bool:
    """Return whether a map may be taken block by block and its parts added up."""
    return isinstance(step, AdditiveMap) and step.additive


@runtime_checkable
class InverseRoot(Inverse, LinearMap, Protocol):
    """A fitted inverse Hessian in two-sided form: R of both sides, R^T R = (H + damping I)^-1.

    `map` is R g, for the rows of both sides like the map of a projector, so that a sketch may
    follow; `apply` is R^T R g, as of any inverse.
    """

    def with_damping(self, damping: Damping) -> InverseRoot:
        """Return the root at another damping."""
        ...


@runtime_checkable
class RootSolver(Solver, Protocol):
    """A solver that knows the symmetric root of its inverse, for the two-sided form."""

    def root_for(self, operator: Any, device: torch.device) -> Inverse:
        """Return an inverse whose `apply` is (H + damping I)^-1/2 g instead.

        Raises:
            NumericsError: H + damping I is not positive definite, so that it has no real root.
        """
        ...


@runtime_checkable
class ReducedInverse(Inverse, Protocol):
    """A fitted inverse of low rank, as two sides: <g, P^T M P h> = <P g, M P h>.

    P is the train map; ``apply(h)`` is M P h. At another damping M is another one, so that a sweep
    takes P once on either side.
    """

    @property
    def train_map(self) -> LinearMap | None:
        """Return P, whatever the damping; None where rows stay whole."""
        ...

    def in_basis(self, rows: Rows) -> Rows:
        """Return M k for rows k = P h."""
        ...


@runtime_checkable
class SplitInverse(Inverse, Protocol):
    """An inverse whose eigenvectors are known: <g, Q M Q^T h> = <Q^T g, M Q^T h>.

    The engine may then leave Q^T g to the train side, so that no row comes back from the
    eigenbasis, and another damping is another M. Q is orthogonal and block diagonal, so norms stay
    what they are, and is the same at every damping.
    """

    @property
    def basis(self) -> LinearMap | None:
        """Return Q, whose ``map`` is Q^T g; None where this inverse cannot be split."""
        ...

    def in_basis(self, rows: Rows) -> Rows:
        """Return M k for rows k = Q^T h, all blocks or a part of them."""
        ...


@runtime_checkable
class SpectralInverse(SplitInverse, Protocol):
    """A `SplitInverse` with M = 1 / (L + damping), entry by entry.

    A sweep of dampings then has L in common, and takes a few products in place of one each.
    """

    @property
    def spectrum(self) -> Mapping[str, tuple[Tensor, float]] | None:
        """Return L, of the shape of a row, and damping of each block; None where M is another."""
        ...


@runtime_checkable
class SharingInverse(Inverse, Protocol):
    """An inverse that answers for several dampings with less work than for one after another."""

    def apply_each(self, rows: Rows, inverses: Sequence[Inverse]) -> list[Rows]:
        """Return the rows after each of some inverses, which are this one at several dampings."""
        ...


@runtime_checkable
class LeverageInverse(Inverse, Protocol):
    """An inverse that knows what train rows are to themselves, <g, (H + damping I)^-1 g>.

    One of H = w sum_i g_i g_i^T over the train rows themselves does: w times it is the statistical
    leverage of row i, the i-th number of the diagonal of w G (H + damping I)^-1 G^T.
    """

    @property
    def leverages(self) -> bool:
        """Return whether it is known of every train row."""
        ...

    def self_influence(self) -> Tensor:
        """Return <g_i, (H + damping I)^-1 g_i>, ``[n_train]`` in float64; where `leverages`."""
        ...


@runtime_checkable
class PreconditionedSolver(Solver, Protocol):
    """An iterative solver that another inverse can speed up, without a change of its answer."""

    def precondition(self, operator: Any, device: torch.device, inverse: Inverse) -> Inverse:
        """Return the inverse of an operator, given a positive definite one that is near to it."""
        ...


@runtime_checkable
class ReducingSolver(Solver, Protocol):
    """A solver whose inverse may leave k numbers of a row, on both sides: a `ReducedInverse`."""

    def out_space(self, space: Space) -> Space:
        """Return the space after it, the same one where it reduces nothing; without a tensor."""
        ...


@runtime_checkable
class SampledOperator(Operator, Protocol):
    """An operator that is a mean over the train examples, and can be taken over some of them."""

    @property
    def n_train(self) -> int:
        """Return the number of train examples."""
        ...

    @property
    def random(self) -> RandomStream:
        """Return the stream of random numbers that choose examples."""
        ...

    def apply_on(self, rows: Rows, index: Tensor) -> Rows:
        """Return the mean over the examples at positions ``index [m]`` of H_i g, for every row g.

        A position that comes twice counts twice.
        """
        ...


@runtime_checkable
class EachOperator(Operator, Protocol):
    """An operator that is a mean over examples, and can multiply a row by that of each."""

    def apply_each(self, rows: Rows, index: Tensor) -> Rows:
        """Return H_i g of one row g for the examples at positions ``index [m]``, ``m`` rows."""


@runtime_checkable
class SpectralOperator(Operator, Protocol):
    """H = Q diag(L) Q^T, Q with orthonormal columns: any function of H is one of L."""

    @property
    def basis(self) -> LinearMap:
        """Return Q: ``map`` is Q^T g, ``adjoint`` is Q g; blockwise where H is block diagonal."""
        ...

    @property
    def eigenvalues(self) -> Mapping[str, Tensor]:
        """Return L by block of ``basis.out_space``, each of the shape of one row."""
        ...

    @property
    def complete(self) -> bool:
        """Return what becomes of a direction orthogonal to all columns of Q.

        False: H is zero there, and (H + damping I)^-1 is 1 / damping. True: there is none, or it is
        dropped, held fixed; every function of H is zero there.
        """
        ...


@runtime_checkable
class RowsOperator(Operator, Protocol):
    """H = weight sum_i r_i r_i^T, over rows that may be more than memory holds."""

    @property
    def weight(self) -> float:
        """Return the weight of each outer product: 1 / n for a mean over n rows."""
        ...

    @property
    def blockwise(self) -> bool:
        """Return whether H is made of the diagonal blocks of that sum alone."""
        ...

    def rows(self) -> Iterator[Rows]:
        """Read all rows, a few at a time; the same ones, in the same order, each time."""
        ...


@runtime_checkable
class IndexedRows(RowsOperator, Protocol):
    """A `RowsOperator` whose rows belong to train examples and can be read by example.

    A solver that cannot hold all rows then reads them again, by parts of the train set. One whose
    rows are those of the train side, one of each example in order, says so by an attribute ``own``.
    """

    @property
    def n_train(self) -> int:
        """Return the number of train examples."""
        ...

    def rows_of(self, index: Tensor) -> Iterator[Rows]:
        """Read the rows of the examples at some positions, those of each example in one order.

        ``Rows.index`` names the example of each. The rows of an example need not come together, but
        come in the same order whatever is read beside them.
        """
        ...


@runtime_checkable
class PartedRows(RowsOperator, Protocol):
    """A `RowsOperator` whose rows several processes may read, each a part of the train set.

    A solver that holds rows then reads its part alone and gets the rest from the others.
    """

    def own_part(self) -> RowsOperator:
        """Return the operator whose `rows` are those of this process's part; itself for all."""
        ...


@runtime_checkable
class WeighingScorer(Scorer, Protocol):
    """A scorer that also gives a weight per train row, for a fold that reduces both apart."""

    @property
    def weighs(self) -> bool:
        """Return whether `Scored.weight` is given."""
        ...


@runtime_checkable
class BilinearScorer(Scorer, Protocol):
    """A scorer whose parts are inner products, so that either side may take a symmetric step."""

    @property
    def bilinear(self) -> bool:
        """Return whether ``pair`` of two blocks is all inner products of their rows."""
        ...


@runtime_checkable
class TermScorer(Scorer, Protocol):
    """A scorer of terms: what each train example adds to a number that they all add up to."""

    @property
    def terms(self) -> bool:
        """Return whether no example but those of the train set of the fit has a score."""
        ...


@runtime_checkable
class RoundedOperator(Operator, Protocol):
    """An operator whose numbers may have fewer digits than the dtype in which it computes.

    Rows in float32 of a model with layers in bfloat16, of adapters in float32 on such layers, or of
    a forward pass under an autocast.
    """

    def precision(self) -> float:
        """Return how far its numbers are rounded, relative to its largest eigenvalue."""
        ...


# What a `Problem` is asked for names only what it has beside one: a check looks for what it names.
@runtime_checkable
class ModelProblem(Protocol):
    """A problem that shows its model and its data, for adapters to libraries of curvature.

    What is read here has passed no stage: rows after a projector are no gradients of this model.
    """

    @property
    def task(self) -> Any:
        """Return the task; its model is the user's, to be copied and never changed."""
        ...

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Return the weights and buffers of the checkpoint, as a state dict."""
        ...

    def epsilon(self, *, tf32: bool = True) -> float:
        """Return the epsilon of the dtype of fewest digits in a forward pass of the model.

        Args:
            tf32: Whether numbers in float32 count as TF32 where a device may multiply them so.
        """
        ...

    def batches(self) -> Iterator[Any]:
        """Read the whole train set in order, batch by batch, on the device of the rows."""
        ...


@runtime_checkable
class KeepingFits(Protocol):
    """A problem, or an operator on one, that keeps what a fit computes where the user says so.

    A fit that was killed then loses what it was computing and nothing before it, and the same fit
    in another process computes nothing; see `kept`.
    """

    def kept(
        self, name: str, part: Any, make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return ``make()``, or what it returned before, on the device of the rows."""
        ...


def kept(
    owner: Any, name: str, part: Any, make: Callable[[], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """Return tensors by name that take long to compute, from disk where the user keeps fits.

    Args:
        owner: The problem that a curvature is fitted on, or the operator that a solver is given:
            of any kind, one that keeps nothing has them computed.
        name: What they are, one word that is a part of a file's name, such as ``"factors"``.
        part: The part that computes them, or a nest of parts, numbers and words: all that they
            depend on besides the owner. Leave out what they do not depend on, such as a damping.
        make: Computes them.
    """
    return owner.kept(name, part, make) if isinstance(owner, KeepingFits) else make()


@runtime_checkable
class SharedProblem(Protocol):
    """A problem whose train set several processes may read, each a part of it."""

    def summed(self, read: Callable[[Problem], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return the sum over all processes of what ``read`` gives of the part of each."""
        ...

    def own_part(self) -> Problem:
        """Return the problem that reads this process's part; itself where it reads all."""
        ...


def summed(
    problem: Problem, read: Callable[[Problem], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """Return sums over the train set, which the processes of `distributed` read in parts.

    In one process, and of a problem that is not shared, they are ``read(problem)``.

    Args:
        problem: That a curvature is fitted on.
        read: Gives the sums by name over the examples of the problem that it gets, a part of the
            train set or all of it; of that problem ``n_train`` and the positions are those of all.
            A name may be left out where nothing was added to it.
    """
    return problem.summed(read) if isinstance(problem, SharedProblem) else read(problem)


@runtime_checkable
class EachProblem(Protocol):
    """A `Problem` that knows products with the curvature of each example."""

    def product_each(self, vector: Rows, kind: CurvatureKind, index: Tensor) -> Rows:
        """Return H_i g of one row g for the examples at positions ``index [m]``, ``m`` rows."""


@runtime_checkable
class ReferencedProblem(Protocol):
    """A problem whose task has reference examples."""

    @property
    def reference(self) -> Problem | None:
        """Return the reference examples in place of the train set, None where there are none.

        Its rows of kind ``"loss"`` are those of the test side: of the target, signed.
        """
        ...


@runtime_checkable
class ByUse(Protocol):
    """A curvature that asks less of the problem when less is asked of its operator."""

    def needs_for(self, asked: frozenset[str]) -> frozenset[str]:
        """Return what it asks of the problem where its operator answers ``asked`` alone."""
        ...


@frozen
class Outlook:
    """What a plan may know of the inverse in a chain, without applying it.

    Args:
        blockwise: See `Inverse.blockwise`.
        damped: Whether it is made of a curvature and a damping, and not the identity.
        forms: Whether rows come out formed, and not as the factors that they were.
        rank: Largest number of outer products of a row that comes out, where it is bounded; a
            fitted inverse says so by an attribute ``row_rank``.
        splits: Whether it is a `SplitInverse` that can be split, and rows keep their kind in its
            basis: factors stay factors.
        spectral: Whether it splits as a `SpectralInverse`.
        reduced: The space of rows after it, where it leaves a few numbers of each.
        two_sided: Whether train rows pass it too, as its root.
        base: Rows of the curvature that an answer is a combination of, beside the row itself.
        beside: Formed rows that are alive beside an answer while it is made; a fitted inverse says
            so by an attribute of this name.
        held: Bytes that it keeps while rows are scored; a fitted inverse says so by an attribute of
            this name.
        leverages: See `LeverageInverse.leverages`.
        note: One line of what the part decides by the train set, ``stage.foresee(problem)``, for
            the plan of a dry run.
    """

    blockwise: bool = False
    damped: bool = True
    forms: bool = True
    rank: int | None = None
    splits: bool = False
    spectral: bool = False
    reduced: Space | None = None
    two_sided: bool = False
    base: int = 0
    beside: int = 3
    held: int = 0
    leverages: bool = False
    note: str = ""
