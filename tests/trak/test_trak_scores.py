"""TRAK equals its closed form: one checkpoint, several, a threshold, sketches; sign and unit."""

import attrs
import pytest
import torch
from oracles.toy_tasks import examples, mlp, states
from oracles.trak import features, published, sequence_margin
from torch import nn
from torch.func import functional_call

import dattri_core as dattri
from dattri_core import Task
from dattri_core.laws.worlds import language, network

N, M, DAMPING = 60, 7, 1e-2
TRAIN, TEST = examples(N), examples(M, seed=300)


def trak(**changes):
    changes = {"projector": "identity", "damping": DAMPING, **changes}
    return dattri.method("trak", **changes)


def member(model, train=TRAIN, test=TEST, ridge=N * DAMPING, columns=slice(None), **margin):
    """Return what the oracle takes of one checkpoint."""
    phi, rest = features(model, *train, **margin)
    return phi[:, columns], rest, features(model, *test, **margin)[0][:, columns], ridge


def test_one_checkpoint_is_the_closed_form_times_n():
    scores = trak().attribute(Task(mlp()), TRAIN, TEST)
    want = published([member(mlp())])
    assert (scores.values - N * want).abs().max() <= 1e-8
    assert want.abs().max() > 1e-3


def test_without_damping_it_is_the_equation_of_the_paper():
    """Through the first layer alone, whose margins leave no direction without curvature."""
    task = Task(mlp(), parameters="0.*")
    scores = trak(damping=0.0).attribute(task, TRAIN, TEST)
    want = published([member(mlp(), ridge=0.0, columns=slice(0, 25))])
    assert (scores.values - N * want).abs().max() <= 1e-8
    gram = features(mlp(), *TRAIN)[0][:, :25]
    assert torch.linalg.matrix_rank(gram) == 25


def test_the_unit_is_that_of_the_margin_which_falls_without_a_helpful_example():
    scores = trak().attribute(Task(mlp()), TRAIN, TEST)
    assert scores.provenance["target"] == {"name": "margin", "higher_is_better": True}
    assert scores.provenance["loss"] == "cross-entropy"
    want = published([member(mlp())])
    assert (scores.values / N - want).abs().max() <= 1e-10
    assert (scores.removal_effect() + want).abs().max() <= 1e-10


def test_a_convolution_with_norms():
    world = network()
    inputs, labels = (torch.cat([a, b]) for a, b in zip(world.train, world.test, strict=True))
    train, test = (inputs[:9], labels[:9]), (inputs[9:], labels[9:])
    scores = trak().attribute(world.task(), train, test)
    want = published([member(world.model(), train, test, 9 * DAMPING)])
    assert (scores.values - 9 * want).abs().max() <= 1e-8


@pytest.mark.parametrize("source", ["per-example", "functional"])
def test_a_language_model_sums_margins_over_tokens_and_averages_residuals(source):
    world = language()
    train, test = ((b["input_ids"], b["labels"]) for b in (world.train, world.test))
    scores = trak(source={"name": "margin", "source": source}).attribute(
        world.task(), world.train, world.test
    )
    want = published([member(world.model(), train, test, 9 * DAMPING, margin=sequence_margin)])
    assert (scores.values - 9 * want).abs().max() <= 1e-8
    padded = {k: nn.functional.pad(v, (0, 3), value=0) for k, v in world.train.items()}
    padded["labels"][:, 4:] = -100
    again = trak().attribute(world.task(), padded, world.test)
    assert (again.values - scores.values).abs().max() <= 1e-10


def test_dictionaries_of_a_text_classifier():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 4, dtype=torch.float64)
            self.head = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, input_ids, attention_mask):
            mask = attention_mask.unsqueeze(-1).double()
            seen = (torch.tanh(self.embedding(input_ids)) * mask).sum(1) / mask.sum(1)
            return {"logits": self.head(seen)}

    torch.manual_seed(3)
    model = Classifier()
    ids = torch.randint(11, (12, 5))
    mask = (torch.arange(5) < torch.randint(2, 6, (12, 1))).long()
    labels = torch.randint(3, (12,))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    scores = trak().attribute(Task(model), batch, batch)

    def value(weights, i):
        given = (ids[i : i + 1], mask[i : i + 1])
        p = functional_call(model, weights, given)["logits"][0].softmax(0)[labels[i]]
        return p.log() - (1 - p).log()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    grads = [torch.func.grad(value)(weights, i) for i in range(12)]
    phi = torch.stack([torch.cat([g.flatten() for g in one.values()]) for one in grads])
    rest = torch.stack([(-value(weights, i)).sigmoid() for i in range(12)])
    want = published([(phi, rest, phi, 12 * DAMPING)])
    assert (scores.values - 12 * want).abs().max() <= 1e-8


# --- several checkpoints ------------------------------------------------------------------------
def task_of(weights, **options):
    return Task(mlp(), checkpoints=weights, **options)


def test_several_checkpoints_are_two_means_multiplied_and_not_the_mean_of_products():
    weights = states(3)
    scores = trak().attribute(task_of(weights), TRAIN, TEST)
    members = [member(mlp(seed=50 * i)) for i in range(3)]
    want = N * published(members)
    assert (scores.values - want).abs().max() <= 1e-8
    mean_of_products = N * sum(published([one]) for one in members) / 3
    assert (want - mean_of_products).abs().max() > 0.05 * want.abs().max()


