"""Laws of sources: the two sides, the sample, and what rows are besides their numbers."""

from __future__ import annotations

import torch
from attrs import evolve

from dattri_core.batch import take
from dattri_core.blocks import Block
from dattri_core.errors import InputError, SpecError
from dattri_core.laws.law import NotApplicable, law, require, require_close
from dattri_core.laws.sources import SourceBench, flat_of, of_the_loss
from dattri_core.laws.untouched import require_frozen
from dattri_core.laws.worlds import World, cast, language, padded, scaled
from dattri_core.losses import Target
from dattri_core.protocols import BoundSource, Role
from dattri_core.source_capabilities import DataSource, sides_differ
from dattri_core.task import Task

ROLES: tuple[Role, Role] = ("train", "test")
FACTORS = (1.0, -3.0)
"""What the loss is multiplied by, to be the target and the loss."""


def _bound(bench: SourceBench) -> str | None:
    fitted = isinstance(bench.part, DataSource)
    return "it is fitted on the train set, not bound to a sample" if fitted else None


@law("source")
def part_is_frozen(bench: SourceBench) -> None:
    """No field can be set; after it was bound to other worlds, rows and the part are the same."""

    def use(some: SourceBench, other: bool) -> torch.Tensor:
        places = [(world, bound) for world, _, bound in some.places()]
        rows = [flat_of(bound, world.train) for world, bound in (places if other else places[:1])]
        return rows[0]

    require_frozen(bench, use)


@law("source", _bound)
def sample_does_not_show(bench: SourceBench) -> None:
    """Rows of a source bound with other examples as its sample are the same rows, in both roles."""
    for world, task, bound in bench.places():
        other = take(world.train, slice(4, 7))
        again = bench.part.bind(task, task.checkpoints[-1], other)
        for role in ROLES:
            want = flat_of(bound, world.train, role)
            what = f"{role} rows bound with another sample in {world.name}"
            require_close(flat_of(again, world.train, role), want, what)


@law("source")
def padding_does_not_show(bench: SourceBench) -> None:
    """Rows of sequences = those in a batch of two more tokens that mask and labels leave out."""
    world = language()
    near, far = (padded(world.train, count) for count in (0, 2))
    there = evolve(world, train=near, test=padded(world.test, 0))
    try:
        bound = bench.bind(there.task(), there)
    except SpecError as error:
        raise NotApplicable(f"it cannot be bound to sequences: {error}") from None
    for role in ROLES:
        want = flat_of(bound, near, role)
        try:
            got = flat_of(bound, far, role)
        except InputError as error:
            raise NotApplicable(f"it refuses sequences of another length: {error}") from None
        require_close(got, want, f"{role} rows of a batch that is padded")


def _of_one_kind(bench: SourceBench) -> str | None:
    differ = sides_differ(bench.part)
    return "it declares that its train rows are of another kind" if differ else None


def _of_two_kinds(bench: SourceBench) -> str | None:
    differ = sides_differ(bench.part)
    return None if differ else "it declares no other kind of train rows than of test rows"


@law("source", of_the_loss, _bound, _of_one_kind)
def both_sides_are_one_source(bench: SourceBench) -> None:
    """row_test(z) for the target c loss, less of it better, = row_train(z) for the loss c loss."""
    features = [world for world, _, bound in bench.places() if not bound.space.covers_parameters]
    if not features:
        raise NotApplicable("its rows are gradients of parameters, which have laws of their own")
    for world in features:
        for factor in FACTORS:
            loss = scaled(world.loss, factor)
            asked, trained = world.task(target=_less_of(loss)), world.task(loss=loss)
            got = flat_of(bench.bind(asked, world), world.train, "test")
            want = flat_of(bench.bind(trained, world), world.train)
            what = f"rows of {factor:g} times the loss as a target in {world.name}"
            require_close(got, want, what)


@law("source", _bound, _of_two_kinds)
def sides_that_differ_show(bench: SourceBench) -> None:
    """row_train(z) != row_test(z) for the loss; row_test(z) for c loss = c row_test(z) for loss."""
    for world, _, bound in bench.places():
        rows = flat_of(bound, world.train)
        asked = flat_of(
            bench.bind(world.task(target=_less_of(world.loss)), world), world.train, "test"
        )
        apart = float((rows - asked).abs().max()) > 1e-6 * float(asked.abs().max())
        require(apart, f"train rows in {world.name} are its test rows: let sides_differ be false")
        for factor in FACTORS:
            task = world.task(target=_less_of(scaled(world.loss, factor)))
            got = flat_of(bench.bind(task, world), world.train, "test")
            what = f"test rows of {factor:g} times the loss in {world.name}"
            require_close(got, factor * asked, what)


def _less_of(loss: object) -> Target:
    return Target(loss, higher_is_better=False)  # type: ignore[arg-type]


@law("source")
def rows_are_plain_numbers(bench: SourceBench) -> None:
    """Rows are of the weights' dtype or a finer one, and carry no graph of autograd."""
    for world, task, bound in bench.places():
        low = world.task(torch.float32)
        _require_plain(bound, world, task)
        there = evolve(world, train=cast(world.train, torch.float32))
        _require_plain(bench.bind(low, world, torch.float32), there, low)


def _require_plain(bound: BoundSource, world: World, task: Task) -> None:
    weights = next(iter(task.model.parameters())).dtype

    def see(name: str, block: Block) -> None:
        fine = block.dtype in (weights, torch.float64)
        require(fine, f"block {name!r} in {world.name} is {block.dtype}, the weights {weights}")
        free = not block.flat().requires_grad
        require(free, f"block {name!r} in {world.name} carries a graph: detach() it")

    for role in ROLES:
        aux = bound.stream(world.train, role, see)
        for name, numbers in aux.items():
            free = not numbers.requires_grad
            require(free, f"aux {name!r} in {world.name} carries a graph: detach() it")
