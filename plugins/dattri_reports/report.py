"""The report: everything that its sections may show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from attrs import frozen

from dattri_reports.outcome import Outcome
from dattri_reports.page import page

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class Report:
    """What a run found.

    Args:
        world: Data, labels, images and the trained model.
        outcomes: One for each method, failed ones too.
        predictions: ``[n_test]``, the model's classes.
        shown: Positions of the test images to show.
        command: As typed.
        versions: Name to version.
        seed: Of the whole run.
        seconds: Of the whole run.
    """

    world: Any
    outcomes: tuple[Outcome, ...]
    predictions: Array
    shown: tuple[int, ...]
    command: str
    versions: Mapping[str, str]
    seed: int
    seconds: float

    @property
    def done(self) -> list[Outcome]:
        """Return the outcomes that have scores, the best first."""
        return [outcome for outcome in self.ranked if outcome.scores is not None]

    @property
    def ranked(self) -> list[Outcome]:
        """Return all outcomes, those that find the wrong labels best first, failed ones last."""
        return sorted(self.outcomes, key=lambda o: (o.scores is None, -o.best_auroc))


Section = Callable[[Report], str]


def render(report: Report, sections: list[Section]) -> str:
    """Return the page."""
    body = "\n".join(section(report) for section in sections)
    return page("dattri-core: which training images are wrong?", body)
