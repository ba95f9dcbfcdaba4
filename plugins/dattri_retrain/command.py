"""``dattri retrain``: train the models of a plan, here or one part of it on each machine."""

from __future__ import annotations

import argparse
import multiprocessing
import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from dattri_parts.choices import setting_of
from dattri_parts.training import leave_one_out, random_subsets

from dattri_core import Counterfactual, InputError, nearest
from dattri_retrain.groups import plan_of_groups
from dattri_retrain.settings import SettingRetraining
from dattri_retrain.store import CounterfactualStore

PLANS = ("subsets", "leave-one-out", "leave-groups-out")


@frozen
class Retrain:
    """The command ``dattri retrain``."""

    help: str = "train a setting's model on other train sets and keep what it gives"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "setting", help="a registered setting, such as digits; NAME:FIELD=VALUE sets a field"
        )
        parser.add_argument("--out", required=True, metavar="FOLDER", help="the store")
        parser.add_argument(
            "--plan",
            choices=PLANS,
            default=PLANS[0],
            help="random subsets (default); or all examples, and all but each one, or each group",
        )
        parser.add_argument(
            "--groups",
            metavar="FILE",
            help="of leave-groups-out: a label for each train example, .npy or .json",
        )
        parser.add_argument("--count", type=int, default=50, help="number of subsets; default 50")
        parser.add_argument(
            "--fraction", type=float, default=0.5, help="of the train set in a subset; default 0.5"
        )
        parser.add_argument("--seed", type=int, default=0, help="of data, subsets and trainings")
        parser.add_argument(
            "--size", help="the setting's full or small size, or train,test numbers; default full"
        )
        parser.add_argument(
            "--index",
            metavar="I/N",
            help="train the I-th of N parts only, from 1/N to N/N: one for each machine or job",
        )
        parser.add_argument(
            "--workers", type=int, default=1, help="processes on this machine; default 1"
        )
        parser.add_argument("--dry-run", action="store_true", help="only say what is missing")

    def run(self, args: argparse.Namespace) -> int:
        """Train what is missing, and say what is there."""
        index = None if args.index is None else part_of(args.index)
        setting = setting_of(args.setting)
        size = None if args.size is None else size_of(args.size, args.setting, setting.sizes)
        if args.workers < 1:
            raise InputError(f"retrain: --workers {args.workers}; expected 1 or more")
        if (args.groups is None) == (args.plan == "leave-groups-out"):
            raise InputError(
                f"retrain: --plan {args.plan} with{'' if args.groups else 'out'} --groups; "
                "leave-groups-out needs a file of labels, and the other plans take none"
            )
        retraining = SettingRetraining(args.setting, size, args.seed)
        store = CounterfactualStore(args.out, retraining)
        plan = _plan(args, retraining.n_train)
        missing = len(store.missing(plan))
        if args.dry_run:
            print(f"{store.path}: {missing} of {len(plan)} models to train")
            return 0
        trained = _fill(store, plan, index, args.workers)
        left = len(store.missing(plan))
        print(f"{store.path}: {trained} trained, {len(plan) - left} of {len(plan)} stored")
        return 0


def _fill(
    store: CounterfactualStore,
    plan: list[Counterfactual],
    index: tuple[int, int] | None,
    workers: int,
) -> int:
    if workers == 1:
        return store.fill(plan, index=index)
    # A new interpreter each: threads of this one do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        return store.fill(plan, pool, index, jobs=4 * workers)


def _plan(args: argparse.Namespace, n: int) -> list[Counterfactual]:
    if args.plan == "leave-one-out":
        whole = Counterfactual(np.ones(n, np.bool_), args.seed)
        return [whole, *leave_one_out(n, seed=args.seed)]
    if args.plan == "leave-groups-out":
        return plan_of_groups(Path(args.groups), n, args.seed)
    return random_subsets(n, args.count, fraction=args.fraction, seed=args.seed)


def part_of(text: str) -> tuple[int, int]:
    """Return ``(7, 50)`` of ``"7/50"``."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise InputError(f"retrain: --index {text!r}; expected a part and their number, as in 7/50")
    return int(found[1]), int(found[2])


def size_of(text: str, name: str, sizes: Mapping[str, Any]) -> tuple[int, int]:
    """Return the (train, test) sizes of a name or of two numbers, ``"1000,200"``."""
    numbers = re.fullmatch(r"(\d+),(\d+)", text)
    if numbers is not None:
        return int(numbers[1]), int(numbers[2])
    if text not in sizes:
        raise InputError(
            f"retrain: setting {name!r} has no size {text!r}; {nearest(text, sizes)}, or two "
            "numbers such as 1000,200"
        )
    train, test = sizes[text]
    return int(train), int(test)


command = Retrain()
