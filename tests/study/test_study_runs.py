"""Studies end to end in a world of milliseconds: numbers, what is shared, what is kept."""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from dattri_bench import studies
from dattri_bench.records import Records
from dattri_bench.studies import dry_run, run_study
from dattri_bench.studies.sharing import Shared, fit_of, front_of
from toy_bench import CALLS, Agreement, Flips, ToySetting, ToyStore, registry
from toy_study import CHOLESKY, DATAINF, SKETCH, SPECTRAL, study

import dattri_core as dattri
from dattri_core import InputError, SpecError
from dattri_core.cli import main
from dattri_core.registry import Registry, using

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def toy():
    # each collection of rubbish takes longer than all else here
    with using(registry()) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr("dattri_parts.measuring.peak.gc", SimpleNamespace(collect=lambda: 0))
        yield made


def run(made, out, **settings):
    """Run a study and return (results, what was done)."""
    CALLS.clear()
    settings = {"retrained": out / "retrained", "say": lambda line: None, **settings}
    return run_study(made, out, **settings), list(CALLS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder and results of the study, run once."""
    out = tmp_path_factory.mktemp("whole")
    return out, *run(study(), out)


def numbers(results):
    return {(r.label, r.metric, r.seed): r.value for r in results.rows if r.status == "done"}


# --- the numbers ----------------------------------------------------------------------------------
def by_hand(point, metric, seed, folder):
    """Return what a metric gives for a fresh method in a fresh world."""
    made = dattri.method(point.base, **point.changes, seed=seed)  # that of the world
    if point.levels["inverse_hessian"] != "none":
        made = dattri.method(point.base, **point.changes, seed=seed, damping=0.03)  # the setting's
    world = ToySetting().load((24, 8), seed=seed, wrong=0.1 if metric == "flips" else 0.0)
    scores = np.asarray(
        dattri.attribute(world.task, world.train, world.test, made).values, np.float64
    )
    outcomes = ToyStore(folder, world.retraining)
    evidence = dattri.Evidence(scores, None, world, outcomes, None, seed)
    return {"agreement": Agreement(), "flips": Flips()}[metric].measure(evidence).value


def test_a_study_gives_what_fresh_methods_give_by_hand(whole, tmp_path):
    _, results, _ = whole
    assert {r.status for r in results.rows} == {"done", "invalid"}
    points = {point.label: point for point in results.study.points()}
    for (label, metric, seed), value in numbers(results).items():
        assert value == pytest.approx(by_hand(points[label], metric, seed, tmp_path), abs=1e-5)
    assert len({round(v, 6) for v in numbers(results).values()}) > 15


def test_one_point_alone_gives_the_same_to_the_last_bit(whole, tmp_path):
    _, results, _ = whole
    levels = {"projector": {"sketch": SKETCH}, "inverse_hessian": {"datainf": DATAINF}}
    alone, _ = run(study(factors={**levels, "scorer": ["cosine"]}), tmp_path)
    found = numbers(results)
    assert numbers(alone)
    assert all(found[key] == value for key, value in numbers(alone).items())


# --- what is shared -------------------------------------------------------------------------------
def test_worlds_and_outcomes_are_made_once(whole):
    _, results, calls = whole
    assert calls.count("load") == 4  # two seeds, with and without wrong labels
    assert calls.count("train") == 4 + 2 * 6  # the worlds' models, and the subsets of each seed
    saved = {one.what: one for one in results.saved}
    cells = sum(r.status == "done" for r in results.rows)
    assert cells == 10 * 2 * 2
    assert saved["worlds, each with a trained model"].done == 4
    assert saved["worlds, each with a trained model"].alone == cells


def test_passes_over_the_train_set_are_saved_and_counted(whole):
    _, results, _ = whole
    saved = {one.what: one for one in results.saved}
    passes = saved["passes of the train set through the model"]
    assert 0 < passes.done < 0.7 * passes.alone
    assert "if each cell had been alone" in str(passes)


def methods():
    return {
        "dot": dattri.method("if-ekfac", damping=0.03),
        "cosine": dattri.method("if-ekfac", damping=0.03, scorer="cosine"),
        "damped": dattri.method("if-ekfac", damping=3.0),
        "other": dattri.Method(inverse_hessian=CHOLESKY),
        "sketched": dattri.Method(projector=SKETCH, inverse_hessian=CHOLESKY),
        "sketched-cosine": dattri.Method(projector=SKETCH, scorer="cosine"),
        "sketched-datainf": dattri.Method(projector=SKETCH, inverse_hessian=DATAINF),
    }


def test_methods_that_differ_in_scorer_or_damping_share_a_fit():
    made = methods()
    keys = {name: fit_of(one) for name, one in made.items()}
    assert keys["dot"] == keys["cosine"] == keys["damped"]
    assert len(set(keys.values())) == 5
    assert fit_of(dattri.method("if-ekfac", seed=1)) != keys["dot"]
    assert fit_of(dattri.method("counted")) is None
    fronts = {name: front_of(one) for name, one in made.items()}
    assert fronts["dot"] is fronts["other"] is None
    sketched = {front for name, front in fronts.items() if name.startswith("sketched")}
    assert len(sketched) == 1
    assert None not in sketched


def test_front_of_wants_random_sketches_and_rows_alone():
    kronecker = {"name": "kronecker", "rank": 2}
    assert front_of(dattri.Method(projector=kronecker)) is not None
    assert front_of(dattri.Method(projector=kronecker, inverse_hessian=SPECTRAL)) is None
    fitted = {**kronecker, "initialisation": "pca"}
    assert front_of(dattri.Method(projector=fitted)) is None
    stages = [{"inverse_hessian": SPECTRAL}, {"projector": kronecker}]
    assert front_of(dattri.Method(stages=stages)) is None
    stages = [{"projector": kronecker}, {"projector": SKETCH}, {"inverse_hessian": DATAINF}]
    one = front_of(dattri.Method(stages=stages))
    assert one not in (None, front_of(dattri.Method(projector=kronecker)))
    assert one != front_of(dattri.Method(stages=stages[1:]))


def test_shared_scores_are_those_of_fresh_fits_and_passes_are_fewer(tmp_path):
    world = ToySetting().load((24, 8), seed=0, wrong=0.0)
    made = methods()
    shared = Shared(world, list(made.values()), tmp_path / "rows")
    passes = {}
    for name, one in made.items():
        found = shared.attribute(one, world.task)
        want = dattri.attribute(world.task, world.train, world.test, one)
        np.testing.assert_allclose(found.scores.values, want.values, rtol=2e-4, atol=2e-5)
        passes[name] = found.passes
        assert found.scores.train_ids == world.train_ids
    assert passes["dot"].done == passes["dot"].alone == passes["cosine"].alone
    for name in ("cosine", "damped"):
        assert passes[name].done == pytest.approx(1, abs=0.3)  # the fit is there: one to attribute
    assert passes["sketched"].done == passes["sketched"].alone > 0.9
    assert passes["sketched-cosine"].done < 0.5  # rows are there: examples are only tried
    assert passes["sketched-cosine"].alone > 0.9
    # self-influence of a method whose fit has gone
    fresh = made["dot"].fit(world.task, world.train).self_influence()
    own = shared.fit(made["dot"], world.task).self_influence()
    np.testing.assert_allclose(own, fresh, rtol=1e-4)
    assert (tmp_path / "rows").is_dir()
    shared.discard()
    assert not (tmp_path / "rows").exists()


def test_what_is_asked_of_a_world_was_planned_with_its_seed(tmp_path, monkeypatch):
    ask, asked = Shared.attribute, []

    def heard(self, made, task):
        asked.append((made.seed, made in self.planned))
        return ask(self, made, task)

    monkeypatch.setattr(Shared, "attribute", heard)
    factors = {"inverse_hessian": {"ekfac": SPECTRAL}, "scorer": ["dot", "cosine"]}
    run(study(factors=factors, metrics=["agreement"]), tmp_path)
    assert asked == [(0, True), (0, True), (3, True), (3, True)]


def test_a_fit_that_fails_at_the_first_damping_is_tried_at_its_own(tmp_path, monkeypatch):
    world = ToySetting().load((24, 8), seed=0, wrong=0.0)
    bad, good = dattri.method("if-ekfac", damping=0.5), dattri.method("if-ekfac", damping=0.03)
    fit = dattri.Method.fit

    def failing(self, *args, **settings):
        if self == bad:
            raise dattri.NumericsError("singular")
        return fit(self, *args, **settings)

    monkeypatch.setattr(dattri.Method, "fit", failing)
    shared = Shared(world, [bad, good], tmp_path)
    assert shared.attribute(good, world.task).scores.shape == (24, 8)
    with pytest.raises(dattri.NumericsError, match="singular"):
        Shared(world, [bad, good], tmp_path).attribute(bad, world.task)


# --- cells that give no number --------------------------------------------------------------------
def test_combinations_that_are_no_method_are_rows_with_the_reason(whole):
    _, results, _ = whole
    invalid = [r for r in results.rows if r.status == "invalid"]
    assert {r.label for r in invalid} == {"sketch / ekfac / dot", "sketch / ekfac / cosine"}
    assert len(invalid) == 2 * 2 * 2
    assert all("needs blocks that keep the factors" in r.error for r in invalid)
    assert not any(r.address for r in invalid)


def test_a_method_that_fails_is_a_row_and_the_others_go_on(tmp_path):
    made = study(factors={"method": ["broken", "counted", "grad-dot"]}, seeds=[0])
    results, _ = run(made, tmp_path)
    failed = [r for r in results.rows if r.status == "failed"]
    assert {(r.label, r.error) for r in failed} == {("broken", "ValueError: no luck | at all")}
    assert sum(r.status == "done" for r in results.rows) == 4
    assert run(made, tmp_path)[1] == []
    assert run(made, tmp_path, retry=True)[1].count("attribute") == 2  # in two worlds


def test_a_world_that_cannot_be_made_is_rows_of_errors(tmp_path, monkeypatch):
    load = ToySetting.load

    def offline(self, size=None, seed=0, wrong=None):
        if seed == 3:
            raise InputError("no network")
        return load(self, size, seed, wrong)

    monkeypatch.setattr(ToySetting, "load", offline)
    made = study(factors={"scorer": ["dot"]}, metrics=["agreement"])
    results, _ = run(made, tmp_path)
    assert [(r.seed, r.status) for r in results.rows] == [(0, "done"), (3, "failed")]
    assert results.rows[1].error == "InputError: no network"
    monkeypatch.setattr(ToySetting, "load", load)
    again, _ = run(made, tmp_path, retry=True)
    assert [r.status for r in again.rows] == ["done", "done"]


def test_when_no_point_is_a_method_nothing_is_run(tmp_path):
    with pytest.raises(SpecError, match=r"none of its 2 points.*no part's field 'scorr"):
        run(study(factors={"scorr": ["dot", "cosine"]}), tmp_path)
    assert CALLS == []


def test_settings_and_ensembles_are_factors(tmp_path):
    made = study(
        factors={"setting": ["toy", "no-classes"], "checkpoints": [1, 2]},
        seeds=[0],
        base="if-ekfac",
    )
    results, _ = run(made, tmp_path)
    found = {(r.setting, r.checkpoints, r.metric): r.status for r in results.rows}
    assert found.pop(("no-classes", 1, "flips")) == found.pop(("no-classes", 2, "flips"))
    assert set(found.values()) == {"done"}
    assert [r.label for r in results.rows if r.setting == "toy"][::2] == ["1", "2"]


def test_a_setting_with_a_field_set_is_a_level_of_its_own(tmp_path):
    levels = ["rounding", "rounding:tf32=true"]
    made = study(factors={"setting": levels}, seeds=[0], metrics=["agreement"])
    results, calls = run(made, tmp_path)
    assert [call for call in calls if call.startswith("tf32")] == ["tf32 False", "tf32 True"]
    assert {(r.setting, r.status) for r in results.rows} == {(level, "done") for level in levels}
    means = {r.setting: r.value for r in results.rows}
    assert means[levels[0]] != means[levels[1]]
    assert run(made, tmp_path)[1] == []


# --- stopping, going on, executors ----------------------------------------------------------------
def test_a_rerun_runs_nothing_and_a_further_level_costs_itself_alone(whole):
    out, results, _ = whole
    again, calls = run(study(), out)
    assert calls == []
    assert numbers(again) == numbers(results)
    more = study(factors={"scorer": ["dot", "relatif"]}, metrics=["agreement"], seeds=[0])
    _, calls = run(more, out)
    assert calls.count("metric") == 1  # grad-dot is there
    assert calls.count("train") == 1


def test_a_cell_is_an_event(tmp_path, toy, monkeypatch):
    heard = []
    monkeypatch.setattr(Registry, "emit", lambda self, event, info: heard.append((event, info)))
    results, _ = run(study(factors={"scorer": ["dot"]}, seeds=[0]), tmp_path)
    cells = [info for event, info in heard if event == "cell_finished"]
    assert [c["row"]["value"] for c in cells] == [r.value for r in results.rows]
    heard.clear()
    made = study(factors={"scorer": ["cosine"]}, seeds=[0])
    with ThreadPoolExecutor(1) as pool:
        results, _ = run(made, tmp_path, executor=pool)
    cells = [info for event, info in heard if event == "cell_finished"]
    assert [c["row"]["value"] for c in cells] == [r.value for r in results.rows]


def test_an_executor_gives_the_same_numbers(whole, tmp_path):
    _, results, _ = whole
    with ThreadPoolExecutor(1) as pool:
        again, calls = run(study(seeds=[3]), tmp_path, executor=pool)
    found = numbers(results)
    assert numbers(again) == {key: value for key, value in found.items() if key[2] == 3}
    # of each world one part first, then the rest: a worker keeps one world
    assert calls.count("load") <= 4
    assert calls.count("train") == calls.count("load") + 6


def test_a_job_that_dies_takes_no_other_with_it(tmp_path, monkeypatch):
    def dying(cells, part, kept, tell):
        if cells.seed == 3:
            raise OSError("gone")
        return done(cells, part, kept, tell=tell)

    done = studies.engine.do_part
    monkeypatch.setattr(studies.engine, "do_part", dying)
    made = study(factors={"scorer": ["dot"]}, metrics=["agreement"])
    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="gone"):
        run(made, tmp_path, executor=pool)
    monkeypatch.setattr(studies.engine, "do_part", done)
    results, calls = run(made, tmp_path)
    assert calls.count("load") == 1
    assert {r.status for r in results.rows} == {"done"}


DIGITS = """
setting = "digits"
size = [60, 20]
metrics = ["lds", "mislabel-auroc", "class-detection"]
subsets = 4
[factors]
scorer = ["dot", "cosine"]
projector.none = "identity"
projector.sketch = {name = "block-count-sketch", dim = 64}
"""


def test_processes_give_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(DIGITS)
    with using(Registry.discovered()):
        for workers in ("1", "2"):
            words = ["--out", workers, "--retrained", f"models-{workers}", "--workers", workers]
            assert main(["ablate", "tiny.toml", *words]) == 0
    one, two = values_in(Path("1")), values_in(Path("2"))
    assert one == two
    assert {row[-2] for row in two} == {"done"}
    found = json.loads(Path("2", "study.json").read_text())
    (models,) = [one for one in found["saved"] if one["what"].startswith("models")]
    assert (models["alone"], models["done"]) == (16, 4)  # one job went first
    over = [c for c in found["comparisons"] if c["over"] == "test examples"]
    # not LDS, whose test examples share the subsets
    assert [(c["metric"], c["count"]) for c in over] == 3 * [("class-detection", 20)]


SMALL = """
name = "toy"
setting = "toy"
metrics = ["agreement", "flips"]
size = "small"
[factors]
scorer = ["dot", "cosine"]
projector.none = "identity"
projector.sketch = {name = "block-count-sketch", dim = 8}
inverse_hessian.none = "identity"
inverse_hessian.ekfac = {curvature = "ekfac", solver = "spectral"}
"""


def ablate(out, *words, dies_at=""):
    path = out.parent / "toy.toml"
    path.write_text(SMALL)
    words = [str(path), "--out", str(out), "--retrained", str(out / "retrained"), *words]
    environment = {**os.environ, "TOY_DIES_AT": dies_at, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "toy_study.py"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def values_in(out):
    with (out / "study.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    keys = ("projector", "scorer", "metric", "seed", "error", "status", "value")
    return [[row[key] for key in keys] for row in rows]


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path):
    (tmp_path / "toy.toml").write_text(SMALL)
    words = ["--out", str(tmp_path / "whole"), "--retrained", str(tmp_path / "whole-models")]
    assert main(["ablate", str(tmp_path / "toy.toml"), *words]) == 0
    killed = ablate(tmp_path / "killed", dies_at="14")
    assert killed.returncode == 9
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "cells").iterdir()}
    assert 0 < len(before) < 12
    done = ablate(tmp_path / "killed")
    assert done.returncode == 0
    assert values_in(tmp_path / "killed") == values_in(tmp_path / "whole")
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "cells").iterdir()}
    assert len(after) == 12
    assert before.items() <= after.items()  # what was there was not computed again
    assert not list((tmp_path / "killed" / "rows").iterdir())


# --- the command ----------------------------------------------------------------------------------
def test_the_command_writes_tables_and_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.toml").write_text(SMALL)
    assert main(["ablate", "toy.toml", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "8 points x 2 metrics x 1 seeds = 16 cells: 4 invalid, 12 missing" in plan
    assert "sketch / ekfac" in plan.replace("dot / ", "")
    assert "to make: 2 worlds" in plan
    assert "up to 6 models" in plan
    assert "unknown before the first cells" in plan
    assert not Path("studies").exists()
    assert main(["ablate", "toy.toml", "--heat", "scorer,projector"]) == 0
    printed = capsys.readouterr().out
    assert "passes of the train set through the model: " in printed
    assert "written to studies/toy: study.json, study.csv, study.tex, study.md, effects.png" in (
        printed
    )
    out = Path("studies/toy")
    for name in ("effects", "heat", "cost"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (out / f"{name}.svg").read_text()
    found = json.loads((out / "study.json").read_text())
    assert len(found["rows"]) == 16
    assert found["saved"]
    assert {c["over"] for c in found["comparisons"]} <= {"test examples", "seeds"}
    assert len(values_in(out)) == 16
    assert "![effects.svg](effects.svg)" in (out / "study.md").read_text()
    assert main(["ablate", "toy.toml", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "12 done, 4 invalid" in plan
    assert "to make: 0 worlds" in plan


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "1 or more"),
        (["--against", "nobody"], "is no point"),
        (["--heat", "scorer"], "two factors"),
        (["--out", "toy.toml"], "is a file"),
    ],
)
def test_options_are_checked_before_any_work(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("toy.toml").write_text(SMALL)
    CALLS.clear()
    assert main(["ablate", "toy.toml", *words]) != 0
    assert message in capsys.readouterr().err
    assert CALLS == []


def test_results_are_a_tidy_table(whole):
    pandas = pytest.importorskip("pandas")
    _, results, _ = whole
    frame = results.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(results.rows) == len(results.study.cells())
    done = frame[frame.status == "done"]
    one = done.set_index(["projector", "inverse_hessian", "scorer", "metric", "seed"]).value
    key = ("sketch", "datainf", "cosine", "agreement", 3)
    assert one[key] == numbers(results)["sketch / datainf / cosine", "agreement", 3]


def test_a_forecast_reads_records_alone(whole, tmp_path):
    out, results, _ = whole
    CALLS.clear()
    new = dry_run(study(), tmp_path / "new", retrained=tmp_path / "retrained")
    assert (new.worlds, new.retrained, new.seconds) == (4, 12, None)
    alone, shared = new.passes
    assert 0 < shared < alone
    old = dry_run(study(), out, retrained=out / "retrained")
    assert (old.worlds, old.parts, old.passes, old.seconds) == (0, 0, (0.0, 0.0), 0.0)
    assert CALLS == []
    assert not (tmp_path / "new").exists()
    assert Records(out).read("cells", results.rows[0].address) is not None
