"""What a method cannot do without: plain passes and matrix products, counted and measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


def best_of(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the shortest of some wall times, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def training_pass(model: nn.Module, sets: list[tuple[Tensor, Tensor]], batch: int = 500) -> None:
    """Run forward and backward with weight gradients over all examples, as training does."""
    for inputs, labels in sets:
        for start in range(0, len(inputs), batch):
            part = slice(start, start + batch)
            loss = nn.functional.cross_entropy(model(inputs[part]), labels[part], reduction="sum")
            model.zero_grad()
            loss.backward()


def factor_products(model: nn.Sequential, n_train: int, n_test: int) -> None:
    """Multiply factors of the right shapes: what all inner products of linear layers need."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            for width in (layer.in_features + 1, layer.out_features):
                torch.ones(n_train, width) @ torch.ones(width, n_test)


def matrix_rate(size: int = 2000) -> float:
    """Return the machine's float32 rate in multiply-adds per second, on a large product."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    return size**3 / best_of(lambda: left @ right, 5)


def hessian_product_multiply_adds(model: nn.Sequential) -> int:
    """Return the multiply-adds of one Hessian-vector product for one example.

    The vector V of a layer with weight W meets its input x and output gradient e once forward
    (x V), once backward (e V^T) and, with the tangents of x and e, in the weight gradient twice;
    tangents pass through W forward and backward: six products of the size of W. The first layer has
    an input without tangent and passes nothing back, which leaves two. Passes without a vector are
    shared by all vectors and not counted.
    """
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    sizes = [(layer.in_features + 1) * layer.out_features for layer in layers]
    return 2 * sizes[0] + 6 * sum(sizes[1:])
