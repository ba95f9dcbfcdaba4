"""Linear datamodels: outcomes regressed on masks, by ridge or by lasso, strength by validation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import frozen

from dattri_core import ConvergenceWarning, InputError, RandomStream

Array = np.ndarray[Any, Any]
RIDGE_GRID = np.logspace(-4, 4, 33)
"""Strengths that are tried, in units of the mean eigenvalue of the masks' Gram matrix."""
LASSO_GRID = np.logspace(0, -3, 16)
"""Strengths that are tried, in units of the least one that makes every weight 0."""
GAP = 1e-6
"""Of the lasso: relative duality gap at which a fit is done."""
STEPS = 10_000


@frozen(eq=False)
class LinearFit:
    """outcome_j(S) ~ intercept_j + sum_(i in S) weights_ij.

    Args:
        weights: ``[n, m]``.
        intercept: ``[m]``.
        strength: ``[m]``, of the penalty, the one that validation chose or the given one.
        validation_error: ``[m]``, mean squared error on train sets left out, at that strength.
        variance: ``[m]``, of the outcomes; an error near to it means that nothing was learnt.
    """

    weights: Array
    intercept: Array
    strength: Array
    validation_error: Array
    variance: Array

    def predict(self, masks: Array) -> Array:
        """Return the predicted outcomes of train sets, ``[k, m]``."""
        predicted: Array = self.intercept + masks.astype(np.float64) @ self.weights
        return predicted


def ridge_datamodel(masks: Array, outcomes: Array, strength: float | None = None) -> LinearFit:
    """Return the ridge regression of outcomes on masks.

    w = argmin sum_k (y_k - b - <w, x_k>)^2 + strength |w|^2 = (X^T X + strength I)^-1 X^T y, with
    X and y less their means; the intercept b is free.

    Args:
        masks: ``[k, n]`` truth values.
        outcomes: ``[k, m]``.
        strength: Of the penalty. None: for each column the one with the least squared error on
            train sets left out one at a time, of 33 from 10^-4 to 10^4 times the mean eigenvalue.

    Raises:
        InputError: Shapes do not fit, there are under 3 train sets, or they are all the same.

    Source: the linear datamodels of Ilyas et al. 2022, Datamodels: Predicting Predictions from
    Training Data (arXiv 2202.00622), with a ridge in place of the lasso.
    """
    x, y, _, _ = centred = _centred(masks, outcomes)
    k = len(x)
    gram = x @ x.T
    eigenvalues, q = np.linalg.eigh(gram)
    eigenvalues = np.maximum(eigenvalues, 0.0)
    unit = float(eigenvalues.sum() / k)
    _require_varied(unit)
    if strength is not None and not strength > 0:
        raise InputError(f"ridge datamodel: strength is {strength}, expected above 0, or None")
    grid = unit * RIDGE_GRID if strength is None else np.array([strength])
    along = q.T @ y
    errors = np.empty((len(grid), y.shape[1]))
    for position, value in enumerate(grid):
        # A left out residual is the residual over one less the leverage; the intercept's is 1 / k.
        shrunk = eigenvalues / (eigenvalues + value)
        residual = y - q @ (shrunk[:, None] * along)
        leverage = 1 / k + (q**2) @ shrunk
        errors[position] = ((residual / (1 - leverage)[:, None]) ** 2).mean(0)
    best = errors.argmin(0)
    chosen = grid[best]
    weights = x.T @ (q @ (along / (eigenvalues[:, None] + chosen)))
    return _fit(centred, weights, chosen, errors[best, np.arange(len(best))])


