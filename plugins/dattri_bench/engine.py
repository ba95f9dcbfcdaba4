"""The loop over worlds: what is missing is computed, each cell once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import frozen
from dattri_parts.measuring.attribution import spell_error
from dattri_parts.measuring.machine import hardware, versions

from dattri_bench.cells import Cell, Finished
from dattri_bench.records import Records, address_of
from dattri_bench.request import Measure, Request
from dattri_bench.work import Work
from dattri_core import DattriError, SpecError, World, default_registry

Say = Callable[[str], None]


def run(request: Request, say: Say) -> list[Finished]:
    """Return all cells, those that were missing computed.

    Args:
        request: What is asked.
        say: Told of each step, in one line.
    """
    return [one for part in _parts(request, say) for one in part.cells()]


def recorded(request: Request) -> list[Finished]:
    """Return the cells that are there; nothing is computed."""
    parts = _parts(request, lambda line: None)
    return [one for part in parts for one in part.read(part.planned())]


def _parts(request: Request, say: Say) -> Iterator[WorldCells]:
    records = Records(request.out)
    for seed in request.seeds:
        for wrong in (0.0, request.wrong):
            measures = [m for m in request.measures if m.needs_wrong_labels == (wrong > 0)]
            if measures:
                yield WorldCells(request, records, seed, wrong, measures, say)


def worlds(request: Request) -> Iterator[dict[str, Any]]:
    """Yield what is known of each world that was made: seed, share of wrong labels, facts."""
    records = Records(request.out)
    for seed in request.seeds:
        for wrong in (0.0, request.wrong):
            if any(m.needs_wrong_labels == (wrong > 0) for m in request.measures):
                record = records.read("worlds", address_of(request.world(seed, wrong)))
                if record is not None:
                    yield {"seed": seed, "wrong": wrong, **record}


@frozen(eq=False)
class WorldCells:
    """The cells of one world.

    Args:
        request: What is asked.
        records: Where answers are kept.
        seed: Of the world.
        wrong: Share of its wrong labels.
        measures: Metrics that ask for this world.
        say: Told of each step, in one line.
    """

    request: Request
    records: Records
    seed: int
    wrong: float
    measures: list[Measure]
    say: Say

    def cells(self) -> list[Finished]:
        """Return the cells of this world; it is made only when one is missing."""
        missing = self.missing(self.planned())
        if missing:
            world = self.load(missing)
            if world is not None:
                Work(self.request, self.records, self.seed, self.wrong, world, self.write).do(
                    self.missing(self.planned())  # by what the world turned out to be
                )
        return self.read(self.planned())

    def planned(self) -> list[Cell]:
        """Return the cells, each with its address as far as the world is known."""
        identity = self.request.world(self.seed, self.wrong)
        known = self.records.read("worlds", address_of(identity))
        fingerprint = None if known is None else known["fingerprint"]
        damping = None if known is None else known["damping"]
        world = {**identity, "fingerprint": fingerprint}
        found = []
        for entrant in self.request.entrants:
            scores = self.request.attribution(world, entrant, damping)
            found += [
                Cell(entrant, measure, self.seed, scores, self.request.cell(scores, measure))
                for measure in self.measures
            ]
        return found

    def missing(self, cells: list[Cell]) -> list[Cell]:
        """Return those that have no record, or are to be tried again."""
        found = []
        for cell in cells:
            record = self.records.read("cells", cell.address)
            if record is None or (record.get("error") and self.request.retry):
                found.append(cell)
        return found

    def read(self, cells: list[Cell]) -> list[Finished]:
        """Return those that have a record."""
        found = [(cell, self.records.read("cells", cell.address)) for cell in cells]
        return [Finished(cell, record) for cell, record in found if record is not None]

    def load(self, missing: list[Cell]) -> World | None:
        """Return the world, noted in the records; None where it has no labels to be wrong.

        Then each missing cell is recorded as failed.

        Raises:
            SpecError: The setting gives something else.
        """
        n_train, n_test = self.request.size
        wrong = f", {100 * self.wrong:g} % wrong labels" if self.wrong else ""
        self.say(f"training: {self.request.name} {n_train} x {n_test}, seed {self.seed}{wrong} ...")
        try:
            world = self.request.setting.load(self.request.size, seed=self.seed, wrong=self.wrong)
        except DattriError as error:
            if self.wrong == 0:
                raise
            # without classes no label can be wrong: that says something of these metrics alone
            for cell in missing:
                self.write(cell, {"error": spell_error(error)})
            return None
        if not isinstance(world, World):
            raise SpecError(
                f"bench: load of the setting {self.request.name!r} gave a {type(world).__name__}, "
                "expected a dattri_core.World: return World(task=..., train=..., test=..., ...)"
            )
        address = address_of(self.request.world(self.seed, self.wrong))
        self.records.write("worlds", address, _facts(world))
        return world

    def write(self, cell: Cell, answer: Mapping[str, Any]) -> None:
        """Record the answer of a cell, and tell plugins and the user."""
        self.record(cell, answer)
        self.tell(cell)

    def record(self, cell: Cell, answer: Mapping[str, Any]) -> None:
        """Record the answer of a cell."""
        record = {
            "cell": cell.identity,
            "result": None,
            "error": None,
            **answer,
            "versions": versions(),
            "hardware": hardware(),
        }
        self.records.write("cells", cell.address, record)

    def tell(self, cell: Cell) -> None:
        """Tell plugins and the user of a cell that is recorded."""
        record = self.records.read("cells", cell.address)
        if record is None:
            return
        row = record["result"] or {"error": record["error"]}
        default_registry().emit(
            "cell_finished",
            {"cell": cell.identity, "row": row, "seconds": record.get("metric_seconds", 0.0)},
        )
        self.say(f"  {cell.measure.label:<20} {cell.entrant.label:<24} {spell_answer(record)}")


def spell_answer(record: Mapping[str, Any]) -> str:
    """Return what a record says, in one line."""
    result = record["result"]
    if result is None:
        return f"not run: {record['error']}"
    return f"{result['value']:.3f} [{result['low']:.3f}, {result['high']:.3f}]"


def _facts(world: World) -> dict[str, Any]:
    """Return what is recorded of a world."""
    return {
        "fingerprint": _fingerprint(world),
        "damping": world.damping,
        "target": world.target,
        "n_train": world.retraining.n_train,
        "n_test": world.retraining.n_test,
        "facts": dict(world.facts),
    }


def _fingerprint(world: World) -> str:
    """Return a hash of how a world was trained and of what came out.

    Training in another number of threads, or on another device, may end at other weights: what was
    said of one network then stands in no table beside what is said of another.
    """
    digest = hashlib.sha256(world.retraining.fingerprint.encode())
    for task in (world.task, world.trajectory):
        for checkpoint in task.checkpoints:
            digest.update(checkpoint.fingerprint(task.model).encode())
    return digest.hexdigest()
