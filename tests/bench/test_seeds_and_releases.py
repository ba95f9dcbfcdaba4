"""What tells cells of one method apart besides its fields: the seed of the world, whose parts."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import toy_bench
from bench_runs import bench, results
from dattri_bench.command import command, request_of

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


def test_numbers_of_a_setting_with_a_field_set_are_kept_apart(tmp_path):
    words = ("--methods", "counted", "--metrics", "agreement")
    _, exact = bench(tmp_path, *words, setting="rounding")
    before = set((tmp_path / "cells").iterdir())
    status, rounded = bench(tmp_path, *words, setting="rounding:tf32=true")
    assert (status, exact[0], rounded[0]) == (0, "tf32 False", "tf32 True")
    assert exact.count("attribute") == rounded.count("attribute") == 1  # a miss, not a hit
    (path,) = set((tmp_path / "cells").iterdir()) - before
    assert json.loads(path.read_text())["cell"]["world"]["fields"] == {"tf32": True}
    assert not any("fields" in p.read_text() for p in before)  # addresses of before hold
    found = results(tmp_path)
    assert found["command"].split()[:3] == ["dattri", "bench", "rounding:tf32=true"]
    assert found["setting"] == "rounding (tf32=true)"
    for again in ("rounding", "rounding:tf32=true"):
        assert bench(tmp_path, *words, setting=again) == (0, [])
    assert results(tmp_path)["setting"] == "rounding (tf32=true)"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rounding:tf23=true", "no field 'tf23'; did you mean 'tf32'"),
        ("rounding:tf32=3", "field 'tf32' got 3 (int), expected bool"),
        ("toy:tf32=true", "no field 'tf32'"),
        ("ronding:tf32=true", "no setting 'ronding'; did you mean 'rounding'"),
        ("rounding:tf32=[1", "without its other half"),
    ],
)
def test_fields_that_a_setting_does_not_have_are_refused(tmp_path, capsys, setting, message):
    words = ("--methods", "counted", "--metrics", "agreement")
    assert bench(tmp_path, *words, setting=setting) == (2, [])
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_results_of_a_setting_with_a_field_set_lie_in_a_folder_that_all_systems_can_name(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args = argparse.ArgumentParser()
    command.add_arguments(args)
    words = ["rounding:tf32=true", "--methods", "counted", "--metrics", "agreement"]
    request = request_of(args.parse_args(words))
    assert request.out == Path("bench/rounding-tf32=true")
