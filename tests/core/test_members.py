"""Members: what the engine makes of a source that gives several networks of one checkpoint."""

import pytest
import torch
from attrs import evolve, field, frozen
from dattri_parts.sources.functional import Functional
from torch import nn

import dattri_core as dattri
from dattri_core.members import expand_checkpoints
from dattri_core.source_capabilities import EnsembleSource


@frozen
class Scaled:
    """Rows of a model whose inputs are multiplied by 1, 2, ...: one factor for each member."""

    members: int = 3
    provides = frozenset()
    bound: list = field(factory=list, eq=False)

    def bind(self, task, checkpoint, sample):
        self.bound.append((checkpoint.name, checkpoint.member))
        factor = checkpoint.member + 1

        def scale(module, args, output):
            return output * factor

        return Functional().bind(task, evolve(checkpoint, hooks={"0": scale}), sample)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), nn.Linear(3, 1)).double()


def task(count=2):
    states = [{k: v + i for k, v in model().state_dict().items()} for i in range(count)]
    loss = "squared-error"
    return dattri.Task(model(), loss, checkpoints=states, learning_rates=[0.5, 0.1][:count])


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, 1, generator=generator, dtype=torch.float64)


TRAIN, TEST = data(6, 1), data(2, 2)


def rows(task, batch, at, member):
    """Return the gradients of |y - w . (s x) - b|^2 in closed form, or of half of it."""
    weight, bias = (task.checkpoints[at].source[name] for name in ("1.weight", "1.bias"))
    x, y = batch
    scaled = x * (member + 1)
    residual = scaled @ weight.T + bias - y
    one = dattri.squared_error(
        nn.Flatten(), (torch.ones(1, 1).double(), torch.zeros(1, 1).double())
    )
    return 2 * one * residual * torch.cat([scaled, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def test_every_member_is_a_checkpoint_in_its_own_place():
    given = task().checkpoints
    found = expand_checkpoints(Scaled(), given)
    assert isinstance(Scaled(), EnsembleSource)
    assert [c.name for c in found] == [f"state {c}, member {m}" for c in (0, 1) for m in range(3)]
    assert [c.member for c in found] == [0, 1, 2, 0, 1, 2]
    assert [(c.position, c.count) for c in found] == [(at, 6) for at in range(6)]
    assert [c.learning_rate for c in found] == pytest.approx([0.5 / 3] * 3 + [0.1 / 3] * 3)
    assert [c.source for c in found] == [given[0].source] * 3 + [given[1].source] * 3
    assert expand_checkpoints(Functional(), given) == given


@pytest.mark.parametrize("fold", ["mean", "weighted"])
def test_scores_are_folded_over_members(fold):
    world = task()
    weights = {"mean": [1 / 6, 1 / 6], "weighted": [0.5 / 3, 0.1 / 3]}[fold]
    want = sum(
        weights[at] * rows(world, TRAIN, at, m) @ rows(world, TEST, at, m).T
        for at in (0, 1)
        for m in range(3)
    )
    method = dattri.Method(source=Scaled(), fold=fold)
    got = method.attribute(world, TRAIN, TEST, progress=False)
    torch.testing.assert_close(got.values, want)
    plan = method.attribute(world, TRAIN, TEST, dry_run=True)
    assert (plan.checkpoints, plan.train_passes) == (6, 6)


def test_a_run_on_disk_gives_the_same_bits(tmp_path):
    source = Scaled()
    method = dattri.Method(source=source)
    want = method.attribute(task(), TRAIN, TEST, progress=False).values
    got = method.attribute(task(), TRAIN, TEST, out=tmp_path / "scores", progress=False)
    torch.testing.assert_close(torch.tensor(got.values), want, rtol=0, atol=0)


def test_what_is_fitted_is_used_again_by_a_changed_method():
    source = Scaled(members=1)
    fitted = dattri.Method(source=source).fit(task(1), TRAIN, progress=False)
    assert source.bound == [("state 0, member 0", 0)]
    other = fitted.with_(scorer="cosine")
    other.attribute(TEST)
    assert source.bound == [("state 0, member 0", 0)]
    plain = fitted.with_(source="functional")
    assert [c.name for c in plain.checkpoints] == ["state 0"]
    want = dattri.method("grad-dot").attribute(task(1), TRAIN, TEST, progress=False)
    torch.testing.assert_close(plain.attribute(TEST).values, want.values)


def test_hooks_are_on_once_in_nested_sessions_and_gone_afterwards():
    world = task(1)
    doubled = evolve(world.checkpoints[0], hooks={"0": lambda m, a, out: 2 * out})
    evaluator = dattri.Evaluator(world, doubled, TRAIN)
    with evaluator.session(), evaluator.session():
        found = evaluator.call(lambda model: model[0](TRAIN[0]))
        with evaluator.session():
            pass
        again = evaluator.call(lambda model: model[0](TRAIN[0]))
    assert torch.equal(found, 2 * TRAIN[0])
    assert torch.equal(again, 2 * TRAIN[0])
    assert not any(m._forward_hooks for m in world.model.modules())
    with pytest.raises(ValueError, match="stop"), evaluator.session():
        raise ValueError("stop")
    assert not any(m._forward_hooks for m in world.model.modules())
