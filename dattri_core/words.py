"""Words that parts may declare of themselves; any other one would be passed over in silence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dattri_core.entries import spell_kind
from dattri_core.errors import SpecError, nearest

WORDS: dict[str, frozenset[str]] = {
    "source.needs": frozenset({"optimiser"}),
    "scorer.locality": frozenset({"tile", "column"}),
    "fold.order": frozenset({"forward", "reverse"}),
    "fold.needs": frozenset({"learning-rate", "weight"}),
    "projector.gives": frozenset({"adjoint", "keeps-factors"}),
    "projector.needs": frozenset(
        {
            "hessian-product",
            "ggn-product",
            "rows",
            "fisher-rows",
            "ggn-rows",
            "leading-rows",
            "reference-rows",
        }
    ),
}
WORDS["curvature.needs"] = WORDS["inverse_hessian.needs"] = WORDS["projector.needs"]
WORDS["solver.needs"] = frozenset({"apply", "dense", "spectral", "rows", "sampled"})


def require_words(kind: str, part: Any) -> None:
    """Refuse a part unless all that it declares in fixed words is spelled as one of them.

    Raises:
        SpecError: A word is not known; the nearest is offered.
    """
    for key, known in WORDS.items():
        its_kind, _, field = key.partition(".")
        if its_kind != kind or not hasattr(part, field):
            continue
        declared: Any = getattr(part, field)
        if callable(declared):  # what a curvature gives is asked for a space
            continue
        if not isinstance(declared, Iterable):
            raise SpecError(
                f"{spell_kind(kind)} {type(part).__name__}: its {field} is {declared!r}; give of "
                f"{', '.join(sorted(known))}"
            )
        for word in sorted([declared] if isinstance(declared, str) else declared):
            if word not in known:
                raise SpecError(
                    f"{spell_kind(kind)} {type(part).__name__}: its {field} says {word!r}; "
                    f"{nearest(word, known)}"
                )
