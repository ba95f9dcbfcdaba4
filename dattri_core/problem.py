"""Problem: the train set as a curvature sees it, at one checkpoint and after the stages so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from attrs import define
from torch import Tensor

from dattri_core.batch import Batch, batch_size, move
from dattri_core.blocks import Block
from dattri_core.errors import MemoryBudgetError, SpecError
from dattri_core.evaluate import Evaluator
from dattri_core.lift import empty_rows, to_parameters
from dattri_core.memory import is_out_of_memory
from dattri_core.products import WORK_LIMIT, batch_product, plan_slices
from dattri_core.protocols import BoundSource, CurvatureKind, LinearMap, RandomStream
from dattri_core.rows import Rows
from dattri_core.space import Space
from dattri_core.stream import Examples


@define(eq=False)
class TrainProblem:
    """The `Problem` of one checkpoint.

    Args:
        source: The gradient source at the checkpoint.
        examples: The train set.
        maps: The projectors before the inverse Hessian, in order.
        batch: Rows at a time.
        random: Keys of random numbers.
        memory: Bytes that a fit may use.
        advance: Called with the number of examples after each batch.
    """

    source: BoundSource
    examples: Examples
    maps: tuple[LinearMap, ...]
    batch: int
    random: RandomStream
    memory: int
    advance: Callable[[int], None] | None = None

    @property
    def space(self) -> Space:
        """Return the space after the maps."""
        return self.maps[-1].out_space if self.maps else self.source.space

    @property
    def n_train(self) -> int:
        """Return the number of train examples."""
        return len(self.examples)

    @property
    def evaluator(self) -> Evaluator:
        """Return the evaluator of a source whose rows are gradients of parameters."""
        evaluator = getattr(self.source, "evaluator", None)
        if not isinstance(evaluator, Evaluator) or not self.source.space.covers_parameters:
            raise SpecError(
                f"curvature products: the rows of {type(self.source).__name__} are not gradients "
                "with respect to parameters; use the source 'per-example' or 'functional', or a "
                "curvature made from rows"
            )
        return evaluator

    @property
    def device(self) -> torch.device:
        """Return where the rows live."""
        return self.evaluator.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the rows."""
        return self.evaluator.dtype

    def rows(self, index: Tensor | None = None) -> Iterator[Rows]:
        """Stream train rows after the maps: all in order, or those at the given positions."""
        if index is None:
            pairs: Iterator[tuple[Tensor, Batch]] = self.examples.batches(self.batch)
        else:
            pieces = torch.split(index, self.batch)
            pairs = ((piece, self.examples.take(piece)) for piece in pieces)
        for positions, batch in pairs:
            rows = collect(self.source, batch, positions, "train", self.device)
            for step in self.maps:
                rows = step.map(rows)
            yield rows

    def product(self, vectors: Rows, kind: CurvatureKind) -> Rows:
        """Return the mean curvature of the train loss times every vector.

        After projectors P the operator is P H P^T: vectors go down through the adjoints, the
        product is taken in parameters, and comes back through the maps.
        """
        self.space.require_same(vectors.space, "curvature product")
        lowered = vectors
        for step in reversed(self.maps):
            lowered = step.adjoint(lowered)
        directions = to_parameters(lowered)
        lifted = empty_rows(self.source.space, directions, vectors.index)
        total = to_parameters(lifted)  # views: what is added to them lands in the rows
        with self.evaluator.session():
            for index, batch in self.examples.batches(self.batch):
                first = int(index[0]) == 0
                part = self._batch_product(
                    move(batch, self.device), directions, kind, total if first else None
                )
                if not first:
                    for name, value in part.items():
                        total[name] += value
                if self.advance is not None:
                    self.advance(batch_size(batch))
        for block in lifted.blocks.values():
            block.dense().values.div_(self.n_train)
        for step in self.maps:
            lifted = step.map(lifted)
        return lifted

    def _batch_product(
        self,
        batch: Batch,
        directions: dict[str, Tensor],
        kind: CurvatureKind,
        out: dict[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        limit = min(WORK_LIMIT, self.memory // 4)
        while True:
            failed: BaseException
            try:
                return batch_product(self.evaluator, batch, directions, kind, limit=limit, out=out)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.with_traceback(None)  # its frames hold the memory that ran out
            limit = self._smaller(limit, batch, directions)
            if limit == 0:
                raise MemoryBudgetError(
                    f"curvature product: out of memory with one example and one of "
                    f"{len(next(iter(directions.values())))} vectors at a time ({failed}); give a "
                    "smaller memory= so that fewer test examples are taken at once"
                ) from failed

    def _smaller(self, limit: int, batch: Batch, directions: dict[str, Tensor]) -> int:
        """Return a limit at which less is taken at once, or 0 where it cannot be less."""
        try:
            size = plan_slices(self.evaluator, batch, directions, limit)
            while limit > 0 and plan_slices(self.evaluator, batch, directions, limit) == size:
                limit //= 2
        except (RuntimeError, MemoryError) as error:  # not even one example can be measured
            if not is_out_of_memory(error):
                raise
            return 0
        return limit


def collect(
    source: BoundSource, batch: Batch, index: Tensor, role: str, device: torch.device
) -> Rows:
    """Return the whole rows of a batch."""
    blocks: dict[str, Block] = {}
    assert role in ("train", "test")
    aux = source.stream(move(batch, device), role, blocks.__setitem__)  # type: ignore[arg-type]
    require_complete(source.space, blocks)
    return Rows(source.space, blocks, index, aux)


def require_complete(space: Space, names: Sequence[str] | dict[str, Block]) -> None:
    """Raise when a source did not hand over every block exactly once."""
    if set(names) != set(space.names) or len(names) != len(space):
        raise SpecError(
            f"source: handed over the blocks {sorted(names)}, its space has {sorted(space.names)}; "
            "a source gives each block once for each batch"
        )
