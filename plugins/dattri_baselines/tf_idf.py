"""TF-IDF: the cosine of the words that a train text and a test text have in common."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from attrs import frozen

from dattri_baselines.documents import WORDS
from dattri_baselines.texts import Documents, Index, score_texts
from dattri_baselines.written import Array, Columns


@frozen
class TfIdf:
    """S_ij = cos(u_i, u_j), u_t = f_t (1 + log((1 + n) / (1 + n_t))) for every word t.

    f_t counts t in a text, n_t is the number of train texts with t; words that no train text has
    are left out. A text without any other scores 0. The weights are those of scikit-learn, extra
    ``text``. Scores are at least 0: texts that share words are taken to help.

    Source: Salton and Buckley 1988, Term-weighting approaches in automatic text retrieval.

    Args:
        words: Regular expression of a word of a text; token ids are taken as they are.
    """

    words: str = WORDS
    reads: ClassVar[str] = "tokens"

    def attribute(
        self,
        task: Any,
        train: Any,
        test: Any,
        *,
        out: str | Path | None = None,
        dry_run: bool = False,
        **settings: Any,
    ) -> Any:
        """Return the scores ``[n_train, n_test]``, float64.

        Args:
            task: Only named in the provenance.
            train: Texts or token ids.
            test: The same.
            out: Folder to write the scores to.
            dry_run: Only say, as text, what would be made.
            settings: Memory and progress of other methods; nothing to set here.

        Raises:
            SpecError: scikit-learn cannot be imported, or the data are neither texts nor token ids.
        """
        return score_texts(self, INDEX, task, train, test, out, dry_run=dry_run)


def _columns(library: ModuleType, texts: Documents, queries: Documents) -> Columns:
    made = library.TfidfVectorizer(analyzer=_tokens, dtype=np.float64)
    rows, asked = made.fit_transform(texts), made.transform(queries)

    def scores(start: int, stop: int) -> Array:
        return np.asarray((rows @ asked[start:stop].T).toarray())

    return scores


def _tokens(document: list[str]) -> list[str]:
    """Return the tokens of a text that was split already."""
    return document


INDEX = Index(
    "tf-idf",
    "sklearn.feature_extraction.text",
    "scikit-learn",
    "pip install dattri-core[text]",
    "one sparse matrix a side",
    _columns,
)
