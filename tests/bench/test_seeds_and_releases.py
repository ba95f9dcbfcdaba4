"""What tells cells of one method apart besides its fields: the seed of the world, whose parts."""

import json
import re

import numpy as np
import pytest
import toy_bench
from bench_runs import bench, results

import dattri_core as dattri
from dattri_core.registry import Registry, using


@pytest.fixture(scope="module", autouse=True)
def registry():
    with using(toy_bench.registry()) as made:
        yield made


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """Figures take longer than all the rest, and have tests of their own."""
    monkeypatch.setattr("dattri_bench.command.draw", lambda rows, title, path: [])


# --- the seed of a method -------------------------------------------------------------------------
def seeds_of(out, method):
    """Return the seed of a method in the cell of each world, by the seed of the world."""
    found = {}
    for cell in results(out)["cells"]:
        spec = cell["cell"]["method"]["spec"]
        if cell["cell"]["method"]["name"] == method:
            own = spec.get("seed", spec.get("attributor"))
            found[cell["cell"]["world"]["seed"]] = own
    return found


def test_a_method_that_draws_has_a_seed_that_follows_the_worlds(tmp_path):
    words = ("--metrics", "bounded", "--seeds=0,3")
    bench(tmp_path, "--methods", "noise", "if-ekfac", "grad-dot", "counted", "asking", *words)
    assert seeds_of(tmp_path, "noise") == {0: "noise", 3: {"name": "noise", "seed": 3}}
    assert seeds_of(tmp_path, "if-ekfac") == {0: 0, 3: 3}
    assert seeds_of(tmp_path, "grad-dot") == {0: 0, 3: 0}  # without a sketch or an inverse
    assert seeds_of(tmp_path, "counted") == {0: "counted", 3: "counted"}
    assert seeds_of(tmp_path, "asking") == {0: "asking", 3: "asking"}  # see below
    want = {seed: np.random.default_rng(seed).normal() for seed in (0, 3)}
    for cell in results(tmp_path)["cells"]:
        if cell["cell"]["method"]["name"] == "noise":
            assert cell["result"]["value"] == want[cell["cell"]["world"]["seed"]]


def test_a_seed_that_is_set_stays(tmp_path):
    words = ("--metrics", "bounded", "--seeds=0,3")
    bench(tmp_path, "--methods", "noise:seed=7", "if-ekfac:seed=7", *words)
    assert seeds_of(tmp_path, "noise") == {k: {"name": "noise", "seed": 7} for k in (0, 3)}
    assert seeds_of(tmp_path, "if-ekfac") == {0: 7, 3: 7}


def test_the_default_seed_of_a_recipe_is_counted_from(tmp_path, registry):
    other = Registry()
    other.merge(registry)
    spec = {"attributor": {"name": "noise", "seed": 10}}
    other.method("louder", spec, summary="toy", formula="S", citation="-")
    with using(other):
        bench(tmp_path, "--methods", "louder", "--metrics", "bounded", "--seeds=0,2")
    assert [seeds_of(tmp_path, "louder")[seed]["seed"] for seed in (0, 2)] == [10, 12]


def test_a_tuned_method_has_the_seed_of_its_world(tmp_path, monkeypatch):
    made, method = [], dattri.method

    def heard(name, **fields):
        made.append(fields)
        return method(name, **fields)

    monkeypatch.setattr("dattri_bench.work.method", heard)
    words = ("--metrics", "agreement", "--seeds=2", "--subsets=6", "--tune", "damping=0.1,1.0")
    bench(tmp_path, "--methods", "if-ekfac", *words)
    assert [fields["seed"] for fields in made] == [2]


# --- whose parts ----------------------------------------------------------------------------------
def test_another_release_of_a_plugin_is_another_cell(tmp_path):
    words = ("--metrics", "bounded", "--methods", "grad-dot", "grad-dot:scorer=louder", "shout")
    counts = []
    for version in ("1.0", "1.0", "1.1"):
        with using(toy_bench.with_plugin(version)):
            bench(tmp_path, *words)
        counts.append(len(list((tmp_path / "cells").iterdir())))
    assert counts == [3, 3, 5]  # grad-dot is made of what comes with dattri-core
    parts = [cell["cell"]["method"].get("parts") for cell in results(tmp_path)["cells"]]
    assert parts[0] is None
    assert [list(found) for found in parts[1:]] == [["toy_bench:Louder"], ["toy_bench:Shout"]]
    for found in parts[1:]:
        (origin,) = found.values()
        assert re.fullmatch(r"dattri-loud 1\.1, [0-9a-f]{12}", origin)


def test_what_is_trained_in_tf32_is_asked_of_the_setting_and_kept_apart(tmp_path):
    words = ("--methods", "counted", "--metrics", "agreement")
    _, exact = bench(tmp_path, *words, setting="rounding")
    before = set((tmp_path / "cells").iterdir())
    status, rounded = bench(tmp_path, *words, "--tf32", setting="rounding")
    assert (status, exact[0], rounded[0]) == (0, "tf32 False", "tf32 True")
    assert exact.count("attribute") == rounded.count("attribute") == 1  # a miss, not a hit
    (path,) = set((tmp_path / "cells").iterdir()) - before
    assert json.loads(path.read_text())["cell"]["world"]["tf32"] is True
    assert not any("tf32" in p.read_text() for p in before)  # addresses of before hold
    found = results(tmp_path)
    assert "--tf32" in found["command"].split()
    assert "True" not in found["command"]
    assert any("in TF32" in note for note in found["notes"])
    for again in (words, (*words, "--tf32")):
        assert bench(tmp_path, *again, setting="rounding") == (0, [])
    bench(tmp_path, *words, setting="rounding")
    assert not any("TF32" in note for note in results(tmp_path)["notes"])
