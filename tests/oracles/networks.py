"""Small float64 networks of every kind of layer, their train sets as problems, dense curvatures."""

from __future__ import annotations

import torch
from torch import nn

from dattri_core import RandomStream, Task
from dattri_core.assemble import build_part
from dattri_core.laws.oracles import ggn, row_matrix
from dattri_core.problem import TrainProblem
from dattri_core.stream import Examples

WORDS, CLASSES = 7, 3


class Reader(nn.Module):
    """Embedding, a convolution over positions, a norm and a head: T positions in most layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 4)
        self.convolution = nn.Conv1d(4, 5, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, tokens):
        hidden = self.convolution(self.embedding(tokens).mT).mT.tanh()
        return self.head(self.norm(hidden).mean(1))


def perceptron():
    """Return Linear layers around a LayerNorm: one position each."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, CLASSES, bias=False)
    )


def images():
    """Return a convolutional network: more positions than weights."""
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 4 * 4, CLASSES))


def network(name, n=8, seed=0, dtype=torch.float64):
    """Return a task of a named network and ``n`` train examples."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {"perceptron": perceptron, "images": images, "reader": Reader}[name]()
    labels = torch.randint(CLASSES, (n,), generator=generator)
    if name == "reader":
        inputs = torch.randint(WORDS, (n, 5), generator=generator)
    else:
        shape = {"perceptron": (4,), "images": (2, 6, 6)}[name]
        inputs = torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return Task(model.to(dtype)), (inputs, labels)


NETWORKS = ("perceptron", "images", "reader")


def problem_of(task, train, *, batch=3, memory=2**28, sketches=()):
    """Return the train set of a task as a curvature sees it, behind sketches."""
    examples = Examples.of(train, "train")
    bound = build_part("source", "per-example").bind(task, task.checkpoints[0], examples.sample(3))
    maps = ()
    for sketch in sketches:
        space = maps[-1].out_space if maps else bound.space
        stream = RandomStream(0, "projector")
        maps = (*maps, sketch.build(space, stream=stream, device=torch.device("cpu")))
    return TrainProblem(
        source=bound,
        examples=examples,
        maps=maps,
        batch=batch,
        random=RandomStream(0, "curvature"),
        memory=memory,
    )


def dense_ggn(task, space, train):
    """Return the GGN ``[d, d]``, one backward pass an output."""
    return ggn(task, space, train)


def dense_second_moment(task, space, train):
    """Return the mean of g g^T over gradients of the loss ``[d, d]``, one backward pass each."""
    rows = row_matrix(task, space, train)
    return rows.T @ rows / len(rows)


def diagonal_blocks(matrix, space):
    """Return the matrix with zeros where two blocks of a space meet."""
    kept = torch.zeros_like(matrix)
    for spec in space:
        start = space.offsets[spec.name]
        where = slice(start, start + spec.size)
        kept[where, where] = matrix[where, where]
    return kept


def solved(matrix, damping, flat):
    """Return (matrix + damping I)^-1 v for every row v."""
    shifted = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.solve(shifted, flat.double().mT).mT


def convolutional(n, m):
    """Return the task of a convolutional network in float64, its sets and dense oracles.

    Its train and test set of n and m examples, their rows ``[n, d]`` and ``[m, d]``, the GGN and
    the empirical Fisher matrix by name, and the space of the rows.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.Tanh(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(72, 3),
        ).double()  # fmt: skip
    sets = []
    for size in (n, m):
        inputs = torch.randn(size, 2, 10, 10, generator=generator, dtype=torch.float64)
        sets.append((inputs, torch.randint(3, (size,), generator=generator)))
    task = Task(model)
    space = problem_of(task, sets[0]).space
    left = row_matrix(task, space, sets[0])
    right = row_matrix(task, space, sets[1], "test")
    curvatures = {
        "ggn": dense_ggn(task, space, sets[0]),
        "fisher": dense_second_moment(task, space, sets[0]),
    }
    return task, *sets, left, right, curvatures, space
