"""What plugins name: parts as "module:attr", methods as specs; nothing imported until used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen

from dattri_core.discovery import Origin

KINDS = (
    "source",
    "projector",
    "inverse_hessian",
    "curvature",
    "solver",
    "scorer",
    "fold",
    "attributor",
    "layer_rule",
    "setting",
    "ground_truth",
    "metric",
    "report_section",
    "command",
)
METHOD = "method"
LOCAL = Origin("this process")


@frozen
class Entry:
    """One name: a part as ``"module:attr"``."""

    kind: str
    name: str
    origin: Origin
    target: str
    summary: str = ""


@frozen
class Recipe:
    """One method: a spec of parts, what it computes, and who published it."""

    name: str
    origin: Origin
    spec: Mapping[str, Any] = field(hash=False)
    summary: str
    formula: str
    citation: str

    @property
    def kind(self) -> str:
        """Return ``"method"``."""
        return METHOD


def load_target(target: str) -> Any:
    """Import ``"module:attr"``."""
    module, _, path = target.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def spell_kind(kind: str) -> str:
    """Return a kind of part as prose."""
    return kind.replace("_", " ")


def clash_message(found: Sequence[Entry | Recipe]) -> str:
    """Return the message for a name that several plugins claim."""
    first, *_ = found
    claims = " and by ".join(str(entry.origin) for entry in found)
    return (
        f"{spell_kind(first.kind)} {first.name!r} is claimed by {claims}; "
        "turn one off, e.g. DATTRI_PLUGINS=-" + found[-1].origin.plugin
    )
