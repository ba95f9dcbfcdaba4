"""TrackStar and its mixed second moment against dense float64 algebra."""

import pytest
import torch
from oracles.toy_tasks import cross_entropies, examples, flat_gradients, mlp, positions, world
from torch.utils.data import DataLoader, TensorDataset

import dattri_core as dattri
from dattri_core import SpecError, StoreError, Task
from dattri_core.shipped_losses import true_margin

N, M, R, DAMPING = 25, 6, 11, 1e-3
TRAIN, TEST, ASKED = examples(N), examples(M, seed=300), examples(R, seed=500)
PLAIN = {"projector": "identity", "damping": DAMPING}


def task_of(reference=ASKED, **options):
    return Task(mlp(), reference=reference, **options)


def trackstar(**changes):
    return dattri.method("trackstar", **{**PLAIN, **changes})


def space_of(task):
    return trackstar().source.bind(task, task.checkpoints[0], tuple(x[:3] for x in TRAIN)).space


def gradients(batch, target=None):
    """Return rows in the order of the space, ``[B, d]``, and the slices of its blocks."""
    model = mlp()
    values = cross_entropies(batch) if target is None else lambda m: -target(m, batch)
    rows = flat_gradients(model, values)
    space = space_of(Task(model))
    order = positions(model, space)
    cuts = [slice(space.offsets[s.name], space.offsets[s.name] + s.size) for s in space]
    return rows[:, order], cuts


def moment(rows):
    return rows.T @ rows / len(rows)


def closed_form(train, test, asked, weight, cuts):
    """Return the cosines after R^-1/2 of each block."""
    ahead, behind = [], []
    for cut in cuts:
        mixed = weight * moment(asked[:, cut]) + (1 - weight) * moment(train[:, cut])
        values, vectors = torch.linalg.eigh(mixed)
        root = vectors @ torch.diag((values.clamp_min(0) + DAMPING) ** -0.5) @ vectors.T
        ahead.append(train[:, cut] @ root)
        behind.append(test[:, cut] @ root)
    ahead, behind = torch.cat(ahead, 1), torch.cat(behind, 1)
    products = ahead @ behind.T
    return products / ahead.norm(dim=1)[:, None] / behind.norm(dim=1)[None]


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9, 1.0])
def test_layer_by_layer_it_is_the_closed_form(weight):
    scores = trackstar(weight=weight).attribute(task_of(), TRAIN, TEST)
    (train, cuts), (test, _), (asked, _) = map(gradients, (TRAIN, TEST, ASKED))
    want = closed_form(train, test, asked, weight, cuts)
    assert (scores.values - want).abs().max() <= 1e-9
    assert want.abs().max() > 0.1


@pytest.mark.parametrize("weight", [0.0, 0.9, 1.0])
def test_of_few_rows_it_is_the_closed_form(weight):
    train, asked = (tuple(x[:k] for x in batch) for batch, k in ((TRAIN, 2), (ASKED, 3)))
    task = task_of(asked)
    fitted = trackstar(weight=weight).fit(task, train)
    (rows, cuts), (test, _), (reference, _) = map(gradients, (train, TEST, asked))
    assert min(cut.stop - cut.start for cut in cuts) < 4 * 5 <= cuts[0].stop  # on either side
    want = closed_form(rows, test, reference, weight, cuts)
    assert (fitted.attribute(TEST).values - want).abs().max() <= 1e-9


def test_of_whole_rows_without_blocks():
    method = trackstar(block=False, solver={"name": "cholesky", "damping": DAMPING})
    scores = method.attribute(task_of(), TRAIN, TEST)
    (train, _), (test, _), (asked, _) = map(gradients, (TRAIN, TEST, ASKED))
    want = closed_form(train, test, asked, 0.9, [slice(None)])
    assert (scores.values - want).abs().max() <= 1e-9


def test_a_solver_that_wants_rows_of_one_weight_is_refused():
    with pytest.raises(SpecError, match="does not give"):
        trackstar(solver="woodbury")


