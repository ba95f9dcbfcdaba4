"""What a method cannot do without: plain passes and matrix products, counted and measured.

All for networks of linear layers on examples of one position. A product is counted in multiply-adds
and taken at the machine's rate on a large product, which few products of these shapes reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, ...]


def best_of(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the shortest of some wall times, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def training_pass(model: nn.Module, sets: list[Pair], batch: int = 500) -> None:
    """Run forward and backward with weight gradients over all examples, as training does."""
    for inputs, labels in sets:
        for start in range(0, len(inputs), batch):
            part = slice(start, start + batch)
            loss = nn.functional.cross_entropy(model(inputs[part]), labels[part], reduction="sum")
            model.zero_grad()
            loss.backward()


def factor_products(model: nn.Module, n_train: int, n_test: int) -> None:
    """Multiply factors of the right shapes: what all inner products of linear layers need."""
    for inputs, outputs in sizes_of(model):
        for width in (inputs, outputs):
            torch.ones(n_train, width) @ torch.ones(width, n_test)


def sizes_of(model: nn.Module) -> list[tuple[int, int]]:
    """Return (inputs with the bias, outputs) of each linear layer."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return [(layer.in_features + 1, layer.out_features) for layer in layers]


def matrix_rate(size: int = 2000, dtype: torch.dtype = torch.float32) -> float:
    """Return the machine's rate in multiply-adds per second, on a large product."""
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return size**3 / best_of(lambda: left @ right, 5)


def hessian_product_multiply_adds(model: nn.Module) -> int:
    """Return the multiply-adds of one Hessian-vector product for one example.

    The vector V of a layer with weight W meets its input x and output gradient e once forward
    (x V), once backward (e V^T) and, with the tangents of x and e, in the weight gradient twice;
    tangents pass through W forward and backward: six products of the size of W. The first layer has
    an input without tangent and passes nothing back, which leaves two. Passes without a vector are
    shared by all vectors and not counted.
    """
    sizes = [inputs * outputs for inputs, outputs in sizes_of(model)]
    return 2 * sizes[0] + 6 * sum(sizes[1:])


def queries_multiply_adds(
    model: nn.Module, positions: int, n_train: int, n_test: int, rank: int | None = None
) -> int:
    """Return the multiply-adds of scores where every row is computed once, and kept.

    A row takes a forward and a backward pass without weight gradients, whichever side it is on. For
    EK-FAC it is turned into the eigenvectors of both sides of each layer and formed, and a pair
    takes one product for each weight; in a Kronecker sketch it is multiplied by two thin matrices.

    Args:
        model: A network of linear layers, apart from what is small.
        positions: Of an example.
        n_train: Train rows.
        n_test: Queries.
        rank: Of the sketch, on either side; None: EK-FAC.
    """
    sizes = sizes_of(model)
    weights = sum(inputs * outputs for inputs, outputs in sizes)
    if rank is None:
        turning = sum(inputs**2 + outputs**2 for inputs, outputs in sizes)
        row, pair = 3 * weights + turning, weights
    else:
        width = sum(inputs + outputs for inputs, outputs in sizes)
        row, pair = 2 * weights + rank * width, rank**2 * len(sizes)
    return (n_train + n_test) * positions * row + n_train * n_test * pair
