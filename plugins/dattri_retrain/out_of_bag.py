"""Data-OOB: how well models that did not see an example answer it."""

from __future__ import annotations

from typing import Any

import numpy as np

from dattri_core import InputError
from dattri_retrain.estimate import Estimate

Array = np.ndarray[Any, Any]
FRACTION = 1 - np.exp(-1.0)
"""Share of the examples that a bootstrap of their number holds, once or more: 1 - 1/e."""


def data_oob(masks: Array, utilities: Array) -> Estimate:
    """Return the mean utility on each train example of the models that were trained without it.

    phi_i = sum_k 1[i not in S_k] U_k(z_i) / sum_k 1[i not in S_k]

    Kwon and Zou bag with bootstraps. Train sets are sets here, so the bags are subsets; those that
    hold ``FRACTION`` of the examples have as many different ones as a bootstrap.

    Args:
        masks: ``[k, n]``, what each model was trained on.
        utilities: ``[k, n]``, of each model on each *train* example; more is better.

    Returns:
        An estimate of one column, with the standard error of each mean.

    Raises:
        InputError: Shapes do not fit, or an example was left out less than twice.

    Source: Kwon and Zou 2023, Data-OOB: Out-of-bag Estimate as a Simple and Efficient Data Value
    (arXiv 2304.07718), equation 2.
    """
    masks, utilities = np.asarray(masks), np.asarray(utilities, dtype=np.float64)
    if masks.dtype != np.bool_ or masks.ndim != 2 or masks.shape != utilities.shape:
        raise InputError(
            f"data-oob: masks {masks.dtype} of shape {masks.shape} and utilities of shape "
            f"{utilities.shape}; expected truth values and numbers, both [k, n_train]: outcomes "
            "are those on the train examples"
        )
    out = ~masks
    count = out.sum(0)
    if count.min() < 2:
        raise InputError(
            f"data-oob: train example {int(count.argmin())} was left out of {int(count.min())} of "
            f"{len(masks)} train sets, and 2 are needed; train more models, or on smaller sets"
        )
    values = np.where(out, utilities, 0.0).sum(0) / count
    squares = np.where(out, (utilities - values) ** 2, 0.0).sum(0)
    errors = np.sqrt(squares / (count * (count - 1.0)))
    return Estimate(
        values=values[:, None],
        errors=errors[:, None],
        mean=values,
        mean_errors=errors,
        draws=len(masks),
        evaluations=len(masks),
        stopped="budget",
    )
