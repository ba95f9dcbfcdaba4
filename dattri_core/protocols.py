"""The protocols: what a part must answer. A part is a frozen attrs value; what it learns is apart.

Two phases everywhere: *bind / build / fit* (expensive, once), then *use*. An author implements each
protocol on one batch, without a loop over data. Facts that a part declares are required.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import frozen
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from dattri_core.blocks import Block
from dattri_core.errors import NumericsError, SpecError
from dattri_core.rows import Rows
from dattri_core.space import Space

if TYPE_CHECKING:
    from dattri_core.scores import Scores

Role = Literal["train", "test"]
Sink = Callable[[str, Block], None]
Parameters = Mapping[str, Tensor]
CurvatureKind = Literal["hessian", "ggn"]
RowKind = Literal["loss", "fisher", "ggn", "leading"]


# --- sources ------------------------------------------------------------------------------------
@runtime_checkable
class Source(Protocol):
    """Gives rows: one per example, gradients or features."""

    @property
    def provides(self) -> frozenset[str]:
        """Return the names of the auxiliary numbers that it attaches to each row."""
        ...

    def bind(self, task: Any, checkpoint: Any, sample: Any) -> BoundSource:
        """Fix the source to one checkpoint, with a few examples to learn shapes from."""
        ...


@runtime_checkable
class BoundSource(Protocol):
    """A source at one checkpoint."""

    @property
    def space(self) -> Space:
        """Return the blocks that every row has."""
        ...

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand each block of the batch's rows to ``sink(name, block)`` as soon as it exists.

        Rows of role ``"train"`` belong to the loss, those of ``"test"`` to the target. Returns the
        auxiliary numbers of the batch, each ``[B]``.
        """
        ...


# --- stages -------------------------------------------------------------------------------------
@runtime_checkable
class LinearMap(Protocol):
    """A linear map of rows, the same for every row, with its adjoint."""

    @property
    def out_space(self) -> Space:
        """Return the space of mapped rows."""
        ...

    @property
    def blockwise(self) -> bool:
        """Return whether block k of the result needs block k of the argument only.

        A blockwise map is given rows that hold a part of the blocks, one at a time.
        """
        ...

    def map(self, rows: Rows) -> Rows:
        """Return P g for every row g."""
        ...

    def adjoint(self, rows: Rows) -> Rows:
        """Return P^T k for every mapped row k."""
        ...


@runtime_checkable
class Projector(Protocol):
    """A sketch, the same on both sides."""

    @property
    def gives(self) -> frozenset[str]:
        """Return the capabilities of the map: of ``{"adjoint", "keeps-factors"}``."""
        ...

    def out_space(self, space: Space) -> Space:
        """Return the space after the sketch; no tensor is made. Raises `SpecError`."""
        ...

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map for one space and one stream of random numbers."""
        ...


@frozen
class RandomStream:
    """The key of a counter-based generator: (seed, role, checkpoint); no hidden state."""

    seed: int
    role: str
    checkpoint: int = 0

    def key(self, *parts: object) -> int:
        """Return a 63-bit key for this stream and any further names, the same on every machine."""
        text = "\x1f".join(map(str, (self.seed, self.role, self.checkpoint, *parts)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def generator(self, *parts: object) -> torch.Generator:
        """Return a CPU generator for this stream and any further names."""
        return torch.Generator().manual_seed(self.key(*parts))


@runtime_checkable
class InverseHessian(Protocol):
    """The inverse of a curvature: fitted on the whole train set, applied to rows."""

    @property
    def needs(self) -> frozenset[str]:
        """Return what it asks of the `Problem`; see `Curvature.needs`. Empty: no fit is needed."""
        ...

    def check(self, space: Space) -> None:
        """Raise `SpecError` when the parts do not fit each other or the space; without a tensor."""
        ...

    def fit(self, problem: Problem) -> Inverse:
        """Fit on the train set. An inverse acts on test rows, an `InverseRoot` on both sides."""
        ...


@runtime_checkable
class Inverse(Protocol):
    """A fitted inverse Hessian."""

    @property
    def stats(self) -> Mapping[str, float]:
        """Return what the last work reported: iterations, residual, damping, eigenvalues..."""
        ...

    @property
    def blockwise(self) -> bool:
        """Return whether block k of `apply` needs block k of the rows only.

        A blockwise inverse is also given rows that hold a part of the blocks, so that test rows can
        be kept as the source gives them and inverted a layer at a time.
        """
        ...

    def apply(self, rows: Rows) -> Rows:
        """Return (H + damping I)^-1 g for every row g."""
        ...

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping, without another pass over the data if possible."""
        ...


