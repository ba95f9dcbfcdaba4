"""A value with its interval as text and as a bar."""

from __future__ import annotations

from dattri_reports.page import text

WIDTH = 168
Scale = tuple[float, float]


def bar(
    value: float,
    low: float,
    high: float,
    chance: float,
    *,
    ceiling: float | None = None,
    scale: Scale = (0.0, 1.0),
) -> str:
    """Return the number, its interval on an axis with lines at chance and ceiling, and its ends.

    Args:
        value: The number.
        low: Lower end of the interval.
        high: Upper end.
        chance: Where the dotted line stands.
        ceiling: Where the dashed line stands; None for none.
        scale: Both ends of the axis.
    """

    def place(x: float) -> float:
        share = (x - scale[0]) / (scale[1] - scale[0])
        return WIDTH * min(max(share, 0.0), 1.0)

    start, end = place(low), place(high)
    best = "" if ceiling is None else _line("ceiling", place(ceiling))
    return (
        f'<span class="measure"><b>{value:.3f}</b>'
        f'<svg viewBox="0 0 {WIDTH} 20" width="{WIDTH}" height="20" role="img" '
        f'aria-label="{text(f"{value:.3f}, interval {low:.3f} to {high:.3f}")}">'
        f'<line class="axis" x1="0" y1="10" x2="{WIDTH}" y2="10"/>'
        f'<rect class="interval" x="{start:.1f}" y="6" width="{max(end - start, 1):.1f}" '
        f'height="8" rx="2"/>{_line("chance", place(chance))}{best}'
        f'<circle class="value" cx="{place(value):.1f}" cy="10" r="4"/></svg>'
        f"<small>{low:.3f} to {high:.3f}</small></span>"
    )


def _line(name: str, x: float) -> str:
    return f'<line class="{name}" x1="{x:.1f}" y1="1" x2="{x:.1f}" y2="19"/>'


def seconds(value: float) -> str:
    """Return a time as text."""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
