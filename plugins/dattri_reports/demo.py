"""``dattri demo``: wrong labels in real data, found by every method; a table and a report."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from dattri_parts.measuring.machine import versions
from dattri_parts.measuring.threads import threads

from dattri_core import InputError, default_registry, format_bytes, nearest, write_text
from dattri_reports.outcome import Outcome, run_method
from dattri_reports.report import Report, Section, render
from dattri_reports.sections.agreement import agreement
from dattri_reports.sections.histogram import histogram
from dattri_reports.sections.neighbours import neighbours
from dattri_reports.sections.reading import reading
from dattri_reports.sections.summary import summary
from dattri_reports.sections.suspects import suspects
from dattri_reports.sections.table import table

METRIC = "mislabel-auroc"
WRONG = 0.05
"""Share of the train labels that are made wrong."""
SHOWN = 8
Say = Callable[[str], None]


@frozen
class Demo:
    """The command ``dattri demo``."""

    help: str = "find wrong labels in real data with every method; prints a table, writes a report"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("--data", default="digits", help="a setting: digits, mnist-mlp")
        parser.add_argument("--out", default="demo-report.html", help="the report, an HTML file")
        parser.add_argument(
            "--methods", nargs="+", metavar="NAME", help="default: every registered method"
        )
        parser.add_argument("--seed", type=int, default=0, help="of data, training and intervals")
        parser.add_argument("--train", type=int, metavar="N", help="number of train examples")
        parser.add_argument("--test", type=int, metavar="N", help="number of test examples")

    def run(self, args: argparse.Namespace) -> int:
        """Run it; 0 when at least one method gave scores."""
        out = Path(args.out)
        if out.is_dir():
            raise InputError(f"demo: --out {args.out!r} is a folder; give the name of a file")
        started = time.perf_counter()
        registry = default_registry()
        names = _chosen(args.methods, registry.names("method"))
        setting = registry.resolve("setting", args.data)
        if METRIC not in setting.metrics:
            raise InputError(
                f"demo: the setting {args.data!r} is not meant for {METRIC!r} but for "
                f"{', '.join(map(repr, setting.metrics))}; choose one of images with classes, such "
                "as 'digits'"
            )
        metric = registry.make("metric", METRIC)
        small = setting.sizes["small"]
        size = (args.train or small[0], args.test or small[1])
        print(f"{setting.title}\ntraining ...", flush=True)
        world = setting.load(size, seed=args.seed, wrong=WRONG)
        if world.pictures is None:
            raise InputError(f"demo: the setting {args.data!r} has no pictures to show")
        facts = world.facts
        print(
            f"{facts['model']}, {facts['parameters']:,} parameters; {facts['n_train']} train "
            f"images, {facts['flipped']} with a wrong label; {100 * facts['test_accuracy']:.1f} % "
            f"of {facts['n_test']} test images correct\n",
            flush=True,
        )
        print(HEAD)
        outcomes = []
        with threads(world.threads):
            _warm_up(world)
            for name in names:
                outcome = run_method(name, world, lambda s, w: metric.of(s, w, args.seed))
                outcomes.append(outcome)
                print(line(outcome), flush=True)
            measured_with = {**versions(), "threads": str(torch.get_num_threads())}
        print(FOOT)
        predictions, shown = _examples(world, args.seed)
        report = Report(
            world=world,
            outcomes=tuple(outcomes),
            predictions=predictions,
            shown=shown,
            command=_command(args, size),
            versions=measured_with,
            seed=args.seed,
            seconds=time.perf_counter() - started,
        )
        if not report.done:
            print("no method gave scores; no report was written")
            return 1
        write_text(out, render(report, _sections()))
        print(f"\n{report.seconds:.0f} s in all; report: {out.resolve()}")
        return 0


HEAD = (
    f"{'method':<14} {'AUROC by self-influence':<25} {'AUROC by test scores':<25} "
    f"{'time':>9} {'peak memory':>12}"
)
FOOT = (
    "AUROC: chance that a wrong label ranks above a correct one, with its 95 % interval; "
    "0.5 is chance.\nBy self-influence, high first; by test scores, the mean over the clean test "
    "set, low (harmful) first."
)


def line(outcome: Outcome) -> str:
    """Return one line of the printed table."""
    if outcome.error:
        return f"{outcome.name:<14} not run: {outcome.error}"
    peak = "-" if outcome.peak is None else format_bytes(outcome.peak)
    return (
        f"{outcome.name:<14} {outcome.by_self or '-'!s:<25} {outcome.by_test!s:<25} "
        f"{outcome.seconds:>7.2f} s {peak:>12}"
    )


def _chosen(wanted: list[str] | None, valid: list[str]) -> list[str]:
    if wanted is None:
        return valid
    names = [name for item in wanted for name in item.split(",") if name]
    for name in names:
        if name not in valid:
            raise InputError(f"demo: no method {name!r}; {nearest(name, valid)}")
    return list(dict.fromkeys(names))


def _sections() -> list[Section]:
    """Return the sections, then those that plugins registered."""
    registry = default_registry()
    own: list[Section] = [summary, table, suspects, neighbours, histogram, agreement]
    others: list[Any] = [
        registry.resolve("report_section", name) for name in registry.names("report_section")
    ]
    return [*own, *others, reading]


def _warm_up(world: Any) -> None:
    """Run a forward and backward pass, so that the first method does not pay for loading code."""
    model = world.task.model
    inputs, labels = (tensor[:8].to(world.task.device) for tensor in world.train)
    loss = torch.nn.functional.cross_entropy(model(inputs), labels)
    torch.autograd.grad(loss, list(model.parameters()))


def _examples(world: Any, seed: int) -> tuple[np.ndarray[Any, Any], tuple[int, ...]]:
    """Return the model's predictions, and the test images to show.

    Half of them are the mistakes with the largest loss, the rest are drawn from the others.
    """
    inputs, labels = (tensor.to(world.task.device) for tensor in world.test)
    with torch.no_grad():
        outputs = world.task.model(inputs)
        losses = torch.nn.functional.cross_entropy(outputs, labels, reduction="none")
    predictions = outputs.argmax(1)
    wrong = [i for i in losses.argsort(descending=True).tolist() if predictions[i] != labels[i]]
    shown = wrong[: SHOWN // 2]
    rest = np.random.default_rng(seed).permutation(len(labels)).tolist()
    shown += [i for i in rest if i not in shown][: SHOWN - len(shown)]
    return predictions.cpu().numpy(), tuple(shown)


def _command(args: argparse.Namespace, size: tuple[int, int]) -> str:
    words = ["dattri", "demo", "--data", args.data, "--train", str(size[0]), "--test", str(size[1])]
    words += ["--seed", str(args.seed), "--out", args.out]
    words += ["--methods", *args.methods] if args.methods else []
    return shlex.join(words)


command = Demo()
