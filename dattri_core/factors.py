"""Factors of a study: what is varied, and the levels that it takes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from attrs import frozen

from dattri_core import assemble
from dattri_core.errors import SpecError, nearest

Choice = tuple[int, ...]
"""The position of a level in each factor."""
PART_KEYS = frozenset({"name", "curvature", "solver"})
RANGE_KEYS = frozenset({"low", "high", "log"})
TRIES = 20
"""Draws for each sample of random search: one that came before is drawn again."""
BASE = "base"
"""Label of what the base method has itself, where a study leaves parts out."""


@frozen
class Level:
    """One value that a factor takes.

    Args:
        label: As tables and figures call it.
        value: A name, a part, a mapping, a number; None: as the base has it.
    """

    label: str
    value: Any


@frozen
class Factor:
    """What a study varies, and the levels that it takes.

    Args:
        name: A slot (``"scorer"``), a field (``"inverse_hessian.damping"``), ``"method"``,
            ``"setting"`` or ``"checkpoints"``.
        levels: In order; plans around a base take the first as that of the base.
    """

    name: str
    levels: tuple[Level, ...]


@frozen
class Range:
    """A factor of random search that takes any number of an interval.

    Args:
        name: As that of `Factor`.
        low: The least value.
        high: The largest.
        log: Whether the logarithm is uniform, not the value.
    """

    name: str
    low: float
    high: float
    log: bool = False

    def draw(self, random: np.random.Generator) -> Level:
        """Return one value, rounded to four digits so that labels say all."""
        if self.log:
            value = math.exp(random.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = random.uniform(self.low, self.high)
        value = min(max(float(f"{value:.4g}"), self.low), self.high)
        return Level(f"{value:g}", value)


def factors_of(given: Any) -> tuple[Factor | Range, ...]:
    """Return factors from a mapping of names to levels.

    Levels are a list, whose labels follow from the values; a table of labels and values; or, for
    random search, ``{"low": 1e-4, "high": 1.0, "log": true}``.

    Raises:
        SpecError: A factor has no levels, two with one label, or is no list or table.
    """
    if isinstance(given, Sequence) and all(isinstance(f, (Factor, Range)) for f in given):
        return tuple(given)
    if not isinstance(given, Mapping):
        raise SpecError(f"study: factors is {given!r}, expected names and the levels of each")
    return tuple(_factor(str(name), levels) for name, levels in given.items())


def _factor(name: str, given: Any) -> Factor | Range:
    if isinstance(given, Mapping) and {"low", "high"} <= set(given) <= RANGE_KEYS:
        return _range(name, given)
    if isinstance(given, Mapping) and PART_KEYS & set(given):
        raise SpecError(
            f"study: the factor {name!r} is one part, {dict(given)!r}; give a list of levels, "
            f"[{{...}}, ...], or a table of labels and values"
        )
    if isinstance(given, Mapping):
        levels = [Level(str(label), value) for label, value in given.items()]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        levels = [Level(spell_level(value), value) for value in given]
    else:
        raise SpecError(
            f"study: the factor {name!r} has the levels {given!r}; expected a list such as "
            '["dot", "cosine"], or a table of labels and values'
        )
    labels = [level.label for level in levels]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if not levels or twice:
        what = f"has {', '.join(map(repr, twice))} twice" if twice else "has no levels"
        raise SpecError(f"study: the factor {name!r} {what}; give each level once")
    return Factor(name, tuple(levels))


def _range(name: str, given: Mapping[str, Any]) -> Range:
    low, high, log = given["low"], given["high"], given.get("log", False)
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (low, high))
    if not (numbers and isinstance(log, bool) and low < high and (low > 0 or not log)):
        raise SpecError(
            f"study: the factor {name!r} has the range {dict(given)!r}; expected numbers low < "
            "high, and low > 0 with log = true"
        )
    return Range(name, float(low), float(high), log)


def spell_level(value: Any) -> str:
    """Return the label that follows from a value: ``cosine``, ``kronecker (rank=16)``, ``0.01``."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        fields = dict(value)
        names = [spell_level(fields.pop(key)) for key in ("name", "curvature") if key in fields]
        solver = fields.pop("solver", None)
        if solver is not None:
            names.append(spell_level(solver))
        rest = ", ".join(f"{key}={spell_level(item)}" for key, item in fields.items())
        name = " + ".join(names)
        return f"{name} ({rest})" if rest and name else name or rest
    if attrs.has(type(value)):
        return spell_level(assemble.describe_part(value))
    return json.dumps(value, default=str)


