"""Scores of texts by an index of the train texts: what the baselines for text share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from attrs import AttrsInstance, asdict, frozen
from typing_extensions import Protocol

from dattri_baselines.documents import read_documents
from dattri_baselines.written import Array, Columns, provenance_of, write_columns
from dattri_core import Examples, SpecError

Documents = list[list[str]]


class TextPart(AttrsInstance, Protocol):
    """A method whose fields say, among others, what a word is."""

    @property
    def words(self) -> str:
        """Return the regular expression of a word."""
        ...


@frozen
class Index:
    """How a method indexes texts.

    Args:
        name: Registered name of the method.
        module: What it imports.
        package: What that is called.
        hint: What to do where it cannot be imported.
        cost: What is made, for a dry run.
        columns: (module, train texts, test texts) -> first test position and the one after the last
            -> ``[n, C]``; the train texts have a token at least.
    """

    name: str
    module: str
    package: str
    hint: str
    cost: str
    columns: Callable[[ModuleType, Documents, Documents], Columns]


def score_texts(
    part: TextPart,
    index: Index,
    task: Any,
    train: Any,
    test: Any,
    out: str | Path | None,
    *,
    dry_run: bool,
) -> Any:
    """Return the scores ``[n_train, n_test]``, float64; 0 where no train text has a token.

    Args:
        part: The method.
        index: How it indexes texts.
        task: Only named in the provenance.
        train: Texts or token ids.
        test: The same.
        out: Folder to write the scores to.
        dry_run: Only say, as text, what would be made.

    Raises:
        SpecError: The package cannot be imported, or the data are neither texts nor token ids.
    """
    try:
        library = importlib.import_module(index.module)
    except ImportError as error:
        raise SpecError(
            f"{index.name}: cannot import {index.package} ({error}); {index.hint}"
        ) from error
    sides = Examples.of(train, "train"), Examples.of(test, "test")
    if dry_run:
        return f"{index.name}: {len(sides[0])} x {len(sides[1])} scores from {index.cost}"
    texts, queries = (read_documents(side, part.words) for side in sides)
    columns = index.columns(library, texts, queries) if any(texts) else _zeros(len(texts))
    facts = provenance_of(task, {"name": index.name, **asdict(part)}, sides[0])
    return write_columns(columns, *sides, facts, out)


def _zeros(rows: int) -> Columns:
    def columns(start: int, stop: int) -> Array:
        return np.zeros((rows, stop - start))

    return columns
