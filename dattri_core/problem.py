"""Problem: the train set as a curvature sees it, at one checkpoint and after the stages so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor

from dattri_core.batch import Batch, move
from dattri_core.blocks import Block
from dattri_core.each_product import each_product
from dattri_core.errors import MemoryBudgetError, SpecError
from dattri_core.evaluate import Evaluator, dtype_of
from dattri_core.halving import halved, halving
from dattri_core.lift import empty_rows, from_parameters, to_parameters
from dattri_core.memory import is_out_of_memory
from dattri_core.processes import processes_now
from dattri_core.products import WORK_LIMIT, batch_product, plan_slices
from dattri_core.projected import pass_blocks, require_complete
from dattri_core.protocols import (
    BoundSource,
    CurvatureKind,
    LinearMap,
    Problem,
    RandomStream,
    Role,
    RowKind,
)
from dattri_core.recording import Named, Recording, record, recording_bytes
from dattri_core.row_kinds import RowReader
from dattri_core.rows import Rows
from dattri_core.space import Space
from dattri_core.stream import Examples
from dattri_core.symmetry import require_sound, require_sum
from dattri_core.task import Task


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
        advance: Called with the number of examples after each batch that was read.
        role: Of the rows of kind ``"loss"``.
        reference: The reference examples of the task, as a problem of their own.
        fits: Where what a fit computes is kept, `KeptFits.get`.
        span: The examples that this process reads where all in order are asked for, as a range.
    """

    source: BoundSource
    examples: Examples
    maps: tuple[LinearMap, ...]
    batch: int
    random: RandomStream
    memory: int
    advance: Callable[[int], None] | None = None
    role: Role = "train"
    reference: TrainProblem | None = None
    fits: Callable[..., Mapping[str, Tensor]] | None = None
    span: tuple[int, int] | None = None
    _recordings: dict[CurvatureKind, tuple[Recording, ...]] = field(init=False, factory=dict)

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
        if not self.source.space.covers_parameters:
            raise SpecError(
                f"curvature products: the rows of {type(self.source).__name__} are not gradients "
                "with respect to parameters; use the source 'per-example' or 'functional', or a "
                "curvature made from rows"
            )
        return self._any_evaluator

    @property
    def _any_evaluator(self) -> Evaluator:
        evaluator = getattr(self.source, "evaluator", None)
        if not isinstance(evaluator, Evaluator):
            raise SpecError(
                f"curvature: the source {type(self.source).__name__} has no evaluator, so neither "
                "the device of its rows nor its model is known; use the source 'per-example' or "
                "'functional'"
            )
        return evaluator

    @property
    def task(self) -> Task:
        """Return the task."""
        return self._any_evaluator.task

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Return the weights and buffers of the checkpoint."""
        return self._any_evaluator.state

    def epsilon(self, *, tf32: bool = True) -> float:
        """Return the epsilon of the dtype of fewest digits in a forward pass of the model."""
        sample = move(self.examples.sample(1), self.device)
        return self._any_evaluator.coarsest(sample, self.role, tf32=tf32)

    def kept(
        self, name: str, part: Any, make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return what a part computes, from disk where it is kept; see `capabilities.kept`."""

        def found(make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
            return make() if self.fits is None else self.fits(name, part, make, self.device)

        processes = processes_now()
        return found(make) if processes is None else processes.made(found, make, self.device)

    def summed(self, read: Callable[[Problem], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return the sum over all processes of what each reads; see `capabilities.summed`."""
        processes, part = processes_now(), self.own_part()
        if processes is None or part is self:
            return read(self)
        return processes.total(read(part), self.device)

    def own_part(self) -> TrainProblem:
        """Return the problem that reads this process's part; itself where it reads all."""
        processes = processes_now()
        if processes is None or self.span is not None:
            return self
        span = processes.part(self.n_train)
        return evolve(self, span=span, advance=self._of_all(processes.size))

    def _of_all(self, size: int) -> Callable[[int], None] | None:
        """Return what counts the examples of all processes by those of one."""
        advance = self.advance
        return None if advance is None else lambda count: advance(count * size)

    def batches(self) -> Iterator[Batch]:
        """Read the whole train set in order; no stage applies.

        Raises:
            SpecError: Rows have passed a map, which may lead from the space of the parameters to
                itself, as a permutation does: a curvature made of the examples is not theirs.
        """
        passed = (*getattr(self.source, "maps", ()), *self.maps)
        changing = [
            type(step).__name__ for step in passed if not getattr(step, "is_identity", False)
        ]
        if changing:
            raise SpecError(
                "examples of the train set, for a curvature of the model's parameters: the rows "
                f"have passed {' and '.join(changing)} and are no gradients of them any more; "
                "leave these stages out, or use a curvature made of rows or of products, which "
                "pass them too"
            )
        examples = self.examples.examples  # rows that are kept are read by their positions
        return (move(batch, self.device) for _, batch in self._batches(self.batch, None, examples))

    @property
    def device(self) -> torch.device:
        """Return where the rows live."""
        return self._any_evaluator.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the rows as the source makes them."""
        return dtype_of(self.source) or self._any_evaluator.dtype

    def rows(
        self, index: Tensor | None = None, *, kind: RowKind = "loss", draw: int = 0
    ) -> Iterator[Rows]:
        """Read train rows after the maps: all in order, or those at the given positions.

        Args:
            index: Positions of examples.
            kind: Of the rows; see `row_kinds`. Rows of kind ``"ggn"`` come example by example, in
                batches of as many rows as of the other kinds.
            draw: Of the labels of kind ``"fisher"``; numbers are keyed by the position of the
                example and the draw, so that neither batches nor order change them.

        Raises:
            SpecError: The loss or the source cannot give the kind; before anything is read.
            MemoryBudgetError: One example is too much; a batch that is too much is halved.
        """
        return self._rows(self._reader(kind, draw), index)

    def stream(
        self,
        sink: Callable[[str, Block, Tensor], None],
        *,
        kind: RowKind = "loss",
        draw: int = 0,
        index: Tensor | None = None,
    ) -> None:
        """Hand the rows of `rows` to ``sink(name, block, index)``, a block at a time.

        Raises:
            SpecError, MemoryBudgetError: As in `rows`; a batch is halved only while none of its
                blocks was handed over.
        """
        reader = self._reader(kind, draw)
        if not all(step.blockwise for step in self.maps):
            for rows in self._rows(reader, index):
                for name, block in rows.blocks.items():
                    sink(name, block, rows.index)
            return

        def work(positions: Tensor, nest: Batch) -> None:
            names: list[str] = []

            def hand_over(name: str, block: Block) -> None:
                names.append(name)
                part = Rows(self.source.space.select([name]), {name: block}, positions)
                for after, mapped in self._map(part).blocks.items():
                    sink(after, mapped, positions)

            try:
                reader.stream(positions, nest, hand_over)
            except (RuntimeError, MemoryError) as error:
                if not names or not is_out_of_memory(error):
                    raise
                raise MemoryBudgetError(
                    f"train rows: out of memory after the blocks {names} of {len(positions)} rows "
                    f"were handed over ({error}); give a smaller memory=, so that batches are "
                    "smaller"
                ) from error
            require_complete(self.source.space, names)

        for positions, nest in self._parts(reader, index):
            halving(work, positions, nest, "train rows")

    def _reader(self, kind: RowKind, draw: int) -> RowReader:
        given = (self.source, self._any_evaluator, kind, draw, self.random, self.memory, self.role)
        return RowReader(*given)

    def _rows(self, reader: RowReader, index: Tensor | None) -> Iterator[Rows]:
        space = self.source.space

        def whole(positions: Tensor, nest: Batch) -> Rows:
            blocks: dict[str, Block] = {}
            aux = pass_blocks(
                space,
                self.maps,
                lambda sink: reader.stream(positions, nest, sink),
                blocks.__setitem__,
            )
            return Rows(self.space, blocks, positions, aux)

        for positions, nest in self._parts(reader, index):
            yield from halved(whole, positions, nest, "train rows")

    def _parts(self, reader: RowReader, index: Tensor | None) -> Iterator[tuple[Tensor, Batch]]:
        """Yield positions and what a reader takes, at most a batch of rows at a time."""
        size = reader.examples(self.batch, move(self.examples.sample(1), self.device))
        for positions, batch in self._batches(size, index):
            yield from reader.parts(positions, move(batch, self.device), self.batch)

    def _batches(
        self, size: int, index: Tensor | None, examples: Examples | None = None
    ) -> Iterator[tuple[Tensor, Batch]]:
        read = examples or self.examples
        pieces: Iterator[tuple[Tensor, Batch]] = read.batches(size, *(self.span or ()))
        if index is not None:
            split = torch.split(index.cpu(), size)
            pieces = ((piece, read.take(piece)) for piece in split if len(piece))
        for positions, batch in pieces:
            yield positions, batch
            if self.advance is not None:
                self.advance(len(positions))

    def _map(self, rows: Rows) -> Rows:
        for step in self.maps:
            rows = step.map(rows)
        return rows

    def product(self, vectors: Rows, kind: CurvatureKind, index: Tensor | None = None) -> Rows:
        """Return the mean curvature of the train loss times every vector.

        After projectors P the operator is P H P^T: vectors go down through the adjoints, the
        product is taken in parameters, and comes back through the maps.

        Args:
            vectors: In the space of the problem.
            kind: Which curvature.
            index: Positions of the examples to take the mean over, an example as often as it is
                named; None: the whole train set.
        """
        self.space.require_same(vectors.space, "curvature product")
        count = self.n_train if index is None else len(index)
        if count == 0:
            raise SpecError("curvature product: index names no example, so there is no mean")
        lowered = vectors
        for step in reversed(self.maps):
            lowered = step.adjoint(lowered)
        directions = to_parameters(lowered)
        lifted = empty_rows(self.source.space, directions, vectors.index)
        total = to_parameters(lifted)  # views: what is added to them lands in the rows
        if index is not None or len(vectors) != 1 or not self._replay(kind, directions, total):
            self._stream_product(directions, kind, index, total)
        if count > 1:
            for block in lifted.blocks.values():
                block.dense().values.div_(count)
        return self._map(lifted)

    def product_each(self, vector: Rows, kind: CurvatureKind, index: Tensor) -> Rows:
        """Return the curvature of each of some examples times one vector, after projectors P H P^T.

        Args:
            vector: One row in the space of the problem.
            kind: Which curvature.
            index: Positions of the examples, ``[m]``.

        Returns:
            ``[m]`` rows, whose index is the positions.

        Raises:
            SpecError: There are several vectors, or no example.
        """
        self.space.require_same(vector.space, "curvature product of each example")
        if len(vector) != 1:
            raise SpecError(
                f"curvature product of each example: got {len(vector)} vectors, expected one; take "
                "them one after another"
            )
        lowered = vector
        for step in reversed(self.maps):
            lowered = step.adjoint(lowered)
        single = {name: value[0] for name, value in to_parameters(lowered).items()}
        limit = self._within(self.memory // 4)
        what = "curvature product of each example"
        parts: list[Rows] = []

        def products(positions: Tensor, batch: Batch) -> Rows:
            found = each_product(self.evaluator, batch, single, kind, limit=limit)
            return self._map(from_parameters(self.source.space, found, positions))

        with self.evaluator.session():
            for positions, batch in self._batches(self.batch, index):
                there = move(batch, self.device)
                self._require_sound(positions, there, single, kind)
                parts += halved(products, positions, there, what)
        if not parts:
            raise SpecError(f"{what}: index names no example")
        return Rows.concatenate(parts)

    def _replay(self, kind: CurvatureKind, vector: Named, out: Named) -> bool:
        """Write the sum over the train set from its recorded graphs; return False without them."""
        try:
            if kind not in self._recordings:
                self._recordings[kind] = self._record(kind, vector)
            recordings = self._recordings[kind]
            single = {name: value[0] for name, value in vector.items()}
            for position, recording in enumerate(recordings):
                found = recording.product(single)
                for name, value in found.items():
                    if position == 0:
                        out[name][0] = value
                    else:
                        out[name][0] += value
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            recordings = self._recordings[kind] = ()
        if recordings and self.advance is not None:
            self.advance(self.n_train)
        return bool(recordings)

    def _record(self, kind: CurvatureKind, names: Iterable[str]) -> tuple[Recording, ...]:
        """Record the train set; nothing where its graphs are too large to be kept.

        They are kept because a Krylov space takes its products one vector after another.
        """
        limit = self._within(self.memory // 8)
        sample = move(self.examples.sample(1), self.device)
        if self.n_train * recording_bytes(self.evaluator, sample) > limit:
            return ()
        recordings = []
        for positions, batch in self._batches(self.n_train, None):  # they fit, all at once
            there = move(batch, self.device)
            self._require_sound(positions, there, names, kind)
            recordings.append(record(self.evaluator, there, names, kind))
        return tuple(recordings)

    def _within(self, limit: int) -> int:
        """Return a limit of bytes; a processor takes no more than it keeps warm."""
        return min(WORK_LIMIT, limit) if self.device.type == "cpu" else limit

    def _require_sound(
        self, positions: Tensor, batch: Batch, names: Iterable[str], kind: CurvatureKind
    ) -> None:
        if kind == "hessian":
            require_sum(self.evaluator, batch, positions)
            require_sound(self.evaluator, batch, names)

    def _stream_product(
        self,
        directions: Named,
        kind: CurvatureKind,
        index: Tensor | None,
        total: Named,
    ) -> None:
        """Write the sum over examples to ``total``, a batch at a time."""
        first = True
        with self.evaluator.session():
            for positions, batch in self._batches(self.batch, index):
                there = move(batch, self.device)
                self._require_sound(positions, there, directions, kind)
                part = self._batch_product(there, directions, kind, total if first else None)
                if not first:
                    for name, value in part.items():
                        total[name] += value
                first = False

    def _batch_product(
        self,
        batch: Batch,
        directions: Named,
        kind: CurvatureKind,
        out: Named | None,
    ) -> Named:
        limit = self.memory // 4
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

    def _smaller(self, limit: int, batch: Batch, directions: Named) -> int:
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
    if not isinstance(aux, Mapping):
        raise SpecError(
            f"source {type(source).__name__}: stream returns a {type(aux).__name__}, expected the "
            "auxiliary numbers of the rows by name, {} where there are none"
        )
    return Rows(source.space, blocks, index, aux)
