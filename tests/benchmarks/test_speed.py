"""Speed and memory against floors and against dattri, on MNIST. Ratios are reported, not asserted.

Run with ``make bench``. Every benchmark is skipped in the test suite (``--benchmark-skip``).
"""

from __future__ import annotations

from typing import Any

import floors
import own_run
import processes
import pytest
import worlds as saved
from making import LR, MLP
from table import Theme

THEME = Theme(
    "speed",
    "Speed and memory",
    "Methods of the first order, conjugate gradients and the explicit inverse on MNIST.",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "if-cg": {"damping": 1e-2, "maximum_iterations": 10, "tolerance": 0.0},
    "if-explicit": {"damping": 1e-2},
}


def _world(path: Any) -> saved.World:
    return saved.load(path)


def _attribute(world: saved.World, method: str) -> Any:
    return own_run.attribute(world, own_run.method_of(method, SETTINGS.get(method, {})))


def _own(path: Any, method: str, repeats: int) -> Any:
    overrides = SETTINGS.get(method, {})
    return processes.own(
        {"world": str(path), "method": method, "overrides": overrides, "repeats": repeats}
    )


def _dattri(path: Any, method: str, batch: int, repeats: int = 1) -> Any:
    job = {"world": str(path), "method": method, "batch": batch, "repeats": repeats}
    return processes.peer("peer_dattri.py", job)


def _ratio(benchmark: Any, row: Any, label: str, own: Any, peer: Any, *, faster: float) -> None:
    if peer is None:
        return
    ratio = peer["seconds"] / own["seconds"]
    benchmark.extra_info[f"speed-up: {label}"] = ratio
    row(
        label,
        f"{own['seconds']:.2f} s, {own['peak_mib']:.0f} MiB",
        f"dattri {peer['seconds']:.2f} s, {peer['peak_mib']:.0f} MiB",
        ratio,
        f">= {faster}x faster",
        ratio >= faster,
    )


def test_grad_dot_floor(benchmark: Any, worlds: Any, row: Any) -> None:
    """grad-dot against a plain training pass over the same examples and the final products."""
    path = worlds("mnist", MLP, 5000, 500)
    world = _world(path)
    model, train, test = world.model, world.train, world.test
    floor = floors.best_of(lambda: floors.training_pass(model, [train, test]), 5)
    floor += floors.best_of(lambda: floors.factor_products(model, 5000, 500), 5)
    benchmark.pedantic(_attribute, (world, "grad-dot"), rounds=10, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    floor_again = floors.best_of(lambda: floors.training_pass(model, [train, test]), 5)
    floor_again += floors.best_of(lambda: floors.factor_products(model, 5000, 500), 5)
    floor = min(floor, floor_again)
    benchmark.extra_info["ratio to floor"] = seconds / floor
    row(
        "grad-dot, MLP 5000 x 500",
        f"{seconds:.3f} s",
        f"forward + backward + products {floor:.3f} s",
        seconds / floor,
        "<= 1.5",
        seconds <= 1.5 * floor,
    )


@pytest.mark.parametrize("method", ["grad-dot", "grad-cos"])
def test_gradients_against_dattri(benchmark: Any, worlds: Any, row: Any, method: str) -> None:
    """Gradient products against dattri, with all examples in one batch and in batches of 64."""
    path = worlds("mnist", MLP, 1000, 100)
    benchmark.pedantic(_attribute, (_world(path), method), rounds=5, warmup_rounds=1)
    own = _own(path, method, 5)
    for batch, goal in ((0, 10), (64, 5)):
        peer = _dattri(path, method, batch, 3)
        name = "one batch" if batch == 0 else f"batches of {batch}"
        label = f"{method}, MLP 1000 x 100, dattri in {name}"
        _ratio(benchmark, row, label, own, peer, faster=goal)


def test_conjugate_gradients(benchmark: Any, worlds: Any, row: Any) -> None:
    """if-cg with ten iterations of the exact Hessian: its 1000 products, counted, and dattri."""
    path = worlds("mnist", MLP, 1000, 100)
    world = _world(path)
    rate = floors.matrix_rate()
    work = floors.hessian_product_multiply_adds(world.model) * 1000 * (10 * 100)
    benchmark.pedantic(_attribute, (world, "if-cg"), rounds=3, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    rate = max(rate, floors.matrix_rate())
    benchmark.extra_info.update(multiply_adds=work, rate=rate, ratio=seconds * rate / work)
    row(
        "if-cg, MLP 1000 x 100, 10 iterations",
        f"{seconds:.2f} s",
        f"{work:.2e} multiply-adds at {rate:.2e}/s = {work / rate:.2f} s",
        seconds * rate / work,
        "<= 1.5",
        seconds * rate <= 1.5 * work,
    )
    own = _own(path, "if-cg", 2)
    for batch in (0, 250):
        peer = _dattri(path, "if-cg", batch)
        name = "one batch" if batch == 0 else f"batches of {batch}"
        _ratio(benchmark, row, f"if-cg, MLP, dattri in {name}", own, peer, faster=1)
        if peer is not None and batch == 0:
            share = own["peak_mib"] / peer["peak_mib"]
            row(
                "if-cg, MLP, peak memory",
                f"{own['peak_mib']:.0f} MiB",
                f"dattri {peer['peak_mib']:.0f} MiB",
                share,
                "<= 0.2",
                share <= 0.2,
            )


def test_explicit(benchmark: Any, worlds: Any, row: Any) -> None:
    """if-explicit on logistic regression against dattri."""
    path = worlds("mnist", LR, 1000, 100)
    benchmark.pedantic(_attribute, (_world(path), "if-explicit"), rounds=2, warmup_rounds=0)
    own = _own(path, "if-explicit", 2)
    peer = _dattri(path, "if-explicit", 0)
    _ratio(benchmark, row, "if-explicit, LR 1000 x 100", own, peer, faster=2)
