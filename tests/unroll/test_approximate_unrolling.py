"""`source`: against matrix exponentials written out, its two limits, and a differentiated run."""

import attrs
import pytest
import torch
from dattri_unroll import read_run
from dattri_unroll.segment_problem import SegmentProblem
from oracles.unrolled import Descent, differentiated
from recorded import LOSSES, N, linear, network, run_recorded

import dattri_core as dattri

RATES = [0.5, 0.3, 0.4, 0.2, 0.1]
EXACT = {"name": "ekfac", "fisher": "ggn"}


def states(model, count=5):
    """Return weights around those of the model."""
    made = []
    for at in range(count):
        generator = torch.Generator().manual_seed(at)
        made.append(
            {
                k: v + 0.3 * torch.randn(v.shape, generator=generator, dtype=v.dtype)
                for k, v in model.state_dict().items()
            }
        )
    return made


def flat(state):
    return torch.cat([value.flatten() for value in state.values()])


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def written_out(world, points, segments, times, decays, sizes=None):
    """Return the formula of the paper, times n, with H_l = E[g g^T], its diagonal blocks alone."""
    model, loss, train, test = world
    run = Descent(model, LOSSES[loss], train, [], [])
    eye = torch.eye(len(flat(points[0])), dtype=torch.float64)
    keep = torch.ones_like(eye)
    if sizes is not None:
        keep = torch.block_diag(*[torch.ones(s, s, dtype=torch.float64) for s in sizes])
    psi = run.gradients(flat(points[-1]), test)
    scores = torch.zeros(N, len(psi), dtype=torch.float64)
    for places, time, decay in reversed(list(zip(segments, times, decays, strict=True))):
        rows = [run.gradients(flat(points[at]), train) for at in places]
        curve = keep * sum(r.T @ r for r in rows) / (N * len(rows)) + decay * eye
        stay = torch.matrix_exp(-time * curve)
        gathered = psi @ torch.linalg.solve(curve, eye - stay)
        scores += sum(rows) / len(rows) @ gathered.T
        psi = psi @ stay
    return scores


@pytest.mark.parametrize(
    ("world", "sizes"), [(linear, None), (network, (20, 18))], ids=["linear", "network"]
)
def test_it_is_the_formula_with_matrix_exponentials(world, sizes):
    made = world()
    model, loss, train, test = made
    points = states(model)
    task = dattri.Task(model, loss, checkpoints=points, learning_rates=RATES)
    method = dattri.method(
        "source",
        curvature={"name": "gauss-newton", "block": sizes is not None},
        segments=2,
        iterations=20,
        weight_decay=0.05,
    )
    got = method.attribute(task, train, test, progress=False).values
    times = [4 * sum(RATES[:3]), 4 * sum(RATES[3:])]  # a checkpoint stands for 4 steps
    want = written_out(made, points, [(0, 1, 2), (3, 4)], times, [0.05, 0.05], sizes)
    close(got, want, 1e-9)
    other = attrs.evolve(method, segments=1).attribute(task, train, test, progress=False).values
    assert (other - want).abs().max() > 1e-3 * want.abs().max()


def test_a_recorded_run_knows_its_steps_and_weight_decay(tmp_path):
    made = network()
    run = run_recorded(made, tmp_path, decay=0.1)
    model, loss, train, test = made
    checkpoints = read_run(tmp_path)
    task = dattri.Task(model, loss, checkpoints=checkpoints)
    method = dattri.method("source", curvature={"name": "gauss-newton", "block": True}, segments=3)
    got = method.attribute(task, train, test, progress=False).values
    points = [{k: c.load(model)[k] for k in model.state_dict()} for c in checkpoints]
    times = [sum(run.rates[at : at + 3]) for at in (0, 3, 6)]
    want = written_out(made, points, [(0, 1, 2), (3, 4, 5), (6, 7, 8)], times, [0.1] * 3, (20, 18))
    close(got, want, 1e-9)


def test_a_long_run_is_the_influence_function_and_a_short_one_tracin():
    model, loss, train, test = linear()
    task = dattri.Task(model, loss, checkpoints=[model.state_dict()], learning_rates=[0.5])
    settings = {"curvature": "gauss-newton", "weight_decay": 0.2}
    long = dattri.method("source", iterations=10_000, **settings)
    want = dattri.attribute(
        task, train, test, "if-explicit", curvature="gauss-newton", damping=0.2, progress=False
    )
    close(long.attribute(task, train, test, progress=False).values, want.values, 1e-8)
    tiny = dattri.Task(model, loss, checkpoints=[model.state_dict()], learning_rates=[1e-9])
    short = dattri.method("source", iterations=1, **settings)
    tracin = dattri.attribute(tiny, train, test, "tracin", progress=False).values
    close(short.attribute(tiny, train, test, progress=False).values, tracin, 1e-7)


def test_directions_without_curvature_are_gone_through_in_a_straight_line():
    model, loss, train, test = linear()
    alike = tuple(t[:1].repeat(N, 1) for t in train)  # one direction has curvature, seven have none
    task = dattri.Task(model, loss, checkpoints=[model.state_dict()], learning_rates=[0.5])
    method = dattri.method("source", curvature="gauss-newton", iterations=8)
    got = method.attribute(task, alike, test, progress=False).values
    run = Descent(model, LOSSES[loss], alike, [], [])
    row = run.gradients(run.start(), alike)[0]
    size = row.square().sum()
    want = run.gradients(run.start(), test) @ row * (1 - torch.exp(-4 * size)) / size
    close(got, want.expand(N, -1), 1e-9)