# --- curvature x solver -------------------------------------------------------------------------
@frozen
class Damping:
    """lambda: added to the eigenvalues of the mean curvature, or relative to their mean.

    ``absolute(mean_eigenvalue)`` is ``value``, or ``value * mean_eigenvalue`` when relative.
    """

    value: float
    relative: bool = False

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise SpecError(f"damping: got {self.value!r}, expected a finite number >= 0")

    def absolute(self, mean_eigenvalue: float) -> float:
        """Return lambda in the unit of the curvature.

        Raises:
            NumericsError: It is relative to a mean eigenvalue that is not positive.
        """
        if not self.relative:
            return self.value
        if not mean_eigenvalue > 0:
            raise NumericsError(
                f"damping: relative to the mean eigenvalue {mean_eigenvalue:.3g}, which is not "
                "positive; give an absolute damping, or the curvature 'ggn'"
            )
        return self.value * mean_eigenvalue


def as_damping(value: Any) -> Damping:
    """Return a damping given as a number, as ``{"relative": number}``, or as it is.

    Raises:
        SpecError: It is none of these, negative, or not finite.
    """
    if isinstance(value, Damping):
        return value
    if isinstance(value, Mapping) and set(value) == {"relative"}:
        return Damping(as_damping(value["relative"]).value, relative=True)
    if isinstance(value, Mapping) and set(value) == {"value", "relative"}:
        return Damping(as_damping(value["value"]).value, relative=bool(value["relative"]))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Damping(float(value))
    raise SpecError(
        f"damping: got {value!r}; expected a number >= 0, absolute in the unit of the mean "
        'curvature, or {"relative": number}, times its mean eigenvalue'
    )


@runtime_checkable
class Curvature(Protocol):
    """A curvature of the train loss, always the mean over the data it was fitted on."""

    @property
    def needs(self) -> frozenset[str]:
        """Return what it asks of the `Problem`.

        Of ``{"hessian-product", "ggn-product", "rows", "fisher-rows", "ggn-rows",
        "leading-rows", "reference-rows"}``: products of a kind, rows of the kinds ``"loss"``,
        ``"fisher"``, ``"ggn"`` and ``"leading"``, and those of the reference examples.
        """
        ...

    @property
    def exact(self) -> bool:
        """Return whether the operator is the curvature it is named after, not an approximation."""
        ...

    def gives(self, space: Space) -> frozenset[str]:
        """Return what its operator does, of {"apply", "dense", "spectral", "rows", "sampled"}.

        Raises `SpecError` when the space lacks what the curvature needs (factors, say).
        """
        ...

    def fit(self, problem: Problem) -> Operator:
        """Return the operator of this curvature on the whole train set."""
        ...


@runtime_checkable
class Operator(Protocol):
    """A symmetric operator on rows. Methods outside of `Curvature.gives` need not exist."""

    @property
    def space(self) -> Space:
        """Return the space on which it acts."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which it computes, so how far its numbers can be trusted."""
        ...

    @property
    def memory(self) -> int:
        """Return the bytes that work with it may use."""
        ...

    def apply(self, rows: Rows) -> Rows:
        """Return H g for every row g."""
        ...


@runtime_checkable
class DenseOperator(Operator, Protocol):
    """An operator that can write itself down."""

    def dense(self) -> Tensor:
        """Return H in float64, ``[d, d]``, in the order of the space."""
        ...


