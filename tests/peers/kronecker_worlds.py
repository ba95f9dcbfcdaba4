"""Models and data that this project and its peers compute Kronecker-factored curvature of."""

import numpy as np
import torch
from torch import nn

N_TRAIN, N_TEST, CLASSES = 120, 20, 5


def mlp():
    return nn.Sequential(
        nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, CLASSES)
    )


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 5, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, CLASSES),
    )


MODELS = {"mlp": (mlp, (12,)), "conv": (conv, (2, 6, 6))}


def world(name):
    """Return a model in float64, 60 steps of Adam into its training, and its train and test set."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    inputs = torch.randn(N_TRAIN + N_TEST, *shape, dtype=torch.float64)
    rule = torch.randn(inputs[0].numel(), CLASSES, dtype=torch.float64)
    noise = torch.randn(len(inputs), CLASSES, dtype=torch.float64)
    labels = (inputs.flatten(1) @ rule + 2 * noise).argmax(1)
    train, test = (inputs[:N_TRAIN], labels[:N_TRAIN]), (inputs[N_TRAIN:], labels[N_TRAIN:])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()
    return model.eval(), train, test


def save(folder, name):
    """Write a world for the peer, and return it."""
    model, train, test = world(name)
    arrays = {f"model.{key}": value.numpy() for key, value in model.state_dict().items()}
    arrays |= {"train_x": train[0].numpy(), "train_y": train[1].numpy()}
    arrays |= {"test_x": test[0].numpy(), "test_y": test[1].numpy()}
    np.savez(folder / f"{name}.npz", **arrays)
    return model, train, test


def load(folder, name):
    """Return a world that `save` wrote: model, train set, test set."""
    arrays = {key: torch.as_tensor(value) for key, value in np.load(folder / f"{name}.npz").items()}
    model = MODELS[name][0]().double()
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in arrays.items() if k.startswith("model.")}
    )
    sides = [(arrays[f"{side}_x"], arrays[f"{side}_y"]) for side in ("train", "test")]
    return model.eval(), *sides
