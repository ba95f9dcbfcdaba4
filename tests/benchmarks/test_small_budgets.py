"""What a process takes beside the budget that it was given, where the budget is small.

Goal: no more than the budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family
import processes
import pytest
import torch
import worlds as saved
from making import MLP
from table import Table, Theme, mib, seconds

pytestmark = pytest.mark.timeout(0)
THEME = Theme(
    "small_budgets",
    "Small budgets of memory",
    "Peaks of processes above what imports take, beside the budget that the method was given "
    "(`memory=`). MLP: MNIST, 1000 x 100, 109,386 parameters, whose rows in float32 are 417 MiB; "
    "with three checkpoints too, one of which is fitted at a time. ResNet-9: CIFAR-2, 100 x 10, "
    "4,825,154 parameters, rows of 1.8 GiB. `groups`: passes over the train set to score it. The "
    "budget counts tensors, a fifth of it is left to the allocator, and pages that the allocator "
    "keeps between tensors of other sizes may take more than that on a network as large as "
    "ResNet-9. Where the least that a method needs is more, it says so at once: `refused`.",
)
LIMIT = 1800.0
METHODS = ("grad-dot", "if-datainf", "if-diagonal", "if-kfac", "if-ekfac", "logra")
NETWORKS: dict[str, tuple[tuple[Any, ...], int, tuple[str, ...]]] = {
    "MLP": (("mnist", MLP, 1000, 100), 1, ("32MiB", "64MiB", "256MiB")),
    "MLP, 3 checkpoints": (("mnist", MLP, 1000, 100), 3, ("64MiB",)),
    "ResNet-9": (("cifar2", 100, 10), 1, ("400MiB", "1024MiB")),
}
CASES = [(name, budget) for name, (_, _, budgets) in NETWORKS.items() for budget in budgets]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("network", "budget"), CASES)
def test_small_budgets(
    benchmark: Any,
    worlds: Any,
    table: Table,
    tmp_path: Path,
    network: str,
    budget: str,
    method: str,
) -> None:
    """One process, and its peak."""
    sizes, checkpoints, _ = NETWORKS[network]
    path = worlds(*sizes)
    damped = {} if method == "grad-dot" else {"damping": family.DAMPING}
    job: dict[str, Any] = {
        "world": str(path),
        "method": method,
        "overrides": {**family.AS_DATTRI.get(method, {}), **damped},
        "memory": budget,
    }
    if checkpoints > 1:
        job["checkpoints"] = str(_near(path, checkpoints, tmp_path))
    key = f"{method}, {network}, {budget}"
    try:
        own = benchmark.pedantic(processes.own, (job, LIMIT), rounds=1)
    except processes.UnfinishedError as error:
        if "MemoryBudgetError" not in str(error):
            raise
        table.put(key, peak="refused", **{"of the budget": ""}, time="", groups="", within="")
        return
    share = own["peak_mib"] / float(budget.removesuffix("MiB"))
    benchmark.extra_info["of the budget"] = share
    assert own["finite"]
    table.put(
        key,
        peak=mib(own["peak_mib"]),
        **{"of the budget": f"{share:.2f}"},
        time=seconds(own["seconds"]),
        groups=own["choice"].split(" query group")[0],
        within=share <= 1,
    )


def _near(world: Path, count: int, folder: Path) -> Path:
    """Save so many checkpoints near the weights of a world."""
    model = saved.load(world).model
    generator = torch.Generator().manual_seed(0)
    for k in range(count):
        state = {
            name: value + 1e-3 * torch.randn(value.shape, generator=generator)
            for name, value in model.state_dict().items()
        }
        torch.save(state, folder / f"{k}.pt")
    return folder