def test_a_soft_threshold_comes_last():
    weights = states(2)
    members = [member(mlp(seed=50 * i)) for i in range(2)]
    plain = published(members)
    threshold = float(plain.abs().median())
    scores = trak(threshold=N * threshold).attribute(task_of(weights), TRAIN, TEST)
    want = N * published(members, threshold)
    assert (scores.values - want).abs().max() <= 1e-8
    assert abs(float((scores.values == 0).double().mean()) - 0.5) < 0.01
    with pytest.raises(dattri.SpecError, match="threshold"):
        trak(threshold=-1.0)


def test_parts_of_checkpoints_add_up():
    task = task_of(states(3))
    whole = trak().attribute(task, TRAIN, TEST)
    parts = trak().attribute(task, TRAIN, TEST, by="checkpoint")
    assert len(parts) == 3
    total = sum(part.values for part in parts.values())
    assert (total - whole.values).abs().max() <= 1e-10


def test_self_influence_is_the_diagonal_over_several_checkpoints():
    task = task_of(states(2))
    fitted = trak().fit(task, TRAIN)
    want = fitted.attribute(TRAIN).values.diagonal()
    assert (fitted.self_influence() - want).abs().max() <= 1e-10


# --- sketches -----------------------------------------------------------------------------------
SKETCH = {"name": "rademacher", "dim": 20}


def sketch_of(task, position, seed=0):
    """Return the matrix of the sketch at a checkpoint ``[d, K]``, by sketching unit rows."""
    projector = trak(projector=SKETCH).projector
    space = task_space(task)
    stream = dattri.RandomStream(seed, "projector", position)
    units = torch.eye(space.dim, dtype=torch.float64)
    rows = dattri.Rows.from_flat(space, units, torch.arange(space.dim))
    return projector.build(space, stream=stream, device=torch.device("cpu")).map(rows).flat()


def task_space(task):
    source = trak().source
    return source.bind(task, task.checkpoints[0], tuple(x[:3] for x in TRAIN)).space


def by_space(model, batch):
    """Return features in the order of the space: a layer's weight and bias side by side."""
    phi, rest = features(model, *batch)
    shapes = [p.shape for p in model.parameters()]
    parts = phi.split([s.numel() for s in shapes], 1)
    layers = [
        torch.cat([w.reshape(len(phi), *shape), b.unsqueeze(2)], 2).flatten(1)
        for w, shape, b in zip(parts[::2], shapes[::2], parts[1::2], strict=True)
    ]
    return torch.cat(layers, 1), rest


def test_each_checkpoint_has_a_sketch_of_its_own_whatever_the_others_are():
    weights = states(3)
    task = task_of(weights)
    members = []
    for at in range(3):
        sketch = sketch_of(task, at)
        train, rest = by_space(mlp(seed=50 * at), TRAIN)
        test, _ = by_space(mlp(seed=50 * at), TEST)
        members.append((train @ sketch, rest, test @ sketch, N * DAMPING))
    for count in (1, 3):
        got = trak(projector=SKETCH).attribute(task_of(weights[:count]), TRAIN, TEST)
        assert (got.values - N * published(members[:count])).abs().max() <= 1e-8
    first, second = sketch_of(task, 0), sketch_of(task, 1)
    agreement = float((first * second).sum() / first.square().sum())
    assert abs(agreement) < 5 / first.numel() ** 0.5
    columns = torch.cat([sketch_of(task, at) for at in range(4)], 1).T
    assert len({tuple(column.tolist()) for column in columns}) == 80


def test_equal_weights_under_two_sketches_are_averaged():
    same = states(1) * 2
    twice = trak(projector=SKETCH).attribute(task_of(same), TRAIN, TEST)
    once = trak(projector=SKETCH).attribute(task_of(same[:1]), TRAIN, TEST)
    assert (twice.values - once.values).abs().max() > 0.1 * once.values.abs().max()
    other = trak(projector=SKETCH, seed=1).attribute(task_of(same), TRAIN, TEST)
    assert (twice.values - other.values).abs().max() > 0.1 * once.values.abs().max()


def test_a_wider_sketch_comes_nearer_to_no_sketch():
    exact = trak().attribute(Task(mlp()), TRAIN, TEST).values
    errors = [
        float(
            (
                trak(projector={**SKETCH, "dim": k}).attribute(Task(mlp()), TRAIN, TEST).values
                - exact
            ).norm()
            / exact.norm()
        )
        for k in (8, 64, 4096)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1


def test_a_factored_sketch_serves_too():
    scores = trak(projector={"name": "kronecker", "rank": 100}).attribute(Task(mlp()), TRAIN, TEST)
    assert (scores.values - N * published([member(mlp())])).abs().max() <= 1e-8


# --- parts that do not fit ------------------------------------------------------------------------
def test_a_weight_is_neither_missed_nor_dropped():
    with pytest.raises(dattri.SpecError, match="fold 'mean' would drop"):
        trak(fold="mean")
    with pytest.raises(dattri.SpecError, match="scorer 'dot' does not give"):
        trak(scorer="dot")
    with pytest.raises(dattri.SpecError, match=r"needs \['residual'\].*: margin"):
        trak(source="per-example")
    assert isinstance(trak().scorer, dattri.WeighingScorer)
    fold = trak().fold
    with pytest.raises(dattri.SpecError, match="the scorer gives no weight"):
        fold.update(None, dattri.Scored(torch.ones(2, 2)), dattri.Snapshot(0, 1, "c", None))


def test_the_method_is_its_spec_and_plain_data():
    method = trak(threshold=0.5)
    assert dattri.Method(**method.to_spec()) == method
    assert attrs.evolve(method, seed=3) != method
