"""Toy attributors that ask for models of other train sets: right without a fault."""

import attrs
import numpy as np
import torch

import dattri_core as dattri


@attrs.frozen
class ToyLeaveOneOut:
    """n (U(all) - U(all but i)), or something like it."""

    ground_truth: object = None
    signed: bool = True
    negative: bool = False
    rolled: int = 0
    noisy: bool = False
    target: str = ""

    def attribute(self, task, train, test, *, progress=None, **settings):
        sides = dattri.Examples.of(train, "train"), dattri.Examples.of(test, "test")
        n = len(sides[0])
        masks = self.masks(n)
        name = "loss" if task.target is None else task.target.name
        plan = [dattri.Counterfactual(mask) for mask in masks]
        found = np.asarray(self.ground_truth.outcomes(plan, self.target or name))
        utilities = -task.sign * found if self.signed else -found
        effects = n * self.effects(np.array(masks), utilities)
        if self.noisy:
            effects = effects + torch.randn(effects.shape).double().numpy()
        if self.negative:
            effects = -effects
        values = torch.from_numpy(np.roll(effects, self.rolled, axis=0).copy())
        return dattri.Scores(values, list(sides[0].ids), list(sides[1].ids), {"n_train": n})

    def masks(self, n):
        return [np.ones(n, bool), *~np.eye(n, dtype=bool)]

    def effects(self, masks, utilities):
        return utilities[:1] - utilities[1:]


@attrs.frozen
class ToyDrawn(ToyLeaveOneOut):
    """n (E[U | i trained on] - E[U | i left out]) over train sets that are drawn."""

    count: int = 100

    def masks(self, n):
        random = np.random.default_rng(0)
        drawn = random.random((self.count, n)) < 0.5
        return [mask for mask in drawn if mask.any()]

    def effects(self, masks, utilities):
        return np.stack([utilities[m].mean(0) - utilities[~m].mean(0) for m in masks.T])
