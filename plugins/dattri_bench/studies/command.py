"""``dattri ablate STUDY.toml``: an ablation study; only what is missing is computed."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen
from dattri_parts.measuring.machine import hardware, versions

from dattri_bench.studies.engine import RETRAINED, dry_run, out_of, run_study
from dattri_bench.studies.figures import draw_all
from dattri_bench.studies.results import DONE, Results
from dattri_bench.studies.statistics import Mean, comparisons, effects, means
from dattri_bench.studies.tables import TESTS, as_csv, as_latex, as_markdown, as_text, tables_of
from dattri_bench.summary import ONE_SEED, PARTIAL, SEVERAL_SEEDS
from dattri_core import InputError, Study, write_text

FORMAT = 1
"""Of ``study.json``."""
NAME = "study"
EXAMPLE = """\
setting = "digits"
metrics = ["lds", "mislabel-auroc"]
seeds = [0, 1]
subsets = 50
plan = "grid"             # zip, one-at-a-time, leave-one-part-out, random
base = "grad-dot"         # or {name = "if-ekfac", damping = 0.1}

[factors]
projector = ["identity", {name = "kronecker", rank_in = 8, rank_out = 8}]
scorer = ["dot", "cosine"]

[factors.inverse_hessian] # a table gives the levels their labels
none = "identity"
ekfac = {curvature = "ekfac", solver = "spectral"}
"""


@frozen
class Ablate:
    """The command ``dattri ablate``."""

    help: str = (
        "Run the ablation study that a TOML (or JSON) file spells: methods made of the levels of "
        "factors, by metrics, over seeds. Writes tables and figures. Cells that were computed "
        "before are read, so that a run that was stopped goes on."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = f"example:\n\n{EXAMPLE}"
        add = parser.add_argument
        add("study", help="the file")
        add("--dry-run", action="store_true", help="list cells, shared work and an estimate")
        add("--workers", type=int, default=1, metavar="N", help="processes; default 1")
        add("--out", metavar="FOLDER", help="default: studies/NAME")
        add(
            "--retrained",
            default=str(RETRAINED),
            metavar="FOLDER",
            help="models trained on other train sets, shared by all studies and benchmarks",
        )
        add("--against", metavar="POINT", help="that others are compared with; default: the first")
        add("--heat", metavar="FACTOR,FACTOR", help="of the heat map; default: most levels")
        add("--retry", action="store_true", help="compute again what failed")

    def run(self, args: argparse.Namespace) -> int:
        """Run it; 0 when at least one cell holds a number."""
        study = Study.read(args.study)
        if args.workers < 1:
            raise InputError(f"ablate: --workers {args.workers}; give 1 or more")
        heat = _pair(args.heat)
        _check_point(study, args.against)
        if args.dry_run:
            forecast = dry_run(study, args.out, retrained=args.retrained)
            print(f"study {study.name}\n" + "\n".join(forecast.lines()))
            return 0

        def say(line: str) -> None:
            print(line, flush=True)

        settings: dict[str, Any] = {"retrained": args.retrained, "retry": args.retry, "say": say}
        if args.workers == 1:
            results = run_study(study, args.out, **settings)
        else:
            # A new interpreter each: threads of this one do not survive a fork.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(args.workers, context) as pool:
                results = run_study(study, args.out, executor=pool, **settings)
        write(results, out_of(study, args.out), args.against, heat)
        return 0 if any(row.status == DONE for row in results.rows) else 1


def write(
    results: Results,
    out: Path,
    against: str | None = None,
    heat: tuple[str, str] | None = None,
) -> None:
    """Print the tables and what was saved; write all of it, and figures where matplotlib is.

    Args:
        results: Of a study.
        out: Folder for ``study.csv``, ``.json``, ``.md``, ``.tex`` and the figures.
        against: The point that others are compared with.
        heat: The factors of the heat map.
    """
    found, parts = means(results), effects(results)
    tests = comparisons(results, against)
    tables = tables_of(found, parts, tests)
    for table in tables:
        if table[1] != TESTS:  # one line for each point: in the files
            print(f"\n{as_text(table)}")
    print()
    for line in results.saved:
        print(line)
    study = results.study
    several = len(study.seeds) > 1
    partial = [PARTIAL] if any(mean.failed and mean.seeds for mean in found) else []
    notes = [
        f"Intervals of means: {SEVERAL_SEEDS if several else ONE_SEED}.",
        *partial,
        (
            "Differences: Student's paired t, two-sided; Holm's correction over the comparisons of "
            "one metric and setting; no p-value where all differences are equal. Over test "
            "examples they speak of the models of these seeds; metrics whose test examples share "
            "models trained on other train sets are compared over seeds alone."
        ),
        (
            "Seconds and peak memory: of the method by itself, to fit and to attribute, as if "
            "nothing had been shared; not to train models."
        ),
    ]
    title = f"Study {study.name}, {len(study.seeds)} seed{'s' if several else ''}"
    base = out / NAME
    data = {
        "format": FORMAT,
        "study": study.name,
        "notes": notes,
        "versions": versions(),
        "hardware": hardware(),
        "saved": [attrs.asdict(one) for one in results.saved],
        "rows": results.plain(),
        "means": [_plain(mean) for mean in found],
        "effects": [attrs.asdict(one) for one in parts],
        "comparisons": [attrs.asdict(one) for one in tests],
    }
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(base.with_suffix(".json"), text + "\n")
    write_text(base.with_suffix(".csv"), as_csv(results))
    write_text(base.with_suffix(".tex"), "\n".join(map(as_latex, tables)))
    names = [f"{NAME}.{kind}" for kind in ("json", "csv", "tex", "md")]
    shown: list[str] = []
    try:
        drawn = [path.name for path in draw_all(found, title, out, heat)]
        names += drawn
        shown = [f"![{name}]({name})" for name in drawn if name.endswith(".svg")]
    except InputError as error:
        print(f"no figure: {error}")
    where = ", ".join(f"{key} {value}" for key, value in hardware().items())
    saved = [str(one) for one in results.saved]
    page = [
        f"# {title}",
        *shown,
        *map(as_markdown, tables),
        "\n".join(f"- {note}" for note in [*notes, *saved, where]),
    ]
    write_text(base.with_suffix(".md"), "\n\n".join(page) + "\n")
    print(f"written to {out}: {', '.join(names)}")


def _plain(mean: Mean) -> dict[str, Any]:
    found = attrs.asdict(mean)
    del found["places"]
    return {**found, "seeds": list(mean.seeds)}


def _pair(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    words = text.split(",")
    if len(words) != 2 or words[0] == words[1]:
        raise InputError(f"ablate: --heat {text!r}; give two factors, as in projector,scorer")
    return words[0], words[1]


def _check_point(study: Study, label: str | None) -> None:
    labels = [point.label for point in study.points()]
    if label is not None and label not in labels:
        raise InputError(f"ablate: --against {label!r} is no point; such as {labels[0]!r}")


command = Ablate()
