"""One fitted checkpoint: its source and stages, what they cost, and the scores of one tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import Factory, define, field, frozen
from torch import Tensor

from dattri_core.activations import activation_bytes
from dattri_core.batch import Batch, move
from dattri_core.blocks import Block, explain_inner
from dattri_core.checkpoint import Checkpoint
from dattri_core.errors import NumericsError
from dattri_core.evaluate import Evaluator
from dattri_core.halving import halving
from dattri_core.measures import Measures, needs_inverse, take_side
from dattri_core.memory import Costs
from dattri_core.problem import TrainProblem, collect, require_complete
from dattri_core.protocols import (
    BoundSource,
    Projector,
    RandomStream,
    Role,
    Scorer,
    Side,
    Source,
)
from dattri_core.rows import Rows
from dattri_core.stages import (
    Chain,
    Stage,
    Step,
    all_blockwise,
    check_stages,
    is_two_sided,
    needs_data,
    space_after,
)
from dattri_core.stream import Examples
from dattri_core.task import Task

SAMPLE = 3
FLAT = ("inner products   of flat rows",)


@frozen(eq=False)
class Fitted:
    """A checkpoint with its chain of stages, and what they cost."""

    checkpoint: Checkpoint
    chain: Chain
    costs: Costs
    weights: str | None  # fingerprint of the weights at the time of the fit
    dtype: torch.dtype  # of scores
    notes: tuple[str, ...]


@define(eq=False)
class Queries:
    """Test rows after all stages, ready to meet train rows."""

    rows: Rows
    side: Side
    device: torch.device

    def __len__(self) -> int:
        return len(self.rows)

    def block(self, name: str, train: Block) -> Block:
        """Return a block of the queries, formed once if the planner would form it each time."""
        block = self.rows.blocks[name]
        if block.positions is not None and explain_inner(train, block).order == "form":
            block = block.dense()
            self.rows = self.rows.map_blocks(lambda n, b: block if n == name else b)
        return block


def fit_checkpoint(
    source: Source,
    stages: Sequence[Stage],
    seed: int,
    task: Task,
    checkpoint: Checkpoint,
    examples: Examples,
    memory: int,
    test: Examples | None = None,
    advance: Callable[[int], None] | None = None,
    plan_only: bool = False,
) -> Fitted:
    """Bind the source at a checkpoint, then build and fit each stage on the train set in order.

    A few test examples, where given, are tried before any stage is fitted. With ``plan_only`` the
    costs are those of all stages, but no inverse Hessian is fitted or in the chain, and projectors
    are fitted on a few examples.
    """
    sample = move(examples.sample(SAMPLE), task.device)
    bound = source.bind(task, checkpoint, sample)
    check_stages(stages, bound.space, bound)
    if test is not None:
        collect(bound, test.sample(1), torch.arange(1), "test", task.device)
    evaluator = getattr(bound, "evaluator", None)
    activations = activation_bytes(evaluator, sample) if isinstance(evaluator, Evaluator) else 0
    rows = collect(bound, sample, torch.arange(SAMPLE), "train", task.device)
    row_bytes = [max(1, block.nbytes // SAMPLE) for block in rows.blocks.values()]
    item = max(4, rows.dtype.itemsize)
    # A map that is not blockwise takes whole rows; most form them block by block, then join them.
    whole = sum(row_bytes) + 2 * bound.space.dim * item
    largest = max(row_bytes) if all_blockwise(stages, bound.space) else whole
    per_example = activations + largest
    batch = max(1, min(len(examples), 4096, memory // 8 // per_example))
    chain = Chain(bound)
    space, widest, reduced = bound.space, 0, False  # widest: numbers that an inverse takes
    step: Step
    for stage in stages:
        before, space = space, space_after(stage, space)
        if not isinstance(stage, Projector):
            widest = max(widest, before.dim) if stage.needs else widest
            reduced = reduced or space != before or is_two_sided(stage)
            if plan_only:
                continue
        role = "projector" if isinstance(stage, Projector) else "curvature"
        stream = RandomStream(seed, role, checkpoint.position)
        if isinstance(stage, Projector) and not needs_data(stage):
            step = stage.build(before, stream=stream, device=task.device)
        else:
            # A plan only asks what comes out of a projector: a few examples tell.
            data = Examples("train", SAMPLE, "tensors", sample) if plan_only else examples
            problem = TrainProblem(bound, data, chain.maps, batch, stream, memory, advance)
            step = stage.fit(problem)
        chain = Chain(bound, (*chain.steps, step))
    query, notes = _query_bytes(rows, chain, item)
    costs = Costs(
        activations=activations,
        train_row=largest,
        query=space.dim * item if widest else query,
        query_work=3 * widest * item if widest else activations,
    )
    if reduced:
        notes = FLAT
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return Fitted(checkpoint, chain, costs, weights_of(bound), dtype, notes)


def weights_of(source: BoundSource) -> str | None:
    """Return a hash of the weights that a source reads, where it has an evaluator."""
    evaluator = getattr(source, "evaluator", None)
    return evaluator.fingerprint if isinstance(evaluator, Evaluator) else None


def _query_bytes(rows: Rows, chain: Chain, item: int) -> tuple[int, tuple[str, ...]]:
    """Return the bytes of one query without an inverse, and how each block will be contracted."""
    if not chain.blockwise:
        return chain.space.dim * item, FLAT
    total, notes = 0, []
    after = chain.train(rows)
    for spec in chain.space:
        block = after.blocks[spec.name]
        order = explain_inner(block, block).order
        notes.append(f"inner of {spec.name} {spec.shape}: {order}")
        total += spec.size * item if order == "form" else block.nbytes // SAMPLE
    return total, tuple(notes)


# --- queries and tiles --------------------------------------------------------------------------
def make_queries(
    fitted: Fitted, scorer: Scorer, examples: Examples, start: int, stop: int, batch: int
) -> Queries:
    """Return the test rows ``start:stop`` after all stages."""
    source = fitted.chain.source
    device = _device(source)
    pieces: list[Rows] = []

    def gather(index: Tensor, part: Batch) -> None:
        pieces.append(collect(source, part, index, "test", device))

    for index, part in examples.batches(batch, start, stop):
        halving(gather, index, part, "test rows")
    return _queries(fitted, scorer, Rows.concatenate(pieces))


def both_sides(fitted: Fitted, scorer: Scorer, index: Tensor, batch: Batch) -> tuple[Rows, Queries]:
    """Return train rows after the stages of the train side and of the test side."""
    source = fitted.chain.source
    rows = collect(source, batch, index, "train", _device(source))
    return fitted.chain.train(rows), _queries(fitted, scorer, rows)


def take_queries(queries: Queries, part: slice) -> Queries:
    """Return some of the queries."""
    return Queries(queries.rows.take(part), take_side(queries.side, part), queries.device)


def _queries(fitted: Fitted, scorer: Scorer, rows: Rows) -> Queries:
    rows = fitted.chain.test(rows)
    bad = [name for name, block in rows.blocks.items() if not block.is_finite()]
    if bad:
        raise NumericsError(
            f"queries: not finite after the stages, at checkpoint {fitted.checkpoint.name!r}, "
            f"examples {rows.index.tolist()[:8]}..., blocks {bad}; look for a diverged checkpoint, "
            "or raise the damping"
        )
    measures = Measures(scorer.needs)
    measures.add(rows)
    return Queries(rows, measures.side(rows.index, rows.aux), _device(fitted.chain.source))


def pair_batch(
    chain: Chain, scorer: Scorer, queries: Queries, index: Tensor, batch: Batch, role: Role
) -> tuple[Tensor, Side]:
    """Return the sum over blocks ``[B, C]`` for a batch, and its side; rows go as they come."""
    pairing = _Pairing(scorer, queries)
    names: list[str] = []
    waiting: dict[str, Block] = {}
    source, inverted = chain.source, needs_inverse(scorer)
    streams = chain.blockwise and (chain.test_blockwise or not inverted)

    def meet(rows: Rows) -> None:
        if inverted:
            pairing.add(*chain.both(rows))
        else:
            pairing.add(chain.train(rows))

    def sink(name: str, block: Block) -> None:
        names.append(name)
        if streams:
            meet(Rows(source.space.select([name]), {name: block}, index))
        else:
            waiting[name] = block

    aux = source.stream(move(batch, queries.device), role, sink)
    require_complete(source.space, names)
    if waiting:
        meet(Rows(source.space, waiting, index))
    return pairing.total(), pairing.measures.side(index, aux)


def pair_rows(rows: Rows, scorer: Scorer, queries: Queries) -> tuple[Tensor, Side]:
    """Return the sum over blocks ``[B, B]`` for train rows and the same rows as queries."""
    pairing = _Pairing(scorer, queries)
    pairing.add(rows, queries.rows)
    return pairing.total(), pairing.measures.side(rows.index, rows.aux)


@define(eq=False)
class _Pairing:
    """Adds up, over blocks, what the scorer pairs and what it needs to know of train rows."""

    scorer: Scorer
    queries: Queries
    measures: Measures = field(
        default=Factory(lambda self: Measures(self.scorer.needs), takes_self=True)
    )
    _total: Tensor | None = None
    _own: bool = False

    def add(self, rows: Rows, inverted: Rows | None = None) -> None:
        self.measures.add(rows, inverted)
        for name, block in rows.blocks.items():
            part = self.scorer.pair(block, self.queries.block(name, block))
            if self._total is None:
                self._total = part
            elif self._own:
                self._total += part
            else:  # the first part belongs to the scorer
                self._total, self._own = self._total + part, True

    def total(self) -> Tensor:
        assert self._total is not None
        return self._total


def require_finite(values: Tensor, index: Tensor, checkpoint: Checkpoint) -> None:
    """Raise when a score of a batch is not finite."""
    # One pass: a sum is finite only if all of its terms are.
    if torch.isfinite(values.sum()) or torch.isfinite(values).all():
        return
    rows, columns = torch.nonzero(~torch.isfinite(values), as_tuple=True)
    raise NumericsError(
        f"scores: not finite at checkpoint {checkpoint.name!r}, train example "
        f"{int(index[rows[0].cpu()])}, query {int(columns[0])}; look for a diverged checkpoint, or "
        "for numbers that overflow half precision"
    )


def _device(source: BoundSource) -> torch.device:
    evaluator = getattr(source, "evaluator", None)
    return evaluator.device if isinstance(evaluator, Evaluator) else torch.device("cpu")
