"""``dattri report``: the results of benchmarks and studies on one page."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from dattri_core import InputError, format_bytes, write_text
from dattri_reports.bars import Scale, bar, seconds
from dattri_reports.page import page, text
from dattri_reports.results import NAME, STUDY, Found, Results, find_results
from dattri_reports.studies import marked, scale_of, study_section, where

Row = Mapping[str, Any]
PLURALS = {"study": "studies"}


@frozen
class ReportCommand:
    """The command ``dattri report``."""

    help: str = (
        "Join the results of benchmarks and ablation studies into one HTML page that loads nothing "
        "else."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "results",
            nargs="*",
            default=["bench"],
            metavar="FOLDER",
            help="folders that dattri bench or dattri ablate wrote to, or that hold such; default: "
            "bench",
        )
        parser.add_argument("--out", default="report.html", help="the page, an HTML file")

    def run(self, args: argparse.Namespace) -> int:
        """Write the page."""
        out = Path(args.out)
        if out.is_dir():
            raise InputError(f"report: --out {args.out!r} is a folder; give the name of a file")
        found = find_results(args.results)
        write_text(out, render_results(found))
        for place in found.empty:
            print(f"passed over {str(place)!r}: it holds no {NAME} and no {STUDY}")
        count = len(found.benchmarks) + len(found.studies)
        print(f"{count} joined; report: {out.resolve()}")
        return 0


def render_results(found: Found) -> str:
    """Return the page of several benchmarks and studies."""
    benchmarks = found.benchmarks
    parts = [_head(found), *map(_section, benchmarks), *map(study_section, found.studies)]
    if benchmarks:
        parts.insert(1, _overview(benchmarks))
    return page("dattri-core: benchmarks", "\n".join(parts))


def _head(found: Found) -> str:
    benchmarks = found.benchmarks
    methods = {row["method"] for results in benchmarks for row in results.data["rows"]}
    rows = sum(len(results.data["rows"]) for results in benchmarks)
    counts = [
        (len(benchmarks), "benchmark"),
        (len({results.name for results in benchmarks}), "setting"),
        (len(methods), "method"),
        (rows + sum(len(study.data["means"]) for study in found.studies), "row"),
        (len(found.studies), "study"),
    ]
    figures = [(n, what) for n, what in counts if n]
    cells = "".join(
        f"<div><dt>{text(what if n == 1 else PLURALS.get(what, f'{what}s'))}</dt><dd>{n}</dd></div>"
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
    asked: dict[int, int] = {}
    for results in found:
        for metric, rows in results.metrics.items():
            column = columns.setdefault((results.name, metric), {})
            column |= {row["method"]: row for row in rows}
            asked |= {id(row): len(results.data["seeds"]) for row in rows}
    methods = sorted({method for column in columns.values() for method in column})
    head = "".join(
        f'<th scope="col">{text(metric)}<br><small>{text(name)}</small></th>'
        for name, metric in columns
    )
    best = {key: _best(list(column.values()), asked) for key, column in columns.items()}
    lines = []
    for method in methods:
        cells = "".join(
            _value(column.get(method), best[key], asked) for key, column in columns.items()
        )
        lines.append(f'<tr><th scope="row"><code>{text(method)}</code></th>{cells}</tr>')
    return (
        '<section id="overview"><h2>All settings</h2><p>The best of each column is bold. What '
        "differs by less than its interval may be chance.</p>"
        '<div class="scroll" tabindex="0"><table class="overview"><thead><tr>'
        f'<th scope="col">method</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
        "</div></section>"
    )


def _best(rows: Sequence[Row], asked: Mapping[int, int]) -> float | None:
    """Return the best value of the rows that have all seeds, or of all where none has."""
    done = [row for row in rows if row["value"] is not None]
    whole = [row for row in done if not _lacks_seeds(row, asked[id(row)])] or done
    values = [row["value"] for row in whole]
    higher = all(row.get("higher_is_better", True) for row in done)
    return (max(values) if higher else min(values)) if values else None


def _lacks_seeds(row: Row, asked: int) -> bool:
    return row["value"] is not None and len(row["seeds"]) < asked


def _value(row: Row | None, best: float | None, asked: Mapping[int, int]) -> str:
    if row is None:
        return "<td></td>"
    if row["value"] is None:
        return f'<td class="none" title="{text(row["error"])}">not run</td>'
    lacks = _lacks_seeds(row, asked[id(row)])
    told = marked(len(row["seeds"]), asked[id(row)]) if lacks else ""
    mark = ' class="best"' if row["value"] == best else ""
    return f"<td{mark}>{row['value']:.3f}{told}</td>"


def _section(results: Results) -> str:
    data = results.data
    asked = len(data["seeds"])
    tables = "".join(_table(metric, rows, asked) for metric, rows in results.metrics.items())
    seeds = ", ".join(map(str, data["seeds"]))
    notes = "".join(f"<li>{text(note)}</li>" for note in data["notes"])
    return (
        f"<section><h2>{text(results.name)}</h2><p>{text(data['title'])}. Seeds: {text(seeds)}.</p>"
        f"<pre><code>{text(data['command'])}</code></pre>{tables}"
        f'<ul class="notes">{notes}</ul>{where(data)}</section>'
    )


def _table(metric: str, rows: Sequence[Row], asked: int) -> str:
    scale = scale_of(rows)
    lower = any(not row.get("higher_is_better", True) for row in rows if row["value"] is not None)
    body = "".join(_row(row, scale, asked) for row in rows)
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


def _row(row: Row, scale: Scale, asked: int) -> str:
    told = marked(len(row["seeds"]), asked) if _lacks_seeds(row, asked) else ""
    head = f'<th scope="row"><code>{text(row["method"])}</code>{told}</th>'
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
