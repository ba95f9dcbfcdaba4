"""Results, as ``dattri bench`` and ``dattri ablate`` write them: found, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from dattri_core import InputError, StoreError

NAME, STUDY = "results.json", "study.json"
FORMAT = 1
KEYS = ("setting", "title", "size", "seeds", "command", "notes", "versions", "hardware", "rows")
STUDY_KEYS = ("study", "notes", "versions", "hardware", "means", "effects", "comparisons")
NUMBERS = ("value", "low", "high", "chance")
FIGURES = ("effects", "heat", "cost")
WRITER = {NAME: "dattri bench", STUDY: "dattri ablate"}


@frozen(eq=False)
class Results:
    """The results of one run.

    Args:
        path: Of the file.
        data: Its content.
    """

    path: Path
    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the setting with its size."""
        n_train, n_test = self.data["size"]
        return f"{self.data['setting']}, {n_train} x {n_test}"

    @property
    def metrics(self) -> dict[str, list[Mapping[str, Any]]]:
        """Return the rows by metric, in their order."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for row in self.data["rows"]:
            found.setdefault(row["metric"], []).append(row)
        return found


@frozen(eq=False)
class StudyResults:
    """The results of one ablation study.

    Args:
        path: Of the file.
        data: Its content.
    """

    path: Path
    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the name of the study."""
        return str(self.data["study"])

    @property
    def figures(self) -> list[Path]:
        """Return the figures beside the file; without matplotlib there are none."""
        paths = [self.path.with_name(f"{name}.svg") for name in FIGURES]
        return [path for path in paths if path.is_file()]

    def tables(self, kind: str) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
        """Return ``"means"``, ``"effects"`` or ``"comparisons"`` by setting and metric."""
        found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for row in self.data[kind]:
            found.setdefault((row["setting"], row["metric"]), []).append(row)
        return found


@frozen(eq=False)
class Found:
    """What places hold.

    Args:
        benchmarks: In the order of the places.
        studies: In the order of the places.
        empty: Places that hold neither.
    """

    benchmarks: list[Results]
    studies: list[StudyResults]
    empty: list[Path]


def find_results(places: Sequence[str]) -> Found:
    """Return the results in files, or in folders and those below them, in the order given.

    Raises:
        InputError: No place holds any.
        StoreError: A file is damaged or holds something else.
    """
    paths: dict[str, list[Path]] = {NAME: [], STUDY: []}
    empty = []
    for place in map(Path, places):
        named = {name: sorted(place.rglob(name)) for name in paths}
        if place.is_file():
            named = {STUDY if place.name == STUDY else NAME: [place]}
        if not any(named.values()):
            empty.append(place)
        for name, found in named.items():
            paths[name] += [path for path in found if path not in paths[name]]
    if not any(paths.values()):
        raise InputError(
            f"report: no {NAME} or {STUDY} in {', '.join(repr(str(place)) for place in empty)}; "
            "give folders that dattri bench or dattri ablate wrote to"
        )
    return Found(
        [read_results(path) for path in paths[NAME]],
        [read_study(path) for path in paths[STUDY]],
        empty,
    )


def read_results(path: Path) -> Results:
    """Return the results of a benchmark that a file holds.

    Raises:
        StoreError: It is damaged, or holds something else.
    """
    data = _read(path, NAME, KEYS)
    _check_rows(path, data["rows"])
    return Results(path, data)


def read_study(path: Path) -> StudyResults:
    """Return the results of a study that a file holds.

    Raises:
        StoreError: It is damaged, or holds something else.
    """
    data = _read(path, STUDY, STUDY_KEYS)
    _check_rows(path, data["means"])
    return StudyResults(path, data)


def _read(path: Path, name: str, keys: Sequence[str]) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"report: {str(path)!r} is no JSON ({error})") from error
    lacking = [key for key in keys if not isinstance(data, dict) or key not in data]
    if lacking:
        raise StoreError(
            f"report: {str(path)!r} has no {', '.join(lacking)}; expected the {name} that "
            f"{WRITER[name]} writes"
        )
    if data.get("format") != FORMAT:
        raise StoreError(
            f"report: {str(path)!r} is of format {data.get('format')!r}; this release reads "
            f"{FORMAT}"
        )
    return dict(data)


def _check_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        if row.get("value") is not None and not all(_is_number(row.get(k)) for k in NUMBERS):
            raise StoreError(f"report: {str(path)!r} has a row without {', '.join(NUMBERS)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
