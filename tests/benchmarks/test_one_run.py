"""What predicts a recorded run without some of its examples: the same run, taken again, decides.

No goal was set.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from dattri_metrics import lds
from dattri_parts.training import random_subsets
from dattri_retrain import CounterfactualStore
from dattri_unroll import RunRetraining
from processes import ROOT
from table import Table, Theme, seconds

import dattri_core as dattri

pytestmark = pytest.mark.timeout(0)
SUBSETS = 50
LEFT_OUT = (0.02, 0.1, 0.5)
THEME = Theme(
    "one_run",
    "One run without some of its examples",
    f"LDS where the truth is the very run that is attributed, taken again with the same start, "
    f"batches and rates, and {SUBSETS} random sets of examples left out, 2, 10 or 50 % of all: of "
    "MNIST with the MLP, 1000 x 100 (200 steps of SGD with momentum), and of Shakespeare with the "
    "small nanoGPT, 200 x 20 (200 steps of AdamW with clipped gradients and warm-up), as their "
    "settings train them and at a tenth of the learning rate. Intervals are over test examples and "
    "subsets. A derivative says what a run does as far as the run is smooth: of Shakespeare at the "
    "rate of its setting, rows that `magic` carries back grow 15,000 times, of which it warns; at "
    "a tenth of it they do not, and the derivative says nearly all. "
    "`tracin` reads checkpoints of the run, `if-ekfac` and `grad-dot` its end; dampings are those "
    "of the setting. Times are of an attribution, on one thread of a busy machine.",
)
WORLDS: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "mnist-mlp": ("mnist-mlp", (1000, 100), {}),
    "mnist-mlp, a tenth of the rate": ("mnist-mlp", (1000, 100), {"learning_rate": 0.005}),
    "shakespeare-nanogpt": ("shakespeare-nanogpt", (200, 20), {}),
    "shakespeare-nanogpt, a tenth of the rate": (
        "shakespeare-nanogpt",
        (200, 20),
        {"learning_rate": 3e-4},
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "magic": {},
    "dvemb": {"curvature": "ggn"},
    "source": {},
    "if-ekfac": {},
    "tracin": {},
    "grad-dot": {},
}


@lru_cache(maxsize=1)
def _world(name: str) -> tuple[Any, dattri.Task, dattri.Task, dattri.Task]:
    """Return a world, and its run by all steps, by some checkpoints and at its end."""
    setting, size, changes = WORLDS[name]
    world = dattri.default_registry().make("setting", setting).load(size=size, seed=0)
    if not changes:
        return world, world.steps(), world.trajectory, world.task
    recipe = attrs.evolve(world.retraining.recipe, **changes)
    retraining = attrs.evolve(world.retraining, recipe=recipe)
    whole = dattri.Counterfactual(np.ones(size[0], dtype=bool), 0)
    states = retraining.run(whole)
    model, loss = states.model, world.task.loss
    rates = list(states.learning_rates)
    return (
        world,
        dattri.Task(model, loss, checkpoints=retraining.steps(whole)),
        dattri.Task(model, loss, checkpoints=list(states.states), learning_rates=rates),
        dattri.Task(model, loss),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WORLDS)
def test_one_run(benchmark: Any, table: Table, name: str, method: str) -> None:
    """Attribute, and compare with the run taken again."""
    torch.set_num_threads(1)
    world, run, along, end = _world(name)
    if method == "source" and not all(c.step.linear for c in run.checkpoints):
        pytest.skip("SOURCE is of gradient descent")
    if method == "dvemb" and "shakespeare" in name:
        pytest.skip("what the GGN is beside the Hessian shows on the MLP")
    changes = dict(METHODS[method])
    if method == "if-ekfac":
        changes["damping"] = world.damping
    made = dattri.method(method, **changes)
    task = {"tracin": along, "if-ekfac": end, "grad-dot": end}.get(method, run)
    start = time.perf_counter()
    scores = benchmark.pedantic(
        made.attribute, (task, world.train, world.test), {"progress": False}, rounds=1
    )
    took = time.perf_counter() - start
    again = RunRetraining(run, world.train, world.test, "loss")
    store = CounterfactualStore(ROOT / ".benchmarks" / "replayed", again)
    cells = {}
    for share in LEFT_OUT:
        plan = random_subsets(len(world.train_ids), SUBSETS, fraction=1 - share, seed=0)
        losses = store.outcomes(plan, "loss")
        found = lds(scores, [c.mask for c in plan], losses, higher_is_better=False)
        cells[f"{share:.0%} left out"] = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
        benchmark.extra_info[f"lds {share}"] = found.value
    called = ", ".join([method, *(f"{k}={v}" for k, v in METHODS[method].items())])
    table.put(f"{name}, {called}", **cells, time=seconds(took))
