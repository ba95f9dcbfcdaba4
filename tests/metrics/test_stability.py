"""Rank stability and model randomisation, on arrays and with real methods."""

from itertools import combinations

import numpy as np
import pytest
import torch
from dattri_metrics import model_randomisation, rank_stability
from dattri_metrics.stability import (
    ModelRandomisation,
    RankStability,
    randomised_state,
    with_state,
)
from scipy import stats
from toy_world import Additive, effects, evidence_of, world_of

import dattri_core as dattri
from dattri_core import InputError


def test_equal_loops_with_scipy():
    scores = np.random.default_rng(0).normal(size=(4, 9, 5)) + effects(9, 5)
    each = [
        stats.spearmanr(a[:, j], b[:, j]).statistic
        for a, b in combinations(scores, 2)
        for j in range(5)
    ]
    found = rank_stability(scores)
    assert found.value == pytest.approx(np.mean(each))
    assert found.low < found.value < found.high
    each = [
        stats.spearmanr(scores[0][:, j], b[:, j]).statistic for b in scores[1:] for j in range(5)
    ]
    against = model_randomisation(scores[0], scores[1:])
    assert against.value == pytest.approx(np.mean(each))
    assert (found.higher_is_better, against.higher_is_better) == (True, False)


def test_the_same_scores_agree_and_constant_ones_count_zero():
    scores = effects()
    same = rank_stability(np.stack([scores, 3 * scores]))
    assert (same.value, same.high) == (1, 1)
    assert 0.99 < same.low < 1
    half = scores.copy()
    half[:, :3] = 0.0
    assert rank_stability(np.stack([scores, half])).value == pytest.approx(0.5)
    assert rank_stability(np.stack([half, scores])).value == pytest.approx(0.5)
    assert model_randomisation(scores, np.zeros((1, *scores.shape))).value == 0.0


def test_a_column_that_varies_by_rounding_only_counts_zero_on_either_side():
    scores = effects()
    silent = scores.copy()
    silent[:, 0] = 1 + 2.3e-16 * (np.arange(len(scores)) % 2)
    assert np.ptp(silent[:, 0]) > 0
    for pair in ((scores, silent), (silent, scores)):
        assert rank_stability(np.stack(pair)).value == pytest.approx(5 / 6)
        assert model_randomisation(pair[0], pair[1][None]).value == pytest.approx(5 / 6)
    every = np.repeat(silent[:, :1], scores.shape[1], axis=1)
    nothing = rank_stability(np.stack([scores, every]))
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_randomised_weights_are_the_trained_ones_in_another_order():
    world = world_of(Additive(effects()))
    before = {k: v.clone() for k, v in world.task.model.state_dict().items()}
    first, again, other = (randomised_state(world, seed) for seed in (0, 0, 1))
    for name, tensor in before.items():
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name].flatten().sort().values, tensor.flatten().sort().values)
        assert torch.equal(world.task.model.state_dict()[name], tensor)
    assert not torch.equal(first["weight"], before["weight"])
    assert not torch.equal(first["weight"], other["weight"])


def test_a_task_at_other_weights_keeps_everything_else():
    world = world_of(Additive(effects()))
    state = randomised_state(world, 0)
    task = with_state(world, state)
    (checkpoint,) = task.checkpoints
    assert checkpoint.learning_rate == 0.25
    assert torch.equal(checkpoint.load(task.model)["weight"], state["weight"])
    assert task.model is world.task.model
    assert task.parameter_names == world.task.parameter_names


def measured(part, attribute, seed=0):
    """Scores of the world's own task, then what the part makes of the method."""
    retraining = Additive(effects())
    world = world_of(retraining)
    evidence = evidence_of(effects(), retraining, world=world, attribute=attribute, seed=seed)
    return part.measure(evidence)


def scorer(name):
    world = world_of(Additive(effects()))

    def attribute(task):
        found = dattri.attribute(task, world.train, world.test, method=name, progress=False)
        return found.values.double().numpy()

    return attribute


@pytest.mark.parametrize("name", ["grad-dot", "tracin"])
def test_real_methods_change_with_the_model(name):
    found = measured(ModelRandomisation(models=2), scorer(name))
    assert -1 < found.value < 0.99
    stable = measured(RankStability(seeds=2), scorer(name))
    assert -1 < stable.value < 0.99
    assert measured(RankStability(seeds=2), scorer(name)) == stable
    assert measured(RankStability(seeds=2), scorer(name), seed=1) != stable


def test_a_method_that_ignores_the_model_is_found_out():
    data_only = effects(seed=3)
    assert measured(ModelRandomisation(), lambda task: data_only).value == pytest.approx(1)
    assert measured(RankStability(), lambda task: data_only).value == pytest.approx(1)


def test_rank_stability_trains_on_everything_with_other_seeds():
    asked = []

    class Watched(Additive):
        def train(self, counterfactuals):
            asked.extend(counterfactuals)
            return super().train(counterfactuals)

    retraining = Watched(effects())
    evidence = evidence_of(effects(), retraining, attribute=lambda task: effects(seed=len(asked)))
    RankStability(seeds=3).measure(evidence)
    assert [c.mask.all() for c in asked] == [True] * 3
    assert len({c.seed for c in asked}) == 3


def test_bad_input_is_named():
    with pytest.raises(InputError, match="scores of 1 seed"):
        rank_stability(effects()[None])
    for n in (1, 2):
        for constant in (np.ones((2, n, 4)), effects(n)[None].repeat(2, 0)):
            with pytest.raises(InputError, match=f"rank-stability: a correlation over {n} train"):
                rank_stability(constant)
    with pytest.raises(InputError, match="shapes differ"):
        model_randomisation(effects(), effects(23)[None])
    with pytest.raises(InputError, match=r"randomised\[0, 1, 0\] is nan"):
        bad = effects()
        bad[1, 0] = np.nan
        model_randomisation(effects(), bad[None])
    for part in (RankStability(), ModelRandomisation()):
        with pytest.raises(InputError, match="the evidence has no attribute"):
            part.measure(evidence_of(effects(), Additive(effects())))
    evidence = evidence_of(effects(), Additive(effects()), attribute=lambda task: effects())
    with pytest.raises(InputError, match="seeds is 0"):
        RankStability(seeds=0).measure(evidence)
    with pytest.raises(InputError, match="models is 0"):
        ModelRandomisation(models=0).measure(evidence)