def lasso_datamodel(
    masks: Array, outcomes: Array, strength: float | None = None, *, folds: int = 5, seed: int = 0
) -> LinearFit:
    """Return the lasso regression of outcomes on masks: few train examples have a weight.

    w = argmin (1 / 2k) sum_k (y_k - b - <w, x_k>)^2 + strength |w|_1; the intercept b is free.

    Args:
        masks: ``[k, n]`` truth values.
        outcomes: ``[k, m]``.
        strength: Of the penalty. None: for each column the one with the least squared error over
            folds, of 16 down to a thousandth of the least that makes all weights 0.
        folds: Parts of the train sets, each left out once.
        seed: Of the parts.

    Raises:
        InputError: Shapes do not fit, there are fewer train sets than folds and 1, or they are all
            the same.

    Source: Ilyas et al. 2022, Datamodels: Predicting Predictions from Training Data
    (arXiv 2202.00622), section 2. Solver: Beck and Teboulle 2009, FISTA, with restarts.
    """
    x, y, _, _ = centred = _centred(masks, outcomes)
    k, m = y.shape
    _require_varied(float((x**2).sum()))
    if strength is not None:
        if not strength > 0:
            raise InputError(f"lasso datamodel: strength is {strength}, expected above 0, or None")
        chosen = np.full(m, float(strength))
        return _fit(centred, _lasso(x, y, [chosen])[0], chosen, np.full(m, np.nan))
    if not 2 <= folds < k:
        raise InputError(
            f"lasso datamodel: {folds} folds of {k} train sets; expected 2 or more, and fewer than "
            "there are train sets"
        )
    random = np.random.Generator(np.random.PCG64(RandomStream(seed, "folds").key(k, folds)))
    part = random.permutation(k) % folds
    top = np.maximum(np.abs(x.T @ y).max(0) / k, np.finfo(float).tiny)
    path = [value * top for value in LASSO_GRID]
    errors = np.zeros((len(path), m))
    for fold in range(folds):
        inside = part != fold
        shift = x[inside].mean(0), y[inside].mean(0)
        fits = _lasso(x[inside] - shift[0], y[inside] - shift[1], path)
        for position, weights in enumerate(fits):
            left = y[~inside] - shift[1] - (x[~inside] - shift[0]) @ weights
            errors[position] += (left**2).sum(0) / k
    best = errors.argmin(0)
    fits = _lasso(x, y, path[: int(best.max()) + 1])
    weights = np.stack([fits[b][:, j] for j, b in enumerate(best)], axis=1)
    chosen = LASSO_GRID[best] * top
    return _fit(centred, weights, chosen, errors[best, np.arange(m)])


def _lasso(x: Array, y: Array, path: Sequence[Array]) -> list[Array]:
    """Return the weights ``[n, m]`` for each strength ``[m]`` of a path, the largest first."""
    k = len(x)
    steep = max(float(np.linalg.eigvalsh(x @ x.T if k < x.shape[1] else x.T @ x)[-1]) / k, 1e-300)
    w = np.zeros((x.shape[1], y.shape[1]))
    found = []
    for strength in path:
        w = _fista(x, y, strength, steep, w)
        found.append(w)
    return found


def _fista(x: Array, y: Array, strength: Array, steep: float, start: Array) -> Array:
    """Minimise one lasso for every column at once, by proximal steps with momentum."""
    k = len(x)
    w: Array = start
    point: Array = start
    momentum = 1.0
    scale = np.maximum((y**2).sum(0) / (2 * k), np.finfo(float).tiny)
    for step in range(STEPS):
        slope = x.T @ (x @ point - y) / k
        moved = point - slope / steep
        after = np.sign(moved) * np.maximum(np.abs(moved) - strength / steep, 0.0)
        if float(((point - after) * (after - w)).sum()) > 0:  # it went past: no momentum now
            momentum = 1.0
        later = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        point = after + (momentum - 1) / later * (after - w)
        w, momentum = after, later
        if step % 10 == 9 and (_gap(x, y, w, strength) <= GAP * scale).all():
            return w
    warnings.warn(
        f"lasso datamodel: {STEPS} steps did not reach a relative duality gap of {GAP}; the "
        "weights are nearly those of the lasso",
        ConvergenceWarning,
        stacklevel=4,
    )
    return w


def _gap(x: Array, y: Array, w: Array, strength: Array) -> Array:
    """Return the duality gap of the lasso in each column, ``[m]``."""
    k = len(x)
    residual = y - x @ w
    primal = (residual**2).sum(0) / (2 * k) + strength * np.abs(w).sum(0)
    steepest = np.maximum(np.abs(x.T @ residual).max(0) / k, np.finfo(float).tiny)
    dual_point = residual * np.minimum(1.0, strength / steepest)
    dual = ((y**2).sum(0) - ((y - dual_point) ** 2).sum(0)) / (2 * k)
    gap: Array = primal - dual
    return gap


def _centred(masks: Array, outcomes: Array) -> tuple[Array, Array, Array, Array]:
    """Return masks and outcomes less their means, and the means."""
    x, y = np.asarray(masks, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 3:
        raise InputError(
            f"datamodel: masks of shape {x.shape} and outcomes of shape {y.shape}; expected "
            "[k, n] and [k, m] of at least 3 train sets"
        )
    means = x.mean(0), y.mean(0)
    return x - means[0], y - means[1], *means


def _require_varied(size: float) -> None:
    if size <= 1e-12:
        raise InputError("datamodel: all train sets are the same, so no example has an effect")


def _fit(
    centred: tuple[Array, Array, Array, Array], weights: Array, strength: Array, error: Array
) -> LinearFit:
    _, y, mean_mask, mean = centred
    return LinearFit(weights, mean - mean_mask @ weights, strength, error, y.var(0))
