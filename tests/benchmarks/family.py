"""The influence family: which methods there are, and their settings in these benchmarks."""

from __future__ import annotations

from typing import Any

from dattri_core import default_registry

NAMES = (
    "if-explicit",
    "if-woodbury",
    "if-cg",
    "if-lissa",
    "if-arnoldi",
    "if-datainf",
    "if-diagonal",
    "if-kfac",
    "if-ekfac",
    "logra",
)
"""What issue 3 asks for, in the order of the tables; a name that is not registered is skipped."""

STEPS = {"if-cg": 10, "if-lissa": 100, "if-arnoldi": 50}
RANK = 64
DAMPING = 1e-2

AS_DATTRI: dict[str, dict[str, Any]] = {
    "if-explicit": {},
    "if-woodbury": {},
    "if-cg": {"maximum_iterations": STEPS["if-cg"], "tolerance": 0.0},
    "if-lissa": {"depth": STEPS["if-lissa"], "batch": 1, "repeats": 1, "scale": 50.0},
    "if-arnoldi": {"rank": STEPS["if-arnoldi"], "iterations": STEPS["if-arnoldi"]},
    "if-datainf": {},
    "if-diagonal": {},
    "if-kfac": {"fisher": "empirical"},
    "if-ekfac": {"fisher": "empirical"},
    "logra": {"rank": RANK},
}
"""The settings at which dattri 0.3.0 is measured; every one with ``damping=DAMPING``."""

PEERS = frozenset(
    {"if-explicit", "if-cg", "if-lissa", "if-arnoldi", "if-datainf", "if-ekfac", "logra"}
)
"""Those that dattri has."""


def all_names() -> list[str]:
    """Return the family with every registered RelatIF."""
    more = [name for name in default_registry().names("method") if name.startswith("relatif")]
    return [*NAMES, *sorted(more)]
