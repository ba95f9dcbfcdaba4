"""What a benchmark is asked for: setting, methods, metrics, seeds; checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from attrs import frozen
from dattri_parts.choices import Choice, setting_of
from dattri_parts.measuring.attribution import (
    damped,
    follows_run,
    retrains,
    sets_damping,
    takes_damping,
)

from dattri_core import (
    InputError,
    Method,
    Metric,
    Setting,
    SpecError,
    default_registry,
    describe_part,
    method,
    nearest,
    origins_of,
)
from dattri_core import __version__ as dattri_version

Size = tuple[int, int]
LEAST_SUBSETS = 3
"""Train sets below which a correlation over them is no number: of two it is 1 or -1."""
NEEDS = frozenset({"mislabelled", "retraining", "labels", "self-influence", "attribute"})
FACT = "fact:"
TrainedOn = Literal["full", "half"]


@frozen(eq=False)
class Entrant:
    """What is measured: a method, on a number of trained models.

    Args:
        choice: Of the method.
        models: How many models it is asked about: 1 is the world's own, more are trained for it;
            0 stands for checkpoints along the run, which the method needs.
    """

    choice: Choice
    models: int

    @property
    def label(self) -> str:
        """Return how tables call it."""
        return f"{self.choice.label} x{self.models}" if self.models > 1 else self.choice.label

    def made(self, damping: float | None, seed: int = 0) -> Any:
        """Return the method in the world of a seed.

        Args:
            damping: That it has where it takes one and the choice sets none; None: its own.
            seed: Of the world.
        """
        fields = self.fields(seed)
        if damping is None:
            return method(self.choice.name, **fields)
        return damped(self.choice.name, damping, fields)

    def fields(self, seed: int) -> Mapping[str, Any]:
        """Return the fields that are set in the world of a seed.

            seed of the method = its default + seed of the world

        where it draws random numbers by a ``seed`` of its own and the choice leaves it open: an
        interval over worlds is then one over its draws too.
        """
        fields = self.choice.fields
        if seed == 0 or "seed" in fields:
            return fields
        made = method(self.choice.name, **fields)
        return {**fields, "seed": made.seed + seed} if _draws(made) else fields

    @property
    def retrains(self) -> bool:
        """Return whether the method trains models itself."""
        return retrains(self.made(None))

    @property
    def tunable(self) -> bool:
        """Return whether it has a damping that the choice leaves open."""
        return not sets_damping(self.choice.fields) and takes_damping(self.made(None))


@frozen(eq=False)
class Measure:
    """A metric, with its name and the fields that the choice sets.

    Args:
        choice: As typed.
        metric: The part.
    """

    choice: Choice
    metric: Any

    @property
    def label(self) -> str:
        """Return how tables call it."""
        return self.choice.label

    @property
    def needs_wrong_labels(self) -> bool:
        """Return whether it asks for a world some of whose labels are wrong."""
        return "mislabelled" in self.metric.needs

    @property
    def subsets(self) -> int | None:
        """Return how many train sets it asks outcomes of, where that is a field of it."""
        found = getattr(self.metric, "subsets", None)
        return found if isinstance(found, int) else None

    def with_subsets(self, count: int) -> Measure:
        """Return it for another number of train sets, where that is a field of it."""
        if self.subsets is None:
            return self
        return Measure(self.choice, attrs.evolve(self.metric, subsets=count))


@frozen(eq=False)
class Request:
    """One benchmark.

    Args:
        chosen: The setting as it was named, with the fields that are set.
        setting: The part.
        size: (train, test) examples.
        seeds: Of worlds.
        entrants: Methods, on how many models.
        measures: Metrics as they are reported.
        chooser: The metric that chooses a damping; None without tuning.
        dampings: That are tried.
        damping: Of every method that takes one; None: the world's.
        wrong: Share of wrong labels in worlds for metrics that ask for them.
        trained_on: What the models of an ensemble are trained on.
        out: Folder of records and results.
        retrained: Folder of models trained on other train sets and of their outcomes.
        retry: Whether cells that failed are computed again.
        command: As typed.
    """

    chosen: Choice
    setting: Setting
    size: Size
    seeds: tuple[int, ...]
    entrants: tuple[Entrant, ...]
    measures: tuple[Measure, ...]
    chooser: Measure | None
    dampings: tuple[Any, ...]
    damping: float | None
    wrong: float
    trained_on: TrainedOn
    out: Path
    retrained: Path
    retry: bool
    command: str

    @property
    def name(self) -> str:
        """Return how tables call the setting."""
        return self.chosen.label

    def world(self, seed: int, wrong: float) -> dict[str, Any]:
        """Return what a world is made from, and by which versions: its identity."""
        return {
            "setting": self.chosen.name,
            **({"fields": dict(self.chosen.fields)} if self.chosen.fields else {}),
            "from": str(default_registry().entry("setting", self.chosen.name).origin),
            "size": list(self.size),
            "seed": seed,
            "wrong": wrong,
            "versions": {"dattri-core": dattri_version, "torch": torch.__version__},
        }

    def attribution(
        self, world: Mapping[str, Any], entrant: Entrant, damping: float | None
    ) -> dict[str, Any]:
        """Return the identity of an entrant's scores.

        Args:
            world: Identity of the world, with its seed and fingerprint.
            entrant: The method.
            damping: Of the world.
        """
        made = entrant.made(self.damping if self.damping is not None else damping, world["seed"])
        spec = made.to_spec() if isinstance(made, Method) else {"attributor": describe_part(made)}
        tuned = self.chooser is not None and entrant.tunable
        return {
            "world": world,
            "method": {
                "name": entrant.choice.name,
                "from": str(default_registry().recipe(entrant.choice.name).origin),
                "spec": spec,
                **_origins(made),
            },
            "models": entrant.models,
            "trained_on": self.trained_on if entrant.models > 1 else None,
            "tuning": self.tuning() if tuned else None,
        }

    def tuning(self) -> dict[str, Any]:
        """Return how a damping is chosen."""
        assert self.chooser is not None
        return {
            "dampings": list(self.dampings),
            "metric": {
                "name": self.chooser.choice.name,
                "spec": describe_part(self.chooser.metric),
                **_origins(self.chooser.metric),
            },
        }

    def cell(self, attribution: Mapping[str, Any], measure: Measure) -> dict[str, Any]:
        """Return the identity of one measured number."""
        name = measure.choice.name
        return {
            **attribution,
            "metric": {
                "name": name,
                "from": str(default_registry().entry("metric", name).origin),
                "spec": describe_part(measure.metric),
                **_origins(measure.metric),
            },
        }


def _origins(made: Any) -> dict[str, Any]:
    """Return ``{"parts": origins}`` where some came with another distribution than dattri-core."""
    found = origins_of(made)
    return {"parts": found} if found else {}


def checked_setting(word: str) -> Setting:
    """Return a registered setting, with the fields changed that ``NAME:FIELD=VALUE`` sets.

    Raises:
        SpecError: No such setting or field, or it is no setting.
    """
    found = setting_of(word)
    if not isinstance(found, Setting):
        raise SpecError(
            f"bench: the setting {word!r} is a {type(found).__name__}, which does not answer "
            "dattri_core.Setting: title, sizes, metrics, load(size, seed, wrong)"
        )
    return found


def size_of(text: str, setting: Setting) -> Size:
    """Return (train, test) sizes from a name such as ``small``, or from ``N,M``.

    Raises:
        InputError: It is neither.
    """
    sizes = dict(setting.sizes)
    if text in sizes:
        return sizes[text]
    words = text.split(",")
    if len(words) == 2 and all(word.strip().isdigit() and int(word) > 0 for word in words):
        return int(words[0]), int(words[1])
    raise InputError(
        f"bench: --size {text!r}; give TRAIN,TEST as two numbers of examples, or one of "
        f"{', '.join(f'{name} ({n} x {m})' for name, (n, m) in sizes.items())}"
    )


def measures_of(choices: Sequence[Choice], subsets: int | None) -> list[Measure]:
    """Return the metrics; ``subsets`` is set where it is a field that the choice leaves open.

    Raises:
        SpecError: A field is unknown, a registered metric is none, or needs what there is not.
        InputError: A metric that retrains has fewer than 3 subsets.
    """
    found = []
    for choice in choices:
        metric = default_registry().make("metric", choice.name, **choice.fields)
        if not isinstance(metric, Metric):
            raise SpecError(
                f"bench: the metric {choice.name!r} is a {type(metric).__name__}, which does not "
                "answer dattri_core.Metric: needs, measure(evidence)"
            )
        _check_needs(choice.name, metric.needs)
        measure = Measure(choice, metric)
        if subsets is not None and "subsets" not in choice.fields:
            measure = measure.with_subsets(subsets)
        check_subsets(measure)
        found.append(measure)
    return found


def _check_needs(name: str, needs: Any) -> None:
    if not isinstance(needs, (frozenset, set)):
        raise SpecError(
            f"bench: the metric {name!r} says needs = {needs!r} ({type(needs).__name__}), expected "
            "a frozenset of words; write frozenset({'retraining'}), or frozenset() for none"
        )
    for word in sorted(map(str, needs)):
        if word not in NEEDS and not word.startswith(FACT):
            raise SpecError(
                f"bench: the metric {name!r} needs {word!r}, which no world gives; "
                f"{nearest(word, [*sorted(NEEDS), f'{FACT}NAME'])}"
            )


def check_subsets(measure: Measure) -> None:
    """Check that a metric that retrains has train sets enough.

    Raises:
        InputError: It has fewer than 3.
    """
    asked = measure.subsets
    if asked is not None and asked < LEAST_SUBSETS and "retraining" in measure.metric.needs:
        raise InputError(
            f"bench: {measure.choice.name!r} on {asked} train subsets; give at least "
            f"{LEAST_SUBSETS}, as in --subsets 50, or subsets = 50 in a study"
        )


def entrants_of(choices: Sequence[Choice], counts: Sequence[int]) -> list[Entrant]:
    """Return the entrants: each method on each number of models, or on its run alone.

    Raises:
        SpecError: A field is unknown.
    """
    return [Entrant(choice, count) for choice in choices for count in models_of(choice, counts)]


def models_of(choice: Choice, counts: Sequence[int]) -> Sequence[int]:
    """Return on how many models a method is asked: 0, its run, or 1 where it trains its own.

    Raises:
        SpecError: A field is unknown.
    """
    made = Entrant(choice, 1).made(None)
    return [0] if follows_run(made) else [1] if retrains(made) else counts


def _draws(made: Any) -> bool:
    """Return whether a method draws random numbers by a field ``seed`` of its own.

    Rows that pass no sketch and no inverse Hessian meet no random number of a method made of
    parts. Methods that train models get a seed where they get what trains them.
    """
    if isinstance(made, Method):
        plainest = Method().chain
        return any(stage not in plainest for stage in made.chain)
    fields = attrs.fields(type(made)) if attrs.has(type(made)) else ()
    own = any(field.name == "seed" and field.init for field in fields)
    return own and not retrains(made) and type(made.seed) is int
