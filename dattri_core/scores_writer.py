"""Writing scores to disk as they are computed, so that they never lie in memory whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from dattri_core.ids import Id
from dattri_core.scores import Scores
from dattri_core.scores_file import FolderWriter, read_folder, release_pages


class ScoresWriter:
    """Scores being written to disk: fill ``values``, then `finish`.

    The folder appears when `finish` returns; leaving the ``with`` block without it, by an error or
    Ctrl-C, leaves nothing behind. A foreign folder is refused at once, before long work.

    Args:
        folder: Where `Scores.load` will find the result.
        n_train: Rows.
        n_test: Columns.
        dtype: A floating point dtype that NumPy has.
    """

    def __init__(
        self, folder: str | Path, n_train: int, n_test: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self._writer = FolderWriter(folder, (n_train, n_test), str(dtype).removeprefix("torch."))

    @property
    def values(self) -> np.ndarray[Any, Any]:
        """Return the mapped file ``[n_train, n_test]``, zero at first, to read and to write."""
        return self._writer.values

    def release(self) -> None:
        """Stop counting the pages touched so far as memory of this process; nothing is lost."""
        release_pages(self._writer.values)

    def finish(
        self,
        train_ids: Sequence[Id] | None = None,
        test_ids: Sequence[Id] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Check the values, write the manifest, name the folder, and return the scores, mapped."""
        scores = Scores(self._writer.values, train_ids, test_ids, provenance or {})
        self._writer.commit(scores.facts())
        values, _ = read_folder(self._writer.folder, map_file=True, verify=False)
        return Scores(
            values, scores.train_ids, scores.test_ids, scores.provenance, known_finite=True
        )

    def __enter__(self) -> ScoresWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, trace)
