"""Laws of whole methods, and of attributors that are not made of parts."""

from __future__ import annotations

import json
import warnings
from typing import Any

import attrs
import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dattri_core.batch import Batch, join, take
from dattri_core.checkpoint import Checkpoint, TrainingStep
from dattri_core.dampings import damping_path
from dattri_core.errors import ConvergenceWarning, SpecError
from dattri_core.laws.curvatures import NAMES
from dattri_core.laws.law import (
    NotApplicable,
    law,
    require,
    require_close,
    require_equal,
    require_identical,
)
from dattri_core.laws.pretended import accelerator
from dattri_core.laws.retrained import answered, asks, draws
from dattri_core.laws.sources import fingerprint
from dattri_core.laws.spaces import flat_rows
from dattri_core.laws.untouched import require_frozen
from dattri_core.laws.worlds import (
    N_TEST,
    N_TRAIN,
    World,
    cast,
    first_logit,
    halves,
    logistic,
    minimise_logistic,
    network,
    regression,
    sentences,
)
from dattri_core.losses import Target
from dattri_core.protocols import Damping, InverseHessian, Projector, RandomStream
from dattri_core.scores import Scores
from dattri_core.source_capabilities import sides_differ
from dattri_core.space import Space
from dattri_core.stages import example_space, needs_data
from dattri_core.task import Task

ITERATIVE = 1e-6
"""Largest relative difference between two runs of an iterative solver."""

SHORT = 20
"""Steps of a solver with a field ``depth``: no law asks how far a series goes."""

SKETCHED = 16
"""Numbers of a sketch with a field ``dim``: no law asks how near it comes to the rows."""

MANY = 800
"""Copies of the train set that do not fit in 1 MiB at once."""


@frozen(eq=False)
class MethodBench:
    """A method on a convex world, and on a network; one with a curvature to invert on convex ones.

    A solver with a field ``tolerance`` is run at 1e-12, but for the law of float32; one with a
    field ``depth`` for `SHORT` steps. A projector with a field ``dim`` leaves `SKETCHED` numbers.
    An attributor whose ``reads`` is ``"tokens"`` is shown sequences of token ids alone; one that
    asks a ground truth is given least squares and models that are refitted in closed form.
    """

    part: Any

    @property
    def short(self) -> Any:
        """Return the method with its series cut short and its sketches small."""
        return _change_solvers(_small_sketches(self.part), depth=SHORT)

    @property
    def tight(self) -> Any:
        """Return the method with its iterative solvers run to rounding."""
        return _change_solvers(self.short, tolerance=1e-12)

    def worlds(self) -> tuple[World, ...]:
        """Return the worlds to try."""
        if getattr(self.part, "reads", None) == "tokens":
            return (sentences(),)
        if asks(self.part):
            return (regression(),)
        chain = getattr(self.part, "chain", ())
        inverts = any(getattr(stage, "needs", ()) for stage in chain)
        return (logistic(), halves() if inverts else network())

    def task(self, world: World, dtype: torch.dtype = torch.float64, **options: Any) -> Task:
        """Return a task with one checkpoint of learning rate 1; the test set is its reference.

        The step taken from it saw the whole train set.
        """
        state = world.model().to(dtype).state_dict()
        options = {"reference": cast(world.test, dtype), **options}
        start = Checkpoint("state", 0, 1, 1.0, state, step=TrainingStep(None))
        return world.task(dtype, checkpoints=[start], **options)

    def scores(self, task: Task, train: Any, test: Any, **settings: Any) -> Scores:
        """Return the scores of the tight method, quietly."""
        return run(self.tight, task, train, test, **settings)

    def values(self, world: World, train: Any = None, test: Any = None) -> Tensor:
        """Return the scores of a world as a tensor, ``[n, m]``."""
        return tensor(
            self.scores(
                self.task(world),
                world.train if train is None else train,
                world.test if test is None else test,
            )
        )


