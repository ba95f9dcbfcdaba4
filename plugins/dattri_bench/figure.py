"""The figure: methods on x, metric with its interval on y, chance and ceiling as lines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dattri_bench.summary import Row
from dattri_bench.tables import metrics_of
from dattri_core import InputError, atomic_file

BAR, INTERVAL, SOFT = "#4f9d86", "#1d1c1a", "#66625a"
CEILING = "#b4541a"
FORMATS = ("png", "svg")


def draw(rows: Sequence[Row], title: str, path: Path) -> list[Path]:
    """Write the figure as PNG and SVG, one panel for each metric; return the files.

    Args:
        rows: Of all metrics.
        title: Above the panels.
        path: Of the files, without their suffix.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "figure: needs matplotlib, which is not installed; install it with: "
            'pip install "dattri-core[plot]"'
        ) from error
    panels = metrics_of(rows)
    most = max(len(own) for own in panels.values())
    written = []
    # text stays text in SVG, and its identifiers are the same every time
    with matplotlib.rc_context({"svg.hashsalt": "dattri", "svg.fonttype": "none"}):
        size = (max(5.0, 1.8 + 0.46 * most), 0.5 + 3.5 * len(panels))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        figure.suptitle(f"{title}\n", fontsize=11)
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axis, (metric, own) in zip(axes, panels.items(), strict=True):
            _panel(axis, metric, own)
        for kind in FORMATS:
            target = path.with_suffix(f".{kind}")
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind, dpi=150, metadata=_undated(kind))
            with atomic_file(target) as handle:
                handle.write(drawn.getvalue())
            written.append(target)
    return written


def _panel(axis: Any, metric: str, rows: Sequence[Row]) -> None:
    done = [row for row in rows if row.value is not None]
    for at, row in enumerate(rows):
        if row.value is None or row.low is None or row.high is None:
            axis.annotate(
                "not run",
                (at, 0.02),
                xycoords=("data", "axes fraction"),
                rotation=90,
                ha="center",
                va="bottom",
                fontsize=7,
                color=SOFT,
            )
            continue
        # an interval of the bootstrap need not hold the value: its ends are drawn where they are
        axis.bar(at, row.value, width=0.66, color=BAR, zorder=2)
        axis.plot([at, at], [row.low, row.high], color=INTERVAL, linewidth=1.2, zorder=4)
        for end in (row.low, row.high):
            axis.plot([at - 0.12, at + 0.12], [end, end], color=INTERVAL, linewidth=1.2, zorder=4)
    if done:
        _level(axis, [row.chance for row in done], "chance", SOFT, (1, (1, 2)))
        _level(axis, [row.ceiling for row in done], "ceiling", CEILING, (0, (5, 2)))
        axis.legend(fontsize=7, frameon=False, loc="upper right", ncols=2, borderaxespad=0.2)
        axis.margins(y=0.14)
    lower = any(not row.higher_is_better for row in done)
    axis.set_ylabel(f"{metric}\n(lower is better)" if lower else metric, fontsize=9)
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.tick_params(labelsize=8)
    axis.set_xticks(
        range(len(rows)),
        [f"{row.method} ({row.counted} seeds)" if row.failed else row.method for row in rows],
        rotation=50,
        ha="right",
        rotation_mode="anchor",
    )
    if any(row.chance != 0 for row in done):
        axis.axhline(0, color=SOFT, linewidth=0.6, zorder=1)
    axis.spines[["top", "right"]].set_visible(False)


def _level(axis: Any, values: Sequence[float | None], label: str, color: str, dashes: Any) -> None:
    """Draw one line where all methods share a level, and one for each that differs."""
    known = [value for value in values if value is not None]
    if not known:
        return
    if max(known) - min(known) < 1e-9:
        axis.axhline(known[0], color=color, linestyle=dashes, linewidth=1.3, zorder=3, label=label)
        return
    named = {"label": label}
    for at, value in enumerate(values):
        if value is not None:
            line = [at - 0.42, at + 0.42], [value, value]
            axis.plot(*line, color=color, linestyle=dashes, linewidth=1.3, zorder=3, **named)
            named = {}


def _undated(kind: str) -> dict[str, Any]:
    """Return metadata without date and version, so that the same rows give the same file."""
    return {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
