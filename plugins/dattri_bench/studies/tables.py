"""Tables of a study: text, Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from dattri_bench.studies.results import Results
from dattri_bench.studies.statistics import Comparison, Mean
from dattri_bench.summary import spell_seeds
from dattri_core import format_bytes

MEANS = ("point", "value", "rank", "seconds", "peak memory")
SEEDS = ("seeds",)
"""The last column of means, where one of them lacks seeds."""
TESTS = ("point", "against", "over", "pairs", "difference", "p", "p (Holm)")
EFFECTS = ("level", "against", "seeds", "difference", "p", "p (Holm)")
Line = tuple[str, ...]
Table = tuple[str, Line, list[Line]]
"""Title, head, lines."""

SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def tables_of(
    found: Sequence[Mean], effects: Sequence[Comparison], tests: Sequence[Comparison]
) -> list[Table]:
    """Return the tables of means, effects and comparisons, one for each setting and metric."""
    made: list[Table] = []
    for key in dict.fromkeys((mean.setting, mean.metric) for mean in found):
        own = [mean for mean in found if (mean.setting, mean.metric) == key]
        lower = any(mean.value is not None and not mean.higher_is_better for mean in own)
        title = f"{key[1]}, {key[0]}{' (lower is better)' if lower else ''}"
        partial = any(mean.failed and mean.seeds for mean in own)
        made.append((title, MEANS + SEEDS * partial, [_mean(mean, partial) for mean in own]))
        of_parts = [c for c in effects if (c.setting, c.metric) == key]
        if of_parts:
            lines = [(c.what, c.against, str(c.count), *_difference(c)) for c in of_parts]
            made.append((f"{title}: what each level does, all else equal", EFFECTS, lines))
        of_points = [c for c in tests if (c.setting, c.metric) == key]
        if of_points:
            lines = [(c.what, c.against, c.over, str(c.count), *_difference(c)) for c in of_points]
            made.append((f"{title}: paired comparisons", TESTS, lines))
    return made


def _mean(mean: Mean, partial: bool) -> Line:
    seeds = (spell_seeds(len(mean.seeds), mean.failed),) * partial
    if mean.value is None:
        return (mean.label, f"not run: {mean.error or 'missing'}", "-", "-", "-", *seeds)
    return (
        mean.label,
        f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]",
        "-" if mean.rank is None else f"{mean.rank:.1f}",
        "-" if mean.seconds is None else f"{mean.seconds:.2f}",
        "-" if mean.peak_bytes is None else format_bytes(mean.peak_bytes),
        *seeds,
    )


def _difference(one: Comparison) -> Line:
    text = f"{one.difference:+.3f}"
    if one.low is not None:
        text += f" [{one.low:+.3f}, {one.high:+.3f}]"
    return text, _p(one.p), _p(one.p_holm)


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def as_text(table: Table) -> str:
    """Return a table in aligned columns; long reasons come after them."""
    title, head, lines = table
    short = [line for line in lines if not line[1].startswith("not run")]
    widths = [max(len(line[at]) for line in [head, *short]) for at in range(len(head))]
    text = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *short]
    ]
    text += [f"{line[0]}  {line[1]}" for line in lines if line[1].startswith("not run")]
    return "\n".join([title, *text])


def as_markdown(table: Table) -> str:
    """Return a heading and a table."""
    title, head, lines = table
    rows = [head, ("---",) * len(head), *lines]
    text = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in rows)
    return "\n".join([f"## {title}", "", *(f"| {line} |" for line in text), ""])


def as_latex(table: Table) -> str:
    """Return a ``table`` of the package booktabs."""
    title, head, lines = table
    body = [" & ".join(map(escape, line)) + r" \\" for line in lines]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{escape(title)}}}",
            rf"\begin{{tabular}}{{{'l' * len(head)}}}",
            r"\toprule",
            " & ".join(map(escape, head)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def escape(text: str) -> str:
    """Return text as LaTeX prints it."""
    return "".join(SPECIAL.get(letter, letter) for letter in text).replace("<", "$<$")


def as_csv(results: Results) -> str:
    """Return the tidy table, one line for each cell, numbers in full."""
    rows = results.plain()
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: "" if value is None else value for key, value in row.items()} for row in rows
    )
    return out.getvalue()
