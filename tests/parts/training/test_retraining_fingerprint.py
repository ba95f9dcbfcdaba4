"""The fingerprint of a retraining: another one for all that changes outcomes, and only for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import starts_of_models as starts
import torch
from attrs import evolve, frozen
from dattri_parts.training import ModelRetraining, Recipe
from dattri_parts.training.description import Description
from dattri_parts.training.fingerprint import start_of
from torch import nn
from training_toys import M, classes, network, numbers, retraining

import dattri_core as dattri

RECIPE = Recipe(2, 10, 0.1)
HERE = Path(__file__).parent
PRINTED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[2]))
from starts_of_models import PAIRS
from test_retraining_fingerprint import drawn, printed
from training_toys import network
made = {name: printed(lambda: make(one)) for name, (make, one, _) in PAIRS.items()}
print(json.dumps(made | {"network": printed(network), "drawn": printed(drawn)}))
"""


def printed(build, **options):
    return retraining(build, RECIPE, **options).fingerprint


def drawn():
    """Starts of all kinds; orthogonal ones have other last digits with other threads."""
    model = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 256), nn.Linear(256, 3))
    nn.init.normal_(model[0].weight)
    nn.init.orthogonal_(model[1].weight)
    nn.init.trunc_normal_(model[2].weight)
    model.register_buffer("phases", torch.randperm(40))
    return model


# --- what a model does ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", starts.PAIRS)
def test_what_a_model_holds_and_runs_is_in_the_fingerprint(name):
    make, one, other = starts.PAIRS[name]
    first, again, second = (printed(lambda v=v: make(v)) for v in (one, one, other))
    assert first == again
    assert first != second


def _class_of(body):
    space = {"nn": nn, "torch": torch, "__name__": __name__}
    exec(
        "class Net(nn.Module):\n"
        " def __init__(self):\n"
        "  super().__init__()\n"
        "  self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)\n"
        f" def forward(self, x):\n{body}",
        space,
    )
    return space["Net"]


def test_an_edited_forward_is_another_one_and_an_edited_comment_is_not():
    base = _class_of("  return self.b(torch.relu(self.a(x)))")
    assert printed(base) == printed(_class_of("\n  # why\n  return self.b(torch.relu(self.a(x)))"))
    others = [
        "  return self.b(torch.sin(self.a(x)))",
        "  return self.b(torch.relu(2 * self.a(x)))",
        "  return self.b(torch.relu(3 * self.a(x)))",
        "  return self.b(torch.relu(self.a(x)) + 0)",
        "  return self.b(torch.relu(self.a(x)) - 0)",
        "  return (lambda y: self.b(y))(torch.relu(self.a(x)))",
    ]
    assert len({printed(base), *(printed(_class_of(body)) for body in others)}) == 7


def test_running_code_does_not_change_it():
    model = starts.Held(starts.closed(2.0))
    before = Description().of(model)
    for _ in range(300):  # the interpreter rewrites code that is run often
        model(torch.zeros(1, 6))
    assert Description().of(model) == before


def test_how_a_model_is_built_is_no_part_of_it():
    def written_otherwise():
        layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)]
        return nn.Sequential(*layers)

    assert printed(written_otherwise) == printed(network)
    assert printed(lambda: network().eval()) == printed(network)


def test_addresses_and_modes_are_no_part_of_it():
    assert printed(lambda: torch.compile(network())) == printed(lambda: torch.compile(network()))
    assert printed(lambda: torch.compile(network())) != printed(network)

    def numbered(value):
        return lambda: starts.Held(_original_object_hash=value).train(value > 1)

    assert printed(numbered(1)) == printed(numbered(2))


# --- where a model starts -------------------------------------------------------------------------
def _loaded(change=0.0, at=0):
    state = nn.Linear(6, 8).state_dict()  # under no seed of the retraining

    def build(state=state):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        torch.manual_seed(9)
        weight = torch.randn(8, 6)
        weight.view(-1)[at] += change
        model[0].load_state_dict({"weight": weight, "bias": torch.zeros(8)})
        return model

    return build


