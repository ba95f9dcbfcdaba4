"""One fitted checkpoint: its source and stages, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from attrs import frozen
from torch import Tensor

from dattri_core.activations import activation_sizes, tensors_made, total_bytes
from dattri_core.batch import Batch, move, take
from dattri_core.capabilities import Outlook, is_additive
from dattri_core.checkpoint import Checkpoint
from dattri_core.errors import DattriError, InputError, SpecError, format_bytes
from dattri_core.evaluate import Evaluator
from dattri_core.first_look import FirstLook, first_rows, front_of, reopen, streams_of
from dattri_core.kept_fits import KeptFits
from dattri_core.measures import needs_inverse, needs_leverages
from dattri_core.memory import is_out_of_memory
from dattri_core.outlook import outlook_before_fit, outlook_of
from dattri_core.padding import require_unpadded
from dattri_core.pages import NUMBER, best_batch
from dattri_core.plans import MAXIMUM_BATCH, Costs, Route
from dattri_core.problem import TrainProblem, collect
from dattri_core.projected import Projected, weights_of
from dattri_core.protocols import (
    BoundSource,
    Damping,
    Inverse,
    LinearMap,
    Projector,
    Role,
    Scorer,
    Source,
)
from dattri_core.routes import contractions_of, gradient_work, routes_of, streams_through
from dattri_core.rows import Rows
from dattri_core.source_capabilities import (
    DataSource,
    HoldingSource,
    ReportingSource,
)
from dattri_core.stages import (
    Chain,
    Stage,
    Step,
    all_blockwise,
    check_stages,
    needs_data,
    space_after,
)
from dattri_core.stored import Keeping, Stored, hold, keep_rows
from dattri_core.stream import Examples
from dattri_core.task import Task

SAMPLE = 3
LOOK = 8
"""Examples that a source is bound on; of the first `SAMPLE` of them there are rows."""
OF_ROWS = frozenset({"rows", "reference-rows"})
"""What a stage may ask of rows that have passed projectors; for the rest it gets the model."""
HELD_SHARE = 4
"""One part in so many of a fit's memory holds sketched train rows, where all of them fit."""
ADDED_TO = 10
"""Numbers that a fit adds to for every batch, for each of a row: covariances of long layers."""
FLAT = ("inner products   of flat rows",)


