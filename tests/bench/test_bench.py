"""``dattri bench`` end to end in a world of milliseconds: what runs, what is kept, what is said."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import attrs
import numpy as np
import pytest
import torch
import toy_bench
from bench_runs import bench, kept, results, row_of
from toy_bench import Agreement, Flips, ToySetting, ToyStore

import dattri_core as dattri
from dattri_core import Scores, Task
from dattri_core.registry import Registry, default_registry, using

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def registry():
    with using(toy_bench.registry()) as made:
        yield made


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """Figures take longer than all the rest, and have tests of their own."""
    monkeypatch.setattr("dattri_bench.command.draw", lambda rows, title, path: [])


# --- the numbers ----------------------------------------------------------------------------------
def test_the_table_holds_what_the_metric_gives_by_hand(tmp_path, capsys):
    status, _ = bench(tmp_path, "--methods", "grad-dot", "if-ekfac", "--seeds", "3")
    assert status == 0
    printed = capsys.readouterr().out
    with (tmp_path / "results.csv").open() as handle:
        lines = {(line["metric"], line["method"]): line for line in csv.DictReader(handle)}
    for name, metric, wrong in (("agreement", Agreement(), 0.0), ("flips", Flips(), 0.1)):
        world = ToySetting().load((24, 8), seed=3, wrong=wrong)
        outcomes = ToyStore(tmp_path / "by-hand", world.retraining)
        for method, fields in (("grad-dot", {}), ("if-ekfac", {"damping": 0.03, "seed": 3})):
            scores = dattri.attribute(world.task, world.train, world.test, method, **fields)
            evidence = dattri.Evidence(
                np.asarray(scores.values, np.float64), None, world, outcomes, None, 3
            )
            want = metric.measure(evidence)
            line = lines[name, method]
            got = [float(line[key]) for key in ("value", "low", "high", "chance")]
            assert got == [want.value, want.low, want.high, want.chance]
            assert line["ceiling"] == ("" if want.ceiling is None else str(want.ceiling))
            row = row_of(tmp_path, method, name)
            assert row["value"] == want.value
            text = f"{want.value:.3f} [{want.low:.3f}, {want.high:.3f}]"
            assert re.search(rf"^{method} +{re.escape(text)} ", printed, re.MULTILINE)
            assert f"| {method} | {text} |" in (tmp_path / "results.md").read_text()
    assert lines["flips", "grad-dot"]["chance"] != "0.0"  # the world has wrong labels


def test_over_seeds_the_mean_has_students_interval(tmp_path):
    from scipy.stats import t

    status, _ = bench(tmp_path, "--methods", "grad-dot", "--metrics", "agreement", "--seeds=0,1,2")
    assert status == 0
    found = results(tmp_path)
    values = [cell["result"]["value"] for cell in found["cells"]]
    assert len(set(values)) == 3
    row = row_of(tmp_path, "grad-dot")
    assert row["high"] - row["value"] > 0.2 / 3**0.5  # what the intervals of the seeds give
    low, high = t.interval(0.95, 2, np.mean(values), np.std(values, ddof=1) / 3**0.5)
    assert np.allclose([row["value"], row["low"], row["high"]], [np.mean(values), low, high])
    assert row["seeds"] == [0, 1, 2]


def test_a_damping_is_the_settings_unless_it_is_given(tmp_path):
    def damping(*words, method="if-ekfac"):
        bench(tmp_path, "--methods", method, "--metrics", "agreement", *words)
        return results(tmp_path)["cells"][0]["cell"]["method"]["spec"]

    assert damping()["inverse_hessian"]["solver"]["damping"] == 0.03
    assert damping("--damping=0.5")["inverse_hessian"]["solver"]["damping"] == 0.5
    own = damping("--damping=0.5", method="if-ekfac:damping=0.25")
    assert own["inverse_hessian"]["solver"]["damping"] == 0.25


# --- what runs ------------------------------------------------------------------------------------
def test_scores_are_computed_once_for_all_metrics(tmp_path):
    _, calls = bench(tmp_path, "--methods", "counted", "--metrics", "agreement", "flips", "other")
    # two worlds, and once more because the metric "other" asks for it
    assert calls.count("attribute") == 3
    assert calls.count("load") == 2
    assert calls.count("metric") == 2


def test_a_rerun_runs_nothing_and_writes_the_same(tmp_path):
    words = ("--methods", "counted", "grad-dot", "broken", "--checkpoints=1,2")
    bench(tmp_path, *words)
    before = kept(tmp_path)
    cells = (tmp_path / "cells").iterdir()
    times = {path: path.stat().st_mtime_ns for path in cells}
    _, calls = bench(tmp_path, *words)
    assert calls == []
    assert kept(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_what_is_added_runs_alone(tmp_path):
    bench(tmp_path, "--methods", "counted", "--metrics", "agreement")
    _, calls = bench(tmp_path, "--methods", "counted", "--metrics", "agreement", "other")
    # scores are on disk: "other" itself asks for one attribution
    assert (calls.count("attribute"), calls.count("metric")) == (1, 0)
    _, calls = bench(tmp_path, "--methods", "counted", "grad-dot", "--metrics", "agreement")
    assert (calls.count("attribute"), calls.count("metric")) == (0, 1)
    # the outcomes of the same subsets are there already: only the setting's own model is trained
    assert calls.count("train") == 1


@pytest.mark.parametrize(
    ("words", "addresses"),
    [
        (("--seeds=1",), 1),
        (("--size=30,8",), 1),
        (("--methods", "counted:scale=2.0"), 1),
        (("--metrics", "agreement:subsets=4"), 1),
        (("--subsets=4",), 1),
        (("--checkpoints=2,3",), 2),
        (("--checkpoints=2", "--trained-on=half"), 1),
        (("--damping=0.5",), 0),  # it takes none
        (("--subsets=6",), 0),  # as it is by default
        (("--wrong=0.3",), 0),  # of worlds that this metric does not ask for
    ],
)
def test_a_changed_field_is_another_cell(tmp_path, words, addresses):
    start = ("--methods", "counted", "--metrics", "agreement")
    bench(tmp_path, *start)
    before = set((tmp_path / "cells").iterdir())
    status, calls = bench(tmp_path, *start, *words)
    assert status == 0
    assert len(set((tmp_path / "cells").iterdir()) - before) == addresses
    assert (calls == []) == (addresses == 0)


def test_a_setting_that_changed_is_another_world(tmp_path, registry):
    words = ("--methods", "counted", "--metrics", "agreement")
    bench(tmp_path, *words)
    changed = Registry()
    changed.merge(registry)
    world = next((tmp_path / "worlds").iterdir())
    # as after an upgrade that this record does not know of
    record = json.loads(world.read_text())
    world.write_text(json.dumps({**record, "fingerprint": "another"}))
    _, calls = bench(tmp_path, *words)
    assert calls.count("load") == 1
    assert json.loads(world.read_text()) == record  # the world as it is
    assert calls.count("metric") == 0  # whose cell is there


def test_what_was_said_of_another_network_is_not_resumed(tmp_path, monkeypatch):
    words = ("--methods", "counted", "--metrics", "agreement")
    bench(tmp_path, *words)
    load = toy_bench.ToySetting.load

    def elsewhere(self, *args, **kwargs):
        """Train as ever, and end in the last bits of the weights elsewhere."""
        world = load(self, *args, **kwargs)
        model = world.task.model
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + 1e-6)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return attrs.evolve(world, task=Task(model, checkpoints=[state]))

    monkeypatch.setattr(toy_bench.ToySetting, "load", elsewhere)
    _, calls = bench(tmp_path, *words)
    assert calls == []  # nothing is missing, so no network is trained
    _, calls = bench(tmp_path, "--methods", "counted", "grad-dot", "--metrics", "agreement")
    assert (calls.count("attribute"), calls.count("metric")) == (1, 2)  # both, of one network


def test_models_of_an_ensemble_are_trained_once(tmp_path):
    words = ("--metrics", "agreement", "--checkpoints=3")
    _, calls = bench(tmp_path, "--methods", "grad-dot", "if-ekfac", *words)
    assert calls.count("train") == 1 + 3 + 6  # the world's, the ensemble's, the subsets'
    assert len(list((tmp_path / "retrained").rglob("*.safetensors"))) == 3
    _, calls = bench(tmp_path, "--methods", "grad-dot", "--metrics", "agreement", "--checkpoints=4")
    assert calls.count("train") == 1 + 1
    row = row_of(tmp_path, "grad-dot x4")
    world = ToySetting().load((24, 8), seed=0, wrong=0.0)
    files = sorted((tmp_path / "retrained").rglob("*.safetensors"))
    task = dattri.Task(world.task.model, checkpoints=files)
    scores = dattri.attribute(task, world.train, world.test, "grad-dot")
    outcomes = ToyStore(tmp_path / "retrained", world.retraining)
    evidence = dattri.Evidence(np.asarray(scores.values, np.float64), None, world, outcomes)
    assert np.isclose(Agreement().measure(evidence).value, row["value"], atol=1e-6)


def test_halves_and_full_sets_are_what_they_say():
    from dattri_bench.ensembles import members

    full, half = members(31, 4, "full", 0), members(31, 4, "half", 0)
    assert all(c.mask.all() for c in full)
    assert {int(c.mask.sum()) for c in half} == {16}
    assert len({c.key for c in full + half}) == 8
    assert [c.key for c in members(31, 2, "half", 0)] == [c.key for c in half[:2]]
    assert half[0].key != members(31, 1, "half", 1)[0].key
    drawn = dattri_parts_subsets(31, 200)
    assert not {c.mask.tobytes() for c in half} & {c.mask.tobytes() for c in drawn}


def dattri_parts_subsets(n, count):
    from dattri_parts.training import random_subsets

    return random_subsets(n, count, seed=0)


# --- what fails -----------------------------------------------------------------------------------
def test_a_method_that_fails_is_a_row_and_is_not_tried_twice(tmp_path, capsys):
    status, calls = bench(tmp_path, "--methods", "broken", "grad-dot", "--metrics=agreement,other")
    assert status == 0
    assert calls.count("attribute") == 1
    row = row_of(tmp_path, "broken")
    assert row["error"] == "ValueError: no luck | at all"
    assert row["value"] is None
    assert "not run: ValueError: no luck | at all" in capsys.readouterr().out
    assert (
        "| broken | not run: ValueError: no luck \\| at all |"
        in (tmp_path / "results.md").read_text()
    )
    _, calls = bench(tmp_path, "--methods", "broken", "--metrics", "agreement")
    assert calls == []
    _, calls = bench(tmp_path, "--methods", "broken", "--metrics", "agreement", "--retry")
    assert calls.count("attribute") == 1


def test_when_nothing_gives_a_number_the_status_says_so(tmp_path):
    status, _ = bench(tmp_path, "--methods", "broken", "--metrics", "agreement")
    assert status == 1
    assert row_of(tmp_path, "broken")["error"]


def test_what_a_metric_cannot_have_is_said(tmp_path):
    words = ("--methods", "counted", "grad-dot", "knn-shapley")
    bench(tmp_path, *words, "--metrics", "own", "sneaky", "nan")
    assert "no score of an example for itself" in row_of(tmp_path, "counted", "own")["error"]
    assert "sees all train examples" in row_of(tmp_path, "knn-shapley", "own")["error"]
    world = ToySetting().load((24, 8), seed=0, wrong=0.0)
    own = dattri.method("grad-dot").fit(world.task, world.train).self_influence()
    assert np.isclose(row_of(tmp_path, "grad-dot", "own")["value"], float(own.double().sum()))
    assert "AttributeError" in row_of(tmp_path, "grad-dot", "sneaky")["error"]
    assert "not finite" in row_of(tmp_path, "grad-dot", "nan")["error"]
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("what", ["scores", "self_influence"])
def test_no_metric_changes_what_the_next_one_sees(tmp_path, what):
    bench(tmp_path / "alone", "--methods", "grad-dot", "--metrics", "own", "agreement")
    words = ("--metrics", f"scribbler:what={what}", "own", "agreement")
    for _ in range(2):  # computed, and read from disk
        bench(tmp_path, "--methods", "grad-dot", *words)
        label = f"scribbler (what={what})"
        assert "read-only" in row_of(tmp_path, "grad-dot", label)["error"]
        for metric in ("own", "agreement"):
            want = row_of(tmp_path / "alone", "grad-dot", metric)["value"]
            assert row_of(tmp_path, "grad-dot", metric)["value"] == want
        for cell in (tmp_path / "cells").iterdir():
            cell.unlink()


def test_what_bounds_a_metric_is_on_record(tmp_path):
    bench(tmp_path, "--methods", "noise", "--metrics", "bounded", "agreement", "--seeds=0,1")
    cells = [cell["result"] for cell in results(tmp_path)["cells"]]
    for cell in cells[::2]:
        assert cell["bounds"] == [cell["value"] - 0.01, None]
    assert [cell["bounds"] for cell in cells[1::2]] == [None, None]
    row = row_of(tmp_path, "noise", "bounded")
    assert row["low"] == min(cell["bounds"][0] for cell in cells[::2])
    assert row["high"] > row["value"] + 1


def test_a_setting_that_gives_no_world_is_named(tmp_path, capsys):
    status, _ = bench(tmp_path, "--methods", "grad-dot", setting="pair")
    assert status == 2
    said = capsys.readouterr().err
    assert "load of the setting 'pair' gave a tuple, expected a dattri_core.World" in said


def test_rows_that_lack_seeds_are_marked_and_come_last(tmp_path, capsys):
    words = ("--metrics", "bounded", "--seeds=0,1")
    bench(tmp_path, "--methods", "noise:fails_at=1", "counted", *words)
    rows = results(tmp_path)["rows"]
    assert [(row["method"], row["seeds"], row["failed"]) for row in rows] == [
        ("counted", [0, 1], []), ("noise (fails_at=1)", [0], [1])
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert re.search(r"^noise \(fails_at=1\) .* 1 of 2$", printed, re.MULTILINE)
    assert "Rows that lack seeds come last" in printed
    assert any("Rows that lack seeds" in note for note in results(tmp_path)["notes"])
    bench(tmp_path, "--methods", "counted", *words)
    assert "Rows that lack seeds" not in capsys.readouterr().out


def test_a_method_along_the_run_is_one_row_whatever_the_models(tmp_path):
    bench(tmp_path, "--methods", "tracin", "--metrics", "agreement,other", "--checkpoints=1,5")
    rows = [row["method"] for row in results(tmp_path)["rows"]]
    assert rows == ["tracin", "tracin"]
    assert row_of(tmp_path, "tracin", "other")["error"] is None
    assert any("follow training" in note for note in results(tmp_path)["notes"])


def test_a_method_that_trains_models_gets_the_store_and_subsets_of_its_own(tmp_path):
    _, calls = bench(tmp_path, "--methods", "asking", "asking:seed=9", "--metrics", "agreement")
    assert calls.count("train") == 1 + 2 + 6
    seeds = {row["method"] for row in results(tmp_path)["rows"]}
    assert seeds == {"asking", "asking (seed=9)"}
    values = [Scores.load(path).values for path in (tmp_path / "scores").iterdir()]
    lowest = sorted(float(np.asarray(v).min()) for v in values)
    assert abs(lowest[0] - 9) < 5
    assert lowest[1] > 1e8  # far from the seeds of worlds, which metrics draw from
    assert any("train models themselves" in note for note in results(tmp_path)["notes"])


def test_all_leaves_out_what_trains_models_by_the_hundred(tmp_path):
    bench(tmp_path, "--methods", "all", "--metrics", "agreement")
    rows = {row["method"] for row in results(tmp_path)["rows"]}
    everything = set(default_registry().names("method"))
    assert everything - rows == {"asking"}


def test_a_setting_without_classes_has_rows_for_the_other_metrics(tmp_path):
    status, _ = bench(tmp_path, "--methods", "grad-dot", setting="no-classes")
    assert status == 0
    assert row_of(tmp_path, "grad-dot", "agreement")["value"] is not None
    assert "have no labels" in row_of(tmp_path, "grad-dot", "flips")["error"]
    _, calls = bench(tmp_path, "--methods", "grad-dot", setting="no-classes")
    assert calls == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "grad-dott"), "did you mean 'grad-dot'"),
        (("--methods", "grad-dot:scale=1"), "no slot and no part's field 'scale'"),
        (("--metrics", "agreements"), "did you mean 'agreement'"),
        (("--metrics", "agreement:subset=2"), "subset"),
        (("--size", "tiny"), "give TRAIN,TEST"),
        (("--seeds", "a"), "--seeds 'a'"),
        (("--checkpoints", "0"), "--checkpoints '0'"),
        (("--damping", "-1"), "--damping '-1'"),
        (("--subsets", "2"), "--subsets 2; give at least 3"),
        (("--metrics", "agreement:subsets=2"), "'agreement' on 2 train subsets; give at least 3"),
        (("--metrics", "agreement:subsets=[2"), "without its other half"),
        (("--metrics", "misspelt"), "needs 'label', which no world gives; did you mean 'labels'"),
        (("--tune", "damping=0.1", "--subsets=5"), "retrains on 6 subsets or more"),
        (("--wrong", "1.5"), "--wrong 1.5"),
        (("--tune", "1e-3"), "--tune '1e-3'"),
        (("--tune", "damping=big"), "'big', expected a number"),
        (("--tune", "damping=0.1", "--metrics", "flips"), "needs a metric that retrains"),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path, capsys, words, message):
    status, calls = bench(tmp_path, *words)
    assert status == 2
    assert calls == []
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_named(tmp_path, capsys):
    words = ("--methods", "counted", "--metrics", "agreement")
    bench(tmp_path, *words)
    (cell,) = (tmp_path / "cells").iterdir()
    cell.write_text(cell.read_text()[:40])
    status, _ = bench(tmp_path, *words)
    assert status == 2
    assert cell.name in capsys.readouterr().err


# --- killed ---------------------------------------------------------------------------------------
def test_a_run_that_is_killed_goes_on_to_the_same_files(tmp_path):
    words = ["--methods", "counted", "grad-dot", "if-ekfac", "--checkpoints=1,2"]
    words += ["--metrics", "agreement", "flips", "--subsets=3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _, calls = bench(whole, *words)
    # in the training of the ensemble, and before a metric of the second world
    ends = [calls.index("train", 3) + 2, len(calls) - 1]
    for end, dies_at in enumerate(ends):
        assert killed(cut, words, dies_at - (0 if end == 0 else ends[0])).returncode == 9
        assert not (cut / "results.json").exists()
    status, again = bench(cut, *words)
    assert status == 0
    assert 0 < len(again) < len(calls)
    assert alike(cut) == alike(whole)


def killed(out, words, dies_at):
    """Run the command in a process that dies at a piece of its work."""
    folders = ["--out", str(out), "--retrained", str(out / "retrained")]
    settings = {"PYTHONPATH": os.pathsep.join(sys.path), "TOY_DIES_AT": str(dies_at)}
    return subprocess.run(
        [sys.executable, str(HERE / "toy_bench.py"), "toy", "--size", "small", *words, *folders],
        env={**os.environ, **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def alike(out):
    """Return the files of a folder, without the names of folders in the command."""
    found = kept(out)
    found["results.json"].pop("command")
    return found


def test_after_ctrl_c_the_results_are_those_of_what_was_computed(tmp_path, monkeypatch, capsys):
    measure, asked = Agreement.measure, []

    def stopped(self, evidence):
        asked.append(evidence)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure(self, evidence)

    words = ("--methods", "counted", "grad-dot", "tracin", "--metrics", "agreement")
    with monkeypatch.context() as patch:
        patch.setattr(Agreement, "measure", stopped)
        status, _ = bench(tmp_path, *words)
    assert status == 130
    printed = capsys.readouterr()
    assert "the results are those of the cells that were computed" in printed.out
    assert "interrupted" in printed.err
    assert [row["method"] for row in results(tmp_path)["rows"]] == ["counted"]
    first = row_of(tmp_path, "counted")
    status, calls = bench(tmp_path, *words)
    assert status == 0
    assert "counted" not in calls  # and the run goes on
    assert len(results(tmp_path)["rows"]) == 3
    assert row_of(tmp_path, "counted") == first


def test_after_ctrl_c_before_the_first_cell_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Agreement, "measure", Mock(side_effect=KeyboardInterrupt))
    status, _ = bench(tmp_path, "--methods", "counted", "--metrics", "agreement")
    assert (status, list(tmp_path.rglob("results.*"))) == (130, [])


# --- hooks ----------------------------------------------------------------------------------------
def test_plugins_hear_of_every_cell(tmp_path, registry, monkeypatch):
    heard = []
    monkeypatch.setattr(registry, "emit", lambda event, info: heard.append((event, info)))
    bench(tmp_path, "--methods", "counted", "broken", "--metrics", "agreement")
    cells = [info for event, info in heard if event == "cell_finished"]
    assert [info["cell"]["method"]["name"] for info in cells] == ["counted", "broken"]
    assert cells[0]["row"]["value"] == row_of(tmp_path, "counted")["value"]
    assert cells[0]["seconds"] > 0
    assert cells[1]["row"] == {"error": "ValueError: no luck | at all"}
    heard.clear()
    bench(tmp_path, "--methods", "counted", "broken", "--metrics", "agreement")
    assert heard == []


# --- the figure -----------------------------------------------------------------------------------
def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch, capsys):
    from dattri_bench.figure import draw

    monkeypatch.setattr("dattri_bench.command.draw", draw)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _ = bench(tmp_path, "--methods", "counted", "--metrics", "agreement")
    assert status == 0
    assert "no figure: figure: needs matplotlib" in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir() if path.name.startswith("results")}
    assert names == {"results.json", "results.csv", "results.md"}


def test_the_figure_lies_beside_the_table(tmp_path, monkeypatch):
    from dattri_bench.figure import draw

    monkeypatch.setattr("dattri_bench.command.draw", draw)
    bench(tmp_path, "--methods", "counted", "broken", "--metrics", "agreement")
    assert (tmp_path / "results.png").stat().st_size > 5000
    assert "counted" in (tmp_path / "results.svg").read_text()
    assert "(results.svg)" in (tmp_path / "results.md").read_text()
