"""The conformance suite: laws of every protocol, and `check`, which runs them on a part."""

from dattri_core.laws.law import Law, LawBroken, NotApplicable
from dattri_core.laws.report import Finding, Report
from dattri_core.laws.run import (
    KINDS,
    Case,
    bench_of,
    cases,
    check,
    check_plugin,
    find,
    laws_of,
    part_of,
)

__all__ = [
    "KINDS",
    "Case",
    "Finding",
    "Law",
    "LawBroken",
    "NotApplicable",
    "Report",
    "bench_of",
    "cases",
    "check",
    "check_plugin",
    "find",
    "laws_of",
    "part_of",
]
