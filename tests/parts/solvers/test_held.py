"""What fitted inverses say that they keep, against the tensors that can be reached from them."""

import warnings
from collections.abc import Mapping

import attrs
import pytest
import torch
from oracles.toy_tasks import mlp, normal
from torch import nn

import dattri_core as dattri
from dattri_core import Method, Task

WIDTHS = (40, 24, 10)
FISHER = {"name": "fisher", "kind": "empirical"}
EXACT = {"name": "exact", "damping": 0.1}
METHODS = {
    "if-woodbury": {},
    "if-datainf": {},
    "if-arnoldi": {"curvature": "ggn", "rank": 20, "iterations": 30, "damping": 0.1},
    "if-kfac": {},
    "if-ekfac": {},
    "if-diagonal": {},
    "cholesky": {"inverse_hessian": {"curvature": "ggn", "solver": "cholesky"}},
    "indefinite": {"inverse_hessian": {"curvature": "hessian", "solver": "cholesky"}},
    "two-sided": {
        "inverse_hessian": {
            "curvature": "ggn",
            "solver": {"name": "cholesky", "damping": 0.1},
            "form": "two-sided",
        }
    },
    "substitute": {"inverse_hessian": {**EXACT, "largest": 100}},
    "fallback": {"inverse_hessian": {**EXACT, "largest": 100, "substitute": FISHER}},
    "low rank": {
        "inverse_hessian": {"name": "low-rank", "rank": 4, "inner": {**EXACT, "curvature": "ggn"}}
    },
}


def method_of(name):
    if name.startswith("if-"):
        return dattri.method(name, **METHODS[name])
    return Method(**METHODS[name])


def tensors(held, seen):
    """Yield the tensors that a value holds, through attributes, mappings and sequences."""
    if id(held) in seen or isinstance(held, (str, bytes, int, float, type, nn.Module)):
        return
    seen[id(held)] = held
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from tensors(value, seen)
    elif isinstance(held, (list, tuple, set, frozenset)):
        for value in held:
            yield from tensors(value, seen)
    elif attrs.has(type(held)):
        for one in attrs.fields(type(held)):
            yield from tensors(getattr(held, one.name, None), seen)
    for value in getattr(held, "__dict__", {}).values():
        yield from tensors(value, seen)


def bytes_of(held, others):
    """Return the bytes of the storages that a value reaches, without those of others."""
    storages = {}
    for tensor in tensors(held, {}):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    for tensor in others:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("name", METHODS)
def test_an_inverse_says_what_it_keeps(name):
    """Within a tenth, and a few numbers; the model and the train set are not its own."""
    task = Task(mlp(WIDTHS, dtype=torch.float32))
    inputs, labels = normal(60, 40, seed=1).float(), torch.arange(60) % 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fitted = method_of(name).fit(task, (inputs, labels), progress=False)
    (inverse,) = fitted._held.chain.inverses
    common = [inputs, labels, *task.model.parameters()]
    common += tensors(fitted._held.chain.source, {})
    found = bytes_of(inverse, common)
    assert found > 1000
    assert abs(inverse.held - found) <= 0.1 * found + 2000, (inverse.held, found)
    assert fitted._held.outline.kept == inverse.held
