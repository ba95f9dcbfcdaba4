"""What several processes compute together; in each, `python shared_work.py RANK SIZE FOLDER`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import dattri_core as dattri
from dattri_core import tiles

METHODS: dict[str, dict[str, Any]] = {
    "grad-dot": {},
    "if-explicit": {"curvature": "ggn"},
    "if-cg": {"curvature": "ggn", "damping": 0.1},
    "if-woodbury": {},
    "if-datainf": {},
    "if-diagonal": {},
    "if-kfac": {"fisher": "ggn"},
    "if-ekfac": {"draws": 2},
    "relatif-ekfac": {},
    "logra": {"rank": 3},
    "grass": {},
    "trak": {},
    "trackstar": {},
    "knn-shapley": {},
}
COUNTED: dict[str, dict[str, Any]] = {
    "grad-dot": {},
    "if-kfac": {},
    "if-ekfac": {},
    "if-diagonal": {},
    "trak": {},
    "logra": {},
    "grass": {"solver": "cholesky"},
    "if-woodbury": {},
    "if-datainf": {},
    "if-explicit": {"curvature": "ggn"},
}
TRAIN, TEST = 47, 5
EIGH = torch.linalg.eigh


class Network(nn.Module):
    """A convolution, a norm and two layers, in float64; counts the examples that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3, groups=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(3 * 16, 6),
            nn.LayerNorm(6),
            nn.Tanh(),
            nn.Linear(6, 3),
        )
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        found: torch.Tensor = self.layers(x)
        return found


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network().double()


def drawn(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (count,), generator=generator)


def task(model: nn.Module, **settings: Any) -> dattri.Task:
    return dattri.Task(model, "cross-entropy", reference=drawn(7, 3), **settings)


def of_methods() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, overrides in METHODS.items():
        train, test = drawn(TRAIN, 1), drawn(TEST, 2)
        fitted = dattri.method(name, **overrides).fit(task(network()), train)
        found[f"{name} scores"] = fitted.attribute(test).values
        if name not in ("knn-shapley", "rps-l2", "if-cg", "if-arnoldi"):
            found[f"{name} self-influence"] = fitted.self_influence()
        best, worst, *_ = fitted.extremes(test, 4)
        for side, which in (("best", best), ("worst", worst)):
            found[f"{name} {side} ids"] = torch.as_tensor(which.ids)
            found[f"{name} {side} values"] = which.values
    return found


def of_requests(folder: Path) -> dict[str, Any]:
    """Checkpoints, sweeps, readings, groups, streams, small budgets, few examples, files."""
    train, test = drawn(TRAIN, 1), drawn(TEST, 2)
    states = [network(seed).state_dict() for seed in range(3)]
    rates = {"checkpoints": states, "learning_rates": [0.1, 0.2, 0.3]}
    many = task(network(), **rates)
    found: dict[str, Any] = {
        "tracin": dattri.attribute(many, train, test, method="tracin").values,
        "trak": dattri.attribute(many, train, test, method="trak").values,
        "ekfac": dattri.attribute(many, train, test, method="if-ekfac").values,
    }
    fitted = dattri.method("tracin").fit(many, train)
    found["tracin self-influence"] = fitted.self_influence()
    found["tracin extremes"] = fitted.extremes(test, 5).top.values
    for name, part in fitted.attribute(test, by="checkpoint").items():
        found[f"of {name}"] = part.values
    one = task(network())
    fitted = dattri.method("if-ekfac").fit(one, train)
    for damping, scores in fitted.sweep(test, damping=[0.1, 1.0]).items():
        found[f"at {damping}"] = scores.values
    for name, part in fitted.attribute(test, by="block").items():
        found[f"through {name}"] = part.values
    pool = drawn(20, 4)
    for name in ("if-ekfac", "trak"):
        pooled = dattri.method(name).fit(one, train).over(pool)
        found[f"pool {name}"] = pooled.attribute(test).values
        found[f"pool {name} self-influence"] = pooled.self_influence()
    found["group"] = fitted.attribute(test, group=True).values
    found["few"] = dattri.attribute(one, drawn(2, 1), test, method="if-diagonal").values
    found["few self"] = dattri.method("grad-dot").fit(one, drawn(2, 1)).self_influence()
    found["one best"] = dattri.method("grad-dot").fit(one, drawn(2, 1)).extremes(test, 1).top.values
    found["items"] = dattri.attribute(one, TensorDataset(*train), test, method="if-kfac").values
    loader = DataLoader(TensorDataset(*train), batch_size=10)
    found["stream"] = dattri.attribute(one, loader, test, method="if-kfac").values
    small = dattri.attribute(one, train, test, method="if-ekfac", memory="3MiB")
    found["small memory"] = small.values
    kept, rows = folder / "fits", folder / "rows"
    for time in ("first", "again"):
        one.model.seen = 0
        scores = dattri.attribute(one, train, test, method="if-ekfac", fits=kept)
        found[f"fits {time}"] = scores.values
        found[f"seen for fits {time}"] = torch.tensor(one.model.seen)
        scores = dattri.attribute(one, train, test, method="logra", rank=3, store=rows)
        found[f"store {time}"] = scores.values
    pca = {"name": "kronecker", "rank": 3, "initialisation": "pca"}
    found["pca"] = dattri.attribute(one, train, test, method="logra", projector=pca).values
    return found