def run(method: Any, task: Task, train: Any, test: Any, **settings: Any) -> Scores:
    """Return the scores without progress bars and warnings of convergence."""
    if asks(method):
        method = answered(method, task, _whole(train), _whole(test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores: Scores = method.attribute(task, train, test, progress=False, **settings)
    return scores


def _whole(side: Any) -> Batch:
    """Return the examples of a side as tensors."""
    return join(list(side)) if isinstance(side, DataLoader) else side


def tensor(scores: Scores) -> Tensor:
    """Return the values of scores."""
    return torch.as_tensor(scores.values).clone()


def _small_sketches(part: Any) -> Any:
    """Return a method whose projectors with a field ``dim`` leave a few numbers."""

    def small(stage: Any) -> Any:
        owner: Any = stage if isinstance(stage, Projector) else None
        if owner is None or not attrs.has(type(owner)):
            return stage
        known = {a.name for a in attrs.fields(type(owner))}
        return attrs.evolve(owner, dim=SKETCHED) if "dim" in known else owner

    if getattr(part, "chain", None) is None:
        return part
    if part.stages is None:
        return attrs.evolve(part, projector=small(part.projector))
    return attrs.evolve(part, stages=[small(stage) for stage in part.stages])


def _change_solvers(part: Any, **changes: Any) -> Any:
    """Return a method with fields of its solvers changed, or of an inverse that solves itself."""

    def changed(stage: Any) -> Any:
        solver = getattr(stage, "solver", None)
        owner: Any = stage if solver is None and isinstance(stage, InverseHessian) else solver
        if owner is None or not attrs.has(type(owner)):
            return stage
        known = {a.name for a in attrs.fields(type(owner))}
        fitting = {key: value for key, value in changes.items() if key in known}
        made = attrs.evolve(owner, **fitting)
        return made if owner is stage else attrs.evolve(stage, solver=made)

    if getattr(part, "chain", None) is None:
        return part
    if part.stages is None:
        return attrs.evolve(part, inverse_hessian=changed(part.inverse_hessian))
    return attrs.evolve(part, stages=[changed(stage) for stage in part.stages])


def _made_of_parts(bench: MethodBench) -> str | None:
    return None if hasattr(bench.part, "chain") else "it is not made of parts"


def _fits(bench: MethodBench) -> str | None:
    if not hasattr(bench.part, "fit"):
        return "it cannot be fitted apart from a test set"
    if sides_differ(getattr(bench.part, "source", None)):
        return "its train rows are of another kind than its test rows: none is its own query"
    column = bench.part.scorer.locality == "column"
    return "its scorer sees whole columns: no score of an example for itself" if column else None


def _damped(bench: MethodBench) -> str | None:
    paths = [damping_path(stage) for stage in getattr(bench.part, "chain", ())]
    return None if any(paths) else "it has no damping"


def _exact(bench: MethodBench) -> str | None:
    """Say why a method does not claim to predict retraining on a convex world to first order."""
    chain = getattr(bench.part, "chain", None)
    if chain is None:
        return "it is not made of parts"
    space = example_space()
    for stage in chain:
        if isinstance(stage, Projector) and not _leaves_rows(stage, space):
            return "its projector changes rows, so it is not exact"
    inverses: list[Any] = [s for s in chain if isinstance(s, InverseHessian) and s.needs]
    if len(inverses) != 1:
        return "it inverts no curvature" if not inverses else "it inverts several curvatures"
    if not getattr(inverses[0], "exact", False):
        return "its curvature or its solver declares that it is not exact"
    if not inverses[0].needs & NAMES.keys():
        return "its curvature is not that of the train loss"
    if bench.part.scorer.needs or bench.part.scorer.locality != "tile":
        return "its scorer reads more than inner products"
    return None


def _leaves_rows(stage: Projector, space: Space) -> bool:
    """Return whether a projector is the identity: the space and all numbers stay what they are."""
    if needs_data(stage) or stage.out_space(space) != space:
        return False
    built = stage.build(space, stream=RandomStream(0, "law"), device=torch.device("cpu"))
    rows = flat_rows(space, 3)
    return torch.equal(built.map(rows).flat(), rows.flat())


@law("method")
def part_is_frozen(bench: MethodBench) -> None:
    """No field can be set; after it scored other data, scores and the parts are the same."""
    world = bench.worlds()[0]

    def use(some: MethodBench, other: bool) -> Tensor:
        return some.values(world, train=take(world.train, slice(0, 6)) if other else None)

    require_frozen(bench, use)


@law("method")
def scores_are_a_matrix(bench: MethodBench) -> None:
    """Scores are finite and [n_train, n_test], with one id for each row and column."""
    for world in bench.worlds():
        scores = bench.scores(bench.task(world), world.train, world.test)
        shape = (N_TRAIN, N_TEST)
        require_equal(tuple(scores.values.shape), shape, f"shape of the scores in {world.name}")
        require(bool(torch.isfinite(tensor(scores)).all()), f"not finite in {world.name}")
        require_equal((len(scores.train_ids), len(scores.test_ids)), shape, "number of ids")


def _not_drawn_by_place(bench: MethodBench) -> str | None:
    needs = {need for stage in getattr(bench.part, "chain", ()) for need in _needs(stage)}
    return "its labels are drawn by the place of an example" if "fisher-rows" in needs else None


def _needs(stage: Any) -> frozenset[str]:
    return frozenset() if isinstance(stage, Projector) else frozenset(stage.needs)


def _not_drawn(bench: MethodBench) -> str | None:
    return "it draws train sets at random" if draws(bench.part) else None


def _columns_apart(bench: MethodBench) -> str | None:
    cut = getattr(bench.part, "truncation", None) is not None
    return "it stops where all test examples agree to" if cut else None


def _makes_rows(bench: MethodBench) -> str | None:
    return "its memory is that of a training" if asks(bench.part) else None


def _takes_all(bench: MethodBench) -> str | None:
    solvers = [getattr(stage, "solver", None) for stage in getattr(bench.part, "chain", ())]
    if any("sampled" in solver.needs for solver in solvers if solver is not None):
        return "its solver samples train examples by position: another order is another sample"
    return None


@law("method", _not_drawn_by_place, _takes_all, _not_drawn)
def permuted_train_rows_permute_scores(bench: MethodBench) -> None:
    """S(train in another order, test) = S(train, test) with its rows in that order."""
    order = torch.tensor([3, 8, 1, 0, 6, 2, 7, 5, 4])
    for world in bench.worlds():
        want = bench.values(world)[order]
        got = bench.values(world, train=take(world.train, order))
        require_close(got, want, f"scores of permuted train rows in {world.name}", ITERATIVE)


@law("method")
def permuted_test_rows_permute_scores(bench: MethodBench) -> None:
    """S(train, test in another order) = S(train, test) with its columns in that order."""
    order = torch.tensor([3, 1, 0, 4, 2])
    for world in bench.worlds():
        want = bench.values(world)[:, order]
        got = bench.values(world, test=take(world.test, order))
        require_close(got, want, f"scores of permuted test rows in {world.name}", ITERATIVE)


@law("method", _columns_apart)
def queries_are_their_own(bench: MethodBench) -> None:
    """S(train, some test rows) = those columns of S(train, test)."""
    for world in bench.worlds():
        got = bench.values(world, test=take(world.test, slice(1, 3)))
        want = bench.values(world)[:, 1:3]
        require_close(got, want, f"scores of two test rows in {world.name}", ITERATIVE)


@law("method", _not_drawn)
def equal_examples_score_equal(bench: MethodBench) -> None:
    """z_i = z_k implies S_ij = S_kj, for train examples and for test examples."""
    for world in bench.worlds():
        train = join([world.train, take(world.train, slice(2, 3))])
        test = join([world.test, take(world.test, slice(1, 2))])
        values = bench.values(world, train, test)
        require_close(
            values[-1], values[2], f"scores of equal train rows in {world.name}", ITERATIVE
        )
        require_close(values[:, -1], values[:, 1], f"of equal test rows in {world.name}", ITERATIVE)


@law("method")
def batches_do_not_show(bench: MethodBench) -> None:
    """S from a loader of batches of 1, 2 or n = S from tensors."""
    for world in bench.worlds():
        want = bench.values(world)
        for size in (1, 2, N_TRAIN):
            got = bench.values(world, _loader(world.train, size), _loader(world.test, size))
            require_close(got, want, f"scores in batches of {size} in {world.name}", ITERATIVE)


def _loader(batch: Batch, size: int) -> Any:
    return DataLoader(TensorDataset(*batch), batch_size=size)


@law("method", _makes_rows)
def memory_does_not_show(bench: MethodBench) -> None:
    """S within 1 MiB and room for itself, in several batches, = S of all train rows at once."""
    for world in bench.worlds():
        many = join([world.train] * MANY)
        want = bench.values(world, many)
        room = 2**20 + 2 * want.nbytes  # with less, a scorer of columns takes one row at a time
        scores = bench.scores(bench.task(world), many, world.test, memory=room)
        require_close(tensor(scores), want, f"scores within 1 MiB in {world.name}", ITERATIVE)


@law("method")
def scores_are_repeatable(bench: MethodBench) -> None:
    """S = S, bit for bit, whatever the global random state."""
    for world in bench.worlds():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first = bench.values(world)
            torch.manual_seed(2)
            require_identical(bench.values(world), first, f"scores, run again, in {world.name}")


@law("method")
def device_does_not_show(bench: MethodBench) -> None:
    """S of a model on an accelerator, pretended where there is none, = S on the CPU."""
    device = accelerator()
    for world in bench.worlds():
        got = tensor(bench.scores(bench.task(world, device=device), world.train, world.test))
        require_close(
            got.cpu(), bench.values(world), f"scores on {device} in {world.name}", ITERATIVE
        )


@law("method")
def target_has_a_direction(bench: MethodBench) -> None:
    """S of a target f of which more is better = S of the target -f of which less is better."""

    def minus(model: nn.Module, batch: Batch) -> Tensor:
        return -first_logit(model, batch)

    targets = (
        Target(first_logit, higher_is_better=True),
        Target(minus, higher_is_better=False),
    )
    for world in bench.worlds():
        up, down = (
            tensor(bench.scores(bench.task(world, target=t), world.train, world.test))
            for t in targets
        )
        require_close(down, up, f"scores of -f against f in {world.name}", ITERATIVE)


@law("method", _not_drawn)
def an_example_helps_itself(bench: MethodBench) -> None:
    """S_ii >= 0 on a convex world, for train examples taken as test examples."""
    world = bench.worlds()[0]
    own = bench.values(world, test=world.train).diagonal()
    require(bool((own >= 0).all()), f"scores of examples for themselves: {own.tolist()}")


@law("method", _fits)
def self_influence_is_the_diagonal(bench: MethodBench) -> None:
    """self_influence() = the diagonal of S(train, train) for the train loss, or for its margin."""
    for world in bench.worlds():
        source = getattr(bench.part, "source", None)
        of_margins = source is not None and "residual" in source.provides
        own = None if of_margins else Target(world.loss, higher_is_better=False)
        task = bench.task(world, target=own)
        want = tensor(bench.scores(task, world.train, world.train)).diagonal()
        got = bench.tight.fit(bench.task(world), world.train, progress=False).self_influence()
        require_close(torch.as_tensor(got), want, f"self-influence in {world.name}", ITERATIVE)


@law("method", _damped)
def damping_can_change(bench: MethodBench) -> None:
    """fit(...).with_(damping=d) scores as a fresh fit at damping d."""
    world, damping = logistic(), Damping(0.7)
    changed = bench.tight.fit(bench.task(world), world.train, progress=False)
    changed = changed.with_(damping=damping)
    fresh = run(
        _change_solvers(bench.tight, damping=damping), bench.task(world), world.train, world.test
    )
    got = tensor(changed.attribute(world.test))
    require_close(got, tensor(fresh), "scores at another damping", ITERATIVE)


@law("method", _exact)
def removal_is_predicted(bench: MethodBench) -> None:
    """removal_effect = d loss_test / d eps, retraining exactly with weight (1 - eps)/n on z_i."""
    world = logistic()
    assert world.rate is not None
    method = _change_solvers(bench.tight, damping=Damping(world.rate))
    scores = run(method, bench.task(world), world.train, world.test)
    got = torch.as_tensor(scores.removal_effect())
    require_close(got, retraining_slopes(world), "the predicted effect of a removal", 1e-5)


def retraining_slopes(world: World, step: float = 1e-3) -> Tensor:
    """Return the slope of each test loss as a train example fades, ``[n, m]``, by retraining."""
    assert world.rate is not None
    slopes = []
    inputs, labels = world.test
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    for i in range(N_TRAIN):
        losses = []
        for sign in (1.0, -1.0):
            weights = torch.full((N_TRAIN,), 1 / N_TRAIN, dtype=torch.float64)
            weights[i] *= 1 - sign * step
            solution = minimise_logistic(world.train, weights, world.rate)
            losses.append(
                nn.functional.cross_entropy(inputs @ solution.T, labels, reduction="none")
            )
        slopes.append((losses[0] - losses[1]) / (2 * step))
    return torch.stack(slopes)


@law("method")
def model_is_untouched(bench: MethodBench) -> None:
    """Weights, gradients, requires_grad, train() state and hooks are as before."""
    for world in bench.worlds():
        task = bench.task(world)
        task.model.train()
        before = fingerprint(task.model)
        bench.scores(task, world.train, world.test)
        after = fingerprint(task.model)
        changed = [key for key in before if before[key] != after[key]]
        require(not changed, f"the model in {world.name} has other {changed}")


@law("method")
def float32_scores_are_close(bench: MethodBench) -> None:
    """S in float32 = S in float64, to 1 % of the largest score."""
    for world in bench.worlds():
        task = bench.task(world, torch.float32)
        train, test = (cast(side, torch.float32) for side in (world.train, world.test))
        low = tensor(run(bench.short, task, train, test)).double()
        require_close(low, bench.values(world).double(), f"float32 scores in {world.name}", 1e-2)


@law("method", _made_of_parts)
def a_method_is_its_spec(bench: MethodBench) -> None:
    """Method(**method.to_spec()) = method, through JSON; where every part has a name."""
    try:
        spec = json.loads(json.dumps(bench.part.to_spec()))
        again = type(bench.part)(**spec)
    except SpecError as error:
        if "registered" in str(error):
            raise NotApplicable(f"it has no spec: {error}") from None
        raise
    require_equal(again, bench.part, "the method made from its spec")
