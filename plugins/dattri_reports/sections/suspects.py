"""The most suspicious train images of each method: what a person would check first."""

from __future__ import annotations

import numpy as np

from dattri_reports.images import train_figure
from dattri_reports.outcome import Outcome
from dattri_reports.page import text
from dattri_reports.report import Report

SHOWN = 18


def suspects(report: Report) -> str:
    """Return a strip of images for each method."""
    wrong = int(report.world.flipped.sum())
    strips = "".join(_strip(report, outcome, wrong) for outcome in report.done)
    return (
        '<section id="suspects"><h2>The images to check first</h2>'
        f"<p>The {SHOWN} most suspicious training images of each method, the worst first. "
        'A <b class="truth">frame</b> marks an image that really was given a wrong label: below it '
        f"the label it was trained with, then the true one.</p>{strips}</section>"
    )


def _strip(report: Report, outcome: Outcome, wrong: int) -> str:
    suspicion = outcome.suspicion
    assert suspicion is not None
    order = np.argsort(-suspicion, kind="stable")
    found = int(report.world.flipped[order[:wrong]].sum())
    hits = int(report.world.flipped[order[:SHOWN]].sum())
    figures = "".join(train_figure(report, int(i)) for i in order[:SHOWN])
    return (
        f"<h3><code>{text(outcome.name)}</code> <small>by {text(outcome.suspicion_name)}: "
        f"{hits} of these {SHOWN} are wrong; checking the first {wrong} images finds {found} of "
        f'{wrong} wrong labels</small></h3><div class="strip">{figures}</div>'
    )
