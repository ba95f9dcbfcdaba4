"""Work: training counterfactuals and writing their rows, in this process or as a job elsewhere."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from dattri_core import Counterfactual, InputError, NumericsError, Retraining
from dattri_retrain.facts import Facts
from dattri_retrain.shards import write_shard

Array = np.ndarray[Any, Any]
Group = tuple[Counterfactual, ...]
SHARD_BYTES = 32 * 2**20
"""Of the rows of one shard, about."""


@frozen(eq=False)
class Job:
    """Groups to train, wherever the job is run; it goes there as a pickle of an executor's own.

    Args:
        retraining: As it is, or as a value that makes it again there, such as
            `SettingRetraining`.
        facts: That the retraining must have there too.
        folder: Of the shards, seen by every machine under this name.
        groups: Each is trained by one call.
        every: Seconds of training between two shards.
    """

    retraining: Retraining
    facts: Facts
    folder: Path
    groups: tuple[Group, ...]
    every: float

    def __call__(self) -> tuple[str, ...]:
        """Train, write, and return the names of the shards.

        Raises:
            InputError: Data, model or recipe differ there.
        """
        there = Facts.of(self.retraining)
        if there != self.facts:
            raise InputError(
                f"retrain: the job is of the retraining {self.facts.plain()}, and where it runs "
                f"the retraining is {there.plain()}; use the same code, data and versions on every "
                "machine"
            )
        return train_groups(
            self.retraining, self.facts, self.folder, self.groups, self.every, lambda _: None
        )


def train_groups(
    retraining: Retraining,
    facts: Facts,
    folder: Path,
    groups: Sequence[Group],
    every: float,
    advance: Callable[[int], None],
    known: Callable[[Group], Group] = lambda group: group,
) -> tuple[str, ...]:
    """Train groups one after another and write their rows; return the names of the shards.

    Rows are written when ``every`` seconds have passed or a shard is full, and at the end, also
    when that comes by an error or Ctrl-C: a model that was measured is not lost.

    Args:
        retraining: How.
        facts: Of the retraining.
        folder: Of the shards.
        groups: Each is trained by one call.
        every: Seconds between two shards.
        advance: Told how many are done.
        known: Says, just before a group is trained, what of it is still missing.

    Raises:
        NumericsError: A model diverged; which one is named.
        InputError: The retraining gives other numbers of models, or outcomes of other shapes.
    """
    done: list[tuple[Counterfactual, Mapping[str, Array]]] = []
    written: list[str] = []
    row_bytes = 8 * facts.n_test * len(facts.targets) + facts.n_train // 8 + 4
    most = max(1, SHARD_BYTES // row_bytes)
    last = time.monotonic()

    def write() -> None:
        nonlocal last
        if done:
            counterfactuals, outcomes = zip(*done, strict=True)
            written.append(write_shard(folder, facts, counterfactuals, outcomes))
            done.clear()
        last = time.monotonic()

    try:
        for group in groups:
            missing = known(group)
            advance(len(group) - len(missing))
            if not missing:
                continue
            states = retraining.train(missing)
            for counterfactual, state in itertools.zip_longest(missing, states):
                if counterfactual is None or state is None:
                    raise InputError(
                        f"retrain: train gave {'more' if counterfactual is None else 'fewer'} "
                        f"models than the {len(missing)} train sets it was given; it must yield "
                        "one state dict for each"
                    )
                outcomes = retraining.measure(state)
                done.append((counterfactual, _checked(outcomes, facts, counterfactual)))
                advance(1)
                if len(done) >= most:
                    write()
            if time.monotonic() - last >= every:
                write()
    finally:
        write()
    return tuple(written)


def _checked(
    outcomes: Mapping[str, Array], facts: Facts, counterfactual: Counterfactual
) -> Mapping[str, Array]:
    """Return the outcomes of one model in float64, every target there and finite."""
    found = {}
    for target in facts.targets:
        if target not in outcomes:
            raise InputError(
                f"retrain: measure gave {sorted(outcomes)} and no {target!r}, which is one of its "
                "targets"
            )
        values = np.asarray(outcomes[target], dtype=np.float64)
        if values.shape != (facts.n_test,):
            raise InputError(
                f"retrain: measure gave {target!r} of shape {values.shape}, expected "
                f"({facts.n_test},), one number for each test example"
            )
        if not np.isfinite(values).all():
            raise NumericsError(
                f"retrain: the model trained on {int(counterfactual.mask.sum())} of "
                f"{facts.n_train} examples with seed {counterfactual.seed} gives {target!r} = "
                f"{values[~np.isfinite(values)][0]} on test example "
                f"{int(np.flatnonzero(~np.isfinite(values))[0])}; the training diverged: lower "
                "its learning rate"
            )
        found[target] = values
    return found
