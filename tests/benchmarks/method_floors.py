"""The least time of each influence method: passes, products and decompositions that it needs.

For networks of linear layers on examples of one position. Passes are run on the data, a product at
its own shape and a decomposition at its size, all in the run that they are compared with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

import torch
from floors import Pair, best_of, sizes_of, training_pass
from torch import nn

Shape = tuple[int, int, int]
"""Of a product: ``[a, b] @ [b, c]``."""


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

    def products(self, shapes: Iterable[Shape], name: str = "products", times: float = 1) -> None:
        """Add matrix products, each shape measured once and counted as often as it comes."""
        counted = Counter(shapes)
        work = times * sum(a * b * c * count for (a, b, c), count in counted.items())
        taken = times * sum(_product(*shape) * count for shape, count in counted.items())
        self.parts[f"{name} ({work:.1e} multiply-adds)"] = taken

    def hessian_products(self, count: int, examples: int) -> None:
        """Add plain Hessian-vector products: a second backward pass through a kept first one."""
        inputs, labels = (side[:examples] for side in self.train)
        variables = list(self.model.parameters())
        loss = nn.functional.cross_entropy(self.model(inputs), labels)
        first = torch.autograd.grad(loss, variables, create_graph=True)
        vector = [torch.ones_like(v) for v in variables]
        each = best_of(lambda: torch.autograd.grad(first, variables, vector, retain_graph=True), 10)
        self.parts[f"{count} Hessian products of {examples} examples"] = count * each

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
def _product(a: int, b: int, c: int) -> float:
    left, right, out = torch.randn(a, b), torch.randn(b, c), torch.empty(a, c)
    return best_of(lambda: torch.mm(left, right, out=out), 5)


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
    pairs = [(n, i, o * m) for i, o in sizes]  # factored rows with formed queries
    once = ("if-cg", "if-lissa", "if-arnoldi")  # their fit is made of products, counted below
    floor.passes(1 if method in once else 3 if method == "if-ekfac" else 2)
    if method in ("if-explicit", "if-woodbury"):
        # The matrix of parameters or that of the rows of the Gauss-Newton matrix: the smaller one.
        classes = sizes[-1][1]
        dual = n * (classes - 1)
        if method == "if-explicit" and entries <= dual:
            floor.products((i, n, i) for i, _ in sizes for _ in range(classes * (classes + 1) // 2))
            floor.products(pairs, "scores")
            floor.decompositions("cholesky", [entries])
        else:
            each = [width for pair in sizes for width in pair]
            floor.products([(dual, width, dual) for width in each], "halves", times=0.5)
            floor.products([(dual, width, m) for width in each], "scores")
            floor.decompositions("cholesky", [dual])
    elif method == "if-cg":
        floor.products(pairs, "scores")
        floor.hessian_products(m * steps, n)
    elif method == "if-lissa":
        floor.products(pairs, "scores")
        floor.hessian_products(m * steps, 1)
        floor.updates(m, steps)
    elif method == "if-arnoldi":
        floor.hessian_products(steps, n)
        floor.updates(1, steps * steps)  # against each vector before it, twice for rounding
        rows = [(count, i, o * steps) for i, o in sizes for count in (n, m)]
        floor.products([*rows, (n, steps, m)], "projections and scores")
    elif method == "if-datainf":
        # Products of all train rows, or queries formed: for each layer whichever is less.
        for i, o in sizes:
            gram = [(n, i, n), (n, o, n), (n, i, m), (n, o, m), (n, n, m)]
            formed = [(n, i, m), (n, o, m), *[(n, i, o * m)] * 2]
            floor.products(min(gram, formed, key=_multiply_adds), f"products of {i} x {o}")
    elif method in ("if-kfac", "if-ekfac"):
        moments = [(width, n, width) for pair in sizes for width in pair]
        turning = [(count, width, width) for pair in sizes for width in pair for count in (n, m)]
        floor.products([*moments, *turning])
        if method == "if-ekfac":
            corrected = [(n, width, width) for pair in sizes for width in pair]
            floor.products([*corrected, *((i, n, o) for i, o in sizes)], "eigenvalues")
        floor.products(pairs, "scores")
        floor.decompositions("eigh", [size for pair in sizes for size in pair])
    elif method == "if-diagonal":
        floor.products([(i, n, o) for i, o in sizes])
        floor.products(pairs, "scores")
    elif method == "logra":
        ranks = [(min(i, rank), min(o, rank)) for i, o in sizes]
        sketch: list[Shape] = []
        for (i, o), (k, q) in zip(sizes, ranks, strict=True):
            sketch += [(count, i, k) for count in (n, m)] + [(count, o, q) for count in (n, m)]
        floor.products(sketch, "sketches")
        kept = [k * q for k, q in ranks]
        sides = [min(n, k) for k in kept]  # of the matrix in the sketch, or of its rows
        floor.products([(side, max(n, k), side) for k, side in zip(kept, sides, strict=True)])
        floor.products([(n, k, m) for k in kept], "scores")
        floor.decompositions("cholesky", sides)
    else:
        raise ValueError(f"no floor of {method!r} is known")
    return floor


def _multiply_adds(shapes: list[Shape]) -> int:
    return sum(a * b * c for a, b, c in shapes)
