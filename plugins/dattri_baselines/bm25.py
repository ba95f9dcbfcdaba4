"""BM25: how well a train text answers to the words of a test text."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from attrs import field, frozen, validators

from dattri_baselines.documents import WORDS
from dattri_baselines.texts import Documents, Index, score_texts
from dattri_baselines.written import Array, Columns


@frozen
class BM25:
    """S_ij = sum over the words t of test text j of idf_t f_ti / (f_ti + k1 (1 - b + b l_i / l)).

    f_ti counts t in train text i, l_i is its length and l the mean length; idf_t =
    log(1 + (n - n_t + 1/2) / (n_t + 1/2)), n_t the number of train texts with t. A word that comes
    twice in a test text counts twice; one that no train text has counts nothing. Scores are at
    least 0: texts that share words are taken to help. They are those of the package bm25s, extra
    ``text``.

    Source: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework: BM25 and Beyond,
    with the idf of Lucene; a baseline of Akyürek et al. 2022, Towards Tracing Knowledge in Language
    Models Back to the Training Data (arXiv 2205.11482).

    Args:
        k1: How soon more of the same word adds no more.
        b: How much the length of a text counts, in [0, 1].
        words: Regular expression of a word of a text; token ids are taken as they are.
    """

    k1: float = field(default=1.5, validator=validators.ge(0))
    b: float = field(default=0.75, validator=[validators.ge(0), validators.le(1)])
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
            SpecError: bm25s cannot be imported, or the data are neither texts nor token ids.
        """
        return score_texts(self, self._index, task, train, test, out, dry_run=dry_run)

    @property
    def _index(self) -> Index:
        def columns(library: ModuleType, texts: Documents, queries: Documents) -> Columns:
            index = library.BM25(k1=self.k1, b=self.b, method="lucene", dtype="float64")
            index.index(texts, show_progress=False)

            def scores(start: int, stop: int) -> Array:
                made = np.zeros((len(texts), stop - start))
                for at, query in enumerate(queries[start:stop]):
                    known = [token for token in query if token in index.vocab_dict]
                    if known:
                        made[:, at] = index.get_scores(known)
                return made

            return scores

        hint = "pip install dattri-core[text]. Or use 'tf-idf'"
        return Index("bm25", "bm25s", "bm25s", hint, "one index of the train set", columns)