@runtime_checkable
class Solver(Protocol):
    """Turns an operator into its damped inverse; owns the damping."""

    @property
    def damping(self) -> Damping:
        """Return the damping it adds."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """Return what it asks of the operator; see `Curvature.gives`."""
        ...

    @property
    def exact(self) -> bool:
        """Return whether `apply` is the exact inverse, up to rounding or its own tolerance."""
        ...

    def check(self, space: Space) -> None:
        """Raise `SpecError` or `MemoryBudgetError` when the space is more than it can take."""
        ...

    def solve_for(self, operator: Any, device: torch.device) -> Inverse:
        """Return the inverse of an operator that answers `needs`."""
        ...


@runtime_checkable
class Problem(Protocol):
    """All that a curvature may see. Every sum runs over the whole train set."""

    @property
    def space(self) -> Space:
        """Return the space after the stages so far."""
        ...

    @property
    def n_train(self) -> int:
        """Return the number of train examples."""
        ...

    @property
    def device(self) -> torch.device:
        """Return where the rows live."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the rows."""
        ...

    @property
    def random(self) -> RandomStream:
        """Return the stream of random numbers of this fit."""
        ...

    @property
    def memory(self) -> int:
        """Return the bytes that the fit may use."""
        ...

    def rows(
        self, index: Tensor | None = None, *, kind: RowKind = "loss", draw: int = 0
    ) -> Iterator[Rows]:
        """Read train rows after the stages so far, a few whole rows at a time.

        Args:
            index: Positions of the examples to read, in that order; None reads all, in order.
            kind: ``"loss"``: the gradient of each example's train loss. ``"fisher"``: of its loss
                at a label drawn from the model. ``"ggn"``: J_b^T f_k for each column of
                C_b = sum_k f_k f_k^T, the Hessian of the criterion in the outputs, so that the mean
                curvature is ``1/n_train`` times the sum of r r^T over all rows exactly. An example
                has as many such rows as C_b has columns that are not 0, maybe none; they come one
                after another, and ``Rows.index`` repeats the example. ``"leading"``: one of those
                rows, with the eigenvectors of C_b as its columns.
            draw: Of the labels: the same number gives the same labels whatever is read in between,
                other numbers independent ones. Of kind ``"leading"``: which eigenvector, 0 that of
                the largest eigenvalue.
        """
        ...

    def stream(
        self,
        sink: Callable[[str, Block, Tensor], None],
        *,
        kind: RowKind = "loss",
        draw: int = 0,
        index: Tensor | None = None,
    ) -> None:
        """Hand the rows of `rows` to ``sink(name, block, index)`` block by block.

        A block comes as the backward pass makes it, so that one is alive at a time; each block of
        each batch comes once, in an order of the model's. Only where a stage so far is not
        blockwise whole rows are made first.
        """
        ...

    def product(self, vectors: Rows, kind: CurvatureKind, index: Tensor | None = None) -> Rows:
        """Return the mean curvature times every vector; after a projector, P H P^T times it.

        Args:
            vectors: In the space of the problem.
            kind: Which curvature.
            index: Positions of the examples to take the mean over; None: the whole train set.
        """
        ...


# --- scorers and folds --------------------------------------------------------------------------
@frozen(eq=False)
class Side:
    """What a scorer may read of one side besides the inner products; rows of the current tile."""

    index: Tensor  # [B]
    aux: Mapping[str, Tensor]  # each [B]
    norm: Tensor | None  # [B], |A g| or |B h|, only when the scorer needs "norm"
    self_influence: Tensor | None = None  # [B], <A g, B g> of train rows, for "self-influence"
    inverse_norm: Tensor | None = None  # [B], |B g| of train rows, for "inverse-norm"


MEASURED = frozenset({"norm", "self-influence", "inverse-norm"})
"""What the engine computes for a scorer; all else that one needs, the source attaches to rows."""


@frozen(eq=False)
class Scored:
    """Scores of a tile ``[B, C]``, and a weight per train row ``[B]`` where the fold wants one."""

    values: Tensor
    weight: Tensor | None = None


@runtime_checkable
class Scorer(Protocol):
    """Pairs train rows with test rows."""

    @property
    def needs(self) -> frozenset[str]:
        """Return the auxiliary numbers it reads, and those of rows that the engine is to measure.

        ``"norm"``: of both sides. ``"self-influence"`` and ``"inverse-norm"``: of train rows, which
        then pass the stages of the test side too.
        """
        ...

    @property
    def locality(self) -> Literal["tile", "column"]:
        """Return ``"tile"``, or ``"column"`` when `finish` must see all train rows at once."""
        ...

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return the part ``[B, C]`` of one block; the parts of all blocks are added."""
        ...

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Turn the sum over blocks into scores; positive means that the train row helps."""
        ...


@frozen
class Snapshot:
    """Which checkpoint a tile belongs to."""

    position: int
    count: int
    name: str
    learning_rate: float | None


FoldState = Mapping[str, Tensor]


@runtime_checkable
class Fold(Protocol):
    """Reduces a tile over checkpoints. A tile's state is all it keeps, so a run can be resumed."""

    @property
    def order(self) -> Literal["forward", "reverse"]:
        """Return in which order it wants the checkpoints."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """Return what it asks for: of ``{"learning-rate", "weight"}``.

        A learning rate of every checkpoint; a weight per train row, which the scorer gives.
        """
        ...

    def update(self, state: FoldState | None, scored: Scored, snapshot: Snapshot) -> FoldState:
        """Return the state after one more checkpoint of the same tile (None before the first)."""
        ...

    def finish(self, state: FoldState) -> Tensor:
        """Return the scores ``[B, C]`` of the tile."""
        ...


@runtime_checkable
class Attributor(Protocol):
    """The outer door: anything that gives scores, whether made of parts or not."""

    def attribute(self, task: Any, train: Any, test: Any, **settings: Any) -> Scores:
        """Return the scores ``[n_train, n_test]``."""
        ...
