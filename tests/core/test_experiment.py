"""Counterfactuals, and what metrics look at."""

from __future__ import annotations

import numpy as np
import pytest

import dattri_core as dattri


def test_a_counterfactual_is_told_apart_by_its_mask_and_its_seed() -> None:
    masks = np.eye(9, dtype=bool)
    keys = {dattri.Counterfactual(mask, seed).key for mask in masks for seed in (0, 1, 2**32 - 1)}
    assert len(keys) == 27
    again = dattri.Counterfactual(masks[3].tolist(), 1)
    assert again.key == dattri.Counterfactual(masks[3], 1).key


def test_a_counterfactual_keeps_its_own_mask() -> None:
    mask = np.array([True, False, True])
    made = dattri.Counterfactual(mask, 0)
    mask[:] = False
    assert made.mask.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="read-only"):
        made.mask[0] = False


@pytest.mark.parametrize("mask", [[0, 1], [[True]], [0.5], []])
def test_other_masks_are_refused(mask: list[object]) -> None:
    with pytest.raises(dattri.InputError, match="one truth value for each train example"):
        dattri.Counterfactual(np.array(mask), 0)


def test_positions_are_told_how_they_become_a_mask() -> None:
    with pytest.raises(dattri.InputError, match=r"numpy\.isin\(numpy\.arange\(n_train\), posit"):
        dattri.Counterfactual([0, 3, 4], 0)  # type: ignore[arg-type]
    dattri.Counterfactual(np.isin(np.arange(6), [0, 3, 4]), 0)


def test_an_empty_train_set_is_refused() -> None:
    with pytest.raises(dattri.InputError, match="keeps none"):
        dattri.Counterfactual(np.zeros(4, bool), 0)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.0, True])
def test_other_seeds_are_refused(seed: object) -> None:
    with pytest.raises(dattri.InputError, match="from 0 to 2\\^32 - 1"):
        dattri.Counterfactual([True], seed)  # type: ignore[arg-type]


def test_the_protocols_of_experiments_tell_things_apart() -> None:
    class Anything:
        pass

    for protocol in (dattri.Retraining, dattri.Outcomes, dattri.Setting, dattri.Metric):
        assert not isinstance(Anything(), protocol)
