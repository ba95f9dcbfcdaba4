"""A method against itself: for models of other seeds, and for a model that knows nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain, combinations
from typing import Any, ClassVar

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from dattri_core import Counterfactual, Evidence, InputError, MetricResult, Task, World
from dattri_metrics.arrays import numbers, same_shape
from dattri_metrics.bootstrap import DEFAULT, Bootstrap, summary
from dattri_metrics.correlation import correlate, varies
from dattri_metrics.evidence import attribute_of, other_seed, scores_of
from dattri_metrics.ids import ordered_with
from dattri_metrics.intervals import Correlation
from dattri_metrics.spread import Estimate

Array = np.ndarray[Any, Any]
RANDOMISED, STABLE = "model-randomisation", "rank-stability"


def rank_stability(scores: Any, *, bootstrap: Bootstrap = DEFAULT) -> MetricResult:
    """Return how far the ranking of train examples stays when the model is trained again.

        mean over pairs of seeds (a, b) and tests j of spearman_i(tau^a_ij, tau^b_ij)

    1 says that the ranking is a property of the data, not of one run. It does not say that it is
    right. A column of constant scores counts 0. The interval is over tests *and* train examples,
    for the seeds that were tried.

    Args:
        scores: ``[seeds, n_train, n_test]``, of 2 or more models that differ by their seed.
        bootstrap: The confidence of the interval.

    Returns:
        Value in [-1, 1]; chance 0.

    Raises:
        InputError: There are fewer than two seeds or three train examples, or a number is not
            finite.
    """
    if isinstance(scores, (list, tuple)):
        for other in scores[1:]:
            ordered_with(STABLE, "those of another seed", scores[0], other)
    tau = numbers(STABLE, "scores", scores, ("seeds", "n_train", "n_test"))
    if len(tau) < 2:
        raise InputError(f"{STABLE}: scores of {len(tau)} seed; give 2 or more")
    pairs = [_agreement(STABLE, a, b) for a, b in combinations(tau, 2)]
    return _mean_of(pairs, bootstrap, higher_is_better=True)


def model_randomisation(
    scores: Any, randomised: Any, *, bootstrap: Bootstrap = DEFAULT
) -> MetricResult:
    """Return how far scores stay the same when the model's weights are random.

        mean over randomised models a and tests j of spearman_i(tau_ij, tau^a_ij)

    Scores that explain what a model learned change when it has learned nothing: near 0 is good,
    less is better (Adebayo et al. 2018, arXiv 1810.03292; Hanawa et al. 2021, arXiv 2006.04528). It
    is a sanity check: random scores pass it, and chance is 0. A column of constant scores counts 0.
    The interval is over tests *and* train examples, for the models that were tried.

    Args:
        scores: ``[n_train, n_test]``, of the trained model.
        randomised: ``[models, n_train, n_test]``, the same method for models of random weights.
        bootstrap: The confidence of the interval.

    Returns:
        Value in [-1, 1]; chance 0.

    Raises:
        InputError: Shapes do not match, a number is not finite, or there are fewer than three train
            examples.
    """
    if isinstance(randomised, (list, tuple)):
        for other in randomised:
            ordered_with(RANDOMISED, "randomised", scores, other)
    else:
        ordered_with(RANDOMISED, "randomised", scores, randomised)
    tau = numbers(RANDOMISED, "scores", scores, ("n_train", "n_test"))
    others = numbers(RANDOMISED, "randomised", randomised, ("models", "n_train", "n_test"))
    same_shape(RANDOMISED, scores=tau, each_of_randomised=others[0])
    pairs = [_agreement(RANDOMISED, tau, other) for other in others]
    return _mean_of(pairs, bootstrap, higher_is_better=False)


def _agreement(name: str, one: Array, two: Array) -> Estimate:
    """Return the rank correlation of each column; 0 where either does not vary."""
    if len(one) < 3:  # also where nothing varies, so that `correlate` is not asked
        raise InputError(f"{name}: a correlation over {len(one)} train examples; give at least 3")
    values, influence = np.zeros(one.shape[1]), np.zeros(one.shape)
    kept = varies(two)  # as `correlate` has it; what it leaves out counts 0 here
    if kept.any():
        found = correlate(name, "spearman", one[:, kept], two[:, kept])
        assert found.influence is not None
        values[kept], influence[:, kept] = found.values, found.influence
    return Estimate(values, influence)


def _mean_of(pairs: list[Estimate], bootstrap: Bootstrap, higher_is_better: bool) -> MetricResult:
    values = np.mean([pair.values for pair in pairs], axis=0)
    influence = np.mean([np.asarray(pair.influence) for pair in pairs], axis=0)
    return summary(
        Estimate(values, influence),
        0.0,
        bootstrap,
        shape=Correlation(len(influence), ranks=True),
        bounds=(-1.0, 1.0),
        higher_is_better=higher_is_better,
    )


def with_state(world: World, state: Mapping[str, Tensor]) -> Task:
    """Return the world's task at other weights, with the last learning rate of its run."""
    task, rate = world.task, world.trajectory.checkpoints[-1].learning_rate
    return Task(
        task.model,
        task.loss,
        target=task.named_target,
        checkpoints=[state],
        learning_rates=None if rate is None else [rate],
        parameters=task.parameter_names,
        reference=task.reference,
    )


