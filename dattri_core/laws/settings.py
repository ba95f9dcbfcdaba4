"""Laws of settings: the numbers depend on the arguments alone, and fit each other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from attrs import field, frozen
from torch import Tensor

from dattri_core.batch import Batch, take
from dattri_core.errors import InputError
from dattri_core.evaluate import Evaluator
from dattri_core.experiment import Counterfactual, Retraining, Setting, World
from dattri_core.laws.global_state import unchanged, watched
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
    changed: list[str] = field(factory=list, init=False)
    """What loading changed of the process; it is put back each time."""

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
            with watched() as changed:
                world = self.part.load(self.size if size is None else size, seed, wrong)
                self.changed[:] = changed()
            return world
        except InputError as error:
            if "not downloaded" in str(error):
                raise NotApplicable(str(error)) from None
            raise

    def retraining(
        self, size: tuple[int, int] | None = None, wrong: float | None = None
    ) -> Retraining:
        """Return that of a world, alone where the setting gives it so, which trains nothing."""
        make = getattr(self.part, "retraining", None)
        if make is None:
            return self.loaded(size, wrong=wrong).retraining
        found: Retraining = make(self.size if size is None else size, seed=SEED, wrong=wrong)
        return found

    @cached_property
    def pair(self) -> tuple[Mapping[str, Tensor], ...]:
        """Return models of the whole train set and of half of it, trained side by side.

        Between them is one of that half at another seed.
        """
        half = half_of(self.world)
        other = Counterfactual(half.mask, SEED + 1)
        found = list(self.world.retraining.train([_whole(self.world), other, half]))
        require_equal(len(found), 3, "number of models for three train sets")
        return found[0], found[2]

    @cached_property
    def alone(self) -> tuple[Mapping[str, Tensor], list[str]]:
        """Return that of half of the train set, trained alone, and the global state it changed."""
        world = self.world
        with watched() as changed:
            (half,) = world.retraining.train([half_of(world)])
            return half, changed()


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


def gap_of(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the largest difference of weights that both have; a tied one may have one name."""
    names = left.keys() & right.keys()
    return max(float((left[n].double() - right[n].double()).abs().max()) for n in names)


def _whole(world: World) -> Counterfactual:
    return Counterfactual(np.ones(len(world.train_ids), dtype=bool), SEED)


def half_of(world: World) -> Counterfactual:
    """Return every other train example as a train set."""
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
    together = world.retraining.together
    require(
        isinstance(together, int) and together >= 1, f"together is {together}, expected 1 or more"
    )
    if world.pictures is not None:
        require_equal(len(world.pictures), 2, "number of sides with pictures")
        for count, pictures in zip(bench.size, world.pictures, strict=True):
            require_equal(len(pictures), count, "number of pictures")
            require_equal(str(pictures.dtype), "uint8", "dtype of pictures")
            fits = pictures.ndim == 3 or (pictures.ndim == 4 and pictures.shape[3] == 3)
            require(
                fits, f"pictures are {pictures.shape}, expected [n, height, width] or 3 colours"
            )
    require(0 < world.damping < math.inf, f"damping is {world.damping}, expected above 0, finite")


@law("setting")
def facts_are_plain(bench: SettingBench) -> None:
    """The facts of a world can be written as JSON: results keep them."""
    for name, value in bench.world.facts.items():
        reason = _no_json(value)
        require(
            reason is None,
            f"facts[{name!r}] is a {type(value).__name__} that JSON cannot hold ({reason}); give "
            "numbers, strings, lists and mappings, such as float(x) or x.tolist()",
        )


def _no_json(value: Any) -> str | None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _rows(data: Batch) -> list[bytes]:
    """Return the inputs of each example; those of a nest without an order are all it has."""
    tensors = list(_tensors(data))
    inputs = tensors if isinstance(data, Mapping) or len(tensors) == 1 else tensors[:-1]
    return [
        b"|".join(t[i].detach().cpu().double().numpy().tobytes() for t in inputs)
        for i in range(len(inputs[0]))
    ]


@law("setting")
def tests_are_not_trained_on(bench: SettingBench) -> None:
    """Fewer than half of the test examples have inputs that a train example has too."""
    known, tests = set(_rows(bench.world.train)), _rows(bench.world.test)
    count = sum(row in known for row in tests)
    require(
        2 * count < len(tests),
        f"{count} of {len(tests)} test examples have the inputs of a train example, expected fewer "
        "than half; split the data before either side is drawn",
    )


@law("setting")
def worlds_are_repeatable(bench: SettingBench) -> None:
    """The same arguments give the same data, weights, facts and fingerprint."""
    first, second = bench.world, bench.fresh()
    require(_same(first.train, second.train), "the train sets differ")
    require(_same(first.test, second.test), "the test sets differ")
    ids = (first.train_ids, first.test_ids), (second.train_ids, second.test_ids)
    require_equal(ids[1], ids[0], "ids")
    require_equal(set(second.facts), set(first.facts), "names of facts")
    other = [n for n, fact in first.facts.items() if contents(fact) != contents(second.facts[n])]
    require(not other, f"the facts {other} differ, expected the same for the same arguments")
    prints = first.retraining.fingerprint, second.retraining.fingerprint
    require_equal(prints[1], prints[0], "fingerprint")
    for left, right in zip(_states(first.trajectory), _states(second.trajectory), strict=True):
        require_equal(gap_of(left, right), 0.0, "difference of the weights")


