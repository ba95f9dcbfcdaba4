"""``dattri bench``: methods by metrics by seeds; only what is missing is computed."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from dattri_parts.choices import choice_of, choices_of
from dattri_parts.measuring.attribution import retrains
from dattri_parts.measuring.machine import hardware, versions

from dattri_bench.cells import Finished
from dattri_bench.engine import recorded, run, worlds
from dattri_bench.figure import draw
from dattri_bench.request import (
    LEAST_SUBSETS,
    Measure,
    Request,
    check_subsets,
    checked_setting,
    entrants_of,
    measures_of,
    size_of,
)
from dattri_bench.summary import ONE_SEED, PARTIAL, SEVERAL_SEEDS, Row, rows_of
from dattri_bench.tables import as_csv, as_markdown, as_text
from dattri_bench.tuning import dampings_of, protocol
from dattri_core import InputError, default_registry, method, write_text

FORMAT = 1
"""Of ``results.json``."""
RESULTS = "results"
TIME = (
    "Seconds: to fit a method and to attribute the test set, without training of models. Peak "
    "memory: above the level before, of the process, or on CUDA of the device."
)


@frozen
class Bench:
    """The command ``dattri bench``."""

    help: str = (
        "Measure methods by metrics over seeds in one setting: prints a table, writes it as CSV, "
        "JSON and Markdown with a bar figure. Cells that were computed before are read, so that "
        "a run that was stopped goes on."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add = parser.add_argument
        add("setting", help="a registered setting; NAME:FIELD=VALUE sets a field")
        add(
            "--methods",
            nargs="+",
            default=["all"],
            metavar="NAME",
            help="names, or all (default), but for those that train models by the hundred, such as "
            "leave-one-out; NAME:FIELD=VALUE sets a field, as trak:seed=1",
        )
        add(
            "--metrics",
            nargs="+",
            metavar="NAME",
            help="default: those of the setting; NAME:FIELD=VALUE sets a field",
        )
        add(
            "--checkpoints",
            default="1",
            metavar="N[,N]",
            help="trained models that a method is asked about; 1 (default) is the setting's own",
        )
        add(
            "--trained-on",
            choices=("full", "half"),
            default="full",
            help="the models of --checkpoints N: the whole train set with other seeds (default), "
            "or a random half of it each",
        )
        add("--seeds", default="0", metavar="S[,S]", help="of data and training; default 0")
        add("--size", default="full", metavar="SIZE", help="full (default), small, or TRAIN,TEST")
        add("--damping", default="auto", help="of inverse Hessians; auto (default): the setting's")
        add("--subsets", type=int, metavar="N", help="train sets that metrics retrain on")
        add(
            "--tune",
            metavar="damping=X,X",
            help="choose each method's damping by the first metric that retrains, on half of the "
            "subsets; the other half is reported",
        )
        add("--wrong", type=float, default=0.1, help="share of wrong labels where a metric asks")
        add("--out", metavar="FOLDER", help="default: bench/SETTING")
        add(
            "--retrained",
            default="bench/retrained",
            metavar="FOLDER",
            help="models trained on other train sets and their outcomes, shared by all runs",
        )
        add("--retry", action="store_true", help="compute again what failed")

    def run(self, args: argparse.Namespace) -> int:
        """Run it; 0 when at least one cell holds a number."""
        request = request_of(args)
        print(f"{request.setting.title}\n{request.command}", flush=True)
        try:
            finished = run(request, lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            if known := recorded(request):
                print("\ninterrupted: the results are those of the cells that were computed")
                _show(request, known)
            raise
        rows = _show(request, finished)
        return 0 if any(row.value is not None for row in rows) else 1


def _show(request: Request, finished: Sequence[Finished]) -> list[Row]:
    """Print and write the results; return their rows."""
    rows = rows_of(finished)
    print(f"\n{as_text(rows)}\n")
    for sentence in sentences(request, rows):
        print(sentence)
    write(request, rows, finished)
    return rows


def request_of(args: argparse.Namespace) -> Request:
    """Return what the options ask for, all of it checked.

    Raises:
        InputError, SpecError: An option is not understood, or asks for what there is not.
        PluginError: A plugin that is needed cannot be imported.
    """
    setting = checked_setting(args.setting)
    chosen = choice_of(args.setting)
    size = size_of(args.size, setting)
    choices = choices_of("method", args.methods, lambda name: not retrains(method(name)))
    if args.subsets is not None and args.subsets < LEAST_SUBSETS:
        raise InputError(f"bench: --subsets {args.subsets}; give at least {LEAST_SUBSETS}")
    if not 0 < args.wrong < 1:
        raise InputError(f"bench: --wrong {args.wrong}; give a share between 0 and 1")
    measures = measures_of(choices_of("metric", args.metrics or setting.metrics), args.subsets)
    if any("retraining" in measure.metric.needs for measure in measures):
        default_registry().resolve("ground_truth", "retraining")  # before models are trained
    chooser, dampings = None, ()
    if args.tune is not None:
        dampings = dampings_of(args.tune)
        chooser, measures = split(measures)
    folder_name = re.sub(r"[^\w.=,-]+", "-", args.setting)  # no colons: not all systems have them
    out = Path(args.out or f"bench/{folder_name}")
    for folder in (out, Path(args.retrained)):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"bench: {str(folder)!r} is a file; give the name of a folder")
    return Request(
        chosen=chosen,
        setting=setting,
        size=size,
        seeds=_numbers(args.seeds, "--seeds", 0),
        entrants=tuple(entrants_of(choices, _numbers(args.checkpoints, "--checkpoints", 1))),
        measures=tuple(measures),
        chooser=chooser,
        dampings=dampings,
        damping=None if args.damping == "auto" else _damping(args.damping),
        wrong=args.wrong,
        trained_on=args.trained_on,
        out=out,
        retrained=Path(args.retrained),
        retry=args.retry,
        command=_command(args),
    )


def split(measures: Sequence[Measure]) -> tuple[Measure, list[Measure]]:
    """Return the metric that chooses dampings, and all metrics on the other half of the subsets.

    Raises:
        InputError: No metric retrains on subsets that could be split.
    """
    least, asked = 2 * LEAST_SUBSETS, ", ".join(measure.label for measure in measures)
    able = [m for m in measures if "retraining" in m.metric.needs and (m.subsets or 0) >= least]
    if not able:
        raise InputError(
            f"bench: --tune needs a metric that retrains on {least} subsets or more, which it "
            f"splits: add --metrics lds and --subsets 50; got {asked}"
        )
    halved = [m.with_subsets(m.subsets - m.subsets // 2) if m.subsets else m for m in measures]
    for measure in halved:
        check_subsets(measure)
    return able[0].with_subsets((able[0].subsets or 0) // 2), halved


def sentences(request: Request, rows: Sequence[Row]) -> list[str]:
    """Return what a reader of the numbers has to know."""
    found = [f"Intervals: {ONE_SEED if len(request.seeds) == 1 else SEVERAL_SEEDS}."]
    if any(row.failed and row.seeds for row in rows):
        found.append(PARTIAL)
    found.append(TIME)
    if request.chooser is not None:
        reported = next(m for m in request.measures if m.choice is request.chooser.choice)
        found.append(protocol(request.chooser.subsets, reported.subsets, request.chooser.label))
    if any(entrant.models > 1 for entrant in request.entrants):
        train_set = {"full": "on all train examples", "half": "on a random half each"}
        found.append(
            f"xN: asked about N models trained {train_set[request.trained_on]}, each with a seed "
            "of its own, drawn apart from those of metrics."
        )
    if any(entrant.retrains for entrant in request.entrants):
        found.append(
            "Methods that train models themselves: seconds include those of models that were not "
            "there yet. Their subsets are drawn apart from those of metrics."
        )
    if any(entrant.models == 0 for entrant in request.entrants):
        found.append("Methods that follow training read the checkpoints of the setting's own run.")
    return found


def write(request: Request, rows: Sequence[Row], finished: Sequence[Finished]) -> None:
    """Write the results; without matplotlib all but the figure, and say so."""
    n_train, n_test = request.size
    title = f"{request.name}, {n_train} x {n_test}, {_count(len(request.seeds), 'seed')}"
    made = [dict(world) for world in worlds(request)]
    results: dict[str, Any] = {
        "format": FORMAT,
        "setting": request.name,
        "title": request.setting.title,
        "size": list(request.size),
        "seeds": list(request.seeds),
        "command": request.command,
        "notes": sentences(request, rows),
        "versions": versions(),
        "hardware": hardware(),
        "worlds": made,
        "rows": [row.plain() for row in rows],
        "cells": [{"address": one.cell.address, **one.record} for one in finished],
    }
    base = request.out / RESULTS
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(base.with_suffix(".json"), text + "\n")
    write_text(base.with_suffix(".csv"), as_csv(rows))
    write_text(base.with_suffix(".md"), _page(request, title, rows, results))
    names = [f"{RESULTS}.{kind}" for kind in ("json", "csv", "md")]
    try:
        names += [path.name for path in draw(rows, title, base)]
    except InputError as error:
        print(f"no figure: {error}")
    print(f"written to {request.out}: {', '.join(names)}")


def _page(request: Request, title: str, rows: Sequence[Row], results: dict[str, Any]) -> str:
    where = ", ".join(f"{key} {value}" for key, value in results["hardware"].items())
    which = ", ".join(f"{key} {value}" for key, value in results["versions"].items())
    notes = "\n".join(f"- {sentence}" for sentence in results["notes"])
    return (
        f"# {title}\n\n{request.setting.title}\n\n"
        f"    {request.command}\n\n![{title}]({RESULTS}.svg)\n\n{as_markdown(rows)}\n"
        f"{notes}\n- {where}; {which}.\n"
    )


def _numbers(text: str, option: str, least: int) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) >= least for word in words):
        raise InputError(f"bench: {option} {text!r}; give numbers from {least} on, as 1,2,3")
    return tuple(dict.fromkeys(int(word) for word in words))


def _damping(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"bench: --damping {text!r}; give auto, or a number of 0 or more")
    return value


def _command(args: argparse.Namespace) -> str:
    """Return the command that gives the same results, options of the default left out."""
    parser = argparse.ArgumentParser()
    Bench().add_arguments(parser)
    words = ["dattri", "bench", args.setting]
    for option, given in vars(args).items():
        if option in ("setting", "retry", "command") or given == parser.get_default(option):
            continue
        values = given if isinstance(given, list) else [str(given)]
        words += [f"--{option.replace('_', '-')}", *values]
    return shlex.join(words)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


command = Bench()
