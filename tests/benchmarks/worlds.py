"""Worlds of the benchmarks: a model with weights, its loss and its data, in one file of arrays.

Read by this package's runs and by those of peers in their own environments, so that it imports
numpy, torch and the models alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dattri_benchmarks import models
from torch import Tensor, nn


@dataclass
class World:
    """A model in ``eval()`` mode, the name of its loss, and (train, test) as tuples of tensors."""

    model: nn.Module
    loss: str
    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]


def save(path: Path, world: World, builder: str, *arguments: int) -> None:
    """Write a world whose model is ``models.<builder>(*arguments)``."""
    about = {"builder": builder, "arguments": arguments, "loss": world.loss}
    arrays: dict[str, Any] = {"about": np.array(json.dumps(about))}
    for name, tensor in world.model.state_dict().items():
        arrays[f"model.{name}"] = tensor.numpy()
    for side, parts in (("train", world.train), ("test", world.test)):
        for at, part in enumerate(parts):
            arrays[f"{side}.{at}"] = part.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.rename(path)


def load(path: str | Path) -> World:
    """Read a world."""
    with np.load(path, allow_pickle=False) as found:
        arrays = dict(found)
    about = json.loads(str(arrays.pop("about")))
    model: nn.Module = getattr(models, about["builder"])(*about["arguments"])
    prefix = "model."
    model.load_state_dict(
        {
            name.removeprefix(prefix): torch.from_numpy(values)
            for name, values in arrays.items()
            if name.startswith(prefix)
        }
    )
    sides = []
    for side in ("train", "test"):
        count = sum(name.startswith(f"{side}.") for name in arrays)
        sides.append(tuple(torch.from_numpy(arrays[f"{side}.{at}"]) for at in range(count)))
    return World(model.eval(), about["loss"], *sides)


def summed_loss(world: World, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a batch summed over its examples, as every library here is given it."""
    if world.loss == "causal-lm":
        outputs, labels = outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(outputs, labels, reduction="sum")


def layers_of(model: nn.Module) -> list[str]:
    """Return the names of the parameters of linear layers and convolutions."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        for name, _ in module.named_parameters(recurse=False)
    ]
