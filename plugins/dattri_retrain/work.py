"""Work: training counterfactuals and writing their rows, in this process or as a job elsewhere."""

from __future__ import annotations

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
Row = tuple[Counterfactual, Mapping[str, Array]]
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
    when that comes by an error or Ctrl-C. They are those of whole groups, so that what is trained
    together does not depend on where a run was stopped: stacked models are equal to rounding only.
    A training that diverges does not stop the others.

    Args:
        retraining: How.
        facts: Of the retraining.
        folder: Of the shards.
        groups: Each is trained by one call.
        every: Seconds between two shards.
        advance: Told how many are done.
        known: Says, just before a group is trained, what of it is still missing.

    Raises:
        NumericsError: A model diverged; which one is named. All others were trained and written.
        InputError: The retraining gives other numbers of models, or outcomes of other shapes.
    """
    done: list[Row] = []
    written: list[str] = []
    diverged: list[NumericsError] = []
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
            done += _trained(retraining, facts, missing, advance, diverged)
            if len(done) >= most or time.monotonic() - last >= every:
                write()
    finally:
        write()
    if diverged:
        raise diverged[0]
    return tuple(written)


def _trained(
    retraining: Retraining,
    facts: Facts,
    group: Group,
    advance: Callable[[int], None],
    diverged: list[NumericsError],
) -> list[Row]:
    """Return the rows of a group, but for those that diverged."""
    rows: list[Row] = []
    states = iter(retraining.train(group)) if group else iter(())
    for counterfactual in group:
        try:
            state = next(states, None)
        except NumericsError as error:  # the others of the group are not to be had
            diverged.append(_named(error, facts, counterfactual))
            return rows
        if state is None:
            raise InputError(
                f"retrain: train gave {len(rows)} models for {len(group)} train sets; it must "
                "yield one state dict for each"
            )
        try:
            rows.append((counterfactual, _checked(retraining.measure(state), facts)))
        except NumericsError as error:
            diverged.append(_named(error, facts, counterfactual))
        advance(1)
    if next(states, None) is not None:
        raise InputError(
            f"retrain: train gave more models than the {len(group)} train sets it was given; it "
            "must yield one state dict for each"
        )
    return rows


def _named(error: NumericsError, facts: Facts, counterfactual: Counterfactual) -> NumericsError:
    named = NumericsError(
        f"retrain: the training on {int(counterfactual.mask.sum())} of {facts.n_train} examples "
        f"with seed {counterfactual.seed} diverged ({error}); lower the learning rate"
    )
    named.__cause__ = error
    return named


def _checked(outcomes: Mapping[str, Array], facts: Facts) -> Mapping[str, Array]:
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
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            raise NumericsError(f"{target!r} is {values[at]} on test example {at}")
        found[target] = values
    return found
