"""What surrounds a method, on an accelerator: stores, sweeps, groups, small memory, functions."""

import pytest
import torch
from dattri_influence import (
    hvp,
    ifvp_datainf,
    ifvp_explicit,
    ihvp_at_x_arnoldi,
    ihvp_at_x_cg,
    ihvp_at_x_explicit,
    ihvp_at_x_lissa,
)
from dattri_parts.training import ModelRetraining, Optimum, Recipe, random_subsets
from dattri_unroll import RunRetraining, read_run, record
from oracles.devices import ACCELERATORS
from oracles.toy_tasks import examples, mlp, normal, states
from torch import nn

import dattri_core as dattri
from dattri_core import Task

TRAIN, TEST = examples(14), examples(5, seed=300)
pytestmark = pytest.mark.parametrize("device", ACCELERATORS)
METHODS = {
    "tracin": {},
    "grad-cos": {},
    "logra": {"rank": 3, "damping": 1e-2},
    "if-woodbury": {"damping": 1e-2},
    "if-explicit": {"curvature": "ggn", "damping": 1e-2},
    "if-ekfac": {"damping": 1e-2},
    "if-arnoldi": {"curvature": "ggn", "damping": 1e-2},
    "trak": {"projector": {"name": "rademacher", "dim": 16}},
}
DAMPINGS = (1e-3, 1e-1)


def task(device):
    checkpoints = [
        dattri.Checkpoint(str(at), at, 2, 0.1, state) for at, state in enumerate(states(2))
    ]
    return Task(mlp().to(device), checkpoints=checkpoints)


