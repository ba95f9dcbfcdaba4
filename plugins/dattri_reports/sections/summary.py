"""The head of the report: what was done, in one paragraph and five numbers."""

from __future__ import annotations

from dattri_reports.report import Report, text


def summary(report: Report) -> str:
    """Return title, lead and key figures."""
    facts = report.world.facts
    figures = [
        (f"{facts['n_train']:,}", "training images"),
        (f"{facts['flipped']}", "with a wrong label, on purpose"),
        (f"{facts['parameters']:,}", f"parameters, {facts['model']}"),
        (f"{100 * facts['test_accuracy']:.1f} %", f"correct on {facts['n_test']} test images"),
        (f"{report.seconds:.0f} s", f"for {len(report.outcomes)} methods, training included"),
    ]
    cells = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for v, k in figures)
    return (
        '<header><p class="kicker">dattri-core demo</p>'
        "<h1>Which training images helped, and which did harm?</h1>"
        f'<p class="lead">A network was trained on real images, '
        f"{100 * facts['wrong_share']:.0f} % of which were given a wrong label. Each method then "
        "scored every training image for every test image. Good scores explain single "
        "predictions, and they point at the wrong labels without being told which they are.</p>"
        f"<dl class='figures'>{cells}</dl></header>"
    )
