"""What a study asks, as requests of benchmarks: one for each setting, valid points alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import frozen
from dattri_parts.choices import Choice, choice_of
from dattri_parts.measuring.attribution import retrains

from dattri_bench.cells import Cell
from dattri_bench.engine import Say, WorldCells
from dattri_bench.records import Records
from dattri_bench.request import (
    Entrant,
    Request,
    checked_setting,
    measures_of,
    models_of,
    size_of,
)
from dattri_bench.studies.sharing import fit_of, front_of
from dattri_core import InputError, Point, SpecError, Study, default_registry

CELLS_OF_ONE_JOB = 48
"""About how many attributions a job of methods without a common sketch has at most."""


@frozen(eq=False)
class Asked:
    """A study as requests.

    Args:
        study: What is asked.
        points: Of the study.
        problems: Why a point is no valid method, by its position.
        requests: One for each setting that has a valid point.
        entrants: Of each point that is valid, by its position.
    """

    study: Study
    points: tuple[Point, ...]
    problems: Mapping[int, str]
    requests: tuple[Request, ...]
    entrants: Mapping[int, Entrant]

    def worlds(self, say: Say) -> Iterator[WorldCells]:
        """Yield the cells of each world."""
        for request in self.requests:
            records = Records(request.out)
            for seed in request.seeds:
                for wrong in (0.0, request.wrong):
                    measures = [m for m in request.measures if m.needs_wrong_labels == (wrong > 0)]
                    if measures:
                        yield WorldCells(request, records, seed, wrong, measures, say)


def asked_of(study: Study, out: Path, retrained: Path, retry: bool) -> Asked:
    """Return a study as requests, all of it checked without a tensor.

    Raises:
        SpecError: No point is a valid method; or a setting or metric does not exist.
        InputError: A size is not understood, or a folder is a file.
    """
    for folder in (out, retrained):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"ablate: {str(folder)!r} is a file; give the name of a folder")
    points = study.points()
    problems = {at: told for at, p in enumerate(points) if (told := p.problem) is not None}
    if len(problems) == len(points):
        raise SpecError(
            f"study {study.name!r}: none of its {len(points)} points is a valid method; the first: "
            f"{problems[0]}"
        )
    measures = tuple(
        measures_of(
            [Choice(one.name, one.fields, one.label) for one in study.metrics], study.subsets
        )
    )
    entrants: dict[int, Entrant] = {}
    for at, point in enumerate(points):
        if at not in problems:
            choice = Choice(point.base, point.changes, point.label)
            (models,) = models_of(choice, [point.checkpoints])
            entrants[at] = Entrant(choice, models)
    if any("retraining" in m.metric.needs for m in measures) or any(
        retrains(entrant.made(None)) for entrant in entrants.values()
    ):
        default_registry().resolve("ground_truth", "retraining")  # before models are trained
    requests = []
    for name in dict.fromkeys(points[at].setting for at in entrants):
        setting = checked_setting(name)
        size = size_of(study.size, setting) if isinstance(study.size, str) else study.size
        requests.append(
            Request(
                chosen=choice_of(name),
                setting=setting,
                size=size,
                seeds=study.seeds,
                entrants=tuple(e for at, e in entrants.items() if points[at].setting == name),
                measures=measures,
                chooser=None,
                dampings=(),
                damping=study.damping,
                wrong=study.wrong,
                trained_on=study.trained_on,
                out=out,
                retrained=retrained,
                retry=retry,
                command=f"dattri ablate {study.name}",
            )
        )
    return Asked(study, points, problems, tuple(requests), entrants)


def parts_of(world: WorldCells) -> list[list[Cell]]:
    """Return the cells of a world in parts that share nothing but the world.

    Methods that read the same sketched rows are one part. The others are cut where a fit begins,
    so that each fit is in one part and there is work for several processes. Parts do not depend on
    which cells are there already.
    """
    fronts: dict[tuple[str | None, int], dict[object, list[Cell]]] = {}
    for cell in world.planned():
        made = cell.entrant.made(None, cell.seed)
        reads = (front_of(made), cell.entrant.models)
        fit = (fit_of(made) or id(cell.entrant), cell.entrant.models)
        fronts.setdefault(reads, {}).setdefault(fit, []).append(cell)
    parts = []
    for (shared, _), fits in fronts.items():
        if shared is not None:
            parts.append([cell for cells in fits.values() for cell in cells])
        else:
            parts += _cut(list(fits.values()))
    return parts


def _cut(fits: list[list[Cell]]) -> list[list[Cell]]:
    found: list[list[Cell]] = []
    for cells in fits:
        if not found or len(found[-1]) + len(cells) > CELLS_OF_ONE_JOB:
            found.append([])
        found[-1] += cells
    return found
