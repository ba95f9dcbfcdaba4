"""A measured number with its interval and what chance would give."""

from __future__ import annotations

from attrs import frozen


@frozen
class MetricResult:
    """A metric's value, its bootstrap percentile interval, and its level by chance.

    Args:
        value: On the whole data.
        low: Lower end of the interval.
        high: Upper end.
        chance: What scores without information give.
        confidence: Share of resamples inside the interval.
    """

    value: float
    low: float
    high: float
    chance: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
