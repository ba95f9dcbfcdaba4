"""Intervals hold the truth as often, and are as narrow, as the documentation says."""

import re
from pathlib import Path

import pytest
from measured_coverage import CASES

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"\| `([a-z-]+)` \| (.+) \| ([01]\.\d{3}) \| (\d+\.\d{3}) \|")
DOCUMENTED = {
    (metric, where): (float(held), float(width))
    for metric, where, held, width in ROW.findall(PAGE.read_text(encoding="utf-8"))
}
FEW_TRAININGS = {("removal-curve", f"{k} trainings, 20 tests") for k in (2, 3)}
IN_SHORT = [
    case for case in CASES if case.truth is not None and (case.metric, case.where) in DOCUMENTED
][::3]


def key(case):
    return case.metric, case.where


def test_every_case_is_documented_and_covers():
    assert list(map(key, CASES)) == list(DOCUMENTED)
    for case, (held, _) in DOCUMENTED.items():
        assert held >= (0.85 if case in FEW_TRAININGS else 0.92), case


@pytest.mark.parametrize("case", IN_SHORT, ids=lambda case: f"{case.metric}: {case.where}")
def test_intervals_in_short(case):
    documented = DOCUMENTED[key(case)]
    held, width = case.measured(150)
    assert held == pytest.approx(documented[0], abs=0.055)  # three standard errors at 0.95
    assert width == pytest.approx(documented[1], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.metric}: {case.where}")
def test_the_table_is_what_is_measured(case):
    assert case.measured() == pytest.approx(DOCUMENTED[key(case)], abs=0.002, rel=0.002)
