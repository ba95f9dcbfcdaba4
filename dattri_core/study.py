"""Study: an ablation as a value: a plan over parts, fields, settings, metrics and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import field, frozen

from dattri_core import assemble
from dattri_core.errors import DattriError, SpecError, nearest
from dattri_core.factors import (
    BASE,
    Factor,
    Level,
    Range,
    combinations,
    factors_of,
    spell_level,
)
from dattri_core.methods import method
from dattri_core.spec import read_data

PlanName = Literal["grid", "zip", "one-at-a-time", "leave-one-part-out", "random"]
LEAVE_OUT = "leave-one-part-out"
METHOD, SETTING, CHECKPOINTS = "method", "setting", "checkpoints"
"""Factors that are no slot or field of a method."""


@frozen
class Named:
    """A registered name and the fields that are set."""

    name: str
    fields: Mapping[str, Any] = field(factory=dict)

    @staticmethod
    def of(value: Any, what: str) -> Named:
        """Return it from ``"lds"`` or ``{"name": "lds", "subsets": 50}``."""
        if isinstance(value, Named):
            return value
        if isinstance(value, str):
            return Named(value)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            rest = {str(key): item for key, item in value.items() if key != "name"}
            return Named(value["name"], rest)
        raise SpecError(
            f"study: {what} is {value!r}; give a name, or a table with a name and fields, "
            '{name = "...", field = value}'
        )

    @property
    def label(self) -> str:
        """Return how tables call it: ``lds (subsets=50)``."""
        return spell_level({"name": self.name, **self.fields})


@frozen(eq=False)
class Point:
    """One combination of levels: a method in a setting.

    Args:
        levels: Label of the level of each factor.
        base: The registered method that is changed.
        changes: What is changed of it, as `dattri_core.method` takes it.
        setting: Name of the setting.
        checkpoints: Trained models that the method is asked about.
    """

    levels: Mapping[str, str]
    base: str
    changes: Mapping[str, Any]
    setting: str
    checkpoints: int

    @property
    def label(self) -> str:
        """Return how tables of one setting call it: the levels, one after another."""
        return " / ".join(v for k, v in self.levels.items() if k != SETTING) or self.base

    @property
    def problem(self) -> str | None:
        """Return why this is no valid method, or None; no tensor is made."""
        try:
            self.made()
        except DattriError as error:
            return " ".join(str(error).split())
        return None

    def made(self) -> Any:
        """Return the method. Raises `SpecError` where the parts do not fit each other."""
        return method(self.base, **self.changes)


@frozen(eq=False)
class StudyCell:
    """One number of a study: a point by a metric in the world of a seed."""

    point: Point
    metric: Named
    seed: int


def _metrics(given: Any) -> tuple[Named, ...]:
    values = [given] if isinstance(given, (str, Mapping)) else list(given)
    found = tuple(Named.of(value, "a metric") for value in values)
    if not found or len({one.label for one in found}) < len(found):
        raise SpecError(f"study: metrics is {given!r}; give one or more, each once")
    return found


def _base(given: Any) -> Named:
    return Named.of(given, "base")


def _seeds(given: Any) -> tuple[int, ...]:
    seeds = (given,) if isinstance(given, int) else tuple(given)
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise SpecError(f"study: seeds is {given!r}; give integers of 0 or more, each once")
    return seeds


def _size(given: Any) -> str | tuple[int, int]:
    if isinstance(given, str):
        return given
    sizes = tuple(given) if isinstance(given, Sequence) else ()
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise SpecError(f"study: size is {given!r}; give a name such as 'full', or [train, test]")
    return sizes[0], sizes[1]


@frozen(eq=False)
class Study:
    """An ablation: the points of a plan, each by every metric and seed.

    Args:
        name: Of the study; folder and titles bear it.
        setting: A registered setting.
        metrics: Registered metrics, by name or ``{"name": "lds", "subsets": 50}``.
        factors: Names to levels; see `Factor`. Slots and fields of the method by any path that
            names one, as ``"scorer"`` or ``"inverse_hessian.damping"``; ``"method"``,
            ``"setting"`` and ``"checkpoints"``.
        plan: ``"grid"``: every combination. ``"zip"``: the k-th levels together.
            ``"one-at-a-time"``: the first levels of all, then every other level alone.
            ``"leave-one-part-out"``: the base, then without each of its parts, or with each factor
            at its only level. ``"random"``: ``samples`` points, of a grid each at most once.
        base: The registered method that is changed, by name or ``{"name": ..., fields}``.
        seeds: Of worlds: data, training, subsets.
        size: Of settings: a name such as ``"full"``, or (train, test) examples.
        checkpoints: Trained models that methods are asked about; 1 is the setting's own.
        trained_on: What further models are trained on: ``"full"``, all examples, or ``"half"``.
        subsets: Train sets that metrics retrain on, where they leave it open.
        wrong: Share of wrong labels, in worlds of metrics that look for them.
        damping: Of methods that leave theirs open; None: the setting's.
        samples: Points of random search.
        draw: Seed of random search.

    Raises:
        SpecError: A value is of another form, or the plan does not take the factors.
    """

    name: str
    setting: str
    metrics: tuple[Named, ...] = field(converter=_metrics)
    factors: tuple[Factor | Range, ...] = field(converter=factors_of, default=())
    plan: PlanName = "grid"
    base: Named = field(default=Named("grad-dot"), converter=_base)
    seeds: tuple[int, ...] = field(default=(0,), converter=_seeds)
    size: str | tuple[int, int] = field(default="full", converter=_size)
    checkpoints: int = 1
    trained_on: Literal["full", "half"] = field(
        default="full", validator=attrs.validators.in_(("full", "half"))
    )
    subsets: int | None = None
    wrong: float = 0.1
    damping: float | None = None
    samples: int | None = None
    draw: int = 0

    def __attrs_post_init__(self) -> None:
        for what in ("name", "setting"):
            if not isinstance(getattr(self, what), str) or not getattr(self, what):
                raise SpecError(f"study: {what} is {getattr(self, what)!r}; give a name")
        if type(self.checkpoints) is not int or self.checkpoints < 1:
            raise SpecError(f"study: checkpoints={self.checkpoints!r}; give 1 or more")
        if self.subsets is not None and (type(self.subsets) is not int or self.subsets < 2):
            raise SpecError(f"study: subsets={self.subsets!r}; give 2 or more")
        if not 0 < self.wrong < 1:
            raise SpecError(f"study: wrong={self.wrong!r}; give a share between 0 and 1")
        names = [factor.name for factor in self.factors]
        if len(set(names)) < len(names):
            raise SpecError(f"study: a factor is named twice: {names}")
        self.points()

    @staticmethod
    def of(data: Mapping[str, Any], label: str = "study") -> Study:
        """Return the study that plain data spell.

        Raises:
            SpecError: A key is missing or unknown, or a value is of another form.
        """
        valid = [a.name for a in attrs.fields(Study)]
        for key in data:
            if key not in valid:
                raise SpecError(f"{label}: no key {key!r}; {nearest(str(key), valid)}")
        missing = [key for key in ("name", "setting", "metrics") if key not in data]
        if missing:
            raise SpecError(f"{label}: has no {', '.join(map(repr, missing))}")
        return Study(**data)

    @staticmethod
    def read(path: str | Path) -> Study:
        """Return the study of a TOML or JSON file, by default named as the file is.

        Raises:
            StoreError: The file is truncated, foreign, a pickle, or not UTF-8.
            SpecError: See `of`.
        """
        return Study.of({"name": Path(path).stem, **read_data(path)}, f"study {str(path)!r}")

    def points(self) -> tuple[Point, ...]:
        """Return the points of the plan in order, those that are no valid method among them."""
        factors = self._left_out() if self.plan == LEAVE_OUT else self.factors
        chosen = combinations(self.plan, factors, self.samples, self.draw)
        return tuple(map(self._point, chosen))

    def cells(self) -> tuple[StudyCell, ...]:
        """Return the cells: each point by each metric and seed."""
        return tuple(
            StudyCell(point, metric, seed)
            for point in self.points()
            for metric in self.metrics
            for seed in self.seeds
        )

    def _point(self, levels: Mapping[str, Level]) -> Point:
        values = {name: level.value for name, level in levels.items() if level.value is not None}
        base = Named.of(values.pop(METHOD), "a method") if METHOD in values else self.base
        setting = values.pop(SETTING, self.setting)
        checkpoints = values.pop(CHECKPOINTS, self.checkpoints)
        if not isinstance(setting, str):
            raise SpecError(f"study: the factor 'setting' has the level {setting!r}; give names")
        if type(checkpoints) is not int or checkpoints < 1:
            raise SpecError(
                f"study: the factor 'checkpoints' has the level {checkpoints!r}; give numbers of "
                "trained models, from 1 on"
            )
        labels = {name: level.label for name, level in levels.items()}
        return Point(labels, base.name, {**base.fields, **values}, setting, checkpoints)

    def _left_out(self) -> tuple[Factor, ...]:
        """Return a factor for each part: as the base has it, and without it."""
        if not self.factors:
            parts = parts_of(method(self.base.name, **self.base.fields))
            given = {
                slot: (Level(spell_level(parts[slot]), None), Level(name, name))
                for slot, name in assemble.DEFAULTS.items()
                if slot in parts and parts[slot] != assemble.build_slot(slot, name)
            }
        else:
            given = {}
            for factor in self.factors:
                if not isinstance(factor, Factor) or len(factor.levels) != 1:
                    raise SpecError(
                        f"study: plan {LEAVE_OUT!r} and the factor {factor.name!r}; give the one "
                        "level that stands for its absence, as in scorer = ['dot'], or no factors"
                    )
                given[factor.name] = (Level(BASE, None), factor.levels[0])
        if not given:
            raise SpecError(
                f"study: the base {self.base.label!r} has no part to be left out: all are the "
                "plainest"
            )
        return tuple(Factor(name, levels) for name, levels in given.items())


def parts_of(made: Any) -> dict[str, Any]:
    """Return the parts of a method by slot; nothing for those that are not made of parts."""
    return {slot: getattr(made, slot) for slot in assemble.DEFAULTS if hasattr(made, slot)}
