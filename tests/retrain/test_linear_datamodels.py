"""Linear datamodels: closed forms, brute-force validation, and scikit-learn's lasso."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from dattri_retrain import lasso_datamodel, ridge_datamodel
from dattri_retrain.linear import LASSO_GRID, RIDGE_GRID
from hypothesis import given, settings
from hypothesis import strategies as st

from dattri_core import ConvergenceWarning, InputError


def masks_and_outcomes(k, n, m, seed=0, noise=0.1, some=None):
    random = np.random.default_rng(seed)
    masks = random.random((k, n)) < 0.5
    masks[0] = True
    truth = random.normal(size=(n, m))
    if some is not None:
        truth[some:] = 0.0
    outcomes = 2.0 + masks @ truth + noise * random.normal(size=(k, m))
    return masks, outcomes, truth


def ridge_by_normal_equations(masks, outcomes, strength):
    """The intercept is a column of ones without a penalty."""
    x = np.concatenate([np.ones((len(masks), 1)), masks], axis=1).astype(float)
    penalty = strength * np.eye(x.shape[1])
    penalty[0, 0] = 0.0
    found = np.linalg.solve(x.T @ x + penalty, x.T @ outcomes)
    return found[1:], found[0]


# --- ridge ----------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(
    st.integers(4, 30),
    st.integers(1, 30),
    st.integers(1, 3),
    st.sampled_from([0.01, 1.0, 50.0]),
    st.integers(0, 99),
)
def test_ridge_is_its_closed_form(k, n, m, strength, seed):
    masks, outcomes, _ = masks_and_outcomes(k, n, m, seed)
    masks[1] = ~masks[0]  # not all the same
    fit = ridge_datamodel(masks, outcomes, strength)
    weights, intercept = ridge_by_normal_equations(masks, outcomes, strength)
    assert np.allclose(fit.weights, weights, atol=1e-9)
    assert np.allclose(fit.intercept, intercept, atol=1e-9)
    assert np.allclose(fit.predict(masks), masks @ weights + intercept, atol=1e-9)


@pytest.mark.parametrize(("k", "n"), [(14, 5), (12, 25)])
def test_ridge_is_validated_by_leaving_each_train_set_out(k, n):
    masks, outcomes, _ = masks_and_outcomes(k, n, 3, seed=2, noise=1.0)
    fit = ridge_datamodel(masks, outcomes)
    x = masks - masks.mean(0)
    unit = np.trace(x @ x.T) / k
    errors = np.zeros((len(RIDGE_GRID), 3))
    for position, relative in enumerate(RIDGE_GRID):
        for out in range(k):
            rest = np.arange(k) != out
            w, b = ridge_by_normal_equations(masks[rest], outcomes[rest], relative * unit)
            errors[position] += (outcomes[out] - masks[out] @ w - b) ** 2 / k
    best = errors.argmin(0)
    assert np.allclose(fit.strength, RIDGE_GRID[best] * unit)
    assert np.allclose(fit.validation_error, errors.min(0))
    assert np.allclose(fit.variance, outcomes.var(0))


def test_ridge_finds_the_effects_of_an_additive_outcome():
    masks, outcomes, truth = masks_and_outcomes(200, 20, 4, noise=1e-3)
    fit = ridge_datamodel(masks, outcomes)
    assert np.allclose(fit.weights, truth, atol=3e-3)
    assert (fit.validation_error < 1e-4 * fit.variance).all()
    noise = np.random.default_rng(1).normal(size=(200, 4))
    nothing = ridge_datamodel(masks, noise)
    assert (nothing.validation_error > 0.9 * nothing.variance).all()
    assert np.abs(nothing.weights).max() < 0.2


# --- lasso ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("k", "n"), [(40, 12), (25, 60)])
@pytest.mark.parametrize("strength", [0.01, 0.1])
def test_lasso_is_that_of_scikit_learn(k, n, strength):
    linear = pytest.importorskip("sklearn.linear_model")
    masks, outcomes, _ = masks_and_outcomes(k, n, 3, seed=1, some=4)
    fit = lasso_datamodel(masks, outcomes, strength)
    x, y = masks.astype(float), outcomes
    for j in range(3):
        peer = linear.Lasso(alpha=strength, tol=1e-12, max_iter=100_000).fit(x, y[:, j])
        assert np.allclose(fit.weights[:, j], peer.coef_, atol=2e-3)
        assert fit.intercept[j] == pytest.approx(peer.intercept_, abs=5e-3)
        objective, best = (
            ((y[:, j] - x @ w - b) ** 2).mean() / 2 + strength * np.abs(w).sum()
            for w, b in ((fit.weights[:, j], fit.intercept[j]), (peer.coef_, peer.intercept_))
        )
        assert best <= objective + 1e-12
        assert objective - best <= 1e-6 * y[:, j].var()


def test_lasso_meets_the_conditions_of_its_optimum():
    masks, outcomes, _ = masks_and_outcomes(60, 15, 2, seed=3)
    fit = lasso_datamodel(masks, outcomes, 0.05)
    slopes = (masks - masks.mean(0)).T @ (outcomes - fit.predict(masks)) / 60
    zero = fit.weights == 0
    assert zero.any()
    assert not zero.all()
    assert (np.abs(slopes[zero]) <= 0.05 + 1e-3).all()
    assert np.allclose(slopes[~zero], 0.05 * np.sign(fit.weights[~zero]), atol=1e-3)


def test_lasso_is_validated_over_folds_and_finds_the_few_that_matter():
    masks, outcomes, truth = masks_and_outcomes(150, 40, 2, seed=4, noise=0.3, some=3)
    fit = lasso_datamodel(masks, outcomes)
    assert (np.abs(fit.weights).argsort(0)[-3:] < 3).all()
    assert np.allclose(fit.weights[:3], truth[:3], atol=0.2)
    x, y = masks - masks.mean(0), outcomes - outcomes.mean(0)
    top = np.abs(x.T @ y).max(0) / 150
    grid = LASSO_GRID[:, None] * top
    assert all(np.isclose(fit.strength[j], grid[:, j]).any() for j in range(2))
    assert (fit.strength < top).all()
    assert (fit.validation_error > 0.3**2 * 0.5).all()
    assert (fit.validation_error < 0.3**2 * 2).all()
    again = lasso_datamodel(masks, outcomes)
    assert np.array_equal(fit.weights, again.weights)
    at_that = lasso_datamodel(masks, outcomes[:, :1], float(fit.strength[0]))
    assert np.allclose(at_that.weights[:, 0], fit.weights[:, 0], atol=5e-3)


def test_lasso_that_is_strong_enough_keeps_nothing():
    masks, outcomes, _ = masks_and_outcomes(30, 8, 2)
    x = masks - masks.mean(0)
    top = np.abs(x.T @ (outcomes - outcomes.mean(0))).max() / 30
    assert (lasso_datamodel(masks, outcomes, 1.001 * top).weights == 0).all()
    assert (lasso_datamodel(masks, outcomes, 0.9 * top).weights != 0).any()


def test_a_lasso_that_did_not_converge_says_so(monkeypatch):
    monkeypatch.setattr("dattri_retrain.linear.STEPS", 10)
    masks, outcomes, _ = masks_and_outcomes(30, 60, 2)
    with pytest.warns(ConvergenceWarning, match="10 steps did not reach"):
        lasso_datamodel(masks, outcomes, 1e-4)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lasso_datamodel(masks, outcomes, 1e-2)


# --- refused --------------------------------------------------------------------------------------
@pytest.mark.parametrize("fit", [ridge_datamodel, lasso_datamodel])
def test_bad_input_is_refused(fit):
    masks, outcomes, _ = masks_and_outcomes(10, 4, 2)
    with pytest.raises(InputError, match=r"shape \(10, 4\) and outcomes of shape \(9, 2\)"):
        fit(masks, outcomes[:9])
    with pytest.raises(InputError, match="at least 3"):
        fit(masks[:2], outcomes[:2])
    with pytest.raises(InputError, match="all train sets are the same"):
        fit(np.ones_like(masks), outcomes)
    with pytest.raises(InputError, match="strength is 0"):
        fit(masks, outcomes, 0.0)
    with pytest.raises(InputError, match="10 folds of 10 train sets"):
        lasso_datamodel(masks, outcomes, folds=10)
