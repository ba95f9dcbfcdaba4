"""``dattri report``: the results of benchmarks on one page."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from dattri_core import InputError, format_bytes, write_text
from dattri_reports.bars import Scale, bar, seconds
from dattri_reports.page import page, text
from dattri_reports.results import Results, find_results

Row = Mapping[str, Any]


@frozen
class ReportCommand:
    """The command ``dattri report``."""

    help: str = "Join the results of benchmarks into one HTML page that loads nothing else."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "results",
            nargs="*",
            default=["bench"],
            metavar="FOLDER",
            help="folders that dattri bench wrote to, or that hold such; default: bench",
        )
        parser.add_argument("--out", default="report.html", help="the page, an HTML file")

    def run(self, args: argparse.Namespace) -> int:
        """Write the page."""
        out = Path(args.out)
        if out.is_dir():
            raise InputError(f"report: --out {args.out!r} is a folder; give the name of a file")
        found = find_results(args.results)
        write_text(out, render_results(found))
        print(f"{len(found)} joined; report: {out.resolve()}")
        return 0


def render_results(found: Sequence[Results]) -> str:
    """Return the page of several benchmarks."""
    body = "\n".join([_head(found), _overview(found), *map(_section, found)])
    return page("dattri-core: benchmarks", body)


def _head(found: Sequence[Results]) -> str:
    methods = {row["method"] for results in found for row in results.data["rows"]}
    figures = [
        (len(found), "benchmark"),
        (len({results.name for results in found}), "setting"),
        (len(methods), "method"),
        (sum(len(results.data["rows"]) for results in found), "row"),
    ]
    cells = "".join(
        f"<div><dt>{text(what if n == 1 else f'{what}s')}</dt><dd>{n}</dd></div>"
        for n, what in figures
    )
    return (
        '<header><p class="kicker">dattri-core benchmarks</p>'
        "<h1>How good are the scores of each method?</h1>"
        '<p class="lead">Every number was measured on the machine and with the versions named '
        "beside it, and the command that gives it again stands above its table. A dotted line is "
        "what scores without information give, a dashed one the best that noise allows.</p>"
        f"<dl class='figures'>{cells}</dl></header>"
    )


def _overview(found: Sequence[Results]) -> str:
    """Return methods by columns of setting and metric; of equal columns the later run counts."""
    columns: dict[tuple[str, str], dict[str, Row]] = {}
    for results in found:
        for metric, rows in results.metrics.items():
            column = columns.setdefault((results.name, metric), {})
            column |= {row["method"]: row for row in rows}
    methods = sorted({method for column in columns.values() for method in column})
    head = "".join(
        f'<th scope="col">{text(metric)}<br><small>{text(name)}</small></th>'
        for name, metric in columns
    )
    best = {key: _best(list(column.values())) for key, column in columns.items()}
    lines = []
    for method in methods:
        cells = "".join(_value(column.get(method), best[key]) for key, column in columns.items())
        lines.append(f'<tr><th scope="row"><code>{text(method)}</code></th>{cells}</tr>')
    return (
        '<section id="overview"><h2>All settings</h2><p>The best of each column is bold. What '
        "differs by less than its interval may be chance.</p>"
        '<div class="scroll" tabindex="0"><table class="overview"><thead><tr>'
        f'<th scope="col">method</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
        "</div></section>"
    )


def _best(rows: Sequence[Row]) -> float | None:
    values = [row["value"] for row in rows if row["value"] is not None]
    higher = all(row.get("higher_is_better", True) for row in rows if row["value"] is not None)
    return (max(values) if higher else min(values)) if values else None


def _value(row: Row | None, best: float | None) -> str:
    if row is None:
        return "<td></td>"
    if row["value"] is None:
        return f'<td class="none" title="{text(row["error"])}">not run</td>'
    mark = ' class="best"' if row["value"] == best else ""
    return f"<td{mark}>{row['value']:.3f}</td>"


def _section(results: Results) -> str:
    data = results.data
    tables = "".join(_table(metric, rows) for metric, rows in results.metrics.items())
    seeds = ", ".join(map(str, data["seeds"]))
    facts = [*data["hardware"].items(), *data["versions"].items()]
    where = " &middot; ".join(f"{text(key)} {text(value)}" for key, value in facts)
    notes = "".join(f"<li>{text(note)}</li>" for note in data["notes"])
    return (
        f"<section><h2>{text(results.name)}</h2><p>{text(data['title'])}. Seeds: {text(seeds)}.</p>"
        f"<pre><code>{text(data['command'])}</code></pre>{tables}"
        f'<ul class="notes">{notes}</ul><p class="versions">{where}</p></section>'
    )


def _table(metric: str, rows: Sequence[Row]) -> str:
    scale = scale_of(rows)
    lower = any(not row.get("higher_is_better", True) for row in rows if row["value"] is not None)
    body = "".join(_row(row, scale) for row in rows)
    items = "".join(
        f"<li><b>{text(row['method'])}</b>: {text(note)}</li>"
        for row in rows
        for note in row.get("notes", ())
    )
    notes = f'<ul class="notes">{items}</ul>' if items else ""
    return (
        f"<h3>{text(metric)}{' <small>lower is better</small>' if lower else ''}</h3>"
        '<div class="scroll" tabindex="0"><table class="methods"><thead><tr>'
        '<th scope="col">method</th><th scope="col">value and interval</th>'
        '<th scope="col" class="number">chance</th><th scope="col" class="number">ceiling</th>'
        '<th scope="col" class="number">time</th><th scope="col" class="number">peak memory</th>'
        f"</tr></thead><tbody>{body}</tbody></table></div>{notes}"
    )


def scale_of(rows: Sequence[Row]) -> Scale:
    """Return the ends of an axis that holds all that is drawn on it, 0 included."""
    drawn = [0.0]
    for row in rows:
        if row["value"] is not None:
            levels = (row["value"], row["low"], row["high"], row["chance"], row.get("ceiling"))
            drawn += [level for level in levels if level is not None]
    low, high = min(drawn), max(drawn)
    return (low, high) if high > low else (low, low + 1.0)


def _row(row: Row, scale: Scale) -> str:
    head = f'<th scope="row"><code>{text(row["method"])}</code></th>'
    if row["value"] is None:
        why = f'<td colspan="5"><b>not run.</b> {text(row["error"])}</td>'
        return f'<tr class="failed">{head}{why}</tr>'
    drawn = bar(
        row["value"],
        row["low"],
        row["high"],
        row["chance"],
        ceiling=row.get("ceiling"),
        scale=scale,
    )
    took, peak, best = row.get("seconds"), row.get("peak_bytes"), row.get("ceiling")
    cells = [
        f"{row['chance']:.3f}",
        "&ndash;" if best is None else f"{best:.3f}",
        "&ndash;" if took is None else seconds(took),
        "&ndash;" if peak is None else format_bytes(peak),
    ]
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f"<tr>{head}<td>{drawn}</td>{numbers}</tr>"


command = ReportCommand()
