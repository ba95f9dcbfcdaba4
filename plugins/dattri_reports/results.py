"""Results of benchmarks, as ``dattri bench`` writes them: found, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from dattri_core import InputError, StoreError

NAME = "results.json"
FORMAT = 1
KEYS = ("setting", "title", "size", "seeds", "command", "notes", "versions", "hardware", "rows")
NUMBERS = ("value", "low", "high", "chance")


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


def find_results(places: Sequence[str]) -> list[Results]:
    """Return the results in files, or in folders and those below them, in the order given.

    Raises:
        InputError: There are none in a place.
        StoreError: A file is damaged or holds something else.
    """
    paths: list[Path] = []
    for place in map(Path, places):
        found = [place] if place.is_file() else sorted(place.rglob(NAME))
        if not found:
            raise InputError(
                f"report: no {NAME} in {str(place)!r}; give folders that dattri bench wrote to"
            )
        paths += [path for path in found if path not in paths]
    return [read_results(path) for path in paths]


def read_results(path: Path) -> Results:
    """Return the results that a file holds.

    Raises:
        StoreError: It is damaged, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"report: {str(path)!r} is no JSON ({error})") from error
    lacking = [key for key in KEYS if not isinstance(data, dict) or key not in data]
    if lacking:
        raise StoreError(
            f"report: {str(path)!r} has no {', '.join(lacking)}; expected the {NAME} that "
            "dattri bench writes"
        )
    if data.get("format") != FORMAT:
        raise StoreError(
            f"report: {str(path)!r} is of format {data.get('format')!r}; this release reads "
            f"{FORMAT}"
        )
    for row in data["rows"]:
        if row.get("value") is not None and not all(_is_number(row.get(k)) for k in NUMBERS):
            raise StoreError(f"report: {str(path)!r} has a row without {', '.join(NUMBERS)}")
    return Results(path, data)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