def trained_state(world: World) -> dict[str, Tensor]:
    """Return the weights at the end of training."""
    return world.task.checkpoints[-1].load(world.task.model)


def randomised_state(world: World, seed: int) -> dict[str, Tensor]:
    """Return the weights with the entries of every parameter in random order.

    They keep the size of trained weights, so that scores stay finite, and know nothing. Buffers
    stay, and so do parameters whose entries are all the same, such as the gains of fresh norms.

    Args:
        world: With the trained model.
        seed: Of the orders.
    """
    state = trained_state(world)
    trained = dict(world.task.model.named_parameters())
    random = torch.Generator().manual_seed(seed)
    for name in sorted(trained.keys() & state.keys()):
        flat = state[name].reshape(-1)
        order = torch.randperm(len(flat), generator=random).to(flat.device)
        state[name] = flat[order].reshape(state[name].shape)
    return state


def _scores(
    name: str, attribute: Callable[[Task], Array], world: World, state: Mapping[str, Tensor]
) -> Array:
    found = attribute(with_state(world, state))
    return numbers(name, "scores", found, ("n_train", "n_test"))


@frozen
class RankStability:
    """Agreement of rankings for models of different seeds; see `rank_stability`.

    The method is asked anew about each, the world's own included, at the end of training: scores
    over several checkpoints would be another question.

    Args:
        seeds: Models that are trained besides the world's own, on the whole train set.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attribute", "retraining"})
    seeds: int = 2

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the mean rank correlation with its interval."""
        everything = np.ones(len(scores_of(STABLE, evidence)), dtype=bool)
        if self.seeds < 1:
            raise InputError(f"{STABLE}: seeds is {self.seeds}; give 1 or more")
        attribute = attribute_of(STABLE, evidence)
        plan = [Counterfactual(everything, other_seed(evidence.seed, k)) for k in range(self.seeds)]
        world = evidence.world
        states = chain([trained_state(world)], world.retraining.train(plan))
        scores = np.stack([_scores(STABLE, attribute, world, state) for state in states])
        return rank_stability(scores, bootstrap=Bootstrap(seed=evidence.seed))


@frozen
class ModelRandomisation:
    """Agreement with scores of the same model with random weights; see `model_randomisation`.

    Weights are randomised by `randomised_state`. The method is asked anew about the trained model
    too, at the end of training: scores over several checkpoints would be another question.

    Args:
        models: Randomised models.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attribute"})
    models: int = 1

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the mean rank correlation with its interval; near 0 is good."""
        scores_of(RANDOMISED, evidence)
        if self.models < 1:
            raise InputError(f"{RANDOMISED}: models is {self.models}; give 1 or more")
        attribute, world = attribute_of(RANDOMISED, evidence), evidence.world
        seeds = [other_seed(evidence.seed, k) for k in range(self.models)]
        states = chain([trained_state(world)], (randomised_state(world, seed) for seed in seeds))
        scores = np.stack([_scores(RANDOMISED, attribute, world, state) for state in states])
        return model_randomisation(scores[0], scores[1:], bootstrap=Bootstrap(seed=evidence.seed))
