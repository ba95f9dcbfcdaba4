"""What the methods of one world share: a fit, and train rows after a sketch.

Methods with the same source, stages and seed, whatever their scorer, fold and damping, take one fit
(`FittedMethod.with_`). Methods that begin with the same sketch, and ask no more of the train set
than sketched rows, read them from one gradient store. Which of the two a method uses depends on the
method alone, so that no number depends on what else is in a study.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import define, field, frozen
from dattri_parts.measuring.attribution import Attribution, Passes, attribute, heard, named
from dattri_parts.measuring.peak import PeakMemory

from dattri_bench.records import address_of
from dattri_core import DattriError, FittedMethod, Method, Projector, Task, World, take

OF_ROWS = frozenset({"rows", "reference-rows"})
"""What a stage may ask so that rows from a store are enough."""


def front_of(made: Any) -> str | None:
    """Return what decides sketched train rows, where a store of them is all that a method reads.

    None: it has no sketch, its sketch is fitted on data, or a stage needs the model or factors.
    """
    if not isinstance(made, Method):
        return None
    sketches = [stage for stage in made.chain if isinstance(stage, Projector)]
    leading = all(isinstance(stage, Projector) for stage in made.chain[: len(sketches)])
    plain = sketches == [Method().projector]
    asked = [frozenset(getattr(stage, "needs", ())) for stage in made.chain]
    if plain or not sketches or not leading:
        return None
    if any(asked[: len(sketches)]) or not all(needs <= OF_ROWS for needs in asked):
        return None
    spec = made.to_spec()
    kept: dict[str, Any] = {
        key: spec[key] for key in ("source", "projector", "seed") if key in spec
    }
    return address_of({**kept, "stages": spec.get("stages", [])[: len(sketches)]})


def fit_of(made: Any) -> str | None:
    """Return what decides a fit: all but scorer, fold and dampings; None where there is none."""
    if not isinstance(made, Method):
        return None
    spec = {k: v for k, v in made.to_spec().items() if k not in ("scorer", "fold")}
    return address_of(_undamped(spec))


def _undamped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _undamped(item) for key, item in value.items() if key != "damping"}
    return [_undamped(item) for item in value] if isinstance(value, list) else value


@frozen(eq=False)
class Fit:
    """A fitted method that others take over, and what fitting took."""

    key: tuple[Any, ...]
    fitted: FittedMethod
    seconds: float
    peak: int | None
    passes: float
    notes: tuple[str, ...]


@frozen
class RowsTaken:
    """What rows in a store took to compute."""

    seconds: float
    peak: int | None
    passes: float


NO_ROWS = RowsTaken(0.0, None, 0.0)


@define(eq=False)
class Shared:
    """Asks methods in one world so that what they have in common is computed once.

    Args:
        world: Of the methods.
        planned: All methods that are to be asked, whether or not their scores are there already;
            of those that share a fit the first is fitted, so that a run that was stopped and went
            on fits the same.
        folder: For stores of rows; see `discard`.
    """

    world: World
    planned: Sequence[Any]
    folder: Path
    _first: dict[str, Method] = field(factory=dict, init=False)
    _held: Fit | None = field(default=None, init=False)
    _rows: dict[tuple[Any, ...], RowsTaken] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        for made in self.planned:
            key = fit_of(made)
            if key is not None:
                self._first.setdefault(key, made)

    def attribute(self, made: Any, task: Task) -> Attribution:
        """Return the scores of a method; seconds and peak are those of the method by itself."""
        if not isinstance(made, Method):
            return attribute(made, task, self.world)
        rows, built = self._stored(made, task)
        fit, fresh = self._fit(made, task, rows)
        fitted = _as(fit.fitted, made)
        before = fitted.train.reads
        with heard() as notes, PeakMemory(task.device) as peak:
            started = time.perf_counter()
            scores = fitted.attribute(self.world.test)
            seconds = time.perf_counter() - started
        own = (fitted.train.reads - before) / len(fitted.train)
        taken = NO_ROWS if rows is None else self._rows[self._row_key(made, task)]
        peaks = [p for p in (taken.peak, fit.peak, peak.bytes) if p is not None]
        return Attribution(
            named(scores, self.world),
            taken.seconds + fit.seconds + seconds,
            max(peaks, default=None),
            tuple(dict.fromkeys([*fit.notes, *notes])),
            fitted,
            Passes(
                taken.passes + fit.passes + own,
                (taken.passes if built else 0.0) + (fit.passes if fresh else 0.0) + own,
            ),
        )

    def fit(self, made: Method, task: Task) -> FittedMethod:
        """Return a method on the train set."""
        rows, _ = self._stored(made, task)
        return _as(self._fit(made, task, rows)[0].fitted, made)

    def discard(self) -> None:
        """Let go of what was fitted, and remove the rows."""
        self._held = None
        self._rows.clear()
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    # --- what is shared -------------------------------------------------------------------------
    def _fit(self, made: Method, task: Task, rows: Path | None) -> tuple[Fit, bool]:
        """Return the fit that a method shares, and whether it was made now."""
        shared = fit_of(made)
        assert shared is not None
        key = (shared, *_same_models(task))
        if self._held is not None and self._held.key == key:
            return self._held, False
        self._held = None  # the one before goes first: two never live at once
        first = self._first.get(shared, made)
        try:
            self._held = self._fitted(first, task, rows, key)
        except (DattriError, RuntimeError, ValueError):
            if first == made:
                raise
            # at another damping it may well be possible
            self._held = self._fitted(made, task, rows, key)
        return self._held, True

    def _fitted(self, made: Method, task: Task, rows: Path | None, key: tuple[Any, ...]) -> Fit:
        with heard() as notes, PeakMemory(task.device) as peak:
            started = time.perf_counter()
            fitted = made.fit(task, self.world.train, store=rows, progress=False)
            seconds = time.perf_counter() - started
        passes = fitted.train.reads / len(fitted.train)
        return Fit(key, fitted, seconds, peak.bytes, passes, tuple(notes))

    def _stored(self, made: Method, task: Task) -> tuple[Path | None, bool]:
        """Return the store of a method's train rows, and whether it was filled now."""
        front = front_of(made)
        if front is None:
            return None, False
        path = self.folder / address_of({"front": front, "models": _names(task)})
        key = self._row_key(made, task)
        if key in self._rows:
            return path, False
        plain = attrs.evolve(_beginning(made), seed=made.seed)
        with PeakMemory(task.device) as peak:
            started = time.perf_counter()
            fitted = plain.fit(task, self.world.train, store=path, progress=False)
            fitted.attribute(take(self.world.test, slice(0, 1)))  # the other checkpoints too
            seconds = time.perf_counter() - started
        self._rows[key] = RowsTaken(seconds, peak.bytes, fitted.train.reads / len(fitted.train))
        return path, True

    def _row_key(self, made: Method, task: Task) -> tuple[Any, ...]:
        return (front_of(made), *_same_models(task))


def _same_models(task: Task) -> tuple[int, ...]:
    return tuple(map(id, task.checkpoints))


def _names(task: Task) -> list[str]:
    return [checkpoint.fingerprint(task.model) for checkpoint in task.checkpoints]


def _beginning(made: Method) -> Method:
    """Return the plainest method with the same source and sketches."""
    if made.stages is None:
        return Method(source=made.source, projector=made.projector)
    sketches = [stage for stage in made.stages if isinstance(stage, Projector)]
    return Method(source=made.source, stages=sketches)


def _as(fitted: FittedMethod, made: Method) -> FittedMethod:
    """Return what was fitted as another method that shares the fit."""
    if fitted.method == made:
        return fitted
    slots = {a.name: getattr(made, a.name) for a in attrs.fields(Method)}
    unused = ("stages",) if made.stages is None else ("projector", "inverse_hessian")
    return fitted.with_(**{name: part for name, part in slots.items() if name not in unused})