def close(got, want):
    got, want = (torch.as_tensor(side).cpu() for side in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.fixture(params=METHODS)
def method(request):
    return dattri.method(request.param, **METHODS[request.param])


def test_a_fitted_method_and_its_store(device, method, tmp_path, request):
    near = method.fit(task("cpu"), TRAIN)
    stored = None if request.node.callspec.params["method"] == "if-ekfac" else tmp_path / "rows"
    far = method.fit(task(device), TRAIN, store=stored)  # its factors are not kept on disk
    for _ in range(2):  # computed, then read
        close(far.attribute(TEST).values, near.attribute(TEST).values)
    close(far.attribute(TEST, group=True).values, near.attribute(TEST, group=True).values)
    close(far.self_influence(), near.self_influence())
    want, got = (side.extremes(TEST, 3) for side in (near, far))
    assert (got.top.ids == want.top.ids).all()
    close(got.bottom.values, want.bottom.values)
    told, expected = (side.attribute(TEST, by="checkpoint") for side in (far, near))
    for name, scores in expected.items():
        close(told[name].values, scores.values)


def test_small_memory_and_scores_on_disk(device, method, tmp_path):
    many = tuple(side.repeat(60, *[1] * (side.dim() - 1)) for side in TRAIN)
    want = method.attribute(task("cpu"), many, TEST)
    got = method.attribute(task(device), many, TEST, memory=2**20, out=tmp_path / "scores")
    close(got.values, want.values)


@pytest.mark.parametrize("name", ["tracin", "grad-cos", "logra", "if-ekfac"])
def test_scores_of_blocks(device, name):
    method = dattri.method(name, **METHODS[name])
    told, expected = (
        method.fit(task(d), TRAIN).attribute(TEST, by="block") for d in (device, "cpu")
    )
    for block, scores in expected.items():
        close(told[block].values, scores.values)


@pytest.mark.parametrize("name", ["if-ekfac", "if-arnoldi", "if-woodbury", "logra"])
def test_sweeps(device, name):
    method = dattri.method(name, **METHODS[name])
    near, far = (method.fit(task(d), TRAIN).sweep(TEST, damping=DAMPINGS) for d in ("cpu", device))
    for damping in DAMPINGS:
        close(far[damping].values, near[damping].values)


@pytest.mark.parametrize(
    "at_x", [ihvp_at_x_explicit, ihvp_at_x_cg, ihvp_at_x_lissa, ihvp_at_x_arnoldi]
)
def test_inverse_products_of_functions(device, at_x):
    root = normal(6, 6, seed=4)
    found = []
    for place in ("cpu", device):
        matrix = (root @ root.T / 6 + torch.eye(6).double()).to(place)
        product = at_x(lambda x, m=matrix: x @ m @ x / 2, normal(6, seed=0).to(place), damping=0.1)
        vectors = normal(5, 6, seed=1).to(place)
        found.append([product(vectors), product.with_damping(0.5)(vectors)])
        found[-1].append(hvp(lambda x, m=matrix: x @ m @ x)((vectors[0],), vectors))
    for want, got in zip(*found, strict=True):
        assert got.device.type == torch.device(device).type
        close(got, want)


@pytest.mark.parametrize("make", [ifvp_explicit, ifvp_datainf])
def test_inverse_products_of_gradients(device, make):
    gradients, vectors = {"w": normal(8, 3, 2, seed=0)}, {"w": normal(4, 3, 2, seed=1)}
    moved = [{n: v.to(device) for n, v in side.items()} for side in (gradients, vectors)]
    got, want = make(moved[0], damping=0.2)(moved[1]), make(gradients, damping=0.2)(vectors)
    close(got["w"], want["w"])


@pytest.mark.parametrize("recipe", [Recipe(2, 4, 0.1, momentum=0.9), Optimum(1e-2)])
@pytest.mark.parametrize("together", [1, 3])
def test_training_again(device, recipe, together):
    def build():
        layers = [nn.Linear(4, 3, dtype=torch.float64)]
        return nn.Sequential(*layers)

    found = []
    for place in ("cpu", device):
        held = ModelRetraining(
            build,
            recipe,
            "cross-entropy",
            TRAIN,
            TEST,
            ("loss", "margin"),
            {},
            together=together,
            device=place,
        )
        measured = [held.measure(state) for state in held.train(random_subsets(14, 3))]
        found.append([torch.as_tensor(m[name]) for m in measured for name in sorted(m)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_steps_of_a_run(device, optimizer):
    found = []
    how = {"momentum": 0.9} if optimizer == "sgd" else {"optimizer": "adamw", "clip": 0.5}
    for place in ("cpu", device):
        held = ModelRetraining(
            lambda: nn.Linear(4, 3, dtype=torch.float64),
            Recipe(2, 4, 0.1, **how),
            "cross-entropy",
            TRAIN,
            TEST,
            ("loss",),
            device=place,
            recorded=True,  # which needs a device that can; steps themselves are run from Python
        )
        found.append(held.steps(random_subsets(14, 1)[0]))
    for want, got in zip(*found, strict=True):
        assert torch.equal(got.step.batch, want.step.batch)
        for name, tensor in want.source.items():
            assert got.source[name].device.type == "cpu"
            close(got.source[name], tensor)
        for name, moments in (want.optimiser.source if want.optimiser else {}).items():
            own = got.optimiser.source[name]
            assert own.first.device.type == own.second.device.type == "cpu"
            close(own.first, moments.first)
            close(own.second, moments.second)
    assert (found[1][-1].optimiser is not None) == (optimizer == "adamw")


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_recorded_run(device, tmp_path, kind):
    found = []
    for place in ("cpu", device):
        model = mlp().to(place)
        optimizer = (
            torch.optim.SGD(model.parameters(), lr=0.1)
            if kind == "sgd"
            else torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
        )
        folder = tmp_path / place
        with record(model, optimizer, folder, clip=0.5) as run:
            for start in (0, 7):
                index = torch.arange(start, start + 7)
                x, y = (side[index].to(place) for side in TRAIN)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                run.step(index)
                optimizer.step()
        here = Task(model, checkpoints=read_run(folder))
        scores = [dattri.attribute(here, TRAIN, TEST, method=m).values for m in ("dvemb", "magic")]
        again = RunRetraining(here, TRAIN, TEST, "loss")
        ends = again.train(random_subsets(len(TRAIN[1]), 2))
        losses = [torch.from_numpy(again.measure(end)["loss"]) for end in ends]
        found.append([*scores, *losses])
    for want, got in zip(*found, strict=True):
        close(got, want)
