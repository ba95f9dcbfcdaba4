"""Models with sparse tensors: one graph, whose nodes are the examples."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dattri_core as dattri
from dattri_core import Task
from dattri_core.activations import LEAST, activation_bytes
from dattri_core.checkpoint import state_fingerprint
from dattri_core.evaluate import Evaluator

COUNT = 10


class Graph(nn.Module):
    def __init__(self, adjacency, *, sparse):
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.register_buffer("features", torch.randn(len(adjacency), 4, dtype=torch.float64))
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.spread = torch.sparse.mm if sparse else torch.mm

    def forward(self, nodes):
        hidden = self.spread(self.adjacency, self.a(self.features)).relu()
        return self.spread(self.adjacency, self.b(hidden))[nodes]


LAYOUTS = {
    "dense": lambda a: a,
    "coo": lambda a: a.to_sparse(),
    "uncoalesced": lambda a: torch.sparse_coo_tensor(a.nonzero().T, a[a != 0], a.shape),
    "csr": lambda a: a.to_sparse_csr(),
}


def graph(layout):
    torch.manual_seed(0)
    adjacency = (torch.rand(COUNT, COUNT) > 0.6).double() + torch.eye(COUNT).double()
    adjacency = adjacency / adjacency.sum(1, keepdim=True)
    model = Graph(LAYOUTS[layout](adjacency), sparse=layout != "dense").double()
    return model, torch.arange(COUNT), torch.randint(3, (COUNT,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nodes_of_a_graph_are_attributed(layout):
    model, nodes, labels = graph(layout)
    gradients = []
    for node in nodes:
        loss = F.cross_entropy(model(node[None]), labels[node][None])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    gradients = torch.stack(gradients)
    train, test = (nodes[:7], labels[:7]), (nodes[7:], labels[7:])
    got = dattri.attribute(
        Task(model), train, test, method="grad-dot", source="functional", progress=False
    )
    torch.testing.assert_close(got.values, gradients[:7] @ gradients[7:].T)
    for method in ("logra", "if-woodbury"):
        scores = dattri.attribute(
            Task(model), train, test, method=method, source="functional", progress=False
        )
        dense = dattri.attribute(
            Task(graph("dense")[0]), train, test, method=method, source="functional", progress=False
        )
        torch.testing.assert_close(scores.values, dense.values, rtol=1e-6, atol=1e-9)


def test_what_a_sparse_tensor_holds_is_counted():
    """The adjacency is given; its product with what was computed keeps what a dense one does."""
    sizes = []
    for layout in ("dense", "coo"):
        model, nodes, labels = graph(layout)
        task = Task(model)
        evaluator = Evaluator(task, task.checkpoints[0], (nodes[:3], labels[:3]))
        sizes.append(activation_bytes(evaluator, (nodes[:3], labels[:3])))
    assert sizes[1] >= COUNT * 6 * 8 > LEAST  # the hidden units of all nodes
    assert sizes[1] <= 2 * sizes[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fingerprint_covers_what_a_sparse_tensor_holds(layout):
    other = torch.randn(COUNT, COUNT, dtype=torch.float64).relu()
    first, second = (
        state_fingerprint({"adjacency": LAYOUTS[layout](a)}) for a in (other, 2 * other)
    )
    assert first != second