def test_loaded_weights_count_to_the_last_bit():
    base = printed(_loaded())
    assert base == printed(_loaded())
    one_bit = float(torch.finfo(torch.float32).eps)
    for at in (0, 47):
        assert printed(_loaded(2 * one_bit, at)) != base


def _half_loaded(first):
    """Pretrained rows, and new rows that the seed draws."""
    model = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 3))
    with torch.no_grad():
        model[0].weight[:32] = first
    return model


def _near(offset):
    """Pretrained, and a little noise that the seed draws."""
    model = network()
    with torch.no_grad():
        model[0].weight += torch.full((8, 6), offset)
    return model


def _spread(gain):
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(gain)
    return model


def test_what_seeds_draw_counts_to_a_thousandth_and_the_rest_of_a_tensor_to_the_bit():
    assert printed(lambda: _half_loaded(0.5)) != printed(lambda: _half_loaded(0.5 + 2**-20))
    assert printed(lambda: _near(0.0)) != printed(lambda: _near(1.0))
    assert len({printed(lambda g=g: _spread(g)) for g in (1.0, 1.005, -1.0)}) == 3


@pytest.mark.parametrize("shape", [(), (3,), (32,), (5, 33), (200, 100)])
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_last_digits_of_what_seeds_draw_do_not_count(shape, draw):
    random = torch.Generator().manual_seed(0)
    one, other, noise = (draw(shape, generator=random) for _ in range(3))
    near = one * (1 + 1e-6 * (noise - 0.5))
    assert not torch.equal(one, near)
    assert start_of(one, other) == start_of(near, other)
    assert start_of(one, one) != start_of(near, near)
    assert start_of(one, other) != start_of(other, one)


@pytest.mark.parametrize("power", range(1, 24))
def test_starts_whose_spread_is_a_power_of_two_lie_on_no_border(power):
    """So are orthogonal ones; rounded to digits, half of them would be either."""
    signs = 1 - 2 * torch.randint(0, 2, (2, 4096), generator=torch.Generator().manual_seed(power))
    one, other = 2 ** (-power / 2) * signs.double()
    assert start_of(one * (1 - 1e-7), other) == start_of(one * (1 + 1e-7), other)


