"""Self-influence as scores: how strongly each train example acts on itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from torch import Tensor

import dattri_core as dattri
from dattri_baselines.written import Array, provenance_of, write_columns
from dattri_core import Examples, Method, SpecError


@frozen
class SelfInfluence:
    """S_ij = S'_ii of another method, for every j.

    Both sides of S'_ii are rows of the train side: gradients of the train loss (of margins, or what
    the source gives), also where the task has a target, so that it is not the diagonal of
    ``attribute(train)`` there; nor is it for ``rps-l2``, whose test rows are logits.

    A large one says that an example is explained by itself alone: it is rare, hard, or has a wrong
    label. In O(n), without a test example. Source: Koh and Liang 2017, Understanding Black-box
    Predictions via Influence Functions, section 5.4 (arXiv 1703.04730); Pruthi et al. 2020, TracIn,
    section 4.1 (arXiv 2002.08484).

    Args:
        method: Whose: a name or a `Method`; in a spec the parts of one.
    """

    method: str | Method = "grad-dot"

    def attribute(
        self,
        task: Any,
        train: Any,
        test: Any,
        *,
        memory: str | int | None = None,
        progress: bool | None = None,
        out: str | Path | None = None,
        dry_run: bool = False,
    ) -> Any:
        """Return the self-influences in every column, ``[n_train, n_test]``.

        Args:
            task: Of the method.
            train: Of the method.
            test: Counted, not read.
            memory: Of the method.
            progress: Of the method.
            out: Folder to write the scores to.
            dry_run: Only return the method's plan.

        Raises:
            SpecError: The method is not made of parts and has no self-influence.
        """
        made = self._method()
        if dry_run:
            return made.attribute(task, train, train, dry_run=True, memory=memory)
        examples = Examples.of(train, "train"), Examples.of(test, "test")
        own = self.self_influence(task, examples[0], memory=memory, progress=progress)
        values: Array = np.asarray(own)[:, None]
        facts = {"name": "self-influence", "method": made.to_spec()}
        return write_columns(
            lambda start, stop: np.repeat(values, stop - start, 1),
            *examples,
            provenance_of(task, facts, examples[0]),
            out,
        )

    def self_influence(
        self,
        task: Any,
        train: Any,
        *,
        memory: str | int | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """Return the self-influence of the method, ``[n_train]``; arguments as for `attribute`."""
        fitted = self._method().fit(task, train, memory=memory, progress=progress)
        return fitted.self_influence()

    def _method(self) -> Method:
        made: Any = dattri.method(self.method) if isinstance(self.method, str) else self.method
        if not isinstance(made, Method):
            raise SpecError(
                f"self-influence: {self.method!r} is a {type(made).__name__} and not made of "
                "parts, so no example has a row to score itself with; give a method such as "
                "'grad-dot' or 'if-ekfac'"
            )
        return made
