"""The source dropout-ensemble against the same networks with their masks written out."""

import math

import pytest
import torch
from dattri_parts.sources.dropout_ensemble import DropoutEnsemble
from dattri_parts.sources.functional import Functional
from dattri_parts.sources.masks import keep_mask
from torch import nn

import dattri_core as dattri
from dattri_core.laws import check
from dattri_core.laws.oracles import hessian, row_matrix
from dattri_core.laws.worlds import seeded

SEED, RATES = 7, {"channels": 0.3, "features": 0.5}
WIDTHS = {"channels": 3, "features": 6}
INNER = ["per-example", "functional"]
CHECKPOINTS = 2


class Net(nn.Module):
    """A small convolutional network with two places where something is dropped."""

    def __init__(self, channels, features):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1)
        self.channels = channels
        self.hidden = nn.Linear(12, 6)
        self.features = features
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.channels(torch.tanh(self.conv(x)))
        hidden = self.features(torch.tanh(self.hidden(hidden.flatten(1))))
        return self.head(hidden)


class Times(nn.Module):
    """Multiplies by numbers that are written out."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers

    def forward(self, x):
        return x * self.numbers


def dropping():
    return seeded(lambda: Net(nn.Dropout1d(RATES["channels"]), nn.Dropout(RATES["features"])))


def mask_of(path, member, seed=SEED):
    key = dattri.RandomStream(seed, "dropout").key(member, path)
    return keep_mask(key, WIDTHS[path], RATES[path])


def thinned(member):
    """Return the network of a member with its masks written out: no dropout, no hook."""
    masks = Times(mask_of("channels", member)[:, None]), Times(mask_of("features", member))
    return seeded(lambda: Net(*masks))


def states():
    """Return the weights of two checkpoints."""
    first = dropping().state_dict()
    return [first, {name: 0.7 * value + 0.05 for name, value in first.items()}]


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


TRAIN, TEST = data(11, 1), data(4, 2)


def ensemble(inner="per-example", members=3, **fields):
    return {"name": "dropout-ensemble", "source": inner, "members": members, "seed": SEED, **fields}


def attribute(name, source, model=None, checkpoints=None, **overrides):
    rates = None if checkpoints is None else [0.5, 0.25][: len(checkpoints)]
    task = dattri.Task(model or dropping(), checkpoints=checkpoints, learning_rates=rates)
    settings = {k: overrides.pop(k) for k in ("by", "memory") if k in overrides}
    method = dattri.method(name, source=source, **overrides)
    return method.attribute(task, TRAIN, TEST, progress=False, **settings)


def close(got, want):
    values = got.values if isinstance(got, dattri.Scores) else got
    torch.testing.assert_close(values, want, rtol=1e-9, atol=1e-12)


def test_the_masks_drop_something_and_differ():
    masks = [mask_of(path, member) for path in WIDTHS for member in range(3)]
    assert all(0 < int((mask == 0).sum()) < len(mask) for mask in masks[3:])
    assert len({tuple(mask.tolist()) for mask in masks[3:]}) == 3


@pytest.mark.parametrize("inner", INNER)
def test_grad_dot_is_the_mean_over_thinned_networks(inner):
    want = torch.zeros(11, 4, dtype=torch.float64)
    for member in range(3):
        task = dattri.Task(thinned(member))
        space = Functional().bind(task, task.checkpoints[0], TRAIN).space
        want += row_matrix(task, space, TRAIN) @ row_matrix(task, space, TEST).T / 3
    close(attribute("grad-dot", ensemble(inner)), want)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    ("name", "options"), [("if-explicit", {}), ("if-cg", {"tolerance": 1e-13})]
)
def test_hessians_are_those_of_the_thinned_networks(inner, name, options):
    want = torch.zeros(11, 4, dtype=torch.float64)
    for member in range(2):
        task = dattri.Task(thinned(member))
        space = Functional().bind(task, task.checkpoints[0], TRAIN).space
        h = hessian(task, space, TRAIN) + 15.0 * torch.eye(space.dim, dtype=torch.float64)
        rows = row_matrix(task, space, TRAIN), row_matrix(task, space, TEST)
        want += rows[0] @ torch.linalg.solve(h, rows[1].T) / 2
    options = {"curvature": "hessian", "damping": 15.0, **options}
    close(attribute(name, ensemble(inner, 2), **options), want)


@pytest.mark.parametrize("inner", INNER)
def test_ekfac_is_fitted_to_each_thinned_network(inner):
    if inner == "functional":
        with pytest.raises(dattri.SpecError, match="factors"):
            attribute("if-ekfac", ensemble(inner), fisher="ggn", uncovered="error")
        return
    options = {"fisher": "ggn", "damping": 1e-2}
    alone = [attribute("if-ekfac", inner, thinned(m), **options).values for m in range(3)]
    close(attribute("if-ekfac", ensemble(inner), **options), torch.stack(alone).mean(0))
    assert not torch.allclose(alone[0], alone[1], rtol=0.1)


def test_every_checkpoint_counts_as_its_members():
    source = ensemble()
    parts = attribute("grad-dot", source, checkpoints=states(), by="checkpoint")
    assert list(parts) == [f"state {c}, member {m}" for c in range(CHECKPOINTS) for m in range(3)]
    for (c, m), part in zip(
        [(c, m) for c in range(CHECKPOINTS) for m in range(3)], parts.values(), strict=True
    ):
        alone = attribute("grad-dot", "per-example", thinned(m), checkpoints=[states()[c]])
        close(part, alone.values / 6)
    whole = attribute("grad-dot", source, checkpoints=states())
    close(whole, torch.stack([part.values for part in parts.values()]).sum(0))
    assert whole.provenance["checkpoints"] == list(parts)
    assert len(set(whole.provenance["weights"])) == CHECKPOINTS
    assert whole.provenance["weights"][0] == whole.provenance["weights"][2]


def test_members_share_a_learning_rate():
    source, want = ensemble(), torch.zeros(11, 4, dtype=torch.float64)
    for member in range(3):
        want += attribute("tracin", "per-example", thinned(member), checkpoints=states()).values / 3
    close(attribute("tracin", source, checkpoints=states()), want)


def test_self_influence_is_the_mean_over_members():
    task = dattri.Task(dropping())
    got = dattri.method("grad-dot", source=ensemble()).fit(task, TRAIN).self_influence()
    want = torch.zeros(11, dtype=torch.float64)
    for member in range(3):
        alone = dattri.Task(thinned(member))
        want += dattri.method("grad-dot").fit(alone, TRAIN).self_influence() / 3
    close(got, want)


def test_a_rate_of_zero_is_the_plain_source():
    plain = attribute("if-explicit", "per-example", damping=15.0)
    none = attribute("if-explicit", ensemble(members=1, rate=0.0), damping=15.0)
    assert torch.equal(none.values, plain.values)
    some = attribute("if-explicit", ensemble(members=1), damping=15.0)
    assert not torch.allclose(some.values, plain.values, rtol=0.1)


def test_the_rate_takes_the_place_of_each_p():
    path = "features"
    for rate in (0.2, 0.8):
        key = dattri.RandomStream(SEED, "dropout").key(0, path)
        numbers = keep_mask(key, 6, rate)
        model = seeded(lambda numbers=numbers: Net(nn.Identity(), Times(numbers)))
        got = attribute("grad-dot", ensemble(members=1, rate=rate, modules=[path]))
        close(got, attribute("grad-dot", "per-example", model).values)


def test_modules_are_chosen_by_pattern():
    mask = Times(mask_of("features", 0))
    want = attribute("grad-dot", "per-example", seeded(lambda: Net(nn.Identity(), mask))).values
    for modules in (["features"], ["feat*"], ["!channels"]):
        close(attribute("grad-dot", ensemble(members=1, modules=modules)), want)


@pytest.mark.parametrize("inner", INNER)
def test_outputs_of_any_module_are_masked_as_by_a_dropout_module_behind_it(inner):
    plain = seeded(lambda: Net(nn.Identity(), nn.Identity()))
    source = ensemble(inner, outputs=["feat*"], rate=RATES["features"])
    parts = []
    for member in range(3):
        mask = Times(mask_of("features", member))
        network = seeded(lambda mask=mask: Net(nn.Identity(), mask))
        parts.append(attribute("grad-dot", inner, network).values)
    close(attribute("grad-dot", source, plain), torch.stack(parts).mean(0))


def test_outputs_of_four_axes_are_masked_by_channels():
    def network(*behind):
        return seeded(
            lambda: nn.Sequential(
                nn.Unflatten(1, (2, 1)), nn.Conv2d(2, 5, 1), *behind, nn.Flatten(), nn.Linear(20, 3)
            )
        )

    key = dattri.RandomStream(SEED, "dropout").key(0, "1")
    mask = Times(keep_mask(key, 5, 0.5)[:, None, None])
    assert 0 < int((mask.numbers == 0).sum()) < 5
    source = ensemble(members=1, outputs=["1"], rate=0.5)
    expected = attribute("grad-dot", "per-example", network(mask)).values
    close(attribute("grad-dot", source, network(nn.Identity())), expected)


def test_two_runs_give_the_same_bits_and_another_seed_other_scores():
    torch.manual_seed(1)
    first = attribute("if-ekfac", ensemble())
    torch.manual_seed(2)
    assert torch.equal(attribute("if-ekfac", ensemble()).values, first.values)
    other = attribute("if-ekfac", ensemble() | {"seed": SEED + 1}).values
    assert not torch.allclose(other, first.values, rtol=0.1)


def test_the_order_and_the_company_of_examples_do_not_matter():
    method = dattri.method("grad-dot", source=ensemble())
    task, order = dattri.Task(dropping()), torch.randperm(11)
    whole = method.attribute(task, TRAIN, TEST, progress=False).values
    mixed = dattri.take(TRAIN, order)
    close(method.attribute(task, mixed, TEST, progress=False), whole[order])
    alone = [
        method.attribute(task, dattri.take(TRAIN, torch.tensor([i])), TEST, progress=False).values
        for i in range(3)
    ]
    close(torch.cat(alone), whole[:3])


def test_a_functional_loss_sees_the_masks():
    model = dropping()

    @dattri.functional
    def loss(parameters, batch):
        outputs = torch.func.functional_call(model, parameters, (batch[0],))
        return nn.functional.cross_entropy(outputs, batch[1], reduction="sum")

    task = dattri.Task(model, loss)
    method = dattri.method("grad-dot", source=ensemble("functional"))
    got = method.attribute(task, TRAIN, TEST, progress=False)
    close(got, attribute("grad-dot", ensemble()).values)


def test_the_model_is_as_before_also_after_an_error():
    model = dropping().train()
    calls = []
    model.features.register_forward_hook(lambda m, a, out: calls.append(out))

    def loss(model, batch):
        values = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        if len(calls) > 35:
            raise RuntimeError("enough")
        return values

    with pytest.raises(dattri.InputError, match="enough"):
        dattri.method("grad-dot", source=ensemble(members=40)).attribute(
            dattri.Task(model, loss), TRAIN, TEST, progress=False
        )
    assert [len(m._forward_hooks) for m in model.modules()] == [0, 0, 0, 0, 1, 0]
    assert all(module.training for module in model.modules())
    dropped = (calls[0] == 0).all(0)
    assert torch.equal(dropped, mask_of("features", 0) == 0)  # the user's hook comes after


class Sequence(nn.Module):
    """Dropout on [B, T, D] and on [T, B, D]: features are the last axis of both."""

    def __init__(self, drop):
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.drop = drop
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head(self.drop(self.embedding(tokens).transpose(0, 1)).mean(0))


@pytest.mark.parametrize("inner", INNER)
def test_positions_share_a_mask(inner):
    tokens = torch.randint(5, (7, 4), generator=torch.Generator().manual_seed(3))
    batch = tokens, torch.arange(7) % 3
    key = dattri.RandomStream(SEED, "dropout").key(0, "drop")
    method = dattri.method("grad-dot", source=ensemble(inner, 1))
    task = dattri.Task(seeded(lambda: Sequence(nn.Dropout(0.5))))
    got = method.attribute(task, batch, batch, progress=False)
    written = dattri.Task(seeded(lambda: Sequence(Times(keep_mask(key, 6, 0.5)))))
    close(got, dattri.method("grad-dot").attribute(written, batch, batch, progress=False).values)


def test_masks_have_mean_one_and_are_independent():
    rate, length, keys = 0.3, 50, 4000
    masks = torch.stack([keep_mask(key, length, rate) for key in range(keys)])
    assert set(masks.unique().tolist()) == {0.0, 1 / (1 - rate)}
    deviation = math.sqrt(rate / (1 - rate) / keys)
    assert float((masks.mean(0) - 1).abs().max()) < 5 * deviation
    correlation = torch.corrcoef(masks.T) - torch.eye(length, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(keys)


def test_a_mask_is_the_beginning_of_a_longer_one():
    long = keep_mask(11, 4099, 0.5)
    for length in (1, 3, 4, 5, 1000):
        assert torch.equal(keep_mask(11, length, 0.5), long[:length])
    assert keep_mask(11, 4, 1.0).tolist() == [0.0] * 4
    assert keep_mask(11, 4, 0.0).tolist() == [1.0] * 4
    # Frozen: other masks under the same seed would be other scores under the same name.
    assert (long[:8] > 0).int().tolist() == [1, 0, 0, 1, 1, 0, 1, 0]


def test_the_laws_hold_with_another_inner_source():
    report = check("source", DropoutEnsemble(source=Functional(), members=2))
    assert report.ok, str(report)


class Functionally(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(nn.functional.dropout(x[:, :, 0], 0.5, self.training))


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (Functionally, {}, r"Functionally has no dropout module .*F.dropout"),
        (dropping, {"modules": ["nothing"]}, r"'nothing' matches none .* 'features'"),
        (dropping, {"modules": ["!*"]}, "leaves none"),
        (dropping, {"outputs": ["x*"], "rate": 0.1}, r"'x\*' matches none of the modules .*'head'"),
        (lambda: Net(nn.Dropout1d(0), nn.Dropout(0.0)), {}, "p = 0 and drop nothing"),
        (
            lambda: Net(nn.Dropout1d(), nn.AlphaDropout()),
            {},
            r"AlphaDropout at 'features' is no product .* modules=\['!features'\]",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(model, fields, message):
    with pytest.raises(dattri.SpecError, match=message):
        attribute("grad-dot", ensemble(**fields), model().double())


def test_an_output_without_features_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 1), nn.Flatten(0), nn.Dropout()).double()
    task = dattri.Task(model, lambda m, batch: m(batch[0]) ** 2)
    method = dattri.method("grad-dot", source="dropout-ensemble")
    with pytest.raises(dattri.InputError, match=r"'3' gives an output of shape \(3,\)"):
        method.attribute(task, TRAIN, TEST, progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 1.0}, "rate is 1.0"),
        ({"members": 0}, "members"),
        ({"modules": []}, "modules is empty"),
        ({"outputs": ["head"]}, r"give rate= above 0"),
        ({"source": "dropout-ensemble"}, "ensemble itself"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, message):
    with pytest.raises(dattri.SpecError, match=message):
        dattri.method("grad-dot", source={"name": "dropout-ensemble", **fields})
