"""How the scores of each method are spread, for correctly and wrongly labelled train images."""

from __future__ import annotations

from typing import Any

import numpy as np

from dattri_reports.outcome import Outcome
from dattri_reports.page import text
from dattri_reports.report import Report

Array = np.ndarray[Any, Any]
WIDTH, HEIGHT, MARGIN, BINS = 320, 120, 30, 61
FLOOR = 1e-4  # share at the foot of the axis, four decades down
INNER = 99.5  # percentile of |score| at the ends of the axis


def histogram(report: Report) -> str:
    """Return one small chart for each method."""
    charts = "".join(_chart(report, outcome) for outcome in report.done)
    return (
        '<section id="histogram"><h2>How scores are spread</h2>'
        "<p>All scores, training images by test images: the share in each bin, on a logarithmic "
        'axis. <span class="key correct">correctly labelled</span> '
        '<span class="key wrong">wrongly labelled</span> training images, each adding up to one. '
        f"The axis holds {INNER} % of the scores; the rest is counted at its ends. Only the order "
        "and the sign compare between methods: their units differ.</p>"
        f'<div class="charts">{charts}</div></section>'
    )


def _chart(report: Report, outcome: Outcome) -> str:
    assert outcome.scores is not None
    values = np.asarray(outcome.scores.values, dtype=np.float64)
    reach = float(np.percentile(np.abs(values), INNER)) or 1.0
    edges = np.linspace(-reach, reach, BINS + 1)
    shapes = []
    for kind, rows in (("correct", ~report.world.flipped), ("wrong", report.world.flipped)):
        inside = np.clip(values[rows], -reach, reach)
        share = np.histogram(inside, edges)[0] / inside.size
        height = HEIGHT * (1 - np.log10(np.maximum(share, FLOOR)) / np.log10(FLOOR))
        shapes.append(_steps(height, kind))
    decades = "".join(
        f'<line class="grid" x1="0" y1="{y}" x2="{WIDTH}" y2="{y}"/>'
        f'<text class="level" x="-5" y="{y + 3}" text-anchor="end">{share}</text>'
        for y, share in zip((30, 60, 90), ("10 %", "1 %", "0.1 %"), strict=True)
    )
    harmful = float((values < 0).mean())
    return (
        f'<figure class="chart"><figcaption><code>{text(outcome.name)}</code> '
        f"<small>{100 * harmful:.0f} % negative</small></figcaption>"
        f'<svg viewBox="{-MARGIN} 0 {WIDTH + MARGIN} {HEIGHT + 18}" role="img" '
        f'aria-label="histogram of the scores of {text(outcome.name)}">{decades}'
        f'<line class="zero" x1="{WIDTH / 2}" y1="0" x2="{WIDTH / 2}" y2="{HEIGHT}"/>'
        f'{"".join(shapes)}<line class="axis" x1="0" y1="{HEIGHT}" x2="{WIDTH}" y2="{HEIGHT}"/>'
        f'<text x="0" y="{HEIGHT + 14}">{-reach:.2g}</text>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT + 14}" text-anchor="middle">0</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{reach:.2g}</text></svg></figure>'
    )


def _steps(height: Array, kind: str) -> str:
    width = WIDTH / len(height)
    path = [f"M0 {HEIGHT}"]
    for number, h in enumerate(height):
        path.append(f"V{HEIGHT - h:.1f}H{(number + 1) * width:.1f}")
    return f'<path class="{kind}" d="{"".join(path)}V{HEIGHT}Z"/>'
