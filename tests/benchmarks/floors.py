"""What a method cannot do without: plain passes and matrix products, counted and measured.

All for networks of linear layers on examples of one position. A product is counted in multiply-adds
and taken at the machine's rate on a large product, which few products of these shapes reach; a
decomposition is run at its size; passes are run on the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

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


@dataclass
class Floor:
    """The least time of a method: the sum of its parts.

    Args:
        model: A network of linear layers.
        train: Its train set.
        test: Its test set.
    """

    model: nn.Module
    train: Pair
    test: Pair
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Return the sum."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return " + ".join(f"{name} {value:.3f} s" for name, value in self.parts.items())

    def passes(self, train: int) -> None:
        """Add forward and backward passes over the train set, and one over the test set."""
        each = best_of(lambda: training_pass(self.model, [self.train]))
        test = best_of(lambda: training_pass(self.model, [self.test]))
        self.parts[f"{train} + 1 passes"] = train * each + test

    def products(self, multiply_adds: float, name: str = "products") -> None:
        """Add matrix products."""
        label = f"{name} ({multiply_adds:.1e} multiply-adds)"
        self.parts[label] = multiply_adds / matrix_rate()

    def updates(self, vectors: int, times: int) -> None:
        """Add the reading and writing of vectors as large as the parameters, again and again."""
        size = sum(inputs * outputs for inputs, outputs in sizes_of(self.model))
        one, two = torch.ones(vectors, size), torch.ones(vectors, size)
        self.parts[f"{times} vector updates"] = times * best_of(lambda: one.add_(two, alpha=0.5))

    def decompositions(self, kind: str, sizes: list[int]) -> None:
        """Add eigendecompositions or Cholesky factorisations in float64."""
        seconds = sum(_decomposition(kind, size) for size in sizes)
        self.parts[f"{kind} of {', '.join(map(str, sizes))}"] = seconds


@cache
def _decomposition(kind: str, size: int) -> float:
    torch.manual_seed(0)
    noise = torch.randn(size, size, dtype=torch.float64)
    matrix = noise @ noise.mT / size + torch.eye(size, dtype=torch.float64)
    work = torch.linalg.eigh if kind == "eigh" else torch.linalg.cholesky
    return best_of(lambda: work(matrix), 3 if size < 1000 else 1)


def floor_of(
    method: str, model: nn.Module, train: Pair, test: Pair, steps: int, rank: int
) -> Floor:
    """Return the floor of a method of the influence family.

    Args:
        method: Its registered name.
        model: A network of linear layers with ten outputs.
        train: Train set, n examples.
        test: Test set, m examples.
        steps: Iterations of cg, depth of lissa (one example a step), dimension of arnoldi.
        rank: Of each side of a Kronecker sketch.
    """
    floor = Floor(model, train, test)
    n, m = len(train[0]), len(test[0])
    sizes = sizes_of(model)
    entries = sum(i * o for i, o in sizes)
    widths = sum(i + o for i, o in sizes)
    product = hessian_product_multiply_adds(model)
    pairs = n * m * entries  # of factored rows with formed queries
    once = ("if-cg", "if-lissa", "if-arnoldi")  # their fit is made of products, counted below
    floor.passes(1 if method in once else 3 if method == "if-ekfac" else 2)
    if method in ("if-explicit", "if-woodbury"):
        # The matrix of parameters or that of the rows of the Gauss-Newton matrix: the smaller one.
        classes = sizes[-1][1]
        dual = n * (classes - 1)
        if method == "if-explicit" and entries <= dual:
            matrix = n * classes * (classes + 1) / 2 * sum(i * i for i, _ in sizes)
            floor.products(matrix + pairs)
            floor.decompositions("cholesky", [entries])
        else:
            floor.products(dual * dual / 2 * widths + dual * m * widths)
            floor.decompositions("cholesky", [dual])
    elif method == "if-cg":
        floor.products(pairs)
        floor.products(product * n * m * steps, f"{m * steps} Hessian products")
    elif method == "if-lissa":
        floor.products(pairs)
        floor.products(product * m * steps, f"{m * steps} Hessian products of one example")
        floor.updates(m, steps)
    elif method == "if-arnoldi":
        floor.products(product * n * steps, f"{steps} Hessian products")
        floor.updates(1, steps * steps)  # against each vector before it, twice for rounding
        floor.products((n + m) * steps * entries, "projections")
    elif method == "if-datainf":
        # Products of all train rows, or queries formed: for each layer whichever is less.
        gram = [n * n * (i + o) + n * m * (i + o) + n * n * m for i, o in sizes]
        formed = [n * m * (i + o) + 2 * n * m * i * o for i, o in sizes]
        floor.products(sum(min(pair) for pair in zip(gram, formed, strict=True)))
    elif method in ("if-kfac", "if-ekfac"):
        moments = n * sum(i * i + o * o for i, o in sizes)
        rotations = (n + m) * sum(i * i + o * o for i, o in sizes)
        corrected = n * (entries + sum(i * i + o * o for i, o in sizes))
        floor.products(moments + rotations + pairs + (corrected if method == "if-ekfac" else 0))
        floor.decompositions("eigh", [size for pair in sizes for size in pair])
    elif method == "if-diagonal":
        floor.products(n * entries + pairs)
    elif method == "logra":
        ranks = [(min(i, rank), min(o, rank)) for i, o in sizes]
        sketch = sum(
            2 * (n + m) * (i * k + o * q) for (i, o), (k, q) in zip(sizes, ranks, strict=True)
        )
        kept = [k * q for k, q in ranks]
        sides = [min(n, k) for k in kept]  # of the matrix in the sketch, or of its rows
        moments = n * sum(k * side for k, side in zip(kept, sides, strict=True))
        floor.products(sketch + moments + n * m * sum(kept))
        floor.decompositions("cholesky", sides)
    else:
        raise ValueError(f"no floor of {method!r} is known")
    return floor
