"""Laws of settings: the numbers depend on the arguments alone, and fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from attrs import field, frozen
from torch import Tensor

from dattri_core.batch import Batch
from dattri_core.errors import InputError
from dattri_core.experiment import Counterfactual, Retraining, Setting, World
from dattri_core.laws.law import NotApplicable, law, require, require_equal
from dattri_core.laws.untouched import contents, require_fixed
from dattri_core.task import Task

SIZE = (40, 20)
"""Of the worlds that are loaded, (train, test), where the setting is no smaller."""
SEED = 1
WRONG = 0.25
"""Share of labels that are made wrong."""
TOLERANCE = 1e-5
"""Largest difference of weights between trainings of one train set in different company."""
MOVED = 1e-4
"""Least difference of weights after training on other examples, or from another seed."""
DIGITS = 1e-4
"""Of outcomes, relative."""


@frozen(eq=False, slots=False)
class SettingBench:
    """A setting with worlds that it loaded, each once."""

    part: Setting
    _worlds: dict[Any, World] = field(factory=dict, init=False)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Return the size that its worlds are loaded in."""
        train, test = self.part.sizes["full"]
        return min(SIZE[0], train), min(SIZE[1], test)

    @property
    def world(self) -> World:
        """Return the world that most laws look at."""
        return self.loaded()

    def loaded(
        self, size: tuple[int, int] | None = None, seed: int = SEED, wrong: float | None = None
    ) -> World:
        """Return a world, as it was loaded the first time."""
        key = (size, seed, wrong)
        if key not in self._worlds:
            self._worlds[key] = self.fresh(size, seed, wrong)
        return self._worlds[key]

    def fresh(
        self, size: tuple[int, int] | None = None, seed: int = SEED, wrong: float | None = None
    ) -> World:
        """Return a world that is loaded anew.

        Raises:
            NotApplicable: Its data are not here.
        """
        try:
            return self.part.load(self.size if size is None else size, seed, wrong)
        except InputError as error:
            if "not downloaded" in str(error):
                raise NotApplicable(str(error)) from None
            raise


def _tensors(data: Batch) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
        return
    for part in data.values() if isinstance(data, Mapping) else data:
        yield from _tensors(part)


def _same(left: Batch, right: Batch) -> bool:
    pairs = list(zip(_tensors(left), _tensors(right), strict=True))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _states(task: Task) -> list[dict[str, Tensor]]:
    return [checkpoint.load(task.model) for checkpoint in task.checkpoints]


