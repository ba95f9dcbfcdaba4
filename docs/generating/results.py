"""Measured numbers, as the JSON files of ``docs/results`` have them.

There are two kinds of files: results of ``dattri bench`` (``bench_NAME.json``, one row for each
method and metric), and themes of ``make bench`` (rows by their key).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from generating.markdown import heading, page, table

FOLDER = Path(__file__).parents[1] / "results"
BENCH, STUDY = "bench_", "study_"
SHORT = 60
"""Characters of a cell that are shown; what failed says why at length in its own table."""


def results_page() -> str:
    """Return ``results/index.md``: every table with what it is about."""
    return page(_index())


@cache
def benchmarks() -> dict[str, dict[str, Any]]:
    """Return the results of ``dattri bench`` by the name of their file, in its order."""
    paths = sorted(FOLDER.glob(f"{BENCH}*.json"))
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return {name: data for name, data in found.items() if "rows" in data}


@cache
def _themes() -> dict[str, dict[str, Any]]:
    paths = [p for p in sorted(FOLDER.glob("*.json")) if not p.stem.startswith(BENCH)]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def title_of(path: Path) -> str:
    """Return the title of a page."""
    return heading(path.read_text(encoding="utf-8")) or path.stem


def tables() -> list[Path]:
    """Return the pages of the tables."""
    return sorted(path for path in FOLDER.glob("*.md") if path.stem != "index")


def _index() -> Iterator[str]:
    yield "# Results"
    yield ""
    yield "Every number was measured by the command that stands above its table. Beside each page"
    yield "lies a JSON file of the same name, or a CSV file of a study. How to run them:"
    yield "[benchmarks](../benchmarks.md) for how good methods are, `make bench` for speed and"
    yield "memory."
    for title, mine in (
        ("How good methods are", [p for p in tables() if p.stem.startswith(BENCH)]),
        ("What parts contribute", [p for p in tables() if p.stem.startswith(STUDY)]),
        ("Speed and memory", [p for p in tables() if not p.stem.startswith((BENCH, STUDY))]),
    ):
        if mine:
            yield ""
            yield f"## {title}"
            yield ""
            yield from table(
                ("table", "about"),
                [(_linked(path), _about(path)) for path in mine],
            )


def _linked(path: Path) -> str:
    return f"[{title_of(path)}]({path.name})"


def _about(path: Path) -> str:
    """Return the first sentence of a table's page that is no command."""
    text = path.read_text(encoding="utf-8").partition("\n")[2]
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if words and not words.startswith(("Command:", "|", "#", "!", "-")) and paragraph[0] != " ":
            return re.split(r"(?<=[a-z)\d%]\.) (?=[A-Z`])", words)[0]
    return ""


def benchmark_rows(method: str) -> Iterator[tuple[str, ...]]:
    """Yield what ``dattri bench`` gave for a method: setting, metric, value, rank, seconds."""
    for name, data in benchmarks().items():
        for metric, rows in by_metric(data).items():
            for rank, row in enumerate(rows, 1):
                if _bare(row["method"]) == method:
                    label = f"[{data['setting']}](../results/{name}.md)"
                    models = f", {row['models']} models" if row["models"] > 1 else ""
                    value = interval(row)
                    place = f"{rank} of {len(rows)}"
                    yield label + models, metric, value, place, f"{row['seconds'] or 0:.2f}"


def by_metric(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows that hold a number by metric, the best first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        if row["value"] is not None:
            found.setdefault(row["metric"], []).append(row)
    return found


def interval(row: dict[str, Any]) -> str:
    """Return a value with its interval."""
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _bare(label: str) -> str:
    """Return the name in the label of a method: ``trak x10`` and ``trak:seed=1`` are ``trak``."""
    return re.split(r"[\s:]", label)[0]


def measured_rows(method: str) -> Iterator[tuple[str, ...]]:
    """Yield the rows of all themes that name a method: table, row, time, peak."""
    for name, rows in _themes().items():
        for key, row in rows.items():
            if method in re.split(r",\s*", key):
                settings = f" ({row['settings']})" if row.get("settings") else ""
                link = f"[{title_of(FOLDER / f'{name}.md')}](../results/{name}.md)"
                time = _short(row.get("time") or row.get("measured") or "")
                yield link, key + settings, time, _short(row.get("peak", ""))


def _short(text: Any) -> str:
    words = str(text).split(": ")[0]
    return words if len(words) <= SHORT else f"{words[:SHORT]} ..."


def choosing_lines() -> Iterator[str]:
    """Yield, for each benchmark, its methods with every metric side by side, best first."""
    if not benchmarks():
        yield ""
        yield "No table of `dattri bench` is there yet."
    for name, data in benchmarks().items():
        metrics = by_metric(data)
        n_train, n_test = data["size"]
        seeds = len(data["seeds"])
        yield ""
        yield f"### {data['setting']}, {n_train} x {n_test}"
        yield ""
        yield f"{seeds} {'seed' if seeds == 1 else 'seeds'}, intervals of 95 %; the whole table:"
        yield f"[{title_of(FOLDER / f'{name}.md')}](results/{name}.md)."
        yield ""
        methods = dict.fromkeys(row["method"] for rows in metrics.values() for row in rows)
        cells = {(m, row["method"]): row for m, rows in metrics.items() for row in rows}
        lines = []
        for method in methods:
            own = [cells[m, method] for m in metrics if (m, method) in cells]
            values = [interval(cells[m, method]) if (m, method) in cells else "" for m in metrics]
            seconds = max((row["seconds"] or 0 for row in own), default=0)
            lines.append((f"`{method}`", *values, f"{seconds:.2f}"))
        yield from table(("method", *metrics, "seconds"), lines)
        yield ""
