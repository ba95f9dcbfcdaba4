"""Models trained again on random halves of a world's train set, and what they say of the test set.

Made once and kept beside the worlds: an ensemble for TRAK, and other halves to check scores by.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import worlds
from dattri_benchmarks import models
from dattri_parts.training import random_subsets
from dattri_trak.ensemble import train_ensemble
from torch import Tensor, nn

FRACTION = 0.5
TRUTH_SEED = 1
"""Of the halves that scores are checked by; the ensemble has another one."""


def ensemble(world: Path, members: int) -> Path:
    """Return a folder of members, each trained on a random half."""
    folder = world.with_suffix("") / f"ensemble-{members}"
    held = worlds.load(world)
    train_ensemble(
        lambda indices, seed: _trained(held, indices, seed).state_dict(),
        folder,
        n=len(held.train[0]),
        members=members,
        fraction=FRACTION,
    )
    return folder


def truth(world: Path, halves: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (masks ``[halves, n_train]``, margins ``[halves, n_test]``) of models on halves."""
    path = world.with_suffix("") / f"halves-{halves}.npz"
    if not path.exists():
        held = worlds.load(world)
        n = len(held.train[0])
        masks = np.zeros((halves, n), dtype=bool)
        margins = []
        for half, subset in enumerate(
            random_subsets(n, halves, fraction=FRACTION, seed=TRUTH_SEED)
        ):
            masks[half] = subset.mask
            indices = torch.from_numpy(np.flatnonzero(subset.mask))
            margins.append(_margins(_trained(held, indices, subset.seed), held.test))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, masks=masks, margins=np.stack(margins))
        part.rename(path)
    with np.load(path, allow_pickle=False) as found:
        return found["masks"], found["margins"]


def _trained(world: worlds.World, indices: Tensor, seed: int) -> nn.Module:
    """Return a new model of the world's kind, trained as the world's was, by the seed."""
    torch.manual_seed(seed)
    linear = [layer for layer in world.model.modules() if isinstance(layer, nn.Linear)]
    model = models.mlp(linear[0].in_features, *(layer.out_features for layer in linear))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    inputs, labels = (part[indices] for part in world.train)
    model.train()
    for _ in range(20):
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs), 100):
            chosen = order[start : start + 100]
            sgd.zero_grad()
            nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            sgd.step()
    return model.eval()


def _margins(model: nn.Module, data: tuple[Tensor, ...]) -> np.ndarray:
    inputs, labels = data
    with torch.no_grad():
        outputs = model(inputs).double()
    own = outputs.gather(1, labels[:, None])
    others = outputs.scatter(1, labels[:, None], -torch.inf).logsumexp(1, keepdim=True)
    return (own - others)[:, 0].numpy()
