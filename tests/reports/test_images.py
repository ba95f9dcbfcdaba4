"""Numbers below images are short and keep their sign."""

import pytest
from dattri_reports.images import short


@pytest.mark.parametrize(
    ("score", "text"),
    [(0.123, "+0.12"), (-9.96, "-10"), (142.4, "+142"), (-3.1e6, "-3.1e+06"), (1e-7, "+1e-07")],
)
def test_short(score, text):
    assert short(score) == text
