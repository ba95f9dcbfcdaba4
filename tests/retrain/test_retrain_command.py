"""``dattri retrain``: one part or all of a plan, in this process or in several."""

from __future__ import annotations

import json

import attrs
import numpy as np
import pytest
from dattri_parts.training import leave_one_out, random_subsets
from dattri_retrain import CounterfactualStore, SettingRetraining
from dattri_retrain.groups import plan_of_groups
from dattri_retrain.settings import as_retraining
from retrain_plans import same
from retrain_setting import ToySetting
from toy_retraining import M, N, Toy

from dattri_core import Counterfactual, cli

pytestmark = pytest.mark.usefixtures("toy_setting")


def run(capsys, *words):
    status = cli.main(["retrain", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def store_of(folder, n=N, m=M):
    return CounterfactualStore(folder, Toy(n_train=n, n_test=m))


def test_subsets_are_those_that_metrics_ask_for(tmp_path, capsys):
    status, out, _ = run(capsys, "toy", "--out", tmp_path, "--count", 7, "--seed", 4)
    store = store_of(tmp_path)
    assert status == 0
    assert out == f"{store.path}: 7 trained, 7 of 7 stored\n"
    assert store.missing(random_subsets(N, 7, fraction=0.5, seed=4)) == []
    assert len(store) == 7
    _, out, _ = run(capsys, "toy", "--out", tmp_path, "--count", 9, "--seed", 4)
    assert "2 trained, 9 of 9 stored" in out
    run(capsys, "toy", "--out", tmp_path, "--count", 2, "--fraction", 0.75)
    assert store.missing(random_subsets(N, 2, fraction=0.75)) == []


def test_leave_one_out_is_of_all_examples_too(tmp_path, capsys):
    run(capsys, "toy", "--out", tmp_path, "--plan", "leave-one-out", "--size", "small")
    store = store_of(tmp_path, 8, 3)
    plan = [Counterfactual(np.ones(8, bool)), *leave_one_out(8)]
    assert (store.missing(plan), len(store)) == ([], 9)


@pytest.mark.parametrize("name", ["groups.json", "groups.npy", "words.npy"])
def test_a_plan_leaves_out_each_group_of_a_file(tmp_path, capsys, name):
    labels = [4, 4, 7, 4, 7, 0, 7, 0]
    if name == "groups.json":
        (tmp_path / name).write_text(
            json.dumps([["a", "b", 3][[4, 7, 0].index(g)] for g in labels])
        )
    else:
        np.save(tmp_path / name, np.array(labels, dtype=str if name == "words.npy" else int))
    words = ("--plan", "leave-groups-out", "--groups", tmp_path / name, "--size", "small")
    _, out, _ = run(capsys, "toy", "--out", tmp_path / "bank", *words, "--seed", 3)
    store = store_of(tmp_path / "bank", 8, 3)
    masks = [np.ones(8, bool), *(np.array(labels) != group for group in (4, 7, 0))]
    assert "4 trained, 4 of 4 stored" in out
    assert (store.missing([Counterfactual(m, 3) for m in masks]), len(store)) == ([], 4)


def test_an_example_whose_label_is_null_is_in_every_train_set(tmp_path):
    path = tmp_path / "groups.json"
    path.write_text('[1, null, 1, "1", null]')
    whole, *others = plan_of_groups(path, 5, 0)
    assert whole.mask.all()
    assert [other.mask.tolist() for other in others] == [
        [False, True, False, True, True],
        [True, True, True, False, True],
    ]


def test_a_field_of_the_setting_is_set(tmp_path, capsys, monkeypatch):
    found = []

    @attrs.frozen
    class Rounds(ToySetting):
        tf32: bool = False

        def load(self, *size, **words):
            found.append(self.tf32)
            return super().load(*size, **words)

    monkeypatch.setattr("retrain_setting.setting", Rounds())
    run(capsys, "toy:tf32=true", "--out", tmp_path, "--count", 1)
    run(capsys, "toy", "--out", tmp_path, "--count", 1)
    assert found == [True, False]
    named = as_retraining({"setting": "toy:tf32=true", "size": [10, 4]})
    assert named == SettingRetraining("toy:tf32=true", (10, 4))
    assert (named.n_train, found) == (10, [True, False, True])


def test_parts_on_many_machines_make_the_whole(tmp_path, capsys):
    words = ("toy", "--count", 9, "--size", "10,4")
    for part in (3, 1, 2):
        status, out, _ = run(capsys, *words, "--out", tmp_path / "parts", "--index", f"{part}/3")
        assert status == 0
    assert "9 of 9 stored" in out
    run(capsys, *words, "--out", tmp_path / "whole")
    assert same(
        store_of(tmp_path / "parts", 10, 4).rows(), store_of(tmp_path / "whole", 10, 4).rows()
    )


def test_a_dry_run_counts(tmp_path, capsys):
    _, out, _ = run(capsys, "toy", "--out", tmp_path, "--dry-run")
    assert "50 of 50 models to train" in out
    assert list(tmp_path.iterdir()) == []


def test_several_workers(tmp_path, capsys, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    asked = []

    def threads(workers, context):
        asked.append((workers, context.get_start_method()))
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr("dattri_retrain.command.ProcessPoolExecutor", threads)
    _, out, _ = run(capsys, "toy", "--out", tmp_path, "--count", 6, "--workers", 2)
    assert asked == [(2, "spawn")]
    assert "6 trained, 6 of 6 stored" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tooy",), "did you mean 'toy'"),
        (("toy", "--index", "7"), "as in 7/50"),
        (("toy", "--index", "0/50"), "parts count from 1 to 50"),
        (("toy", "--size", "smal"), "did you mean 'small'"),
        (("toy", "--workers", "0"), "expected 1 or more"),
        (("toy", "--fraction", "0"), "fraction 0.0"),
        (("toy:tf32=true",), "no field 'tf32'"),
        (("toy:tf32",), "no setting 'toy:tf32'"),
        (("toy", "--groups", "of.json"), "--plan subsets with --groups"),
        (("toy", "--plan", "leave-groups-out"), "leave-groups-out without --groups"),
        (("toy", "--plan", "leave-groups-out", "--groups", "of.txt"), "expected a file .npy"),
        (("toy", "--plan", "leave-groups-out", "--groups", "no.npy"), "cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, words, message):
    status, _, err = run(capsys, *words, "--out", tmp_path)
    assert status == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "has 2 labels, and there are 8 train examples"),
        ("[1, 2", "cannot be read"),
        ("[[1, 2]]", "something else than one label for each"),
        ('{"a": 1}', "something else than one label for each"),
        ("[1, 2.5, 1, 1, 1, 1, 1, 1]", "something else than one label for each"),
        ("[1, 1, 1, 1, 1, 1, 1, 1]", "holds all 8 examples"),
        ("[null, null, null, null, null, null, null, null]", "got no groups"),
    ],
)
def test_mistakes_in_a_file_of_groups_are_named(tmp_path, capsys, text, message):
    (tmp_path / "of.json").write_text(text)
    words = ("--plan", "leave-groups-out", "--groups", tmp_path / "of.json", "--size", "small")
    status, _, err = run(capsys, "toy", "--out", tmp_path / "bank", *words)
    assert (status, (tmp_path / "bank").exists()) == (2, False)
    assert message in err
