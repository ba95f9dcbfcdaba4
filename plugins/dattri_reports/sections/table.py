"""The table: how well each method finds the wrong labels, how long it took, how much memory."""

from __future__ import annotations

from typing import Any

from dattri_parts.measuring.peak import MEANING

from dattri_core import format_bytes
from dattri_reports.bars import bar, seconds
from dattri_reports.outcome import Outcome
from dattri_reports.page import text
from dattri_reports.report import Report


def table(report: Report) -> str:
    """Return the table of methods with interval bars."""
    rows = "".join(_row(outcome) for outcome in report.ranked)
    notes = [
        f"<li><b>{text(o.name)}</b>: {text(note)}.</li>"
        for o in report.ranked
        for note in (*([f"no self-influence: {o.self_note}"] if o.self_note else []), *o.notes)
    ]
    some = report.done[0].by_test if report.done else None
    share = f"{100 * some.confidence:.0f} %" if some else "95 %"
    return (
        '<section id="table"><h2>Finding the wrong labels</h2>'
        "<p>AUROC: the chance that a wrongly labelled image is ranked above a correctly labelled "
        "one. 1 is perfect, 0.5 (the dotted line) is chance. Bars are "
        f"{share} intervals over the training images.</p>"
        '<div class="scroll" tabindex="0"><table class="methods"><thead><tr>'
        '<th scope="col">method</th>'
        '<th scope="col">AUROC by self-influence<small>high is suspicious</small></th>'
        '<th scope="col">AUROC by test scores<small>mean harm to the clean test set</small></th>'
        '<th scope="col" class="number">time</th><th scope="col" class="number">peak memory</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<ul class="notes">{"".join(notes)}'
        "<li>Self-influence is the score of an image for its own loss, the field&rsquo;s usual "
        "suspicion: large where only the image itself explains its label. A cosine of a gradient "
        "with itself is 1 for every image, so there it can only give chance.</li>"
        "<li>Time is for fitting and for attributing all test images; self-influence is not "
        f"included. Peak memory is the {text(MEANING)}.</li></ul></section>"
    )


def _row(outcome: Outcome) -> str:
    head = (
        f'<th scope="row"><code>{text(outcome.name)}</code>'
        f"<small>{text(outcome.summary)}</small></th>"
    )
    if outcome.error:
        reason = f'<td colspan="4"><b>not run.</b> {text(outcome.error)}</td>'
        return f'<tr class="failed">{head}{reason}</tr>'
    peak = "&ndash;" if outcome.peak is None else format_bytes(outcome.peak)
    return (
        f"<tr>{head}<td>{_bar(outcome.by_self)}</td><td>{_bar(outcome.by_test)}</td>"
        f'<td class="number">{seconds(outcome.seconds)}</td><td class="number">{peak}</td></tr>'
    )


def _bar(result: Any) -> str:
    if result is None:
        return '<span class="none">&ndash;</span>'
    return bar(result.value, result.low, result.high, result.chance)
