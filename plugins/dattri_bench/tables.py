"""Tables: rows as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from dattri_bench.summary import Row
from dattri_core import format_bytes

HEAD = ("method", "value", "chance", "ceiling", "seconds", "peak memory")
SEEDS = "seeds"
"""The last column, where a run has several seeds."""
COLUMNS = (
    "metric",
    "method",
    "models",
    "seeds",
    "value",
    "low",
    "high",
    "confidence",
    "chance",
    "ceiling",
    "higher_is_better",
    "seconds",
    "peak_bytes",
    "notes",
    "error",
    "failed",
)


def has_seeds(rows: Sequence[Row]) -> bool:
    """Return whether any row is of several seeds, so that how many each has is to be said."""
    return any(len(row.seeds) + len(row.failed) > 1 for row in rows)


def metrics_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows by metric, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.metric, []).append(row)
    return found


def as_text(rows: Sequence[Row]) -> str:
    """Return one aligned table for each metric."""
    parts, several = [], has_seeds(rows)
    for metric, own in metrics_of(rows).items():
        lines = [_head(several), *(_cells(row, several) for row in own if row.value is not None)]
        widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
        text = [_aligned(line, widths) for line in lines]
        text += [f"{row.method:{widths[0]}}  not run: {row.error}" for row in own if row.error]
        parts.append("\n".join([f"{metric}{_direction(own)}", *text]))
    return "\n\n".join(parts)


def as_markdown(rows: Sequence[Row]) -> str:
    """Return a heading and a table for each metric."""
    parts, several = [], has_seeds(rows)
    head = _head(several)
    for metric, own in metrics_of(rows).items():
        lines = [
            f"## {metric}{_direction(own)}",
            "",
            f"| {' | '.join(head)} |",
            "|" + " --- |" + " ---: |" * (len(head) - 1),
        ]
        for row in own:
            if row.value is None:
                reason = (row.error or "").replace("|", "\\|")
                lines.append(f"| {row.method} | not run: {reason} |" + " |" * (len(head) - 2))
            else:
                lines.append(f"| {' | '.join(_cells(row, several))} |")
        notes = [f"- {row.method}: {'; '.join(row.notes)}" for row in own if row.notes]
        parts.append("\n".join([*lines, *(["", *notes] if notes else [])]))
    return "\n\n".join(parts) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Return one line for each row, numbers in full."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        plain = row.plain()
        for name in ("seeds", "failed"):
            plain[name] = " ".join(map(str, plain[name]))
        plain["notes"] = "; ".join(row.notes)
        writer.writerow(["" if plain[name] is None else plain[name] for name in COLUMNS])
    return out.getvalue()


def _head(several: bool) -> tuple[str, ...]:
    return (*HEAD, SEEDS) if several else HEAD


def _cells(row: Row, several: bool) -> tuple[str, ...]:
    found = (
        row.method,
        f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]",
        f"{row.chance:.3f}",
        "-" if row.ceiling is None else f"{row.ceiling:.3f}",
        "-" if row.seconds is None else f"{row.seconds:.2f}",
        "-" if row.peak_bytes is None else format_bytes(row.peak_bytes),
    )
    return (*found, row.counted) if several else found


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        f"{cell:<{width}}" if at == 0 else f"{cell:>{width}}"
        for at, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def _direction(rows: Sequence[Row]) -> str:
    lower = any(row.value is not None and not row.higher_is_better for row in rows)
    return " (lower is better)" if lower else ""
