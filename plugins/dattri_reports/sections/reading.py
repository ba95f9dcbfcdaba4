"""How to read the scores, and how to make the report again."""

from __future__ import annotations

from dattri_reports.page import text
from dattri_reports.report import Report


def reading(report: Report) -> str:
    """Return sign, scale, sources, and the command with its versions."""
    facts = report.world.facts
    checkpoints = ", ".join(map(str, facts["checkpoints"]))
    versions = " &middot; ".join(f"{text(k)} {text(v)}" for k, v in report.versions.items())
    sources = "".join(
        f"<li><code>{text(o.name)}</code> <span class='formula'>{text(o.formula)}</span>"
        f"<small>{text(o.citation)}</small></li>"
        for o in report.outcomes
    )
    return (
        '<section id="reading"><h2>How to read this</h2><dl class="terms">'
        "<dt>Sign</dt><dd>A positive score means that the training image helps: its presence "
        "lowers the loss of the test image. This holds for every method.</dd>"
        "<dt>Scale</dt><dd>An influence score divided by the number of training images is the "
        "first-order change of the test loss when the image is removed and the network trained "
        f"again: with n = {facts['n_train']:,}, a score of {facts['n_train']:,} would raise it by "
        "1. Cosines and random scores have no such unit, only an order.</dd>"
        "<dt>Training</dt><dd>"
        f"{100 * facts['train_accuracy']:.1f} % of the training labels are fitted, and of the "
        f"wrong ones {100 * facts['flipped_fitted']:.0f} %. Methods that follow training use the "
        f"states after epochs {checkpoints}; the others the last one.</dd>"
        f"<dt>Damping</dt><dd>Inverse Hessians add {report.world.damping:g} to every eigenvalue of "
        "the Hessian of the mean training loss: more than the weight decay, so that the sum is "
        "positive where training ended.</dd>"
        f"<dt>Data</dt><dd>{text(facts['data'])}</dd></dl>"
        f'<ul class="sources">{sources}</ul>'
        f"<h2>Make it again</h2><pre><code>{text(report.command)}</code></pre>"
        f'<p class="versions">seed {report.seed} &middot; {versions}</p></section>'
    )