@frozen(eq=False)
class Outline:
    """What a chain costs, known from its steps and from one row.

    Args:
        steps: Maps as they are, and of an inverse what is known of it.
        row: One train row as the source gives it.
        activations: Bytes that a pass keeps for one example.
        work: Multiply-adds that a train row takes at the source; 0 where it is read from a store.
        mixed: Whether the source mixes the blocks of the parameters into others.
        said: What is to be told of the store.
        held: Bytes of projected train rows in memory.
        tensors: Bytes of each tensor that an example makes on a processor; see `pages`.
    """

    steps: tuple[LinearMap | Outlook, ...]
    row: Rows
    activations: int
    work: int
    mixed: bool = False
    said: tuple[str, ...] = ()
    held: int = 0
    tensors: tuple[int, ...] = ()

    def costs(self, *, variants: bool = False, measured: bool = False) -> Costs:
        """Return the costs of one example.

        Args:
            variants: For several dampings at once.
            measured: Train rows pass the test side too, for what a scorer needs of them.
        """
        routes = routes_of(self.steps, self.row, variants=variants, measured=measured)
        return Costs(self.activations, self.work, routes, self.tensors)

    def measures(self, scorer: Scorer) -> bool:
        """Return whether train rows pass the test side too, for what a scorer needs of them."""
        last = self.steps[-1] if self.steps else None
        known = isinstance(last, Outlook) and last.leverages and needs_leverages(scorer)
        known = known and all(isinstance(step, LinearMap) for step in self.steps[:-1])
        return needs_inverse(scorer) and not known

    @property
    def kept(self) -> int:
        """Return the bytes of train rows in memory, and of what inverses keep."""
        return self.held + sum(step.held for step in self.steps if isinstance(step, Outlook))

    @property
    def after(self) -> Rows | None:
        """Return the row after the train side, or None where a stage mixes its blocks."""
        row = self.row
        if self.mixed or not all(map(streams_through, self.steps)):
            return None
        for step in self.steps:
            if isinstance(step, LinearMap):
                row = step.map(row)
        return row

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what was decided of inverses, and how each block will be contracted."""
        row = self.after
        told = (step.note for step in self.steps if isinstance(step, Outlook) and step.note)
        return (*self.said, *told, *(FLAT if row is None else contractions_of(row)))


@frozen(eq=False)
class Fitted:
    """A checkpoint with its chain of stages, and what they cost."""

    checkpoint: Checkpoint
    chain: Chain
    outline: Outline
    weights: str | None  # fingerprint of the weights at the time of the fit
    dtype: torch.dtype  # of scores
    train: Examples  # what the source takes for train examples: themselves, or their positions
    reported: Mapping[str, float]  # by the source

    @property
    def device(self) -> torch.device:
        """Return where the rows live."""
        evaluator = getattr(self.chain.source, "evaluator", None)
        return evaluator.device if isinstance(evaluator, Evaluator) else torch.device("cpu")

    def batch(self, budget: int) -> int:
        """Return how many train rows may pass both sides of the stages at once."""
        costs = self.outline.costs(measured=True)
        per_row = costs.activations + costs.routes[0].train_row
        most = max(1, min(len(self.train), 1024, budget // 2 // max(1, per_row)))
        return best_batch(costs.tensors, len(self.train), most)

    @property
    def layout(self) -> tuple[tuple[Route, ...], torch.dtype]:
        """Return how queries come to train rows, as a plan counts it, and the dtype of scores."""
        return self.outline.costs().choices, self.dtype

    def at_dampings(self, dampings: Sequence[Damping | None]) -> Fitted:
        """Return the same with some stages at another damping, None where it stays."""
        if not any(dampings):
            return self
        return attrs.evolve(self, chain=self.chain.with_damping(dampings))

    def require_same_weights(self) -> None:
        """Raise unless the model of the user has the weights that were fitted."""
        if self.checkpoint.source is not None or self.weights is None:
            return
        if weights_of(self.chain.source) != self.weights:
            raise InputError(
                "attribute: the model's weights changed since the method was fitted on them; fit "
                "again, or give checkpoints=model.state_dict() to keep a copy"
            )


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
    keeping: Keeping | None = None,
    reference: Examples | None = None,
    fits: KeptFits | None = None,
    pool: Examples | None = None,
) -> Fitted:
    """Bind the source at a checkpoint, then build and fit each stage on the train set in order.

    A test example, where one is given, and a few of a pool that is to be scored in place of the
    train set are tried before anything long: a fit, or rows to be kept.
    With ``plan_only`` the costs are those of all stages, but no inverse Hessian is fitted or in the
    chain, and projectors are fitted on a few examples. Where rows are kept in a store they are
    computed first, so far as they are not there, and read by all that needs no more than train
    rows. Reference examples are those of the task. What stages compute is kept in ``fits``, where
    it is given.
    """
    places, wide = examples.sampled(min(LOOK, max(SAMPLE, len(examples))))
    wide = move(wide, task.device)
    index, sample = places[:SAMPLE], take(wide, slice(0, SAMPLE))
    few = Examples("train", SAMPLE, "tensors", sample)
    streams = streams_of(stages, seed, checkpoint.position)

    def look(bound: BoundSource) -> FirstLook:
        check_stages(stages, bound.space, bound)
        raw = first_rows(bound, sample, index, task.device)
        stored = keeping is not None
        front = front_of(stages, bound.space, streams, task.device, stored=stored)
        return FirstLook.of(bound, raw, front)

    if isinstance(source, DataSource):
        first = look(source.fit(task, checkpoint, few if plan_only else examples, memory))
    else:
        there = None if keeping is None else reopen(source, task, checkpoint, wide, keeping, look)
        first = there or look(source.bind(task, checkpoint, wide))
    bound, raw, front, rows = first.source, first.raw, first.front, first.rows
    evaluator = getattr(bound, "evaluator", None)
    sizes = activation_sizes(evaluator, sample) if isinstance(evaluator, Evaluator) else ()
    activations = total_bytes(sizes) if isinstance(evaluator, Evaluator) else 0
    if isinstance(evaluator, Evaluator):
        require_unpadded(evaluator, examples, index, sample, "train", (bound, raw))

    def try_test() -> None:
        if pool is not None:
            sampled_rows(bound, pool, task.device)
        if test is None:
            return
        _collected(bound, test, test.sample(1), torch.arange(1), "test", task.device)
        if isinstance(evaluator, Evaluator) and test.kind == "items":
            at, some = test.sampled(SAMPLE)
            require_unpadded(evaluator, test, at, move(some, task.device), "test")

    if keeping is None or any(map(stage_needs, stages)):
        try_test()
    work = gradient_work(raw)
    tensors = tensors_made(raw, sizes)
    given: BoundSource = bound
    data = examples
    said: tuple[str, ...] = ()
    held = 0
    own = bound.held if isinstance(bound, HoldingSource) else 0
    if not front:
        activations = passing(bound, raw, activations)
    else:
        given = projected = Projected(bound, front)
        activations = passing(projected, raw, activations)
        if keeping is not None:
            given, data, said = keep_rows(
                keeping, projected, examples, rows, activations, memory, try_test, plan_only
            )
            work = 0 if isinstance(given, Stored) else work
            check_stages(stages[len(front) - 1 :], given.space)
        else:
            held = _held(stages[len(front) :], rows, len(examples), memory)
        if held:
            work = 0
            said = (f"train rows        {format_bytes(held)} after the sketch, computed once",)
            if not plan_only:
                size = max(1, min(MAXIMUM_BATCH, memory // 8 // (activations + _whole(rows))))
                size = best_batch(tensors, len(examples), size)
                given = Stored(projected, hold(projected, examples, size, task.device))
                data = examples.positions()
    chain = Chain(given, absorbed=len(front) - (keeping is not None))
    per_example = activations + (
        _largest(rows, formed=False)
        if all_blockwise(stages[chain.absorbed :], given.space)
        else _whole(rows)
    )
    batch = max(1, min(len(examples), 4096, memory // 8 // per_example))
    batch = best_batch(tensors, len(examples), batch, ADDED_TO * given.space.dim * NUMBER)
    outlooks: list[LinearMap | Outlook] = []
    space = given.space
    if fits is not None:
        weights = weights_of(bound) or checkpoint.fingerprint(task.model)
        raw_space = bound.space.fingerprint
        fits = fits.of(raw, {"space": raw_space, "weights": weights, "member": checkpoint.member})
    step: Step
    for at, (stage, stream) in list(enumerate(zip(stages, streams, strict=True)))[chain.absorbed :]:
        before, space = space, space_after(stage, space)
        if not stage_needs(stage) <= OF_ROWS or given is bound:
            maps: tuple[LinearMap, ...] = (*front, *chain.maps)
            problem = TrainProblem(bound, examples, maps, batch, stream, memory, advance)
        else:
            problem = TrainProblem(given, data, chain.maps, batch, stream, memory, advance)
        if fits is not None:
            sketches = [part for part in stages[:at] if isinstance(part, Projector)]
            problem.fits = fits.before(sketches, stream).get
        if plan_only and isinstance(stage, Projector):
            # A plan only asks what comes out of a projector: a few examples tell.
            maps = (*front, *chain.maps)
            problem = TrainProblem(bound, few, maps, batch, stream, memory, advance)
        if reference is not None:
            problem.reference = attrs.evolve(
                problem,
                examples=reference,
                random=attrs.evolve(stream, role="reference"),
                role="test",
                fits=None,
            )
        if plan_only and not isinstance(stage, Projector):
            outlooks.append(outlook_before_fit(stage, before, problem))
            continue
        if isinstance(stage, Projector) and not needs_data(stage):
            step = stage.build(before, stream=stream, device=task.device)
        else:
            step = stage.fit(problem)
        wanted = LinearMap if isinstance(stage, Projector) else Inverse
        if not isinstance(step, wanted):
            raise SpecError(
                f"{type(stage).__name__}: it makes a {type(step).__name__}, expected what answers "
                f"dattri_core.{wanted.__name__}"
            )
        outlooks.append(outlook_of(stage, step, before))
        chain = attrs.evolve(chain, steps=(*chain.steps, step))
    dtype = torch.promote_types(rows.dtype, torch.float32)
    mixed = any(not step.blockwise for step in front)
    if own:
        said = (*said, f"source            {format_bytes(own)} kept beside the model")
    row = rows.take(slice(0, 1))
    outline = Outline(
        tuple(outlooks),
        row,
        activations,
        work,
        mixed,
        said,
        held + own,
        tensors if work else (),
    )
    reported = dict(bound.stats) if isinstance(bound, ReportingSource) else {}
    return Fitted(checkpoint, chain, outline, weights_of(bound), dtype, data, reported)


def sampled_rows(
    source: BoundSource, examples: Examples, device: torch.device
) -> tuple[Batch, Rows]:
    """Return a few train examples and their rows, once padding was seen to change neither.

    Raises:
        InputError: The source or the loss does not take them, or they depend on padding.
        NumericsError: A number is not finite.
    """
    index, sample = examples.sampled(SAMPLE)
    sample = move(sample, device)
    rows = _collected(source, examples, sample, index, "train", device)
    evaluator = getattr(source, "evaluator", None)
    if isinstance(evaluator, Evaluator):
        require_unpadded(evaluator, examples, index, sample, "train", (source, rows))
    return sample, rows


def _collected(
    source: BoundSource,
    examples: Examples,
    sample: Batch,
    index: Tensor,
    role: Role,
    device: torch.device,
) -> Rows:
    """Return the rows of a few of some examples; an error says whose they are."""
    try:
        return collect(source, sample, index, role, device)
    except DattriError as error:
        if role == "test" or isinstance(error, MemoryError):  # says itself what it is of
            raise
        raise type(error)(f"{examples.name} data: {error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        taker = "loss" if role == "train" else "target"
        raise InputError(
            f"{examples.name} data: the model or the {taker} does not take them: "
            f"{type(error).__name__}: {error}; give examples of the form of those that the method "
            "was fitted on"
        ) from error


def passing(source: BoundSource, raw: Rows, activations: int) -> int:
    """Return the bytes that a pass takes for one example.

    Args:
        source: At a checkpoint, with the projectors that it takes by itself.
        raw: Rows of a few examples before those.
        activations: Bytes that the model keeps for an example.
    """
    projected = source if isinstance(source, Projected) else None
    bound = source if projected is None else projected.source
    if isinstance(bound, HoldingSource):
        activations += bound.beside * _largest(raw, formed=True)
    if projected is None:
        return activations
    # While blocks pass the maps, one is alive beside what has been added up, or all are.
    parts = all(step.blockwise or is_additive(step) for step in projected.maps)
    return activations + (_largest(raw, formed=True) if parts else _whole(raw))


def _held(stages: Sequence[Stage], rows: Rows, count: int, memory: int) -> int:
    """Return the bytes of train rows that are kept in memory once a stage was fitted on them.

    0: no stage is; or they are as large as gradients, or still have factors.
    """
    fitted = any(stage_needs(stage) and stage_needs(stage) <= OF_ROWS for stage in stages)
    size = count * rows.space.dim * max(4, rows.dtype.itemsize)
    fits = size <= memory // HELD_SHARE and all(spec.kind == "dense" for spec in rows.space)
    return size if fitted and fits else 0


def stage_needs(stage: Stage) -> frozenset[str]:
    """Return what a stage asks of the `Problem`."""
    return getattr(stage, "needs", frozenset())


def _largest(rows: Rows, *, formed: bool) -> int:
    """Return the bytes of the largest block of one row, as it comes or as it is formed."""
    item = max(4, rows.dtype.itemsize)
    sizes = [max(1, block.nbytes // len(rows)) for block in rows.blocks.values()]
    return max(*sizes, *(spec.size * item for spec in rows.space if formed), 1)


def _whole(rows: Rows) -> int:
    """Return the bytes of one whole row while a map that takes whole rows forms and joins it."""
    item = max(4, rows.dtype.itemsize)
    return max(1, rows.nbytes // len(rows)) + 2 * rows.space.dim * item


def task_of(source: BoundSource, task: Task) -> Task:
    """Return what a source asks of the model: the task, with the loss and target of the source."""
    evaluator = getattr(source, "evaluator", None)
    return evaluator.task if isinstance(evaluator, Evaluator) else task
