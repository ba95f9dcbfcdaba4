"""Test images beside the train images that helped and harmed them most."""

from __future__ import annotations

from dattri_reports.images import test_figure, train_figure
from dattri_reports.outcome import Outcome
from dattri_reports.page import text
from dattri_reports.report import Report

SHOWN = 7


def neighbours(report: Report) -> str:
    """Return one foldable block for each method; the first is open."""
    blocks: list[str] = []
    for outcome in report.done:
        rows = "".join(_row(report, outcome, j) for j in report.shown)
        blocks.append(
            f"<details{'' if blocks else ' open'}><summary><code>{text(outcome.name)}</code> "
            f"<small>{text(outcome.summary)}</small></summary>"
            f'<p class="formula">{text(outcome.formula)}</p>{rows}</details>'
        )
    return (
        '<section id="neighbours"><h2>Test images and the training images behind them</h2>'
        "<p>Left of each row a test image: first the mistakes of the model with the largest loss, "
        "then others by chance. A positive score means that training on the image lowered the loss "
        "of this test image; a negative one, that it raised it.</p>"
        f"{''.join(blocks)}</section>"
    )


def _row(report: Report, outcome: Outcome, position: int) -> str:
    scores = outcome.scores
    assert scores is not None
    name = report.world.test_ids[position]
    sides = []
    for title, kind, found in (
        ("most helpful", "helpful", scores.top(SHOWN, test=name)),
        ("most harmful", "harmful", scores.bottom(SHOWN, test=name)),
    ):
        where = {example: at for at, example in enumerate(scores.train_ids)}
        figures = "".join(
            train_figure(report, where[example], float(value))
            for example, value in zip(found.ids, found.values, strict=True)
        )
        sides.append(
            f'<div class="{kind}"><h4>{title}</h4><div class="strip">{figures}</div></div>'
        )
    return f'<div class="row">{test_figure(report, position)}{"".join(sides)}</div>'
