"""Any torch model whose data lie in memory, trained again on any part of its train set."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from attrs import define, field, fields_dict, frozen
from torch import Tensor, nn
from torch.func import functional_call

from dattri_core import (
    Checkpoint,
    Counterfactual,
    InputError,
    Loss,
    NumericsError,
    at_every_place,
    batch_size,
    labels_of,
    leaves,
    map_tensors,
    nearest,
    take,
)
from dattri_parts.training.fingerprint import fingerprint
from dattri_parts.training.measures import check_targets, measured, outcomes_of
from dattri_parts.training.objective import is_shipped, loss_of, mean_loss
from dattri_parts.training.optima import Optima, prepare
from dattri_parts.training.optimum import Optimum
from dattri_parts.training.orders import Order
from dattri_parts.training.products import rounded_products
from dattri_parts.training.recipe import Length, Recipe, check_kept
from dattri_parts.training.rehearsal import rehearse
from dattri_parts.training.run import Run
from dattri_parts.training.sequential import Build, built, seeded, train_one, with_threads
from dattri_parts.training.stacked import Member, check_stackable, train_stacked
from dattri_parts.training.steps import step_by_step

Array = np.ndarray[Any, Any]
MEASURED = 512
"""Test examples in a forward pass, at most."""
OUTPUTS = 2**22
"""Numbers that a forward pass gives, at most: they are measured in float64, and the attention of a
transformer needs as much again for every layer."""


def _device_of(device: str | torch.device) -> torch.device:
    return torch.device(device)


@define(eq=False)
class _Held:
    """What is made once and used by every training."""

    fingerprint: str | None = None
    versions: tuple[int, ...] = ()  # of the data, when the fingerprint was taken
    template: nn.Module | None = None
    data: tuple[Any, Any] | None = None
    optima: Optima | None = None
    checked: bool = False
    measured: int = 1  # test examples in a forward pass


@frozen(eq=False)
class ModelRetraining:
    """Trains a model from scratch on a part of its train set; a `dattri_core.Retraining`.

    Args:
        build: Makes a new model; called under the seed of the counterfactual, on the CPU.
        recipe: `Recipe` of minibatch steps, or `Optimum` of a convex model.
        loss: A shipped one by name, such as ``"cross-entropy"``; a `dattri.Loss` of one's own, or a
            function ``(model, batch) -> [B]``. They call the model, and ask it for nothing else.
        train_data: A nest of tensors that begin with ``[n_train]``, labels last.
        test_data: The same for the test set.
        targets: What is measured: names of ``"loss"``, ``"margin"``, ``"logit"`` and ``"correct"``.
            As an attribute, for each whether more of it is better.
        about: What tells this training apart beyond data, the model's code and recipe, JSON-ready:
            words for the record, or what code does not show.
        together: How many models are trained by one call at most; above 1 small models are stacked
            and take their steps at once. Their weights are those of one by one up to rounding.
        device: To train and measure on.
        threads: Of training one model; None leaves them, and so do stacks and optima. Where a step
            is too short to share, a second thread only waits; with one, sums come in the same order
            everywhere.
        recorded: Whether a CUDA device records the kernels of a step once and replays them, which
            spares those of a small model the wait for Python. For a model whose forward pass runs
            the same operations each time, whatever the numbers are, and changes nothing but
            tensors: no random choice in Python, no count of calls. With ``together`` above 1 steps
            are long, and are not recorded.
        tf32: Whether a CUDA device may take the matrix products of training in TF32, which keeps
            10 bits of a float32 number's 23: several times as fast where networks are large. False
            leaves them as torch has them, which is exact to float32 unless told otherwise. Models
            are measured as torch has it in either case. It is part of the fingerprint, as devices
            are not: another device adds in another order, which moves last digits, while this
            rounds every factor to a thousandth, as a choice of whoever trains; a difference of
            outcomes that one example makes may be smaller than that of the two. What is named is
            the leave: a device without TF32 computes in float32.
        order: In which order the examples of an epoch are read. ``"own"``: each train set is
            shuffled by itself. ``"shared"``: the whole train set is shuffled, and the last examples
            take the places of those left out, so that trainings of one seed have nearly the same
            batches. What leaving one out does is then not lost in what another order does.
        length: How long trainings on a part of the train set last. ``"epochs"``: as many as on all
            of it, so that half of the examples take half of the steps, and a recipe that stops far
            from an optimum stops farther. ``"steps"``: as many steps, to the next whole epoch.

    Raises:
        InputError: Data, loss and targets do not fit each other, there is no such order or length,
            or one of them or ``tf32`` is asked of an `Optimum`, which is found in float64 by a
            search.
    """

    build: Build
    recipe: Recipe | Optimum
    loss: str | Loss | Callable[..., Tensor]
    train_data: Any
    test_data: Any
    targets: Mapping[str, bool] = field(converter=measured)
    about: Mapping[str, Any] = field(factory=dict)
    together: int = 1
    device: torch.device = field(default=torch.device("cpu"), converter=_device_of)
    threads: int | None = 1
    recorded: bool = False
    tf32: bool = False
    order: Order = "own"
    length: Length = "epochs"
    _held: _Held = field(init=False, factory=_Held, repr=False)

    def __attrs_post_init__(self) -> None:
        loss = self._loss
        check_targets(self.targets, loss)
        if isinstance(self.together, bool) or self.together < 1:
            raise InputError(f"retraining: together is {self.together!r}, expected 1 or more")
        if self.tf32 and isinstance(self.recipe, Optimum):
            raise InputError("retraining: tf32 is for a Recipe; an Optimum is found in float64")
        for what, given, choices in (("order", self.order, Order), ("length", self.length, Length)):
            first, *_ = valid = get_args(choices)
            if given not in valid:
                raise InputError(f"retraining: no {what} named {given!r}; {nearest(given, valid)}")
            if given != first and isinstance(self.recipe, Optimum):
                raise InputError(
                    f"retraining: {what} {given!r} is for a Recipe; an Optimum reads all examples "
                    "at once, as often as its search needs"
                )
        for name, data in (("train_data", self.train_data), ("test_data", self.test_data)):
            if batch_size(data) < 1:
                raise InputError(f"retraining: {name} holds no example")
            if is_shipped(loss):
                labels_of(data)

    @property
    def n_train(self) -> int:
        """Return the number of train examples."""
        return batch_size(self.train_data)

    @property
    def n_test(self) -> int:
        """Return the number of test examples."""
        return batch_size(self.test_data)

    @property
    def _whole(self) -> int | None:
        return self.n_train if self.order == "shared" else None

    @property
    def _loss(self) -> Loss:
        return loss_of(self.loss)

    @property
    def fingerprint(self) -> str:
        """Return a hash of data, model, recipe, order, length, loss, targets, ``about``, ``tf32``.

        Of the model, the code of its classes and all that it holds count, see `Description`; of
        ``build``, what it builds under two seeds, however it is written.

        Raises:
            InputError: ``about`` is not JSON-ready, or ``build`` makes no model.
        """
        if self._held.fingerprint is None:
            loss = self._loss
            own = [] if is_shipped(loss) else [loss.forward, loss.criterion, loss.margin]
            known = fields_dict(ModelRetraining)
            words = {
                "tf32": self.tf32,
                "order": self._whole and self.order,
                "length": self.length if self.length != "epochs" else None,
            }
            more = {name: getattr(self, name) for name in fields_dict(type(self)).keys() - known}
            self._held.fingerprint = fingerprint(
                self.recipe,
                self._two_starts(),
                (self.train_data, self.test_data),
                {
                    "loss": loss.name,
                    "targets": sorted(self.targets),
                    "about": dict(self.about),
                    **{name: word for name, word in words.items() if word},  # none for defaults
                },
                [own, type(self), dict(sorted(more.items()))],
            )
            self._held.versions = _versions(self.train_data, self.test_data)
        return self._held.fingerprint

    def _two_starts(self) -> tuple[nn.Module, nn.Module]:
        """Return new models of two seeds on the CPU, by one thread as everywhere."""
        cpu, models = torch.device("cpu"), []
        with with_threads(1):
            for seed in (0, 1):
                with seeded(seed, self.device):
                    models.append(built(self.build, cpu))
        return models[0], models[1]

    def run(self, counterfactual: Counterfactual, keep: tuple[int, ...] | None = None) -> Run:
        """Return the run of one model, with its states on the way.

        Args:
            counterfactual: Train set and seed.
            keep: Epochs after which the state is kept, beside the last; those of the recipe by
                default. An optimum has no epochs.

        Raises:
            InputError: The mask is not one of this train set, or an epoch is not one of the recipe.
            NumericsError: The loss is not finite, or no optimum was found.
        """
        self._check(counterfactual)
        if isinstance(self.recipe, Optimum):
            if keep:
                raise InputError(f"retraining: keep is {keep}, and an optimum has no epochs")
            (state,) = self._optima.states([_positions(counterfactual)])
            model = copy.deepcopy(self._optima.head.model)
            model.load_state_dict(state)
            return Run(model, (0,), (state,), (1.0,))
        recipe = self._recipe(counterfactual)
        keep = recipe.keep if keep is None else tuple(keep)
        check_kept(keep, recipe.epochs)
        return self._run(counterfactual, keep)

    def _recipe(self, counterfactual: Counterfactual) -> Recipe:
        assert isinstance(self.recipe, Recipe)
        if self.length == "epochs":
            return self.recipe
        return self.recipe.lasting(self.n_train, int(counterfactual.mask.sum()))

    def _run(self, counterfactual: Counterfactual, keep: tuple[int, ...] = ()) -> Run:
        with with_threads(self.threads):
            return train_one(
                self.build,
                self._recipe(counterfactual),
                self._loss,
                self._on_device[0],
                _positions(counterfactual),
                counterfactual.seed,
                keep,
                self.device,
                recorded=self.recorded,
                tf32=self.tf32,
                whole=self._whole,
            )

    def steps(self, counterfactual: Counterfactual) -> tuple[Checkpoint, ...]:
        """Return the checkpoints of a run before each of its steps and at its end.

        Raises:
            InputError: The mask is not one of this train set, or the recipe has no steps.
            MemoryBudgetError: They do not fit the free memory.
            NumericsError: The loss is not finite.
        """
        self._check(counterfactual)
        if isinstance(self.recipe, Optimum):
            raise InputError("steps of a run: an optimum is found by a search and has none")
        with with_threads(self.threads):
            return step_by_step(
                self.build,
                self._recipe(counterfactual),
                self._loss,
                self._on_device[0],
                _positions(counterfactual),
                counterfactual.seed,
                self.device,
                self.tf32,
                self._whole,
            )

    def train(self, counterfactuals: Sequence[Counterfactual]) -> Iterator[Mapping[str, Tensor]]:
        """Yield the state dict of a model for each counterfactual, in their order.

        Raises:
            InputError: A mask is not one of this train set.
            NumericsError: The loss is not finite, or no optimum was found.
        """
        for counterfactual in counterfactuals:
            self._check(counterfactual)
        return self._states(counterfactuals)

    def _states(self, counterfactuals: Sequence[Counterfactual]) -> Iterator[Mapping[str, Tensor]]:
        for start in range(0, len(counterfactuals), self.together):
            window = counterfactuals[start : start + self.together]
            if isinstance(self.recipe, Optimum):
                yield from self._optima.states([_positions(each) for each in window])
            elif self.together == 1:
                yield self._run(window[0]).states[-1]
            else:
                members = [
                    Member(_positions(each), each.seed, self._recipe(each)) for each in window
                ]
                with rounded_products(self.tf32, self.device):
                    states = train_stacked(
                        self.build,
                        self._loss,
                        self._on_device[0],
                        members,
                        self.device,
                        self._whole,
                    )
                yield from states

    def measure(self, state: Mapping[str, Tensor]) -> dict[str, Array]:
        """Return the outcome of every target on every test example, ``[n_test]`` in float64.

        Args:
            state: State dict of a model, as `train` yields it.

        Raises:
            InputError: It is not one of this model.
            NumericsError: An outcome is not finite.
        """
        self._rehearse()
        model = self._template
        given = {k: tensor.to(self.device) for k, tensor in _untied(model, state).items()}
        data = _like(self._on_device[1], given)
        found: dict[str, list[Tensor]] = {target: [] for target in self.targets}
        call = _caller(model, given)
        with torch.no_grad():
            for start in range(0, self.n_test, self._held.measured):
                batch = take(data, slice(start, start + self._held.measured))
                for target, values in outcomes_of(self._loss, self.targets, call, batch).items():
                    found[target].append(values)
        outcomes = {target: torch.cat(parts).cpu().numpy() for target, parts in found.items()}
        for target, outcome in outcomes.items():
            if not np.isfinite(outcome).all():
                at = int(np.flatnonzero(~np.isfinite(outcome))[0])
                raise NumericsError(
                    f"retraining: the {target} is {outcome[at]} on test example {at}; the "
                    "model that was trained gives outputs without bounds"
                )
        return outcomes

    def gradient_norm(self, counterfactual: Counterfactual, state: Mapping[str, Tensor]) -> float:
        """Return the norm of the gradient of an `Optimum`'s objective: how near a model is to it.

        Measured by autograd on the model itself, apart from the search. The distance of the weights
        to the optimum is at most this norm divided by l2.

        Args:
            counterfactual: That the model was trained on.
            state: Its state dict.

        Raises:
            InputError: The recipe is no `Optimum`, which alone has an objective to end at.
        """
        if not isinstance(self.recipe, Optimum):
            raise InputError("gradient norm: a Recipe stops where it stops; it is for an Optimum")
        self._check(counterfactual)
        names = [name for name, p in self._template.named_parameters() if p.requires_grad]
        given = {name: tensor.detach().double().to(self.device) for name, tensor in state.items()}
        trained = leaves({name: given[name] for name in names})
        data = take(_like(self._on_device[0], given), _positions(counterfactual))
        value = mean_loss(self._loss, _caller(self._template, {**given, **trained}), data)
        penalty = torch.stack([leaf.square().sum() for leaf in trained.values()]).sum()
        objective = value + self.recipe.l2 / 2 * penalty
        slopes = torch.autograd.grad(objective, list(trained.values()))
        return math.sqrt(sum(slope.square().sum().item() for slope in slopes))

    @property
    def _optima(self) -> Optima:
        if self._held.optima is None:
            assert isinstance(self.recipe, Optimum)
            self._held.optima = prepare(self._build, self._loss, self.recipe, self._on_device[0])
        return self._held.optima

    def _build(self, seed: int) -> nn.Module:
        with seeded(seed, self.device):
            return built(self.build, self.device)

    @property
    def _template(self) -> nn.Module:
        if self._held.template is None:
            model = self._build(0).eval()
            self._held.template = model.double() if isinstance(self.recipe, Optimum) else model
        return self._held.template

    @property
    def _on_device(self) -> tuple[Any, Any]:
        if self._held.data is None:
            train, test = (
                map_tensors(lambda tensor: tensor.to(self.device), part)
                for part in (self.train_data, self.test_data)
            )
            self._held.data = (train, test)
        return self._held.data

    def _check(self, counterfactual: Counterfactual) -> None:
        if len(counterfactual.mask) != self.n_train:
            raise InputError(
                f"retraining: the mask of a counterfactual has {len(counterfactual.mask)} truth "
                f"values, and there are {self.n_train} train examples"
            )
        self._rehearse()

    def _rehearse(self) -> None:
        """Refuse what every training would fail on, once and before the first.

        Data that were changed in place since the fingerprint was taken are refused each time.
        """
        if self._held.fingerprint and self._held.versions != _versions(
            self.train_data, self.test_data
        ):
            raise InputError(
                "retraining: train_data or test_data were changed in place after the fingerprint "
                "was taken, so outcomes would be kept under that of other data; make a new "
                "ModelRetraining of the changed data"
            )
        if self._held.checked:
            return
        if self.together > 1 and isinstance(self.recipe, Recipe):
            check_stackable(self._template)
        state = self._template.state_dict()
        samples = [_like(part, state) for part in self._on_device]
        model = self._template if is_shipped(self._loss) else _caller(self._template, state)
        outputs = rehearse(self._loss, model, samples[0], samples[1])
        self._held.measured = max(1, min(MEASURED, OUTPUTS // outputs))
        self._held.checked = True


def _versions(*data: Any) -> tuple[int, ...]:
    """Return how often each tensor was written to; torch does not count it for some."""
    found: list[int] = []
    map_tensors(lambda t: found.append(0 if t.is_inference() else t._version), data)
    return tuple(found)


def _positions(counterfactual: Counterfactual) -> Tensor:
    return torch.from_numpy(np.flatnonzero(counterfactual.mask))


def _like(data: Any, state: Mapping[str, Tensor]) -> Any:
    """Return the data in the state's precision; integers stay."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if torch.float64 not in dtypes:
        return data
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, data)


def _untied(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with one name of each tied weight; it may hold any of them, or all.

    Raises:
        InputError: It is not one of this model.
    """
    own = model.state_dict(keep_vars=True)  # a tied weight is one object
    held = {id(own[name]): tensor for name, tensor in state.items() if name in own}
    odd = sorted(state.keys() - own.keys() | {n for n, t in own.items() if id(t) not in held})
    if odd:
        raise InputError(
            f"retraining: the state dict is not one of {type(model).__name__}; it lacks, or "
            f"has too many of, {odd[:8]}"
        )
    names = {id(tensor): name for name, tensor in reversed(own.items())}
    return {name: held[key] for key, name in names.items()}


def _caller(model: nn.Module, state: Mapping[str, Tensor]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        placed = at_every_place(model, state)
        return functional_call(model, placed, args, kwargs, tie_weights=False)

    return call
