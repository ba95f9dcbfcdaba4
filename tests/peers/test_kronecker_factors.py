"""The same K-FAC and EK-FAC as curvlinops, the same scores as kronfluence.

Set DATTRI_PEERS_PYTHON to a Python that has curvlinops-for-pytorch 3.0.1 and kronfluence 1.0.1.
"""

import numpy as np
import pytest
import torch
from kronecker_worlds import MODELS, N_TEST, N_TRAIN, save
from peer_runs import run_script

import dattri_core as dattri
from dattri_core import Rows, Task
from dattri_core.assemble import build_part
from dattri_core.lift import to_parameters
from dattri_core.problem import TrainProblem
from dattri_core.protocols import RandomStream
from dattri_core.stream import Examples

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1800)]
DAMPING = 1e-2


@pytest.fixture(scope="module")
def curvlinops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curvlinops")
    worlds = {name: save(folder, name) for name in MODELS}
    run_script(
        "curvlinops_dense.py", folder, packages={"curvlinops": "curvlinops-for-pytorch 3.0.1"}
    )
    return worlds, folder


@pytest.fixture(scope="module")
def kronfluence(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kronfluence")
    worlds = {name: save(folder, name) for name in MODELS}
    run_script(
        "kronfluence_scores.py", folder, DAMPING, packages={"kronfluence": "kronfluence 1.0.1"}
    )
    return worlds, folder


def dense(curvature, model, train):
    """Return the matrix of a curvature in the order of the model's parameters."""
    examples = Examples.of(train, "train")
    task = Task(model)
    source = build_part("source", "per-example")
    bound = source.bind(task, task.checkpoints[0], examples.sample(3))
    problem = TrainProblem(
        source=bound,
        examples=examples,
        maps=(),
        batch=50,
        random=RandomStream(0, "curvature"),
        memory=2**28,
    )
    matrix = build_part("curvature", curvature).fit(problem).dense()
    places = torch.arange(bound.space.dim).double().unsqueeze(0)
    found = to_parameters(Rows.from_flat(bound.space, places, torch.zeros(1)))
    order = torch.cat([found[name].flatten() for name, _ in model.named_parameters()]).long()
    return matrix[order[:, None], order]


@pytest.mark.parametrize("fisher", ["ggn", "empirical"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", MODELS)
def test_the_matrix_is_that_of_curvlinops(curvlinops, name, kind, fisher):
    worlds, folder = curvlinops
    model, train, _ = worlds[name]
    got = dense({"name": kind, "fisher": fisher}, model, train)
    want = torch.as_tensor(np.load(folder / f"{name}-{kind}-{fisher}.npy"))
    gap = float((got - want).abs().max() / want.abs().max())
    print(f"{name} {kind} {fisher}: {gap:.1e}")
    assert gap <= 1e-5


# Not K-FAC of the convolutions: its damping there is of the mean over positions, not over examples.
SCORES = [(name, kind) for name in MODELS for kind in ("ekfac", "diagonal")] + [("mlp", "kfac")]


@pytest.mark.parametrize(("name", "kind"), SCORES)
def test_the_scores_are_those_of_kronfluence(kronfluence, name, kind):
    worlds, folder = kronfluence
    model, train, test = worlds[name]
    got = dattri.attribute(
        Task(model), train, test, method=f"if-{kind}", fisher="empirical", damping=DAMPING
    ).values
    want = torch.as_tensor(np.load(folder / f"{name}-{kind}.npy"))
    assert got.shape == (N_TRAIN, N_TEST) == tuple(want.shape)
    correlation = float(torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1])
    gap = float((got - want).norm() / want.norm())
    print(f"{name} {kind}: Pearson {correlation:.7f}, relative difference {gap:.1e}")
    assert correlation >= 0.999