def test_it_nears_the_derivative_of_the_whole_run_as_steps_grow_small(tmp_path):
    gaps = []
    for rate in (0.02, 0.002):
        made = linear()
        steps = 6
        everything = [list(range(N))] * steps
        folder = tmp_path / str(rate)
        run = run_recorded(made, folder, batches=everything, rates=[rate] * steps, decay=0.1)
        model, loss, train, test = made
        task = dattri.Task(model, loss, checkpoints=read_run(folder))
        method = dattri.method("source", curvature=EXACT, segments=steps)
        got = method.attribute(task, train, test, progress=False).removal_effect()
        want = differentiated(run, test)
        gaps.append(float((got - want).norm() / want.norm()))
    assert gaps[0] < 0.1
    assert 8 < gaps[0] / gaps[1] < 12  # to first order in the learning rate


@pytest.mark.parametrize("dampening", [0.0, 0.25])
def test_a_recorded_momentum_lengthens_the_steps(dampening, tmp_path):
    made = network()
    run_recorded(made, tmp_path, decay=0.1, momentum=0.5, dampening=dampening)
    model, loss, train, test = made
    checkpoints = read_run(tmp_path)
    method = dattri.method("source", segments=3)
    task = dattri.Task(model, loss, checkpoints=checkpoints)
    got = method.attribute(task, train, test, progress=False).values
    longer = [
        attrs.evolve(
            c,
            learning_rate=c.learning_rate * (1 - dampening) / 0.5,
            step=attrs.evolve(c.step, momentum=0.0, dampening=0.0),
        )
        for c in checkpoints
    ]
    plain = dattri.Task(model, loss, checkpoints=longer)
    close(got, method.attribute(plain, train, test, progress=False).values, 1e-12)


# --- invariance -----------------------------------------------------------------------------------
def test_memory_groups_and_disk_do_not_show(tmp_path, monkeypatch):
    import dattri_unroll.points as module

    model, loss, train, test = network()
    task = dattri.Task(model, loss, checkpoints=states(model), learning_rates=RATES)
    method = dattri.method("source", curvature=EXACT, segments=2, iterations=9)
    want = method.attribute(task, train, test, progress=False).values
    stored = method.attribute(task, train, test, out=tmp_path / "scores", progress=False)
    assert torch.equal(torch.from_numpy(stored.values.copy()), want)
    monkeypatch.setattr(module, "COPIES", 2**19 // 38 // 8 // 3)
    monkeypatch.setattr(module, "LARGEST_BATCH", 5)
    text = method.attribute(task, train, test, dry_run=True, memory=2**20)
    assert "2 passes backwards over 5 checkpoints, 60 train rows in each" in text
    few = method.attribute(task, train, test, progress=False, memory=2**20).values
    close(few, want, 1e-9)


def test_a_segment_is_the_examples_of_all_of_its_checkpoints():
    from dattri_core.laws.problems import curvature_worlds, problem_of

    first, second = (problem_of(curvature_worlds()[0], order) for order in (None, (3, 1, 2)))
    second = attrs.evolve(first, train_rows=first.train_rows.scale(2 * torch.ones(9)), seed=1)
    segment = SegmentProblem(first, 2, lambda at: [first, second][at])
    assert segment.n_train == 18
    rows = dattri.Rows.concatenate(list(segment.rows()))
    assert torch.equal(rows.index, torch.arange(18))
    assert torch.equal(rows.flat()[9:], 2 * rows.flat()[:9])
    some = dattri.Rows.concatenate(list(segment.rows(torch.tensor([10, 2, 17]))))
    assert some.index.tolist() == [2, 10, 17]  # checkpoint by checkpoint
    assert torch.equal(some.flat(), rows.flat()[[2, 10, 17]])
    seen = {}
    segment.stream(lambda name, block, index: seen.setdefault(name, []).extend(index.tolist()))
    assert all(positions == list(range(18)) for positions in seen.values())
    matrices = {"hessian": 3 * first.matrices["hessian"], "ggn": first.matrices["ggn"]}
    segment = SegmentProblem(first, 2, lambda at: attrs.evolve(first, matrices=matrices))
    vectors = first.train_rows
    close(
        segment.product(vectors, "hessian").flat(),
        2 * first.product(vectors, "hessian").flat(),
        1e-12,
    )


# --- what is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"iterations": 5}, "has no learning rate; give Task"),
        ({"learning_rates": RATES}, {}, "not known how many steps the run took; give iterations="),
        ({"learning_rates": RATES}, {"segments": 6, "iterations": 9}, "6 segments need as many"),
        (
            {"learning_rates": RATES},
            {"curvature": "hessian", "iterations": 9},
            r"needs 'spectral' of its curvature, and Hessian gives",
        ),
        ({"learning_rates": RATES}, {"segments": 0}, "segments"),
    ],
)
def test_what_is_not_known_is_asked_for(options, changes, message):
    model, loss, train, test = network()
    task = dattri.Task(model, loss, checkpoints=states(model), **options)
    with pytest.raises(dattri.SpecError, match=message):
        dattri.attribute(task, train, test, method="source", progress=False, **changes)
