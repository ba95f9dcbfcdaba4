"""How far the methods agree: rank correlations of their scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata

from dattri_reports.page import text
from dattri_reports.report import Report

Array = np.ndarray[Any, Any]


def spearman(scores: list[Array]) -> Array:
    """Return the rank correlation of every two methods, ``[k, k]``, a mean over test examples.

    For each test example the train examples are ranked (ties get their mean rank) and the ranks
    correlated: rho = mean_j corr(rank S_.j, rank S'_.j) (Spearman 1904). A column without spread
    has no ranking and counts 0.

    Args:
        scores: k matrices ``[n, m]``.
    """
    standard = []
    for values in scores:
        ranks = rankdata(values, axis=0)
        ranks = ranks - ranks.mean(0)
        length = np.sqrt((ranks**2).sum(0))
        standard.append(ranks / np.where(length > 0, length, np.inf))
    return np.array([[float((a * b).sum(0).mean()) for b in standard] for a in standard])


def agreement(report: Report) -> str:
    """Return the matrix of rank correlations."""
    done = report.done
    rho = spearman([np.asarray(o.scores.values) for o in done if o.scores is not None])
    head = "".join(f'<th scope="col"><code>{text(o.name)}</code></th>' for o in done)
    rows = "".join(
        f'<tr><th scope="row"><code>{text(outcome.name)}</code></th>'
        + "".join(_cell(value) for value in line)
        + "</tr>"
        for outcome, line in zip(done, rho, strict=True)
    )
    return (
        '<section id="agreement"><h2>Do the methods agree?</h2>'
        "<p>Spearman rank correlation of the scores of all training images, a mean over the test "
        "images. 1 is the same order, 0 no relation.</p>"
        f'<div class="scroll" tabindex="0"><table class="matrix">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _cell(value: float) -> str:
    side = "plus" if value >= 0 else "minus"
    value = 0.0 if abs(value) < 0.005 else value
    return f'<td class="{side}" style="--strength:{min(1, abs(value)):.2f}">{value:.2f}</td>'
