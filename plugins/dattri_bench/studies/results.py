"""Results of a study: one row for each cell, those that failed or are no method among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from dattri_bench.studies.asked import Asked
from dattri_core import InputError, Study

DONE, FAILED, INVALID, MISSING = "done", "failed", "invalid", "missing"


@frozen(eq=False)
class Row:
    """One cell: a point by a metric in the world of a seed.

    Args:
        setting: Of the point.
        checkpoints: Trained models that the method was asked about.
        levels: Label of the level of each factor.
        label: Of the point.
        metric: As tables call it.
        seed: Of the world.
        status: ``"done"``, ``"failed"``, ``"invalid"`` (no valid method) or ``"missing"``.
        result: The metric's answer, as `plain_result` spells it; None without a number.
        seconds: To fit and attribute, of the method by itself; not to train models.
        peak_bytes: Of memory meanwhile.
        passes: Over the train set, of the method by itself.
        notes: Warnings.
        error: Why there is no number.
        address: Of the record; None without one.
    """

    setting: str
    checkpoints: int
    levels: Mapping[str, str]
    label: str
    metric: str
    seed: int
    status: str
    result: Mapping[str, Any] | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    passes: float | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None
    address: str | None = None

    @property
    def value(self) -> float | None:
        """Return the number, or None."""
        return None if self.result is None else float(self.result["value"])


@frozen
class Saved:
    """What sharing saved: how much of something all cells would have taken alone, and was done."""

    what: str
    alone: float
    done: float

    def __str__(self) -> str:
        return f"{self.what}: {self.alone:,.6g} if each cell had been alone, {self.done:,.6g} done"


@frozen(eq=False)
class Results:
    """The rows of a study and what sharing saved.

    Args:
        study: What was asked.
        rows: In the order of `dattri_core.Study.cells`.
        saved: Over all runs of the study.
        retrained: Metrics, as tables call them, whose test examples share a sample of models that
            were trained on other train sets.
    """

    study: Study
    rows: tuple[Row, ...]
    saved: tuple[Saved, ...]
    retrained: frozenset[str] = frozenset()

    @property
    def factors(self) -> list[str]:
        """Return the names of the factors of the points."""
        return list(self.rows[0].levels)

    def plain(self) -> list[dict[str, Any]]:
        """Return one flat record for each row: the tidy table."""
        return [_flat(row) for row in self.rows]

    def to_pandas(self) -> Any:
        """Return the tidy table as a `pandas.DataFrame`. Raises `InputError` without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise InputError(
                'study: to_pandas needs pandas, which is not installed; pip install "dattri-core'
                '[table]"'
            ) from error
        return pandas.DataFrame(self.plain())


FIXED = (
    "setting",
    "checkpoints",
    "metric",
    "seed",
    "status",
    "value",
    "low",
    "high",
    "confidence",
    "chance",
    "ceiling",
    "higher_is_better",
    "seconds",
    "peak_bytes",
    "passes",
    "notes",
    "error",
    "address",
)


def column_of(factor: str) -> str:
    """Return the column of a factor; the method's own seed is not that of the world."""
    return f"method.{factor}" if factor in FIXED else factor


def _flat(row: Row) -> dict[str, Any]:
    result = row.result or {}
    own = {
        column_of(name): label
        for name, label in row.levels.items()
        if name not in ("setting", "checkpoints")
    }
    measured = ("value", "low", "high", "confidence", "chance", "ceiling", "higher_is_better")
    return {
        "setting": row.setting,
        "checkpoints": row.checkpoints,
        **own,
        "metric": row.metric,
        "seed": row.seed,
        "status": row.status,
        **{name: result.get(name) for name in measured},
        "seconds": row.seconds,
        "peak_bytes": row.peak_bytes,
        "passes": row.passes,
        "notes": "; ".join(row.notes),
        "error": row.error,
        "address": row.address,
    }


def results_of(asked: Asked) -> Results:
    """Return what is on record of a study."""
    records: dict[tuple[int, str, int], tuple[str, Mapping[str, Any]]] = {}
    worlds = 0
    for cells in asked.worlds(lambda line: None):
        finished = cells.read(cells.planned())
        worlds += any(one.record["result"] is not None for one in finished)
        for one in finished:
            cell = one.cell
            key = (id(cell.entrant), cell.measure.label, cell.seed)
            records[key] = cell.address, one.record
    measures = asked.requests[0].measures
    labels = [measure.label for measure in measures]
    retrained = frozenset(m.label for m in measures if "retraining" in m.metric.needs)
    rows = [
        _row(asked, at, metric, seed, records)
        for at in range(len(asked.points))
        for metric in labels
        for seed in asked.study.seeds
    ]
    unique = dict(records.values())
    saved = tuple(_saved(list(unique.values()), worlds))
    return Results(asked.study, tuple(rows), saved, retrained)


def _row(
    asked: Asked,
    at: int,
    metric: str,
    seed: int,
    records: Mapping[tuple[int, str, int], tuple[str, Mapping[str, Any]]],
) -> Row:
    point = asked.points[at]
    place = (point.setting, point.checkpoints, point.levels, point.label, metric, seed)
    if at in asked.problems:
        return Row(*place, status=INVALID, error=asked.problems[at])
    found = records.get((id(asked.entrants[at]), metric, seed))
    if found is None:
        return Row(*place, status=MISSING)
    address, record = found
    if record["result"] is None:
        return Row(*place, status=FAILED, error=record["error"], address=address)
    run = record["attribution"]
    passes = run.get("passes")
    own = run.get("self_influence") or {}
    return Row(
        *place,
        status=DONE,
        result=record["result"],
        seconds=run.get("seconds"),
        peak_bytes=run.get("peak_bytes"),
        passes=None if passes is None else passes["alone"],
        notes=(*run.get("notes", ()), *own.get("notes", ())),
        address=address,
    )


def _saved(records: Sequence[Mapping[str, Any]], worlds: int) -> list[Saved]:
    """Return what sharing saved, from the records of cells that gave a number."""
    done = [record for record in records if record["result"] is not None]
    runs: dict[str, Mapping[str, Any]] = {}
    alone = 0.0
    for record in done:
        identity = {k: v for k, v in record["cell"].items() if k != "metric"}
        run = record["attribution"]
        runs[repr(identity)] = run
        alone += (run.get("passes") or {}).get("alone", 0.0) + _own_passes(run)
    passes = sum(
        (run.get("passes") or {}).get("done", 0.0) + _own_passes(run) for run in runs.values()
    )
    models = [record["models"] for record in done if record.get("models")]
    saved = [
        Saved("worlds, each with a trained model", len(done), worlds),
        Saved("attributions", len(done), len(runs)),
        Saved("passes of the train set through the model", round(alone, 1), round(passes, 1)),
    ]
    if models and all(one["trained"] is not None for one in models):
        asked, trained = (sum(one[key] for one in models) for key in ("asked", "trained"))
        saved.append(Saved("models trained on other train sets", asked, trained))
    return saved


def _own_passes(run: Mapping[str, Any]) -> float:
    own = run.get("self_influence") or {}
    return float(own.get("passes") or 0.0)
