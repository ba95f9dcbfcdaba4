"""Runs of peers' scripts in the Python that DATTRI_PEERS_PYTHON names."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.toy_tasks import examples, mlp, states


def run_script(name, folder, *arguments, packages):
    """Run a script of this folder on ``folder``; skip where what it needs is not installed.

    Args:
        name: Of the script.
        folder: Its first argument, and where it runs.
        arguments: The rest, as text.
        packages: Imported name and what to say of each package that it needs.
    """
    python = os.environ.get("DATTRI_PEERS_PYTHON")
    said = " and ".join(packages.values())
    if not python:
        pytest.skip(f"DATTRI_PEERS_PYTHON is not set; give a Python that has {said}")
    done = subprocess.run(
        [python, str(Path(__file__).with_name(name)), str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    for package in packages:
        if f"No module named '{package}'" in done.stderr:
            pytest.skip(f"the Python of DATTRI_PEERS_PYTHON has no {package}")
    assert done.returncode == 0, done.stderr[-3000:]


def save_sides(folder, train, test, **arrays):
    """Write the data, and more arrays, to ``arrays.npz`` in the folder."""
    sides = {"train_x": train[0], "train_y": train[1], "test_x": test[0], "test_y": test[1]}
    np.savez(folder / "arrays.npz", **sides, **arrays)


def save_network(folder, n_train, n_test, checkpoints):
    """Write a small network's checkpoints and data; return (model, weights, train, test)."""
    sizes = (6, 7, 4)
    train, test = (
        examples(count, inputs=6, classes=4, seed=seed, dtype=torch.float32)
        for count, seed in ((n_train, 100), (n_test, 300))
    )
    weights = states(checkpoints, sizes=sizes, dtype=torch.float32)
    named = {f"{at}:{name}": w for at, state in enumerate(weights) for name, w in state.items()}
    save_sides(folder, train, test, **named)
    return mlp(sizes, dtype=torch.float32), weights, train, test