def counted() -> dict[str, Any]:
    """The examples that a process evaluates."""
    found = {}
    for name, overrides in COUNTED.items():
        model = network()
        dattri.attribute(task(model), drawn(600, 1), drawn(TEST, 2), method=name, **overrides)
        found[name] = torch.tensor(model.seen)
    return found


def failures(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What is said where one process meets a bad example, and what is refused in all."""
    images, labels = drawn(TRAIN, 1)
    bad = images.clone()
    bad[43, 0, 0, 0] = float("nan")
    one, test = task(network()), drawn(TEST, 2)
    found = {}
    for name in ("grad-dot", "if-ekfac", "trak"):
        found[name] = said(lambda n=name: dattri.attribute(one, (bad, labels), test, method=n))
    train = (images, labels)
    found["spec"] = said(lambda: dattri.attribute(one, train, test, method="grad-dott"))
    found["after"] = dattri.attribute(one, train, test, method="grad-dot").values
    pair = distributed.new_group([0, 1])

    def among() -> Any:
        with dattri.distributed(pair):
            return dattri.attribute(one, train, test, method="if-diagonal")

    found["pair"] = among().values if rank < 2 else said(among)
    return found


def on_disk(rank: int, folder: Path) -> dict[str, Any]:
    """Scores on disk: whole, of a method that sees all rows at once, and of a run that stopped."""
    one, train, test = task(network()), drawn(TRAIN, 1), drawn(TEST, 2)
    found = {}
    for name in ("if-ekfac", "knn-shapley"):
        for turn in ("first", "again"):
            method = dattri.method(name, **METHODS[name])
            scores = method.attribute(one, train, test, out=folder / name)
            found[f"{name} {turn}"] = copied(scores)
    put, calls = tiles.FolderTiles.put, []

    def failing(self: Any, *given: Any) -> None:
        calls.append(given)
        if rank == 1 and len(calls) == 3:
            raise dattri.InputError("the disk is gone")
        put(self, *given)

    tiles.FolderTiles.put = failing  # type: ignore[method-assign]
    fitted = dattri.method("if-kfac").fit(one, train)
    found["stopped"] = said(lambda: fitted.attribute(test, out=folder / "stopped"))
    distributed.barrier()
    if rank == 0:
        shutil.copytree(folder / "stopped.run", folder / "left.run")
    before = len(calls)
    found["resumed"] = copied(fitted.attribute(test, out=folder / "stopped"))
    found["tiles before"] = torch.tensor(min(before, 2) if rank == 1 else before)
    found["tiles after"] = torch.tensor(len(calls) - before)
    tiles.FolderTiles.put = put  # type: ignore[method-assign]
    return found


def copied(scores: dattri.Scores) -> torch.Tensor:
    return torch.from_numpy(np.array(scores.values))


def said(call: Any) -> str:
    try:
        call()
    except dattri.DattriError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def backwards(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return another decomposition of the same matrix, as another machine may find one."""
    values, vectors = EIGH(matrix)
    return values.flip(-1), vectors.flip(-1)


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if rank:
        torch.linalg.eigh = backwards
    where = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    with dattri.distributed():
        found = {
            "methods": of_methods(),
            "requests": of_requests(folder / "shared"),
            "counted": counted(),
            "failures": failures(rank, size, folder),
            "on disk": on_disk(rank, folder),
        }
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo that outlives the interpreter would abort the process, rarely


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
