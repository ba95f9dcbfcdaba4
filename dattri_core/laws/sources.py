"""Laws of sources: rows of single examples, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core.batch import Batch, batch_size, join, move, take
from dattri_core.blocks import Block
from dattri_core.checkpoint import Checkpoint
from dattri_core.errors import InputError, SpecError
from dattri_core.evaluate import Evaluator
from dattri_core.laws.law import (
    LawBroken,
    NotApplicable,
    law,
    require,
    require_close,
    require_equal,
    require_identical,
)
from dattri_core.laws.oracles import row_matrix, singles
from dattri_core.laws.pretended import accelerator
from dattri_core.laws.worlds import N_TRAIN, World, cast, decayed, first_logit, scaled, worlds
from dattri_core.losses import Target, labels_of
from dattri_core.members import expand_checkpoints
from dattri_core.problem import collect
from dattri_core.protocols import BoundSource, Role, Source
from dattri_core.rows import Rows
from dattri_core.source_capabilities import (
    DataSource,
    EnsembleSource,
    MovableSource,
    OutputSource,
    ReopenedSource,
)
from dattri_core.stream import Examples
from dattri_core.task import Task

CPU = torch.device("cpu")
MEMORY = 2**28
Direction = Callable[[Tensor], Tensor]


@frozen(eq=False)
class SourceBench:
    """A source on the toy worlds that it can be bound to."""

    part: Source

    def bind(
        self,
        task: Task,
        world: World,
        dtype: torch.dtype = torch.float64,
        checkpoint: Checkpoint | None = None,
    ) -> BoundSource:
        """Return the source bound to a checkpoint of a task, by default its last."""
        train, place = cast(world.train, dtype), checkpoint or task.checkpoints[-1]
        if isinstance(self.part, DataSource):
            return self.part.fit(task, place, Examples.of(train, "train"), MEMORY)
        return self.part.bind(task, place, take(train, slice(0, 3)))

    def places(self) -> Iterator[tuple[World, Task, BoundSource]]:
        """Yield the worlds that the source can be bound to; a `SpecError` leaves one out."""
        refused = []
        for world in worlds():
            task = world.task()
            try:
                bound = self.bind(task, world)
            except SpecError as error:
                refused.append(f"{world.name}: {error}")
                continue
            yield world, task, bound
        if len(refused) == len(worlds()):
            raise NotApplicable(f"it can be bound to no toy world: {'; '.join(refused)}")

    def gradients(self) -> Iterator[tuple[World, Task, BoundSource]]:
        """Yield the worlds where the rows are gradients of parameters, as their space says."""
        found = False
        for place in self.places():
            if place[2].space.covers_parameters:
                found = True
                yield place
        if not found:
            raise NotApplicable("its space covers no parameters, so rows need not be gradients")

    def pulling(self) -> Iterator[tuple[World, Task, OutputSource]]:
        """Yield the worlds where the source pulls directions in the outputs back."""
        found = False
        for world, task, bound in self.places():
            if isinstance(bound, OutputSource):
                found = True
                yield world, task, bound
        if not found:
            raise NotApplicable("it gives rows of the loss only: it has no pull")


def rows_of(bound: BoundSource, batch: Batch, role: Role = "train") -> Rows:
    """Return the whole rows of a batch."""
    return collect(bound, batch, torch.arange(batch_size(batch)), role, CPU)


def flat_of(bound: BoundSource, batch: Batch, role: Role = "train") -> Tensor:
    """Return the rows of a batch, formed, ``[B, d]``."""
    return rows_of(bound, batch, role).flat().double()


def expected_rows(task: Task, bound: BoundSource, batch: Batch, role: Role = "train") -> Tensor:
    """Return the gradients by autograd of the network that the source evaluates, ``[B, d]``."""
    evaluator = getattr(bound, "evaluator", None)
    session = evaluator.session() if isinstance(evaluator, Evaluator) else nullcontext()
    with session:  # an ensemble's member is the model under the hooks of its checkpoint
        return row_matrix(task, bound.space, batch, role)


def alone(bound: BoundSource, batch: Batch, role: Role = "train") -> Tensor:
    """Return the rows of the examples, each in a batch of its own, ``[B, d]``."""
    return torch.cat([flat_of(bound, example, role) for example in singles(batch)])


def pulled(bound: OutputSource, batch: Batch, direction: Direction) -> Tensor:
    """Return the rows J_b^T u_b of a batch, formed, ``[B, d]``."""
    blocks: dict[str, Block] = {}

    def sink(name: str, block: Block) -> None:
        require(name not in blocks, f"pull handed block {name!r} over twice")
        blocks[name] = block

    bound.pull(batch, direction, sink)
    require_equal(set(blocks), set(bound.space.names), "blocks that pull handed over")
    return Rows(bound.space, blocks, torch.arange(batch_size(batch))).flat().double()


@law("source")
def space_is_true(bench: SourceBench) -> None:
    """Each block of the space comes exactly once a batch, of its shape, outer ones as factors."""
    for world, _, bound in bench.places():
        for role in ("train", "test"):
            seen: dict[str, int] = {}

            def sink(
                name: str,
                block: Block,
                seen: dict[str, int] = seen,
                bound: BoundSource = bound,
                world: World = world,
            ) -> None:
                seen[name] = seen.get(name, 0) + 1
                require(name in bound.space, f"block {name!r} is not in the space")
                require_equal(block.shape, bound.space[name].shape, f"shape of block {name!r}")
                require_equal(len(block), batch_size(world.train), f"rows of block {name!r}")
                factored = block.positions is not None
                require(factored or bound.space[name].kind == "dense", f"{name!r} came formed")
                require(block.is_finite(), f"block {name!r} is not finite")

            bound.stream(world.train, role, sink)
            require_equal(seen, dict.fromkeys(bound.space.names, 1), f"blocks in {world.name}")


@law("source")
def aux_is_declared(bench: SourceBench) -> None:
    """The auxiliary numbers are those of `provides`, one per example: aux_k is [B]."""
    for world, _, bound in bench.places():
        aux = bound.stream(world.train, "train", lambda name, block: None)
        require_equal(set(aux), set(bench.part.provides), f"aux in {world.name}")
        for key, numbers in aux.items():
            shape = tuple(numbers.shape)
            require_equal(shape, (batch_size(world.train),), f"shape of aux {key!r}")


@law("source")
def rows_are_their_own(bench: SourceBench) -> None:
    """row_b(batch) = row(z_b alone), for any batch, any order and any repetition."""
    order = torch.tensor([4, 0, 7, 0, 4, 2])
    for world, _, bound in bench.places():
        for role in ("train", "test"):
            single = alone(bound, take(world.train, slice(0, 3)), role)
            whole = flat_of(bound, world.train, role)
            require_close(whole[:3], single, f"rows of a batch in {world.name}")
            mixed = flat_of(bound, take(world.train, order), role)
            require_close(mixed, whole[order], f"rows of a reordered batch in {world.name}")


@law("source")
def rows_are_repeatable(bench: SourceBench) -> None:
    """rows(batch) = rows(batch), bit for bit, whatever the global random state."""
    for world, _, bound in bench.places():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first = flat_of(bound, world.train)
            torch.manual_seed(2)
            require_identical(flat_of(bound, world.train), first, f"rows in {world.name}")


def of_the_loss(bench: SourceBench) -> str | None:
    """Return why rows are not those of the loss, None where they are."""
    if "residual" not in bench.part.provides:
        return None
    return "it provides the residual: its rows are of a margin that the loss is a function of"


def _of_a_margin(bench: SourceBench) -> str | None:
    given = "residual" in bench.part.provides
    return None if given else "it provides no residual: its rows are of the loss"


@law("source", of_the_loss)
def rows_are_gradients(bench: SourceBench) -> None:
    """row(z) = d loss(z) / d theta where the space covers parameters; z alone in its batch."""
    for world, task, bound in bench.gradients():
        want = expected_rows(task, bound, take(world.train, slice(0, 4)))
        got = alone(bound, take(world.train, slice(0, 4)))
        require_close(got, want, f"gradients in {world.name}")


@law("source", _of_a_margin)
def residual_times_row_is_the_loss_row(bench: SourceBench) -> None:
    """residual(z) row(z) = d loss(z) / d theta, where z has one label; z alone in its batch."""
    for world, task, bound in bench.gradients():
        some = take(world.train, slice(0, 4))
        if labels_of(some).dim() != 1:
            continue
        residuals = [bound.stream(z, "train", _drop)["residual"].double() for z in singles(some)]
        got = torch.cat(residuals).unsqueeze(1) * alone(bound, some)
        want = row_matrix(task, bound.space, some)
        require_close(got, want, f"residuals times rows in {world.name}")


def _drop(name: str, block: Block) -> None:
    """Forget a block."""


@law("source")
def target_rows_carry_the_sign(bench: SourceBench) -> None:
    """row_test(z) = -d target(z) / d theta where more of the target is better, + where less is."""
    for world, _, bound in bench.gradients():
        for higher in (True, False):
            task = world.task(target=Target(first_logit, higher_is_better=higher))
            bound = bench.bind(task, world)
            some = take(world.test, slice(0, 2))
            want = expected_rows(task, bound, some, "test")
            require_close(alone(bound, some, "test"), want, f"target rows in {world.name}")


@law("source", of_the_loss)
def rows_scale_with_the_loss(bench: SourceBench) -> None:
    """Rows of c loss = c rows of loss, for c = 1000 and c = -1000."""
    for world, _, bound in bench.gradients():
        rows = flat_of(bound, world.train)
        for factor in (1e3, -1e3):
            task = world.task(loss=scaled(world.loss, factor))
            more = flat_of(bench.bind(task, world), world.train)
            require_close(more, factor * rows, f"rows of {factor:g} times the loss in {world.name}")


@law("source")
def rows_cover_the_selection(bench: SourceBench) -> None:
    """The parameters of the space are the selected ones, no more and no fewer."""
    for world, task, bound in bench.gradients():
        names = set(bound.space.parameter_names)
        require_equal(names, set(task.parameter_names), f"parameters in {world.name}")
        some = world.task(parameters="*weight")
        names = set(bench.bind(some, world).space.parameter_names)
        require_equal(names, set(some.parameter_names), f"selected parameters in {world.name}")


@law("source")
def pull_of_the_slope_is_the_loss_row(bench: SourceBench) -> None:
    """J_b^T u_b = row_train(z_b) for u the slope of the criterion at the outputs."""
    for world, _, bound in bench.pulling():

        def slope(outputs: Tensor, world: World = world) -> Tensor:
            require(not outputs.requires_grad, "the outputs given to the cotangent need gradients")
            free = outputs.clone().requires_grad_()
            values = world.loss.criterion(free, world.train)
            return torch.autograd.grad(values.sum(), free)[0]

        want = flat_of(bound, world.train)
        require_close(pulled(bound, world.train, slope), want, f"pulled rows in {world.name}")


@law("source")
def pull_is_linear(bench: SourceBench) -> None:
    """J^T (1000 u - 3 v) = 1000 J^T u - 3 J^T v, whatever the size of the directions."""
    for world, _, bound in bench.pulling():
        once = pulled(bound, world.train, torch.cos)
        other = pulled(bound, world.train, torch.ones_like)
        both = pulled(bound, world.train, lambda o: 1e3 * o.cos() - 3)
        want = 1e3 * once - 3 * other
        require_close(both, want, f"pull of a sum in {world.name}")
        require(bool(once.any() and other.any()), f"pull gives zeros in {world.name}")


@law("source")
def pull_is_of_single_rows(bench: SourceBench) -> None:
    """J_b^T u_b depends on example b and u_b alone, for any batch, order and repetition."""
    order = torch.tensor([4, 0, 7, 0, 4, 2])
    for world, _, bound in bench.pulling():
        whole = pulled(bound, world.train, torch.cos)
        mixed = pulled(bound, take(world.train, order), torch.cos)
        require_close(mixed, whole[order], f"pull of a reordered batch in {world.name}")
        three = singles(take(world.train, slice(0, 3)))
        alike = torch.cat([pulled(bound, example, torch.cos) for example in three])
        require_close(alike, whole[:3], f"pull of single examples in {world.name}")


@law("source")
def rows_are_at_the_checkpoint(bench: SourceBench) -> None:
    """Rows depend on the weights of the checkpoint, not on those the model has now."""
    for world, _, bound in bench.places():
        want = flat_of(bound, world.train)
        state = world.model().state_dict()
        task = world.task(checkpoints=[state])
        with torch.no_grad():
            for weight in task.model.parameters():
                weight.mul_(-0.5)
        got = flat_of(bench.bind(task, world), world.train)
        require_close(got, want, f"rows at a checkpoint in {world.name}")


@law("source")
def moved_rows_are_bound_rows(bench: SourceBench) -> None:
    """Rows of a source moved to a checkpoint = rows bound there; those where it was stay."""
    if not isinstance(bench.part, MovableSource):
        raise NotApplicable("it is bound to every checkpoint anew: it has no move")
    for world, task, bound in bench.places():
        before, names = flat_of(bound, world.train), dict(task.model.named_parameters())
        state = {k: -0.5 * v if k in names else v for k, v in task.model.state_dict().items()}
        other = world.task(checkpoints=[state])
        moved, there = bench.part.move(bound, other.checkpoints[-1]), bench.bind(other, world)
        for role in ("train", "test"):
            want = flat_of(there, world.train, role)
            require_close(flat_of(moved, world.train, role), want, f"moved rows in {world.name}")
        require_identical(flat_of(bound, world.train), before, f"rows that stayed in {world.name}")


@law("source")
def reopened_rows_are_bound_rows(bench: SourceBench) -> None:
    """Rows of a source reopened = rows bound; a loss that goes past what it catches is refused."""
    if not isinstance(bench.part, ReopenedSource):
        raise NotApplicable("it is bound where a store has its rows, too: it has no reopen")
    for world, task, bound in bench.places():
        few = take(world.train, slice(0, 3))
        there = bench.part.reopen(task, task.checkpoints[-1], few)
        for role in ("train", "test"):
            want = flat_of(bound, world.train, role)
            require_close(flat_of(there, world.train, role), want, f"rows in {world.name}")
        other = world.task(loss=decayed(world.loss))
        try:
            bench.bind(other, world)
        except InputError:  # it does not catch the decay, which no row shows
            with suppress(InputError):
                bench.part.reopen(other, other.checkpoints[-1], few)
                raise LawBroken(
                    f"a loss with weight decay is not refused in {world.name}"
                ) from None


@law("source")
def members_are_networks_of_their_own(bench: SourceBench) -> None:
    """Members of a checkpoint are not all the same network; each gives the same rows every time."""
    if not isinstance(bench.part, EnsembleSource) or bench.part.members == 1:
        raise NotApplicable("it makes one network of each checkpoint")
    for world, task, _ in bench.places():
        members = expand_checkpoints(bench.part, task.checkpoints)
        rows = [
            flat_of(bench.bind(task, world, checkpoint=member), world.train) for member in members
        ]
        alike = all(torch.equal(other, rows[0]) for other in rows[1:])
        require(not alike, f"all members give the same rows in {world.name}")
        again = flat_of(bench.bind(world.task(), world, checkpoint=members[-1]), world.train)
        require_identical(again, rows[-1], f"rows of a member in {world.name}")


@law("source")
def a_fit_is_of_the_whole_train_set(bench: SourceBench) -> None:
    """Fitted rows depend on all train examples and not on their order; bind is a SpecError."""
    if not isinstance(bench.part, DataSource):
        raise NotApplicable("it is not fitted on the train set")
    order = torch.tensor([3, 8, 1, 0, 6, 2, 7, 5, 4])
    for world, task, bound in bench.places():
        want = flat_of(bound, world.test)

        def fitted(index: Any, world: World = world, task: Task = task) -> Tensor:
            some = Examples.of(take(world.train, index), "train")
            return flat_of(bench.part.fit(task, task.checkpoints[-1], some, MEMORY), world.test)  # type: ignore[attr-defined]

        require_close(fitted(order), want, f"rows fitted in another order in {world.name}", 1e-6)
        for left_out in (0, N_TRAIN - 1):
            less = fitted(order[order != left_out])
            require(
                bool((less - want).abs().max() > 1e-6 * want.abs().max()),
                f"rows in {world.name} do not depend on train example {left_out}",
            )
        try:
            bench.part.bind(task, task.checkpoints[-1], take(world.train, slice(0, 3)))
        except SpecError:
            continue
        raise LawBroken(f"bind in {world.name} gave rows that are not fitted on the train set")


@law("source")
def float32_rows_are_close(bench: SourceBench) -> None:
    """Rows in float32 = rows in float64, to the tolerance of float32."""
    for world, _, bound in bench.places():
        task = world.task(torch.float32)
        low = flat_of(bench.bind(task, world, torch.float32), cast(world.train, torch.float32))
        require_close(low, flat_of(bound, world.train), f"float32 rows in {world.name}", 2e-5)


@law("source")
def model_is_untouched(bench: SourceBench) -> None:
    """Weights, buffers, gradients, requires_grad, train() state and hooks are as before."""
    for world, _, _ in bench.places():
        task = world.task()
        task.model.train()
        before = fingerprint(task.model)
        bound = bench.bind(task, world)
        rows_of(bound, join([world.train, world.test]))
        require_equal(fingerprint(task.model), before, f"the model in {world.name}")


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """Return all that a user could see of a model."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "weights": {name: t.detach().clone().flatten().tolist() for name, t in tensors.items()},
        "identity": {name: id(t) for name, t in tensors.items()},
        "grad": {name: t.grad is None for name, t in tensors.items()},
        "requires_grad": {name: t.requires_grad for name, t in tensors.items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: (
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                len(module._backward_hooks),
            )
            for name, module in model.named_modules()
        },
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
    }


@law("source")
def device_does_not_show(bench: SourceBench) -> None:
    """Rows of a model on an accelerator, pretended where there is none, = those on the CPU."""
    device = accelerator()
    for world, _, bound in bench.places():
        train = move(world.train, device)
        far = bench.bind(world.task(device=device), evolve(world, train=train))
        places: set[str] = set()

        def note(_: str, block: Block, seen: set[str] = places) -> None:
            seen.add(block.device.type)

        far.stream(train, "train", note)
        require_equal(places, {device.type}, f"devices of the rows in {world.name}")
        got = collect(far, train, torch.arange(N_TRAIN), "train", device)
        want = rows_of(bound, world.train)
        require_close(got.flat().cpu(), want.flat(), f"rows on {device} in {world.name}")
        require_equal(set(got.aux), set(want.aux), f"aux on {device} in {world.name}")
        for name, numbers in want.aux.items():
            require_close(got.aux[name].cpu(), numbers, f"aux {name!r} on {device}")
