"""Tuning: the damping that is best on subsets that no reported number uses."""

import json

import numpy as np
import pytest
import toy_bench
from dattri_bench.tuning import CHOOSING, dampings_of, try_dampings
from toy_bench import CALLS, Agreement, ToySetting, ToyStore

import dattri_core as dattri
from dattri_core.cli import main
from dattri_core.registry import using

TUNE = '--tune=damping=1e-4,0.03,10,{"relative":0.1}'


@pytest.fixture(scope="module", autouse=True)
def registry():
    with using(toy_bench.registry()) as made:
        yield made


@pytest.fixture(scope="module")
def tuned(registry, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    CALLS.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dattri_bench.command.draw", lambda rows, title, path: [])
        assert main(words(out)) == 0
        first = list(CALLS)
        CALLS.clear()
        assert main(words(out)) == 0
        assert CALLS == []
    return out, json.loads((out / "results.json").read_text()), first


def words(out):
    return [
        "bench", "toy", "--size=small", "--methods", "if-ekfac", "grad-dot", "if-ekfac:damping=0.5",
        "--metrics", "agreement", "flips", "--subsets=9", TUNE,
        "--out", str(out), "--retrained", str(out / "retrained"),
    ]  # fmt: skip


def test_the_chosen_damping_is_the_best_on_the_subsets_for_choosing(tuned):
    out, found, _ = tuned
    world = ToySetting().load((24, 8), seed=0, wrong=0.0)
    store = ToyStore(out / "retrained", world.retraining)

    def value(damping, seed, subsets):
        scores = dattri.attribute(world.task, world.train, world.test, "if-ekfac", damping=damping)
        values = np.asarray(scores.values, np.float64)
        evidence = dattri.Evidence(values, None, world, store, None, seed)
        return Agreement(subsets).measure(evidence).value

    dampings = [1e-4, 0.03, 10, {"relative": 0.1}]
    want = [value(damping, CHOOSING, 4) for damping in dampings]
    (cell,) = [c for c in found["cells"] if is_cell(c, "if-ekfac", "agreement")]
    tried = cell["tuning"]["tried"]
    assert [one["damping"] for one in tried] == dampings
    assert np.allclose([one["value"] for one in tried], want, atol=1e-5)
    best = dampings[int(np.argmax(want))]
    assert cell["tuning"]["chosen"] == best
    assert len({round(v, 6) for v in want}) == 4  # there was something to choose
    assert np.isclose(cell["result"]["value"], value(best, 0, 5), atol=1e-6)


def is_cell(cell, method, metric):
    own = cell["cell"]
    names = own["method"]["name"], own["metric"]["name"]
    return names == (method, metric) and own["tuning"] is not None


def test_every_row_is_reported_on_the_other_half(tuned):
    _, found, calls = tuned
    specs = [c["cell"]["metric"]["spec"] for c in found["cells"]]
    assert [s for s in specs if s != "flips"] == 3 * [{"name": "agreement", "subsets": 5}]
    assert calls.count("train") == 2 + 4 + 5
    (note,) = [note for note in found["notes"] if note.startswith("Damping of each method")]
    assert "on 4 train subsets drawn for choosing alone; reported on 5 others" in note


def test_the_choice_holds_for_metrics_of_the_other_world(tuned):
    _, found, _ = tuned
    (clean,) = [c for c in found["cells"] if is_cell(c, "if-ekfac", "agreement")]
    (other,) = [c for c in found["cells"] if is_cell(c, "if-ekfac", "flips")]
    assert other["tuning"] == clean["tuning"]
    rows = {(row["method"], row["metric"]): row for row in found["rows"]}
    assert any(note.startswith("seed 0: damping") for note in rows["if-ekfac", "flips"]["notes"])


def test_what_has_no_open_damping_is_not_tuned(tuned):
    _, found, _ = tuned
    untuned = [c for c in found["cells"] if c["cell"]["tuning"] is None]
    assert {c["cell"]["method"]["name"] for c in untuned} == {"grad-dot", "if-ekfac"}
    assert all(c["tuning"] is None for c in untuned)
    assert len(untuned) == 4


def test_a_damping_that_fails_leaves_the_others():
    world = ToySetting().load((24, 8))
    made = dattri.method("if-ekfac")

    def measure(scores):
        if np.abs(scores).max() > 20:  # of a small damping
            raise dattri.NumericsError("too large")
        return toy_bench.result(-float(np.abs(scores).max()))

    # the first is refused by the solver, and with it the pass for all; the second by the metric
    found = try_dampings(made, world.task, world, [1e-12, 1e-4, 1.0, 0.1], measure)
    assert found["chosen"] == 1.0
    assert "singular" in found["tried"][0]["error"]
    assert found["tried"][1] == {"damping": 1e-4, "error": "NumericsError: too large"}
    assert set(found["tried"][2]) == {"damping", "value", "low", "high"}
    with pytest.raises(dattri.NumericsError, match=r"none of the dampings \[1e-12\]"):
        try_dampings(made, world.task, world, [1e-12], measure)


def test_where_one_pass_for_all_fails_each_is_tried_alone(monkeypatch):
    world = ToySetting().load((24, 8))
    made = dattri.method("if-ekfac")

    def measure(scores):
        return toy_bench.result(float(np.abs(scores).sum()), higher=False)

    at_once = try_dampings(made, world.task, world, [0.1, 1.0], measure)

    def fails(self, test, *, damping):
        raise dattri.NumericsError("one of them")

    monkeypatch.setattr("dattri_core.fitted.FittedMethod.sweep", fails)
    alone = try_dampings(made, world.task, world, [0.1, 1.0], measure)
    assert at_once["chosen"] == alone["chosen"] == 1.0  # the least, where lower is better
    for one, other in zip(at_once["tried"], alone["tried"], strict=True):
        assert np.isclose(one["value"], other["value"])


def test_dampings_are_read_as_they_are_spelled():
    assert dampings_of("damping=1e-3,1,1e-3") == (1e-3, 1)
    assert dampings_of('damping={"relative":0.1},2') == ({"relative": 0.1}, 2)
