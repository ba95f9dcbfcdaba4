"""What answers take beside the factor that is held: no second matrix, however many there are."""

import pytest
import torch
from dattri_parts.curvatures.gauss_newton import GaussNewton
from dattri_parts.solvers.woodbury import Woodbury
from oracles.networks import problem_of
from torch import nn
from torch.profiler import ProfilerActivity, profile

import dattri_core as dattri

CASES = {
    "inner products of rows": (nn.Linear(900, 2), 400, 400),
    "the matrix itself": (nn.Linear(199, 2), 900, 400),
}
"""A network, its train examples, and the rows of the factor."""


def data(count, features, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    return torch.randn(count, features, generator=generator), labels


def peak_of(work):
    """Return the most bytes alive at once beside those before, inside of operations too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("way", CASES)
def test_a_few_answers_take_less_than_a_copy_of_the_factor(way):
    model, n, rows = CASES[way]
    task = dattri.Task(model)
    features = model.in_features
    inverse = Woodbury(0.1).solve_for(
        GaussNewton().fit(problem_of(task, data(n, features, 1), batch=200)), torch.device("cpu")
    )
    assert inverse.stats["dual_blocks"] == (way == "inner products of rows")
    (few,) = problem_of(task, data(4, features, 2), batch=4).rows()
    inverse.apply(few)  # a first call loads what later ones have
    assert peak_of(lambda: inverse.apply(few)) < 8 * rows**2 / 2