def test_special_numbers_and_kinds_of_tensors_are_told_apart():
    nan, inf = float("nan"), float("inf")
    given = [
        torch.tensor([nan, 1.0]),
        torch.tensor([inf, 1.0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([0, 1]),
        torch.tensor([0.0, 1.0], dtype=torch.bfloat16),
        torch.tensor([False, True]),
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([0.0, 1.0j]),
        torch.tensor([0.0, 1.0j]).conj(),
        torch.zeros(0),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
    ]
    alone = [json.dumps(start_of(t, t)) for t in given]
    assert len(set(alone)) == len(given)
    assert alone == [json.dumps(start_of(t.clone(), t.clone())) for t in given]
    zeros, draws = torch.zeros(40), torch.randn(40)
    assert start_of(zeros, draws)[-1] == [0]
    assert start_of(draws, None) == start_of(draws, torch.randn(3))


# --- elsewhere ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("threads", "vector"), [(1, "default"), (2, None)])
def test_other_processes_threads_and_processors_give_the_same(threads, vector):
    """Without vector instructions torch draws other last digits, as another processor does."""
    environment = {**os.environ, "PYTHONHASHSEED": str(threads)}
    if vector is not None:
        environment["ATEN_CPU_CAPABILITY"] = vector
    script = [sys.executable, "-c", PRINTED, str(HERE), str(threads)]
    out = subprocess.run(script, capture_output=True, text=True, check=True, env=environment)
    made = {name: printed(lambda m=m, o=o: m(o)) for name, (m, o, _) in starts.PAIRS.items()}
    here = made | {"network": printed(network), "drawn": printed(drawn)}
    assert json.loads(out.stdout.splitlines()[-1]) == here


# --- what is run beside the model -----------------------------------------------------------------
def _squares(weight):
    def forward(model, batch):
        return model(batch[0])

    def criterion(outputs, batch):
        return weight * (outputs - batch[1][:, None]).square().mean(1)

    return dattri.Loss(forward, criterion, "squares")


def _recipe(rate):
    @frozen
    class Own(Recipe):
        def rate(self, step, per_epoch):
            return self.learning_rate * rate

    return Own(2, 10, 0.1)


def _measuring(by):
    class Own(ModelRetraining):
        def measure(self, state):
            return {name: by * values for name, values in super().measure(state).items()}

    return Own


def _with_field(value):
    @frozen(eq=False)
    class Own(ModelRetraining):
        more: float = 0.0

    return evolve(_as(Own, retraining(network, RECIPE)), more=value)


def _as(kind, held):
    names = ("build", "recipe", "loss", "train_data", "test_data", "targets", "about")
    return kind(**{name: getattr(held, name) for name in names})


def test_losses_recipes_and_measures_of_ones_own_count_by_their_code():
    base = retraining(network, RECIPE)
    made = [
        base,
        *(retraining(network, RECIPE, data=numbers_of, loss=_squares(w)) for w in (1.0, 2.0)),
        *(retraining(network, _recipe(r)) for r in (0.5, 0.25)),
        *(_as(_measuring(by), base) for by in (2.0, 3.0)),
        *(_with_field(v) for v in (1.0, 2.0)),
    ]
    assert len({held.fingerprint for held in made}) == len(made)
    again = retraining(network, RECIPE, data=numbers_of, loss=_squares(1.0))
    assert again.fingerprint == made[1].fingerprint
    assert _as(_measuring(2.0), base).fingerprint == made[5].fingerprint
    shipped = retraining(network, RECIPE, loss=dattri.cross_entropy)
    assert shipped.fingerprint == base.fingerprint


def numbers_of(n=40, seed=0):
    return tuple(part.float() for part in numbers(n, seed))


@pytest.mark.parametrize(
    "change",
    [
        {"train_data": (classes()[0].double(), classes()[1])},
        {"train_data": (classes()[0], classes()[1].int())},
        {"train_data": tuple(part.flip(0) for part in classes())},
        {"train_data": [*classes()]},
        {"test_data": tuple(part.flip(0) for part in classes(M, seed=1))},
        {"recipe": Recipe(2, 10, 0.1, optimizer="adamw", betas=(0.9, 0.99))},
        {"recipe": Recipe(2, 10, 0.1, optimizer="adamw")},
        {"recipe": Recipe(2, 10, 0.1, momentum=0.9)},
        {"recipe": Recipe(2, 10, 0.1, warmup=1)},
        {"recipe": Recipe(2, 10, 0.1, schedule="constant")},
        {"recipe": Recipe(2, 11, 0.1)},
        {"recipe": Recipe(2, 10, 0.1, weight_decay=1e-9)},
        {"build": lambda: network(torch.float64)},
    ],
)
def test_types_orders_and_every_number_of_the_recipe_count(change):
    base = retraining(network, RECIPE)
    assert evolve(base, **change).fingerprint != base.fingerprint
    assert evolve(base, **change).fingerprint == evolve(base, **change).fingerprint


@pytest.mark.parametrize("changed", ["train_data", "test_data"])
def test_data_changed_in_place_are_refused_once_the_fingerprint_is_taken(changed):
    def start(held):
        plan = [dattri.Counterfactual([True] * 40)]
        return lambda: held.measure(next(iter(held.train(plan))))

    held = retraining(network, RECIPE)
    getattr(held, changed)[0].mul_(1.0)
    start(held)()  # no fingerprint was taken yet
    held.fingerprint
    start(held)()
    getattr(held, changed)[0][3, 2] += 1
    with pytest.raises(dattri.InputError, match="changed in place after the fingerprint"):
        start(held)()
    state = network().state_dict()
    with pytest.raises(dattri.InputError, match="make a new ModelRetraining"):
        held.measure(state)
    assert evolve(held).fingerprint != held.fingerprint