@law("setting")
def global_randomness_is_left_alone(bench: SettingBench) -> None:
    """Loading and training leave global random generators and settings as they are."""
    bench.fresh()
    require(*unchanged(bench.changed, "load"))
    require(*unchanged(bench.alone[1], "retraining.train"))


@law("setting")
def seeds_make_other_worlds(bench: SettingBench) -> None:
    """Another seed gives other weights and another fingerprint; another size the latter."""
    world, other = bench.world, bench.loaded(seed=SEED + 1)
    gap = gap_of(_states(world.task)[0], _states(other.task)[0])
    require(gap > MOVED, f"weights of two seeds differ by {gap:.1e}, expected over {MOVED:g}")
    prints = {world.retraining.fingerprint, other.retraining.fingerprint}
    require(len(prints) == 2, "the fingerprint of two seeds is the same")
    train, test = bench.size
    others = {"test": (train, test + 1), "train": (train - 1, test)}
    if bench.part.sizes["full"][1] == test:
        others["test"] = (train, test - 1)
    for side, size in others.items():
        try:
            other_print = bench.retraining(size).fingerprint
        except InputError:
            continue  # too few for this setting
        same = other_print == world.retraining.fingerprint
        require(not same, f"the fingerprint for another {side} set is the same")


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


@law("setting", _classes)
def what_is_left_out_does_not_show(bench: SettingBench) -> None:
    """Without the examples whose labels are wrong, training gives the model of right labels."""
    # With them it gives another. So masks are heeded, example by example, and labels are those of
    # the world.
    clean, world = bench.loaded(wrong=0.0), bench.loaded(wrong=WRONG)
    gap = gap_of(_states(clean.task)[0], _states(world.task)[0])
    require(
        gap > MOVED,
        f"wrong labels move the weights by {gap:.1e}, expected over {MOVED:g}: train on the labels "
        "of world.train",
    )
    right = Counterfactual(~world.flipped, SEED)
    one, two = (next(iter(side.retraining.train([right]))) for side in (clean, world))
    gap = gap_of(one, two)
    require(
        gap <= TOLERANCE,
        f"labels of examples that the mask leaves out move the weights by {gap:.1e}, expected "
        f"{TOLERANCE:g} at most: train on the examples where the mask is true, and no other",
    )


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
    whole, half = bench.pair
    gap = gap_of(task, whole)
    require(gap <= TOLERANCE, f"the model and retraining on everything differ by {gap:.1e}")
    gap = gap_of(task, half)
    require(gap > MOVED, f"retraining on half of the train set moves weights by {gap:.1e} only")
    for what, at in (("task", world.task), ("trajectory", world.trajectory)):
        modes = [name or "itself" for name, m in at.model.named_modules() if m.training]
        require(not modes, f"the model of {what} is in training mode ({modes[:3]}): call eval()")


@law("setting")
def what_is_trained_on_is_fitted_better(bench: SettingBench) -> None:
    """Models of two halves of the train set have less loss on their own half, in sum."""
    # sum_{i in A} (l_i(A) - l_i(B)) + sum_{i in B} (l_i(B) - l_i(A)) < 0: a step of gradient
    # descent from common weights makes it -rate |grad L_A - grad L_B|^2 times the size of a half.
    # So masks are not turned around or shifted, also where no label can be made wrong.
    world, half = bench.world, half_of(bench.world)
    (other,) = world.retraining.train([Counterfactual(~half.mask, SEED)])
    own, others = (_losses(world, state) for state in (bench.pair[1], other))
    gain = float((own - others)[half.mask].sum() + (others - own)[~half.mask].sum())
    require(
        gain < 0,
        f"models of two halves have {gain:+.2g} more loss on what they were trained on than on "
        "the rest, in sum; train on the examples where the mask is true",
    )


def _losses(world: World, state: Mapping[str, Tensor]) -> np.ndarray[Any, Any]:
    """Return the loss of every train example at some weights, ``[n_train]``."""
    task = Task(world.task.model, world.task.loss, checkpoints=[state])
    evaluator = Evaluator(task, task.checkpoints[0], take(world.train, slice(0, 3)))
    with torch.no_grad():
        values = evaluator.per_example(None, world.train, "train")
    return values.double().cpu().numpy()


@law("setting")
def training_is_of_one_counterfactual(bench: SettingBench) -> None:
    """A model trained again is the same whatever other train sets are asked for beside it."""
    gap = gap_of(bench.alone[0], bench.pair[1])
    require(gap <= TOLERANCE, f"trained beside others the weights differ by {gap:.1e}")


@law("setting")
def trajectory_ends_at_the_model(bench: SettingBench) -> None:
    """The last checkpoint of the trajectory is the model; each has a positive learning rate."""
    world = bench.world
    run = _states(world.trajectory)
    require_equal(gap_of(run[-1], _states(world.task)[0]), 0.0, "difference of the last checkpoint")
    rates = [checkpoint.learning_rate for checkpoint in world.trajectory.checkpoints]
    require(all(rate is not None and rate > 0 for rate in rates), f"learning rates are {rates}")
    moves = [gap_of(a, b) for a, b in pairwise(run)]
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
        nearest = min(gap_of(state, step) for step in run)
        require_equal(nearest, 0.0, f"difference of {checkpoint.name!r} from the nearest step")
    require_equal(gap_of(run[-1], _states(world.task)[0]), 0.0, "difference of the last step")
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
            loss = world.task.loss(world.task.model, world.test).double().cpu().numpy()
        gap = float(np.abs(first["loss"] - loss).max())
        scale = max(1.0, float(np.abs(loss).max()))
        require(gap <= DIGITS * scale, f"the measured loss and the task's differ by {gap:.1e}")