# --- plans ----------------------------------------------------------------------------------------
def grid(sizes: Sequence[int]) -> Iterator[Choice]:
    """Yield every combination, the last factor changing fastest."""
    return itertools.product(*map(range, sizes))


def zipped(sizes: Sequence[int]) -> Iterator[Choice]:
    """Yield the first levels together, the second ones together, and so on."""
    if len(set(sizes)) > 1:
        raise SpecError(
            f"study: plan 'zip' takes the k-th levels together, and the factors have {list(sizes)} "
            "levels; give as many of each, or take another plan"
        )
    return ((k,) * len(sizes) for k in range(sizes[0]))


def one_at_a_time(sizes: Sequence[int]) -> Iterator[Choice]:
    """Yield the first level of all, then each other level of each factor alone."""
    yield (0,) * len(sizes)
    for at, size in enumerate(sizes):
        for k in range(1, size):
            yield tuple(k if other == at else 0 for other in range(len(sizes)))


PLANS: dict[str, Callable[[Sequence[int]], Iterator[Choice]]] = {
    "grid": grid,
    "zip": zipped,
    "one-at-a-time": one_at_a_time,
    "leave-one-part-out": one_at_a_time,  # of factors with two levels: the part, and without it
}
RANDOM = "random"


def combinations(
    plan: str, factors: Sequence[Factor | Range], samples: int | None, draw: int
) -> list[dict[str, Level]]:
    """Return the level of each factor at every point of a plan.

    Args:
        plan: One of `PLANS`, or ``"random"``.
        factors: What is varied.
        samples: Points of random search.
        draw: Its seed: more samples begin with the same points.

    Raises:
        SpecError: No such plan, or factors that it does not take.
    """
    if plan not in (*PLANS, RANDOM):
        raise SpecError(f"study: no plan {plan!r}; {nearest(plan, [*PLANS, RANDOM])}")
    if (samples is None) == (plan == RANDOM):
        raise SpecError(
            f"study: plan {plan!r} and samples={samples}; samples says how many points plan "
            "'random' draws, and no other plan takes it"
        )
    if not factors:
        return [{}]
    if plan == RANDOM:
        assert samples is not None
        return _drawn(factors, samples, draw)
    discrete = [f for f in factors if isinstance(f, Factor)]
    if len(discrete) < len(factors):
        raise SpecError(f"study: plan {plan!r} takes levels, not ranges; ranges need plan 'random'")
    chosen = PLANS[plan]([len(f.levels) for f in discrete])
    return [
        {f.name: f.levels[k] for f, k in zip(discrete, choice, strict=True)} for choice in chosen
    ]


def _drawn(factors: Sequence[Factor | Range], samples: int, draw: int) -> list[dict[str, Level]]:
    """Return random points: of a grid each at most once."""
    if samples < 1:
        raise SpecError(f"study: samples={samples}; give 1 or more")
    sizes = [len(f.levels) if isinstance(f, Factor) else 0 for f in factors]
    if all(sizes):
        discrete = [f for f in factors if isinstance(f, Factor)]
        order = np.random.default_rng(draw).permutation(math.prod(sizes))[:samples]
        chosen = [tuple(map(int, np.unravel_index(k, sizes))) for k in order]
        return [
            {f.name: f.levels[k] for f, k in zip(discrete, choice, strict=True)}
            for choice in chosen
        ]
    found: dict[tuple[str, ...], dict[str, Level]] = {}
    for k in range(TRIES * samples):
        if len(found) == samples:
            break
        random = np.random.default_rng([draw, k])
        point = {
            f.name: f.draw(random) if isinstance(f, Range) else _any(f, random) for f in factors
        }
        found.setdefault(tuple(level.label for level in point.values()), point)
    return list(found.values())


def _any(factor: Factor, random: np.random.Generator) -> Level:
    return factor.levels[int(random.integers(len(factor.levels)))]