def test_reference_rows_are_of_the_target():
    scores = trackstar().attribute(task_of(target="margin"), TRAIN, TEST)
    train, cuts = gradients(TRAIN)
    test, asked = (gradients(batch, true_margin)[0] for batch in (TEST, ASKED))
    want = closed_form(train, test, asked, 0.9, cuts)
    assert (scores.values - want).abs().max() <= 1e-9
    wrong = closed_form(train, test, gradients(ASKED)[0], 0.9, cuts)
    assert (want - wrong).abs().max() > 1e-3


def test_reference_rows_pass_the_sketch_that_comes_before():
    sketch = {"name": "kronecker", "rank": 3}
    method = trackstar(projector=sketch)
    task = task_of()
    scores = method.attribute(task, TRAIN, TEST)
    space = space_of(task)
    stream = dattri.RandomStream(0, "projector", 0)
    built = method.projector.build(space, stream=stream, device=torch.device("cpu"))

    def sketched(batch):
        rows, _ = gradients(batch)
        return built.map(dattri.Rows.from_flat(space, rows, torch.arange(len(rows)))).flat()

    after = built.out_space
    cuts = [slice(after.offsets[s.name], after.offsets[s.name] + s.size) for s in after]
    want = closed_form(*map(sketched, (TRAIN, TEST, ASKED)), 0.9, cuts)
    assert (scores.values - want).abs().max() <= 1e-9


def test_neither_order_nor_batches_of_the_reference_show():
    want = trackstar().attribute(task_of(), TRAIN, TEST).values
    turned = tuple(x.flip(0) for x in ASKED)
    loader = DataLoader(TensorDataset(*ASKED), batch_size=4)
    for reference in (turned, loader):
        got = trackstar().attribute(task_of(reference), TRAIN, TEST).values
        assert (got - want).abs().max() <= 1e-10
    other = trackstar().attribute(task_of(examples(R, seed=700)), TRAIN, TEST).values
    assert (other - want).abs().max() > 1e-2


def test_the_share_of_the_reference_does_not_grow_with_it():
    twice = tuple(torch.cat([x, x]) for x in ASKED)
    want = trackstar().attribute(task_of(), TRAIN, TEST).values
    got = trackstar().attribute(task_of(twice), TRAIN, TEST).values
    assert (got - want).abs().max() <= 1e-10


def test_a_task_without_reference_examples_is_refused():
    task, train, test = world()
    with pytest.raises(SpecError, match=r"the task has none; give Task\(..., reference=examples\)"):
        trackstar().attribute(task, train, test)
    with pytest.raises(dattri.InputError, match="reference data: got a int"):
        trackstar().attribute(task_of(3), TRAIN, TEST)
    with pytest.raises(SpecError, match="weight"):
        trackstar(weight=1.5)


def test_a_run_does_not_go_on_with_other_reference_examples(tmp_path):
    first = trackstar().attribute(task_of(), TRAIN, TEST)
    assert first.provenance["reference"] != first.provenance["test"]
    plain = dattri.method("grad-dot").attribute(Task(mlp()), TRAIN, TEST)
    assert plain.provenance["reference"] is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dattri_core.runner.ScoresWriter", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trackstar().attribute(task_of(), TRAIN, TEST, out=tmp_path / "scores")
    with pytest.raises(StoreError, match="another reference"):
        other = task_of(examples(R, seed=700))
        trackstar().attribute(other, TRAIN, TEST, out=tmp_path / "scores")
    again = trackstar().attribute(task_of(), TRAIN, TEST, out=tmp_path / "scores")
    assert torch.equal(torch.from_numpy(again.values.copy()), first.values)


def test_a_problem_with_reference_examples_answers_the_protocol():
    seen = []

    class Looking:
        needs = frozenset({"rows", "reference-rows"})
        exact = True

        def gives(self, space):
            return frozenset({"apply", "dense"})

        def fit(self, problem):
            seen.append(problem)
            return dattri.default_registry().make("curvature", "gauss-newton").fit(problem)

    inverse = {"curvature": Looking(), "solver": "cholesky"}
    dattri.Method(inverse_hessian=inverse).attribute(task_of(), TRAIN, TEST)
    (problem,) = seen
    assert isinstance(problem, dattri.ReferencedProblem)
    assert (problem.n_train, problem.reference.n_train) == (N, R)
    assert problem.reference.random != problem.random
    rows = torch.cat([part.flat() for part in problem.reference.rows()])
    assert (rows - gradients(ASKED)[0]).abs().max() <= 1e-12