def _gap(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the largest difference of weights that both have; a tied one may have one name."""
    names = left.keys() & right.keys()
    return max(float((left[n].double() - right[n].double()).abs().max()) for n in names)


def _whole(world: World) -> Counterfactual:
    return Counterfactual(np.ones(len(world.train_ids), dtype=bool), SEED)


def _half(world: World) -> Counterfactual:
    return Counterfactual(np.arange(len(world.train_ids)) % 2 == 0, SEED)


@law("setting")
def part_is_frozen(bench: SettingBench) -> None:
    """No field can be set, and none has changed after a world was loaded."""
    require_fixed(bench.part)
    before = contents(bench.part)
    assert bench.world is not None
    require(contents(bench.part) == before, "its fields have changed after a world was loaded")


@law("setting")
def facts_are_declared(bench: SettingBench) -> None:
    """It has a title, metrics, and sizes "full" and "small", the second no larger."""
    setting = bench.part
    require(bool(setting.title), "it has no title")
    require(bool(setting.metrics), "it names no metrics")
    missing = {"full", "small"} - set(setting.sizes)
    require(not missing, f"sizes lack {sorted(missing)}")
    small, full = setting.sizes["small"], setting.sizes["full"]
    fits = all(0 < a <= b for a, b in zip(small, full, strict=True))
    require(fits, f"sizes: small is {small}, full {full}")


@law("setting")
def worlds_have_their_sizes(bench: SettingBench) -> None:
    """Data, ids, retraining and pictures have the sizes that were asked for; no id occurs twice."""
    world = bench.world
    sides = zip(
        bench.size, (world.train, world.test), (world.train_ids, world.test_ids), strict=True
    )
    for count, data, ids in sides:
        require_equal({len(tensor) for tensor in _tensors(data)}, {count}, "lengths of the data")
        require_equal(len(ids), count, "number of ids")
    both = {*world.train_ids, *world.test_ids}
    require_equal(len(both), sum(bench.size), "number of different ids")
    require(isinstance(world.retraining, Retraining), "retraining is no Retraining")
    sizes = world.retraining.n_train, world.retraining.n_test
    require_equal(sizes, bench.size, "sizes of the retraining")
    for count, pictures in zip(bench.size, world.pictures or (), strict=False):
        require_equal(len(pictures), count, "number of pictures")
        require_equal(str(pictures.dtype), "uint8", "dtype of pictures")
    require(world.damping > 0, f"damping is {world.damping}")


@law("setting")
def worlds_are_repeatable(bench: SettingBench) -> None:
    """The same arguments give the same data, weights, facts and fingerprint."""
    first, second = bench.world, bench.fresh()
    require(_same(first.train, second.train), "the train sets differ")
    require(_same(first.test, second.test), "the test sets differ")
    ids = (first.train_ids, first.test_ids), (second.train_ids, second.test_ids)
    require_equal(ids[1], ids[0], "ids")
    require_equal(dict(second.facts), dict(first.facts), "facts")
    prints = first.retraining.fingerprint, second.retraining.fingerprint
    require_equal(prints[1], prints[0], "fingerprint")
    for left, right in zip(_states(first.trajectory), _states(second.trajectory), strict=True):
        require_equal(_gap(left, right), 0.0, "difference of the weights")


def _numpy_state() -> list[int]:
    state: Any = np.random.get_state()  # noqa: NPY002 - the global state is what must stay
    return [*state[1].tolist(), state[2]]


@law("setting")
def global_randomness_is_left_alone(bench: SettingBench) -> None:
    """Loading takes no number from the global generators of torch and NumPy, nor seeds them."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state(), _numpy_state()
        bench.fresh()
        after = torch.get_rng_state(), _numpy_state()
    require(torch.equal(before[0], after[0]), "the state of torch's generator is another")
    require(before[1] == after[1], "the state of NumPy's generator is another")


@law("setting")
def seeds_make_other_worlds(bench: SettingBench) -> None:
    """Another seed gives other weights and another fingerprint; another size the latter."""
    world, other = bench.world, bench.loaded(seed=SEED + 1)
    gap = _gap(_states(world.task)[0], _states(other.task)[0])
    require(gap > MOVED, f"weights of two seeds differ by {gap:.1e}, expected over {MOVED:g}")
    prints = {world.retraining.fingerprint, other.retraining.fingerprint}
    require(len(prints) == 2, "the fingerprint of two seeds is the same")
    if bench.part.sizes["full"][1] > bench.size[1]:
        larger = bench.loaded(size=(bench.size[0], bench.size[1] + 1))
        same = larger.retraining.fingerprint == world.retraining.fingerprint
        require(not same, "the fingerprint for another test set is the same")


def _classes(bench: SettingBench) -> str | None:
    return "it has no classes" if bench.world.true_labels is None else None


@law("setting", _classes)
def wrong_labels_are_counted(bench: SettingBench) -> None:
    """At wrong=w, round(n w) train labels are other ones, and the fingerprint; nothing else is."""
    clean, world = bench.loaded(wrong=0.0), bench.loaded(wrong=WRONG)
    require_equal(int(clean.flipped.sum()), 0, "wrong labels at wrong=0")
    require_equal(
        int(world.flipped.sum()), round(WRONG * bench.size[0]), f"wrong labels at wrong={WRONG}"
    )
    assert world.true_labels is not None
    assert clean.true_labels is not None
    require(np.array_equal(world.true_labels, clean.true_labels), "the true labels are others")
    require(_same(world.train[:-1], clean.train[:-1]), "more than labels of the train set changed")
    require(_same(world.test, clean.test), "the test set changed")
    same = clean.retraining.fingerprint == world.retraining.fingerprint
    require(not same, "the fingerprint with wrong labels is the same")


@law("setting")
def bad_arguments_are_refused(bench: SettingBench) -> None:
    """A size, a seed or a share that cannot be is an `InputError`."""
    train, test = bench.size
    tried: list[tuple[str, Any]] = [
        *(("size", size) for size in ((10**9, test), (train, 10**9), (0, test), (train, -1))),
        *(("seed", seed) for seed in (-1, 2**32)),
        *(("wrong", wrong) for wrong in (-0.1, 1.5, float("nan"))),
    ]
    for name, value in tried:
        try:
            bench.fresh(**{name: value})
        except InputError:
            continue
        except NotApplicable:
            raise
        except Exception as error:
            require(False, f"{name}={value} raises {error!r}, expected an InputError")
        require(False, f"{name}={value} is taken")


@law("setting")
def model_is_trained_on_everything(bench: SettingBench) -> None:
    """The model is what retraining on the whole train set gives at the seed; on half, another."""
    world = bench.world
    (task,) = _states(world.task)
    whole, half = world.retraining.train([_whole(world), _half(world)])
    gap = _gap(task, whole)
    require(gap <= TOLERANCE, f"the model and retraining on everything differ by {gap:.1e}")
    gap = _gap(task, half)
    require(gap > MOVED, f"retraining on half of the train set moves weights by {gap:.1e} only")
    require(not world.task.model.training, "the model is in training mode")


@law("setting")
def training_is_of_one_counterfactual(bench: SettingBench) -> None:
    """A model trained again is the same whatever other train sets are asked for beside it."""
    world = bench.world
    half = _half(world)
    (alone,) = world.retraining.train([half])
    other = Counterfactual(half.mask, SEED + 1)
    together = list(world.retraining.train([_whole(world), other, half]))
    require_equal(len(together), 3, "number of models for three train sets")
    gap = _gap(alone, together[2])
    require(gap <= TOLERANCE, f"trained beside others the weights differ by {gap:.1e}")


@law("setting")
def trajectory_ends_at_the_model(bench: SettingBench) -> None:
    """The last checkpoint of the trajectory is the model; each has a positive learning rate."""
    world = bench.world
    run = _states(world.trajectory)
    require_equal(_gap(run[-1], _states(world.task)[0]), 0.0, "difference of the last checkpoint")
    rates = [checkpoint.learning_rate for checkpoint in world.trajectory.checkpoints]
    require(all(rate is not None and rate > 0 for rate in rates), f"learning rates are {rates}")
    moves = [_gap(a, b) for a, b in pairwise(run)]
    require(all(move > 0 for move in moves), "two checkpoints of the trajectory are the same")


def _has_steps(bench: SettingBench) -> str | None:
    return "its run is not given step by step" if bench.world.steps is None else None


@law("setting", _has_steps)
def steps_pass_through_the_trajectory(bench: SettingBench) -> None:
    """The run step by step holds every checkpoint of the trajectory, and the model at its end."""
    world = bench.world
    assert world.steps is not None
    task = world.steps()
    run = _states(task)
    for checkpoint, state in zip(
        world.trajectory.checkpoints, _states(world.trajectory), strict=True
    ):
        nearest = min(_gap(state, step) for step in run)
        require_equal(nearest, 0.0, f"difference of {checkpoint.name!r} from the nearest step")
    require_equal(_gap(run[-1], _states(world.task)[0]), 0.0, "difference of the last step")
    missing = [c.name for c in task.checkpoints[:-1] if c.step is None or not c.learning_rate]
    require(not missing, f"no step is said of {missing[:3]}")


@law("setting")
def outcomes_are_of_the_model(bench: SettingBench) -> None:
    """Every target is measured on every test example, and again the same; "loss" is the task's."""
    world = bench.world
    targets = world.retraining.targets
    require(world.target in targets, f"{world.target!r} is not of {sorted(targets)}")
    (state,) = _states(world.task)
    first, second = (world.retraining.measure(state) for _ in range(2))
    require_equal(set(first), set(targets), "targets that are measured")
    for name, values in first.items():
        require_equal(values.shape, (bench.size[1],), f"shape of {name!r}")
        require(bool(np.isfinite(values).all()), f"{name!r} is not finite")
        require(np.array_equal(values, second[name]), f"{name!r} is another when measured again")
    if "loss" not in first:
        return
    require(targets["loss"] is False, "more of the loss counts as better")
    if callable(world.task.loss):
        with torch.no_grad():
            loss = world.task.loss(world.task.model, world.test).numpy()
        gap = float(np.abs(first["loss"] - loss).max())
        scale = max(1.0, float(np.abs(loss).max()))
        require(gap <= DIGITS * scale, f"the measured loss and the task's differ by {gap:.1e}")
