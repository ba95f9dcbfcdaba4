"""Figures of a study: effect of each factor, two factors as a heat map, metric against cost."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dattri_bench.studies.statistics import Mean
from dattri_core import InputError, atomic_file, nearest

INK, SOFT, FAINT, FRONT = "#1d1c1a", "#66625a", "#b9b4a8", "#b4541a"
COLORS = ("#4f9d86", "#b4541a", "#3f6fb0", "#c79a2b", "#8a5aa5", "#5d5d5d", "#a83e5b", "#7aa53c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FORMATS = ("png", "svg")
MEBIBYTE = 2**20


def draw_all(
    found: Sequence[Mean], title: str, folder: Path, heat: tuple[str, str] | None = None
) -> list[Path]:
    """Write the figures as PNG and SVG; return the files.

    Args:
        found: Means of all points.
        title: Of the study.
        folder: For the files.
        heat: The two factors of the heat map; those with most levels by default.

    Raises:
        InputError: matplotlib is not installed, or no such factor.
    """
    done = [mean for mean in found if mean.value is not None]
    factors = [f for f in dict.fromkeys(k for m in found for k in m.levels) if _varies(found, f)]
    factors = [f for f in factors if f != "setting"]
    if not done:
        return []
    for factor in heat or ():
        if factor not in factors:
            raise InputError(f"figure: no factor {factor!r}; {nearest(factor, factors)}")
    panels = list(dict.fromkeys((mean.setting, mean.metric) for mean in done))
    figures: dict[str, Callable[[Any], None]] = {}
    if factors:
        figures["effects"] = lambda f: _effects(f, done, panels, factors)
    pair = heat or _largest(found, factors)
    if pair is not None:
        figures["heat"] = lambda f: _heat(f, done, panels, pair)
    if any(mean.seconds is not None for mean in done):
        figures["cost"] = lambda f: _cost(f, done, panels, factors)
    written: list[Path] = []
    for name, fill in figures.items():
        written += _write(fill, title, folder / name)
    return written


def _write(fill: Callable[[Any], None], title: str, path: Path) -> list[Path]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "figure: needs matplotlib, which is not installed; install it with: "
            'pip install "dattri-core[plot]"'
        ) from error
    written = []
    # text stays text in SVG, and its identifiers are the same every time
    with matplotlib.rc_context({"svg.hashsalt": "dattri", "svg.fonttype": "none"}):
        figure = Figure(layout="constrained", facecolor="white")
        figure.suptitle(title, fontsize=11)
        fill(figure)
        for kind in FORMATS:
            drawn = io.BytesIO()
            undated = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
            figure.savefig(drawn, format=kind, dpi=150, metadata=undated)
            with atomic_file(path.with_suffix(f".{kind}")) as handle:
                handle.write(drawn.getvalue())
            written.append(path.with_suffix(f".{kind}"))
    return written


def _varies(found: Sequence[Mean], factor: str) -> bool:
    return len({mean.levels[factor] for mean in found}) > 1


def _levels(found: Sequence[Mean], factor: str) -> list[str]:
    """Return the levels in the order of the study."""
    places = {mean.levels[factor]: mean.places[factor] for mean in found}
    return sorted(places, key=places.__getitem__)


def _largest(found: Sequence[Mean], factors: Sequence[str]) -> tuple[str, str] | None:
    ordered = sorted(factors, key=lambda factor: -len(_levels(found, factor)))
    return (ordered[0], ordered[1]) if len(ordered) > 1 else None


def _of(done: Sequence[Mean], panel: tuple[str, str]) -> list[Mean]:
    return [mean for mean in done if (mean.setting, mean.metric) == panel]


def _name(panel: tuple[str, str], panels: Sequence[tuple[str, str]]) -> str:
    several = len({setting for setting, _ in panels}) > 1
    return f"{panel[1]}\n{panel[0]}" if several else panel[1]


# --- the effect of each factor --------------------------------------------------------------------
def _effects(figure: Any, done: Sequence[Mean], panels: Any, factors: Sequence[str]) -> None:
    counts = [len(_levels(done, factor)) for factor in factors]
    figure.set_size_inches(
        max(5.0, 1.4 + 0.62 * sum(counts) + 0.5 * len(factors)), 0.6 + 2.9 * len(panels)
    )
    axes = figure.subplots(
        len(panels), len(factors), squeeze=False, sharey="row", width_ratios=counts
    )
    for row, panel in zip(axes, panels, strict=True):
        own = _of(done, panel)
        for axis, factor in zip(row, factors, strict=True):
            _strip(axis, own, factor, _levels(done, factor))
        row[0].set_ylabel(_name(panel, panels), fontsize=9)
    for axis, factor in zip(axes[0], factors, strict=True):
        axis.set_title(factor, fontsize=9)


def _strip(axis: Any, own: Sequence[Mean], factor: str, levels: Sequence[str]) -> None:
    """Draw every point, lines between those that else are equal, and the mean of each level.

    The mean is over what all levels go with.
    """
    place = {level: at for at, level in enumerate(levels)}
    joined: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for mean in own:
        rest = tuple(sorted((k, v) for k, v in mean.levels.items() if k != factor))
        assert mean.value is not None
        joined.setdefault(rest, []).append((place[mean.levels[factor]], mean.value))
    for line in joined.values():
        x, y = zip(*sorted(line), strict=True)
        axis.plot(x, y, color=FAINT, linewidth=0.6, marker="o", markersize=2.5, zorder=1)
    # a level that only some of the others go with is not to look better for that
    whole = [dict(line) for line in joined.values() if len(line) == len(levels)]
    for at in place.values() if whole else ():
        axis.plot(
            [at - 0.28, at + 0.28],
            [np.mean([line[at] for line in whole])] * 2,
            color=COLORS[0],
            linewidth=3,
            solid_capstyle="butt",
            zorder=3,
        )
    _chance(axis, own)
    axis.set_xticks(range(len(levels)), levels, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.6, len(levels) - 0.4)
    axis.tick_params(labelsize=7.5)
    axis.spines[["top", "right"]].set_visible(False)


def _chance(axis: Any, own: Sequence[Mean]) -> None:
    if own and own[0].chance is not None:
        axis.axhline(own[0].chance, color=SOFT, linestyle=(1, (1, 2)), linewidth=1, zorder=0)


# --- two factors ----------------------------------------------------------------------------------
def _heat(figure: Any, done: Sequence[Mean], panels: Any, pair: tuple[str, str]) -> None:
    down, across = (_levels(done, factor) for factor in pair)
    figure.set_size_inches(
        max(4.5, len(panels) * (1.9 + 0.95 * len(across))), 1.9 + 0.5 * len(down)
    )
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        own = _of(done, panel)
        table = np.full((len(down), len(across)), np.nan)
        for i, one in enumerate(down):
            for j, other in enumerate(across):
                values = [
                    m.value
                    for m in own
                    if (m.levels[pair[0]], m.levels[pair[1]]) == (one, other)
                    and m.value is not None
                ]
                table[i, j] = np.mean(values) if values else np.nan
        higher = not own or own[0].higher_is_better
        image = axis.imshow(table, cmap="YlGnBu" if higher else "YlGnBu_r", aspect="auto")
        middle = np.nanmin(table) + 0.6 * (np.nanmax(table) - np.nanmin(table))
        for (i, j), value in np.ndenumerate(table):
            dark = np.isfinite(value) and (value > middle) == higher
            axis.text(
                j,
                i,
                f"{value:.3f}" if np.isfinite(value) else "-",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else INK,
            )
        axis.set_title(f"{_name(panel, panels)}, mean over the rest", fontsize=9)
        axis.set_xticks(
            range(len(across)), across, rotation=30, ha="right", rotation_mode="anchor", fontsize=8
        )
        axis.set_yticks(range(len(down)), down, fontsize=8)
        axis.set_xlabel(pair[1], fontsize=9)
        axis.spines[:].set_visible(False)
        figure.colorbar(image, ax=axis, shrink=0.85).ax.tick_params(labelsize=7)
    axes[0].set_ylabel(pair[0], fontsize=9)


# --- cost -----------------------------------------------------------------------------------------
def _cost(figure: Any, done: Sequence[Mean], panels: Any, factors: Sequence[str]) -> None:
    kinds = [("seconds", "seconds to fit and attribute", 1.0)]
    if any(mean.peak_bytes for mean in done):
        kinds.append(("peak_bytes", "peak memory (MiB)", MEBIBYTE))
    figure.set_size_inches(1.6 + 4.3 * len(kinds) + 1.2, 0.7 + 3.2 * len(panels))
    axes = figure.subplots(len(panels), len(kinds), squeeze=False, sharey="row")
    ordered = sorted(factors, key=lambda factor: -len(_levels(done, factor)))
    color = _style(done, ordered[0] if ordered else None, COLORS)
    marker = _style(done, ordered[1] if len(ordered) > 1 else None, MARKERS)
    for row, panel in zip(axes, panels, strict=True):
        own = _of(done, panel)
        for axis, (key, name, unit) in zip(row, kinds, strict=True):
            _scatter(axis, own, key, unit, color, marker)
            axis.set_xlabel(name, fontsize=8.5)
        row[0].set_ylabel(_name(panel, panels), fontsize=9)
    handles = _legend(color, "o") + _legend(marker, None)
    if handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize=7.5, frameon=False)


class _Styles(dict[str, Any]):
    """What a level looks like, and which factor it is of."""

    factor: str | None = None


def _style(done: Sequence[Mean], factor: str | None, looks: Sequence[str]) -> _Styles:
    found = _Styles()
    found.factor = factor
    for at, level in enumerate(_levels(done, factor) if factor is not None else []):
        found[level] = looks[at % len(looks)]
    return found


def _look(styles: _Styles, mean: Mean, default: str) -> str:
    return default if styles.factor is None else str(styles[mean.levels[styles.factor]])


def _legend(styles: _Styles, shape: str | None) -> list[Any]:
    from matplotlib.lines import Line2D

    title = [Line2D([], [], linestyle="", label=styles.factor)] if styles.factor else []
    return title + [
        Line2D(
            [],
            [],
            linestyle="",
            marker=shape or look,
            color=look if shape else SOFT,
            markersize=6,
            label=level,
        )
        for level, look in styles.items()
    ]


def _scatter(
    axis: Any, own: Sequence[Mean], key: str, unit: float, color: _Styles, marker: _Styles
) -> None:
    from matplotlib import ticker

    shown = [mean for mean in own if getattr(mean, key)]
    for mean in shown:
        axis.plot(
            getattr(mean, key) / unit,
            mean.value,
            linestyle="",
            markersize=6,
            marker=_look(marker, mean, "o"),
            color=_look(color, mean, COLORS[0]),
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=3,
        )
    line = front(
        [(getattr(m, key) / unit, m.value or 0.0) for m in shown],
        higher=not own or own[0].higher_is_better,
    )
    if len(line) > 1:
        x, y = zip(*line, strict=True)
        axis.step(x, y, where="post", color=FRONT, linewidth=1.1, zorder=2)
    if shown:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    _chance(axis, own)
    axis.tick_params(labelsize=7.5)
    axis.spines[["top", "right"]].set_visible(False)


def front(points: Sequence[tuple[float, float]], *, higher: bool) -> list[tuple[float, float]]:
    """Return the points that no other beats in cost and value: the Pareto front, by rising cost.

    Args:
        points: Cost and value of each.
        higher: Whether more of the value is better.
    """
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not best or (value > best[-1][1] if higher else value < best[-1][1]):
            best.append((cost, value))
    return best
