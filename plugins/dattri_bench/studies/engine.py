"""Running a study: worlds, in each the parts that share work, here or on any executor."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future, as_completed
from pathlib import Path
from typing import Any

from attrs import define, field, frozen
from dattri_parts.measuring.attribution import spell_error

from dattri_bench.cells import Cell
from dattri_bench.engine import Say, WorldCells
from dattri_bench.records import address_of
from dattri_bench.studies.asked import Asked, asked_of, parts_of
from dattri_bench.studies.forecast import Forecast, forecast
from dattri_bench.studies.results import Results, results_of
from dattri_bench.studies.sharing import Shared
from dattri_bench.work import Work
from dattri_core import DattriError, Study, World

ROWS = "rows"
RETRAINED = Path("bench/retrained")


def out_of(study: Study, out: str | Path | None) -> Path:
    """Return the folder of a study."""
    return Path("studies") / study.name if out is None else Path(out)


def run_study(
    study: Study,
    out: str | Path | None = None,
    *,
    retrained: str | Path = RETRAINED,
    executor: Executor | None = None,
    retry: bool = False,
    say: Say = print,
) -> Results:
    """Compute the cells of a study that are missing, and return its results.

    Each cell is a file that appears whole: a run may be killed at any time, and the next goes on.

    Args:
        study: What is asked.
        out: Folder of records; ``studies/NAME`` by default.
        retrained: Folder of models trained on other train sets, shared by all studies and
            benchmarks.
        executor: Any `concurrent.futures.Executor` whose workers see the folders; None: here.
        retry: Whether cells that failed are computed again.
        say: Told of each step, in one line.

    Raises:
        SpecError: No point is a valid method; or a setting or metric does not exist.
        InputError: A size is not understood, or a folder is a file.
    """
    asked = asked_of(study, out_of(study, out), Path(retrained), retry)
    if executor is None:
        _run_here(asked, say)
    else:
        _run_on(executor, asked, say)
    return results_of(asked)


def dry_run(
    study: Study, out: str | Path | None = None, *, retrained: str | Path = RETRAINED
) -> Forecast:
    """Return what a run would do: cells, what they share, and an estimate; nothing is computed.

    Args:
        study: What is asked.
        out: Folder of records, as that of `run_study`.
        retrained: Folder of models, as that of `run_study`.
    """
    return forecast(asked_of(study, out_of(study, out), Path(retrained), False))


@define
class Kept:
    """The world that was made last: parts of one world follow each other."""

    address: str | None = None
    world: World | None = None

    def load(self, cells: WorldCells, missing: list[Cell]) -> World | None:
        """Return the world of cells; None where it cannot be made, which is then on record."""
        address = address_of(cells.request.world(cells.seed, cells.wrong))
        if self.address != address:
            self.address = self.world = None  # the one before goes first
            self.world = cells.load(missing)
            self.address = address
        elif self.world is None:
            cells.load(missing)
        return self.world


def _run_here(asked: Asked, say: Say) -> None:
    kept = Kept()
    for cells in asked.worlds(say):
        for part in range(len(parts_of(cells))):
            do_part(cells, part, kept, tell=True)


def do_part(cells: WorldCells, part: int, kept: Kept, *, tell: bool) -> None:
    """Compute what is missing of a part of a world.

    Args:
        cells: Of the world.
        part: Position among `parts_of`.
        kept: The world, if it is made.
        tell: Whether plugins and the user hear of each cell.
    """
    write = cells.write if tell else cells.record
    missing = cells.missing(parts_of(cells)[part])
    if not missing:
        return
    try:
        world = kept.load(cells, missing)
    except DattriError as error:  # the worlds of other settings and seeds go on
        for cell in missing:
            write(cell, {"error": spell_error(error)})
        return
    if world is None:
        return
    planned = parts_of(cells)[part]  # by what the world turned out to be
    missing = cells.missing(planned)
    request = cells.request
    damping = world.damping if request.damping is None else request.damping
    entrants = dict.fromkeys(cell.entrant for cell in planned)
    where = {"world": request.world(cells.seed, cells.wrong), "part": part}
    shared = Shared(
        world,
        [entrant.made(damping, cells.seed) for entrant in entrants if not entrant.retrains],
        request.out / ROWS / address_of(where),
    )
    Work(request, cells.records, cells.seed, cells.wrong, world, write, shared).do(missing)
    shared.discard()


# --- on an executor -------------------------------------------------------------------------------
@frozen(eq=False)
class Job:
    """A part of a world, for another process.

    Args:
        study: What is asked.
        out: Folder of records.
        retrained: Folder of models.
        retry: Whether cells that failed are computed again.
        world: Position of the world in the study.
        part: Position of the part in the world.
    """

    study: Study
    out: Path
    retrained: Path
    retry: bool
    world: int
    part: int

    def __call__(self) -> None:
        """Compute what is missing; cells are written as they are done."""
        asked = asked_of(self.study, self.out, self.retrained, self.retry)
        cells = list(asked.worlds(lambda line: None))[self.world]
        do_part(cells, self.part, _PROCESS, tell=False)


_PROCESS = Kept()
"""What this worker process keeps from one job to the next."""


@frozen(eq=False)
class _Waiting:
    """A job, and the cells that it is to write."""

    job: Job
    cells: WorldCells
    missing: list[Cell] = field(factory=list)


def _run_on(executor: Executor, asked: Asked, say: Say) -> None:
    """Run all parts that lack cells: of each world one first, which trains what all others read."""
    first: list[_Waiting] = []
    rest: list[_Waiting] = []
    for at, cells in enumerate(asked.worlds(say)):
        begun = False
        for part, planned in enumerate(parts_of(cells)):
            missing = cells.missing(planned)
            if missing:
                request = cells.request
                job = Job(asked.study, request.out, request.retrained, request.retry, at, part)
                (rest if begun else first).append(_Waiting(job, cells, missing))
                begun = True
    errors = _wave(executor, first) + _wave(executor, rest)
    if errors:
        raise errors[0]


def _wave(executor: Executor, jobs: Sequence[_Waiting]) -> list[BaseException]:
    """Run jobs and return what went wrong; the others go on, their cells are not lost."""
    futures: dict[Future[Any], _Waiting] = {}
    errors: list[BaseException] = []
    try:
        for waiting in jobs:
            futures[executor.submit(waiting.job)] = waiting
        for future in as_completed(futures):
            error = future.exception()
            if error is not None:
                errors.append(error)
            waiting = futures[future]
            known = {id(cell.entrant) for cell in waiting.missing}
            measures = {id(cell.measure) for cell in waiting.missing}
            for cell in waiting.cells.planned():  # by what the world turned out to be
                if id(cell.entrant) in known and id(cell.measure) in measures:
                    waiting.cells.tell(cell)
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return errors
