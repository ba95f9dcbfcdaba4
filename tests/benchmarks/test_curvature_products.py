"""Curvature times vectors on networks whose weights no cache holds, against plain passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import own_run
import pytest
import torch
import worlds as saved
from making import MLP
from table import Table, Theme, mib, seconds

import dattri_core as dattri
from dattri_core import products
from dattri_core.activations import activation_bytes
from dattri_core.evaluate import Evaluator, leaves

pytestmark = pytest.mark.timeout(0)
LIMIT = 2**30
"""Bytes that a product may take: a quarter of a budget of 4 GiB."""
THEME = Theme(
    "curvature_products",
    "Products of the curvature with vectors",
    "The Gauss-Newton matrix or the Hessian of so many train examples times so many vectors, as "
    "conjugate gradients, LiSSA and Arnoldi take it, within 1 GiB: slices of vectors and examples, "
    "and about what one takes. `plain`: a forward and a backward pass over the same examples, in "
    "the same process. `passes`: the time of a product by one vector over it. `narrow`: slices of "
    "32 MiB, which were taken whatever the weights before; of the small network they are the same. "
    "The best of two.",
)
CASES: dict[str, tuple[tuple[Any, ...], int, int, str]] = {
    "MLP, 100 vectors": (("mnist", MLP, 1000, 100), 1000, 100, "ggn"),
    "ResNet-9, 1 vector": (("cifar2", 100, 20), 16, 1, "ggn"),
    "ResNet-9, 10 vectors": (("cifar2", 100, 20), 16, 10, "ggn"),
    "transformer, 1 vector": (("shakespeare", 200, 20), 32, 1, "ggn"),
    "transformer, 10 vectors": (("shakespeare", 200, 20), 32, 10, "ggn"),
    "transformer, 10 vectors, Hessian": (("shakespeare", 200, 20), 32, 10, "hessian"),
    "transformer, 10 vectors of a step of LiSSA": (("shakespeare", 200, 20), 4, 10, "ggn"),
}


@pytest.mark.parametrize("case", CASES)
def test_curvature_products(benchmark: Any, worlds: Any, table: Table, case: str) -> None:
    """Both sizes of slices and the plain passes in one run."""
    made, examples, count, kind = CASES[case]
    world = saved.load(worlds(*made))
    task = own_run.task_of(world)
    batch = dattri.take(world.train, slice(0, examples))
    evaluator = Evaluator(task, task.checkpoints[0], dattri.take(batch, slice(0, 2)))
    generator = torch.Generator().manual_seed(0)
    vectors = {
        name: torch.randn(count, *p.shape, generator=generator)
        for name, p in evaluator.selected.items()
    }

    def product(limit: int) -> Any:
        return products.batch_product(evaluator, batch, vectors, kind, limit=limit)

    def plain() -> None:
        variables = leaves(evaluator.selected)
        total = evaluator.total(variables, batch, "train")
        torch.autograd.grad(total, list(variables.values()))

    passes = _best(plain)
    narrow = _best(lambda: product(products.WORK_LIMIT))
    wide = benchmark.pedantic(lambda: _best(lambda: product(LIMIT)), rounds=1)
    size = products.plan_slices(evaluator, batch, vectors, LIMIT)
    each = 2 * sum(v[0].numel() * v.element_size() for v in vectors.values())
    pair = products.TANGENTS * activation_bytes(evaluator, batch)
    benchmark.extra_info.update(passes=wide / count / passes, faster=narrow / wide)
    table.put(
        case + ("" if kind == "hessian" else ", Gauss-Newton"),
        examples=examples,
        plain=seconds(passes),
        slices=f"{size.vectors} x {size.examples}",
        of=mib(size.vectors * (each + size.examples * pair) / 2**20),
        time=seconds(wide),
        passes=f"{wide / count / passes:.2f}",
        narrow=seconds(narrow),
        faster=f"{narrow / wide:.2f}",
    )


def _best(run: Callable[[], object]) -> float:
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
