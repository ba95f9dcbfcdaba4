"""Flat projectors in methods: specs, new processes, batches, curvature in the sketch, agreement."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import attrs
import pytest
import torch
from flat_cases import CASES, kernel_of
from oracles.toy_tasks import world
from scipy.stats import spearmanr

import dattri_core as dattri
from dattri_core import Method
from dattri_core.registry import default_registry

every = pytest.mark.parametrize("name", CASES)

FRESH = """
import hashlib, json, sys, torch
from dattri_core import BlockSpec, Method, RandomStream, Space
space, stream = Space((BlockSpec("flat", "dense", (1,)),)), RandomStream(7, "projector", 2)
for spec in json.loads(sys.argv[1]):
    part = Method(projector=spec).projector
    mapped = part.build(space, stream=stream, device=torch.device("cpu"))
    matrix = mapped.kernel.matrix(2**32, 2**32 + 500).contiguous()
    print(hashlib.sha256(matrix.numpy().tobytes()).hexdigest())
"""


def test_a_spec_gives_the_same_matrix_in_another_process() -> None:
    specs, digests = [], []
    for case in CASES.values():
        spec = default_registry().spec_of(case.part)
        assert Method(projector=json.loads(json.dumps(spec))).projector == case.part
        matrix = kernel_of(case.part, seed=7, checkpoint=2).matrix(2**32, 2**32 + 500)
        specs.append(spec)
        digests.append(hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest())
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(specs)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == digests


@every
@pytest.mark.parametrize("source", ["per-example", "functional"])
def test_scores_in_the_sketch_are_those_of_the_matrix_written_down(name: str, source: str) -> None:
    task, train, test = world()
    part = attrs.evolve(CASES[name].part, dim=16)
    method = Method(source=source, projector=part, seed=3)
    scores = method.attribute(task, train, test).values
    rows = []
    for batch in (train, test):
        bound = default_registry().make("source", source).bind(task, task.checkpoints[0], batch)
        blocks = {}
        bound.stream(batch, "train", lambda n, b, blocks=blocks: blocks.__setitem__(n, b.flat()))
        rows.append(torch.cat([blocks[n] for n in bound.space.names], 1))
    stream = dattri.RandomStream(3, "projector", 0)
    mapped = part.build(bound.space, stream=stream, device=torch.device("cpu"))
    matrix = mapped.kernel.matrix(0, bound.space.dim) * mapped.kernel.scale
    want = rows[0] @ matrix.T @ matrix @ rows[1].T
    assert (torch.as_tensor(scores) - want).abs().max() < 1e-8 * want.abs().max()


@every
@pytest.mark.parametrize("scope", ["row", "block"])
def test_scores_do_not_depend_on_the_batch_size_or_order(name: str, scope: str) -> None:
    task, train, test = world(n_train=9)
    part = attrs.evolve(CASES[name].part, dim=8, scope=scope)
    method = Method(
        projector=part, inverse_hessian={"curvature": "gauss-newton", "solver": "cholesky"}
    )
    whole = torch.as_tensor(method.attribute(task, train, test).values)
    for size in (1, 4):
        data = torch.utils.data.TensorDataset(*train)
        loader = torch.utils.data.DataLoader(data, batch_size=size)
        again = torch.as_tensor(method.attribute(task, loader, test).values)
        assert (again - whole).abs().max() < 1e-10 * whole.abs().max()
    order = torch.tensor([3, 8, 1, 0, 6, 2, 7, 5, 4])
    turned = method.attribute(task, tuple(t[order] for t in train), test).values
    assert (torch.as_tensor(turned) - whole[order]).abs().max() < 1e-9 * whole.abs().max()


@every
def test_a_product_is_lifted_through_the_adjoint(name: str) -> None:
    """H in the sketch is P H P^T: conjugate gradients and the dense factorisation agree."""
    task, train, test = world(n_train=9)
    part = attrs.evolve(CASES[name].part, dim=8)
    curvature = {"curvature": "ggn", "solver": {"name": "cholesky", "damping": 0.1}}
    dense = Method(projector=part, inverse_hessian=curvature).attribute(task, train, test)
    curvature = {
        "curvature": "ggn",
        "solver": {"name": "cg", "damping": 0.1, "tolerance": 1e-12, "maximum_iterations": 200},
    }
    steps = Method(projector=part, inverse_hessian=curvature).attribute(task, train, test)
    want = torch.as_tensor(dense.values)
    assert (torch.as_tensor(steps.values) - want).abs().max() < 1e-8 * want.abs().max()


@every
def test_scores_come_nearer_to_those_of_whole_rows_as_the_sketch_grows(name: str) -> None:
    task, train, test = world(n_train=40, n_test=10)
    want = Method().attribute(task, train, test).values
    agreement = []
    for dim in (4, 64, 1024):
        part = attrs.evolve(CASES[name].part, dim=dim)
        agree = [
            spearmanr(
                torch.as_tensor(
                    Method(projector=part, seed=seed).attribute(task, train, test).values
                ).flatten(),
                torch.as_tensor(want).flatten(),
            ).statistic
            for seed in range(3)
        ]
        agreement.append(sum(agree) / 3)
    assert agreement[0] < agreement[1] < agreement[2] + 1e-9
    assert agreement[2] > 0.98
