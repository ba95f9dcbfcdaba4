"""The table: how well each method finds the wrong labels, how long it took, how much memory."""

from __future__ import annotations

from typing import Any

from dattri_parts.measuring.peak import MEANING

from dattri_core import format_bytes
from dattri_reports.outcome import Outcome
from dattri_reports.report import Report, text

WIDTH = 168


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
        f"{share} bootstrap intervals over the training images.</p>"
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
        f'<td class="number">{_seconds(outcome.seconds)}</td><td class="number">{peak}</td></tr>'
    )


def _bar(result: Any) -> str:
    if result is None:
        return '<span class="none">&ndash;</span>'
    low, value, high, chance = (
        WIDTH * x for x in (result.low, result.value, result.high, result.chance)
    )
    return (
        f'<span class="measure"><b>{result.value:.3f}</b>'
        f'<svg viewBox="0 0 {WIDTH} 20" width="{WIDTH}" height="20" role="img" '
        f'aria-label="{result.value:.3f}, interval {result.low:.3f} to {result.high:.3f}">'
        f'<line class="axis" x1="0" y1="10" x2="{WIDTH}" y2="10"/>'
        f'<line class="chance" x1="{chance:.1f}" y1="1" x2="{chance:.1f}" y2="19"/>'
        f'<rect class="interval" x="{low:.1f}" y="6" width="{max(high - low, 1):.1f}" height="8" '
        f'rx="2"/><circle class="value" cx="{value:.1f}" cy="10" r="4"/></svg>'
        f"<small>{result.low:.3f} to {result.high:.3f}</small></span>"
    )


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
