"""Check a part or a method against every law of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import attrs
from attrs import evolve, field, frozen

from dattri_core.entries import Entry, Recipe
from dattri_core.errors import PluginError, SpecError, nearest
from dattri_core.laws import (
    curvatures,
    directions,
    fingerprints,
    folds,
    inverse_numbers,
    inverses,
    keeping,
    methods,
    metric_seeds,
    metric_worlds,
    metrics,
    pools,
    projectors,
    scorers,
    settings,
    solvers,
    source_sides,
    sources,
    targets,
    weighted,
)
from dattri_core.laws.global_state import settings_kept
from dattri_core.laws.law import LAWS, Law, LawBroken, NotApplicable
from dattri_core.laws.places import where
from dattri_core.laws.pretended import prepare
from dattri_core.laws.report import Finding, Report
from dattri_core.methods import method
from dattri_core.registry import Registry, default_registry, using

# laws of kinds whose bench is elsewhere
_MORE = (
    directions,
    fingerprints,
    inverse_numbers,
    keeping,
    metric_seeds,
    metric_worlds,
    pools,
    source_sides,
    targets,
    weighted,
)
BENCHES: dict[str, Callable[[Any], Any]] = {
    "source": sources.SourceBench,
    "projector": projectors.ProjectorBench,
    "curvature": curvatures.CurvatureBench,
    "solver": solvers.SolverBench,
    "inverse_hessian": inverses.InverseBench,
    "scorer": scorers.ScorerBench,
    "fold": folds.FoldBench,
    "method": methods.MethodBench,
    "setting": settings.SettingBench,
    "metric": metrics.MetricBench,
}
KINDS = tuple(BENCHES)
"""The kinds that have laws; an attributor answers to those of a method."""


def check(kind: str, name_or_part: Any, *, registry: Registry | None = None) -> Report:
    """Run every law of a kind on a part.

    A part may declare ``expected_failures``, a mapping of laws to reasons: such a law counts as
    expected to fail, and as failed once it holds, so that the declaration cannot outlive its cause.

    Args:
        kind: One of `KINDS`, or ``"attributor"``.
        name_or_part: A registered name, or the part, method or attributor itself.
        registry: Where names are looked up; default that of the installed plugins.

    Returns:
        The findings; ``report.ok`` says whether all is well, ``print(report)`` shows a table.

    Raises:
        SpecError: No such kind or name, or the part has fields without a default.
    """
    name = name_or_part if isinstance(name_or_part, str) else type(name_or_part).__name__
    prepare()
    with using(registry or default_registry()):
        part = part_of(kind, name_or_part)
        bench = bench_of(kind, part)
        findings: tuple[Any, ...] = tuple(find(law, bench) for law in laws_of(kind))
    return Report(kind, name, findings)


def laws_of(kind: str) -> tuple[Law, ...]:
    """Return the laws of a kind, in the order of their file."""
    prepare()  # while tests are collected, which is before the first backward pass
    return tuple(LAWS[_known(kind)].values())


def bench_of(kind: str, part: Any) -> Any:
    """Return what the laws of a kind take: the part amid toy worlds."""
    return BENCHES[_known(kind)](part)


def part_of(kind: str, name_or_part: Any) -> Any:
    """Return the part of a name from the default registry, or the part itself."""
    known = _known(kind)
    if not isinstance(name_or_part, str):
        return name_or_part
    if kind == "method":
        return method(name_or_part)
    registry = default_registry()
    cls = registry.resolve(kind, name_or_part)
    if isinstance(cls, type) and attrs.has(cls):
        bare = [a.name for a in attrs.fields(cls) if a.default is attrs.NOTHING and a.init]
        if bare:
            raise SpecError(
                f"check {known} {name_or_part!r}: the fields {bare} have no default; give the part "
                "itself: dattri_core.laws.check(kind, Part(...))"
            )
    return registry.make(kind, name_or_part)


@frozen(eq=False)
class Case:
    """One law of one part or method, as a test: ``pytest.mark.parametrize("case", cases(name))``.

    Args:
        kind: Of part, or ``"method"``.
        name: As registered.
        law: The law.
        bench: The part amid toy worlds, shared by all of its laws.
    """

    kind: str
    name: str
    law: Law
    bench: Any = field(repr=False)

    def run(self) -> Finding:
        """Return what became of the law; nothing that the part raises escapes."""
        return find(self.law, self.bench)

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}-{self.law.name}"


def cases(name: str, *, registry: Registry | None = None) -> tuple[Case, ...]:
    """Return every law of every part and method that a plugin, or a distribution, brings.

    What cannot be imported or made is one case, which fails.

    Raises:
        PluginError: It failed to load.
        SpecError: No such plugin, or it brings nothing that has laws.
    """
    registry = registry or default_registry()
    found = [
        Case("plugin", plugin, _raised(error), NO_PART) for plugin, error in _broken(name, registry)
    ]
    with using(registry):
        for kind, part in _checkable(name, registry):
            try:
                bench = bench_of(kind, part_of(kind, part))
            except Exception as error:  # the others are to be checked all the same
                found.append(Case(kind, part, _raised(error), NO_PART))
                continue
            found += [Case(kind, part, law, bench) for law in laws_of(kind)]
    return tuple(found)


def check_plugin(name: str, *, registry: Registry | None = None) -> tuple[Report, ...]:
    """Check every part and method that one plugin, or one distribution, brings.

    Parts whose fields have no default are left to the methods that use them. What cannot be
    imported or made has failed; the others are checked.

    Raises:
        PluginError: It failed to load.
        SpecError: No such plugin, or it brings nothing that has laws.
    """
    registry = registry or default_registry()
    reports = [_unmade("plugin", plugin, error) for plugin, error in _broken(name, registry)]
    for kind, part in _checkable(name, registry):
        try:
            with using(registry):
                made = part_of(kind, part)
        except Exception as error:  # the others are to be checked all the same
            reports.append(_unmade(kind, part, error))
            continue
        reports.append(evolve(check(kind, made, registry=registry), name=part))
    return tuple(reports)


def _unmade(kind: str, name: str, error: Exception | str) -> Report:
    """Return the report of what could not be imported or made."""
    findings: tuple[Any, ...] = (find(_raised(error), NO_PART),)
    return Report(kind, name, findings)


NO_PART = SimpleNamespace(part=None)
"""The bench of a law on what could not be made."""


def _raised(error: Exception | str) -> Law:
    """Return a law that what could not be imported breaks."""

    def fail(_: Any) -> None:
        said = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        raise LawBroken(said)

    return Law("plugin", "it-can-be-made", "What is registered can be imported and made.", fail, ())


def _broken(name: str, registry: Registry) -> list[tuple[str, str]]:
    """Return the plugins of a name or distribution that failed to load, each with its error."""
    return [
        (plugin.origin.plugin, plugin.error)
        for plugin in registry.plugins
        if name in (plugin.origin.plugin, plugin.origin.distribution) and plugin.status == "broken"
    ]


def _checkable(name: str, registry: Registry) -> list[tuple[str, str]]:
    found = [
        (entry.kind, entry.name)
        for entry in registry.entries()
        if name in (entry.origin.plugin, entry.origin.distribution)
        and entry.kind in (*KINDS, "attributor")
        and _has_defaults(entry, registry)
    ]
    if found:
        return found
    for plugin in registry.plugins:
        if name in (plugin.origin.plugin, plugin.origin.distribution) and plugin.error:
            raise PluginError(f"check plugin {name!r}: it is {plugin.status}: {plugin.error}")
    known = {e.origin.plugin for e in registry.entries()}
    raise SpecError(
        f"check plugin {name!r}: it brings nothing that has laws; {nearest(name, known)}"
    )


def _has_defaults(entry: Entry | Recipe, registry: Registry) -> bool:
    if isinstance(entry, Recipe):
        return True
    try:
        cls = registry.resolve(entry.kind, entry.name)
    except PluginError:
        return True  # so that it is tried, and said to have failed
    bare = attrs.has(cls) and any(a.default is attrs.NOTHING and a.init for a in attrs.fields(cls))
    return not bare


def _known(kind: str) -> str:
    known = "method" if kind == "attributor" else kind
    if known not in BENCHES:
        raise SpecError(f"check: no laws for the kind {kind!r}; {nearest(kind, KINDS)}")
    return known


def _expected(part: Any) -> Mapping[str, str]:
    declared: Mapping[str, str] = getattr(part, "expected_failures", {})
    if declared:
        known = {name for laws in LAWS.values() for name in laws}
        for name in declared:
            if name not in known:
                raise SpecError(
                    f"{type(part).__name__}.expected_failures: no law {name!r}; "
                    f"{nearest(name, known)}"
                )
    return declared


def find(law: Law, bench: Any) -> Finding:
    """Return what becomes of one law on a bench; nothing that the part raises escapes."""
    expected = _expected(bench.part)
    try:
        with settings_kept():
            _check(law, bench)
    except NotApplicable as reason:
        return Finding(law.name, law.statement, "skipped", str(reason))
    except LawBroken as broken:
        if law.name in expected:
            return Finding(law.name, law.statement, "expected", expected[law.name])
        return Finding(law.name, law.statement, "failed", str(broken))
    except Exception as error:  # the part's own failure is a finding, and must not hide the others
        detail = f"{type(error).__name__}: {error}{where(error, bench.part)}"
        return Finding(law.name, law.statement, "failed", detail)
    if law.name in expected:
        detail = f"it holds, though declared to fail: {expected[law.name]}"
        return Finding(law.name, law.statement, "failed", detail)
    return Finding(law.name, law.statement, "passed")


def _check(law: Law, bench: Any) -> None:
    """Check a law on a bench; where it fails with fewer steps than the part has, on all of them."""
    try:
        law.check(bench)
    except NotApplicable:
        raise
    except Exception:
        longer = getattr(bench, "longer", None)
        if longer is None:
            raise
        law.check(longer)
