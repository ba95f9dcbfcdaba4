"""Small tasks whose every gradient and Hessian a dense float64 oracle can compute."""

import itertools

import torch
from torch import nn

from dattri_core import Task
from dattri_core.laws.oracles import place


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n, classes, seed):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def mlp(sizes=(4, 5, 3), seed=0, dtype=torch.float64):
    """Return Linear layers with tanh between, weights from the seed alone."""
    layers = []
    for position, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(normal(outputs, inputs, seed=seed + 2 * position) / inputs**0.5)
            layer.bias.copy_(normal(outputs, seed=seed + 2 * position + 1) / 2)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype).eval()


def examples(n, inputs=4, classes=3, seed=100, dtype=torch.float64):
    return normal(n, inputs, seed=seed).to(dtype), labels(n, classes, seed + 1)


def world(n_train=13, n_test=6, seed=0, dtype=torch.float64, **options):
    """Return a task with its train and test examples."""
    task = Task(mlp(seed=seed, dtype=dtype), **options)
    return (
        task,
        examples(n_train, seed=seed + 100, dtype=dtype),
        examples(n_test, seed=seed + 200, dtype=dtype),
    )


def states(count, seed=0, sizes=(4, 5, 3), dtype=torch.float64):
    """Return state dicts of different weights, as checkpoints of one run."""
    return [mlp(sizes, seed=seed + 50 * i, dtype=dtype).state_dict() for i in range(count)]


def flat_gradients(model, values, parameters=None):
    """Return the gradient of each number of ``values(model)`` as a flat row, one backward each."""
    weights = [
        p for name, p in model.named_parameters() if parameters is None or name in parameters
    ]
    rows = []
    for value in values(model):
        grads = torch.autograd.grad(value, weights, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def cross_entropies(batch):
    return lambda model: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def dense_hessian(model, batch, rate=0.0):
    """Return the mean cross entropy's Hessian in the flat order of the parameters, ``[d, d]``."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for _, p in model.named_parameters()]
    sizes = [p.numel() for _, p in model.named_parameters()]

    def mean(flat):
        parts = flat.split(sizes)
        state = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        outputs = torch.func.functional_call(model, state, (batch[0],))
        return nn.functional.cross_entropy(outputs, batch[1])

    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(mean, start)
    return hessian + rate * torch.eye(len(start), dtype=start.dtype)


def positions(model, space):
    """Return where each entry of a space lies in the flat order of the parameters, ``[d]``."""
    start, numbers = 0, {}
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        numbers[name] = torch.arange(start, start + count).reshape(1, *parameter.shape)
        start += count
    return place(space, numbers)[0].long()
