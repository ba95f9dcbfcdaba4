"""Progress: a bar where a person looks, silence elsewhere, and no line left behind."""

import io
import itertools
import re

import pytest
import torch
from torch import nn

import dattri_core as dattri
from dattri_core import progress


class Terminal(io.StringIO):
    def __init__(self, tty):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def tick(seconds):
        now[0] += seconds

    return tick


@pytest.mark.parametrize(
    ("tty", "show", "drawn"),
    [(True, None, True), (False, None, False), (False, True, True), (True, False, False)],
)
def test_it_shows_on_a_terminal_unless_told_otherwise(monkeypatch, clock, tty, show, drawn):
    stream = Terminal(tty)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with progress.bar("work", 10, show) as shown:
        clock(1)
        shown.advance(5)
    assert bool(stream.getvalue()) is drawn


def test_it_counts_and_foretells_from_the_mean_rate(clock):
    shown = progress.Bar("attribute", 200, Terminal(True), start=100.0)
    clock(30)
    shown.advance(50)
    assert f"attribute [{'#' * 6}{'.' * 18}] 50/200 30s, 90s left" in shown.stream.getvalue()
    clock(10)
    shown.advance(150)
    assert f"[{'#' * 24}] 200/200 40s, 0s left" in shown.stream.getvalue()
    assert shown.done == 200


def test_it_redraws_at_most_ten_times_a_second(monkeypatch, clock):
    stream = Terminal(True)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with progress.bar("work", 10_000, None) as shown:
        for _ in range(10_000):
            clock(0.001)
            shown.advance()
    assert 80 <= stream.getvalue().count("left") <= 100


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_it_clears_its_line_however_the_work_ends(monkeypatch, clock, error):
    stream = Terminal(True)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with pytest.raises(error), progress.bar("work", 10, None) as shown:
        clock(1)
        shown.advance()
        raise error
    assert stream.getvalue().endswith("\r\x1b[K")


def test_more_work_than_foretold_and_none_at_all_do_not_break_it(clock):
    shown = progress.Bar("work", 0, Terminal(True), start=100.0)
    clock(1)
    shown.advance(0)
    clock(1)
    shown.advance(3)
    assert "3/0 2s, 0s left" in shown.stream.getvalue()


# --- passes whose number nobody knows -------------------------------------------------------------
N = 40


def drawn(monkeypatch, method, **overrides):
    """Return what a fit and an attribution draw, every batch of it: (label, passes)."""
    seconds = itertools.count(100)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    stream = Terminal(True)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    torch.manual_seed(0)
    train, test = ((torch.randn(n, 3), torch.arange(n) % 2) for n in (N, 4))
    dattri.method(method, **overrides).attribute(dattri.Task(nn.Linear(3, 2)), train, test)
    said = stream.getvalue()
    assert said.endswith("\r\x1b[K")
    found = re.findall(rf"\r(\w+): ([\d.]+) passes over {N} train examples, \d+s ", said)
    return [(label, float(passes)) for label, passes in found]


def test_a_fit_counts_its_passes(monkeypatch):
    """EK-FAC takes factors, then eigenvalues; and nothing is read while queries are solved for."""
    said = drawn(monkeypatch, "if-ekfac")
    assert [label for label, _ in said] == ["fit"] * len(said)
    assert said[-1][1] == 2


def test_a_solver_counts_those_of_its_products(monkeypatch):
    """Three iterations and the residual they leave; the fit reads nothing."""
    said = drawn(monkeypatch, "if-cg", curvature="ggn", maximum_iterations=3, tolerance=0.0)
    assert [label for label, _ in said] == ["solve"] * len(said)
    assert said[-1][1] in (3, 4)


def test_recorded_products_count_too(monkeypatch):
    said = drawn(monkeypatch, "if-arnoldi", curvature="ggn", rank=4, iterations=5)
    assert [label for label, _ in said] == ["fit"] * len(said)
    assert said[-1][1] == 6  # once to record them


def test_they_are_silent_where_nobody_looks(monkeypatch, clock):
    monkeypatch.setattr(progress.sys, "stderr", Terminal(False))
    shown = progress.Passes.over(10, None)
    with shown.until("solve"):
        clock(1)
        shown.advance(5)
    assert progress.sys.stderr.getvalue() == ""
    assert (shown.label, shown.done) == ("solve", 0)
