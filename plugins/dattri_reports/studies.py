"""The part of a report about one ablation study: its tables and figures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dattri_core import format_bytes
from dattri_reports.bars import Scale, bar, seconds
from dattri_reports.page import text
from dattri_reports.results import StudyResults

Row = Mapping[str, Any]


def study_section(study: StudyResults) -> str:
    """Return the section of a study."""
    data = study.data
    effects, tests = study.tables("effects"), study.tables("comparisons")
    tables = "".join(
        _means(f"{metric}, {setting}", rows)
        + _tests("what each level does, all else equal", effects.get((setting, metric), ()))
        + _folded("paired comparisons", tests.get((setting, metric), ()))
        for (setting, metric), rows in study.tables("means").items()
    )
    figures = "".join(map(_figure, study.figures))
    saved = [
        f"{one['what']}: {one['alone']:,.6g} if each cell had been alone, {one['done']:,.6g} done"
        for one in data.get("saved", ())
    ]
    notes = "".join(f"<li>{text(note)}</li>" for note in [*data["notes"], *saved])
    return (
        f"<section><h2>Study {text(study.name)}</h2>{figures}{tables}"
        f'<ul class="notes">{notes}</ul>{where(data)}</section>'
    )


def where(data: Mapping[str, Any]) -> str:
    """Return the line that says on which machine and with which versions."""
    facts = [*data["hardware"].items(), *data["versions"].items()]
    told = " &middot; ".join(f"{text(key)} {text(value)}" for key, value in facts)
    return f'<p class="versions">{told}</p>'


def marked(done: int, asked: int) -> str:
    """Return the mark of a row that lacks seeds."""
    return f" <small>{done} of {asked} seeds</small>"


def scale_of(rows: Sequence[Row]) -> Scale:
    """Return the ends of an axis that holds all that is drawn on it, 0 included."""
    drawn = [0.0]
    for row in rows:
        if row["value"] is not None:
            levels = (row["value"], row["low"], row["high"], row["chance"], row.get("ceiling"))
            drawn += [level for level in levels if level is not None]
    low, high = min(drawn), max(drawn)
    return (low, high) if high > low else (low, low + 1.0)


def _figure(path: Path) -> str:
    """Return a figure inside the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    name = text(path.stem)
    return f'<figure><img alt="{name}" src="data:image/svg+xml;base64,{data}"></figure>'


def _means(title: str, rows: Sequence[Row]) -> str:
    scale = scale_of(rows)
    lower = any(not row["higher_is_better"] for row in rows if row["value"] is not None)
    return (
        f"<h3>{text(title)}{' <small>lower is better</small>' if lower else ''}</h3>"
        '<div class="scroll" tabindex="0"><table class="methods"><thead><tr>'
        '<th scope="col">point</th><th scope="col">value and interval</th>'
        '<th scope="col" class="number">chance</th><th scope="col" class="number">rank</th>'
        '<th scope="col" class="number">time</th><th scope="col" class="number">peak memory</th>'
        f"</tr></thead><tbody>{''.join(_mean(row, scale) for row in rows)}</tbody></table></div>"
    )


def _mean(row: Row, scale: Scale) -> str:
    done, failed = len(row["seeds"]), row.get("failed", 0)
    told = marked(done, done + failed) if done and failed else ""
    head = f'<th scope="row"><code>{text(row["label"])}</code>{told}</th>'
    if row["value"] is None:
        why = f'<td colspan="5"><b>not run.</b> {text(row["error"] or "missing")}</td>'
        return f'<tr class="failed">{head}{why}</tr>'
    drawn = bar(row["value"], row["low"], row["high"], row["chance"], scale=scale)
    rank, took, peak = row["rank"], row["seconds"], row["peak_bytes"]
    cells = [
        f"{row['chance']:.3f}",
        "&ndash;" if rank is None else f"{rank:.1f}",
        "&ndash;" if took is None else seconds(took),
        "&ndash;" if peak is None else format_bytes(peak),
    ]
    return f"<tr>{head}<td>{drawn}</td>{_numbers(cells)}</tr>"


def _folded(title: str, rows: Sequence[Row]) -> str:
    """Return a table that is shown when it is asked for: it has a line for each point."""
    table = _tests("", rows)
    return f"<details><summary>{text(title)}</summary>{table}</details>" if table else ""


def _tests(title: str, rows: Sequence[Row]) -> str:
    """Return a table of differences; nothing without any."""
    if not rows:
        return ""
    lines = "".join(map(_test, rows))
    head = "".join(f'<th scope="col" class="number">{word}</th>' for word in ("p", "p (Holm)"))
    return (
        f"{f'<h4>{text(title)}</h4>' if title else ''}"
        '<div class="scroll" tabindex="0"><table class="overview"><thead><tr>'
        '<th scope="col">what</th><th scope="col">against</th><th scope="col">over</th>'
        f'<th scope="col">difference</th>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _test(row: Row) -> str:
    difference = f"{row['difference']:+.3f}"
    if row["low"] is not None:
        difference += f" [{row['low']:+.3f}, {row['high']:+.3f}]"
    told = [row["against"], f"{row['count']} {row['over']}", difference]
    cells = "".join(f"<td>{text(word)}</td>" for word in told)
    chances = _numbers([_p(row["p"]), _p(row["p_holm"])])
    return f'<tr><th scope="row"><code>{text(row["what"])}</code></th>{cells}{chances}</tr>'


def _p(value: float | None) -> str:
    if value is None:
        return "&ndash;"
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _numbers(cells: Sequence[str]) -> str:
    return "".join(f'<td class="number">{cell}</td>' for cell in cells)
