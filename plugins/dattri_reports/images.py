"""Images of examples, with their labels; wrong labels are marked."""

from __future__ import annotations

from dattri_reports.png import data_address
from dattri_reports.report import Report, text


def train_figure(report: Report, position: int, score: float | None = None) -> str:
    """Return the picture of a train example: its label, and the mark if that label is wrong."""
    world = report.world
    label, truth = int(world.train[1][position]), int(world.true_labels[position])
    wrong = bool(world.flipped[position])
    name = world.train_ids[position]
    said = f"training image {name}, labelled {label}"
    said += f", which is wrong: it is a {truth}" if wrong else ""
    said += f", score {score:+.3g}" if score is not None else ""
    caption = f'label {label} <b class="truth">true {truth}</b>' if wrong else str(label)
    number = f'<span class="score">{short(score)}</span>' if score is not None else ""
    return (
        f'<figure class="train{" flipped" if wrong else ""}" data-id="{text(name)}">'
        f"{_picture(data_address(world.pictures[0][position]), said)}"
        f"<figcaption>{caption}{number}</figcaption></figure>"
    )


def test_figure(report: Report, position: int) -> str:
    """Return the picture of a test example: its label and what the model took it for."""
    world = report.world
    label, guess = int(world.test[1][position]), int(report.predictions[position])
    name = world.test_ids[position]
    verdict = "correct" if guess == label else "mistaken"
    said = f"test image {name}, a {label}, which the model takes for a {guess}"
    return (
        f'<figure class="test {verdict}" data-id="{text(name)}">'
        f"{_picture(data_address(world.pictures[1][position]), said)}"
        f"<figcaption>a {label}<span>model says <b>{guess}</b></span></figcaption></figure>"
    )


def short(score: float) -> str:
    """Return a signed number in few characters: two digits, or all before the point."""
    return f"{score:+.0f}" if 10 <= abs(score) < 1e5 else f"{score:+.2g}"


def _picture(address: str, said: str) -> str:
    return f'<img src="{address}" alt="{text(said)}" title="{text(said)}">'
