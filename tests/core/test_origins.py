"""Where parts come from stands beside what they are called: another release is another result."""

import importlib.util
import sys
from collections import Counter

import pytest
import torch
from oracles.toy_tasks import examples, mlp
from torch.utils.data import Dataset

import dattri_core as dattri
from dattri_core.discovery import Origin
from dattri_core.origins import origins_of
from dattri_core.registry import Registry, using

CODE = """
from attrs import frozen
from dattri_core import Scored

@frozen
class Own:
    needs = frozenset()
    locality = "tile"

    def pair(self, train, test):
        return train.inner(test)

    def finish(self, total, train, test):
        return Scored({sign}total)
"""


def released(folder, sign=""):
    """Return the scorer of a module whose file says so."""
    path = folder / "own_scorer.py"
    path.write_text(CODE.replace("{sign}", sign))
    spec = importlib.util.spec_from_file_location("own_scorer", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_scorer"] = module
    spec.loader.exec_module(module)
    return module.Own()


def test_parts_of_this_distribution_stand_under_its_version():
    assert origins_of(dattri.method("trak")) == {}
    assert origins_of([dattri.method("dvemb"), {"a": dattri.method("logra")}]) == {}


def test_a_part_of_another_one_is_told_by_its_code(tmp_path):
    first = origins_of(dattri.Method(scorer=released(tmp_path)))
    assert list(first) == ["own_scorer:Own"]
    assert first == origins_of(dattri.Method(scorer=released(tmp_path)))
    assert first != origins_of(dattri.Method(scorer=released(tmp_path, "-")))


def test_parts_inside_parts_have_origins_too(tmp_path):
    scorer = released(tmp_path)
    deep = {"a": [dattri.Method(scorer=scorer)], "b": (dattri.method("trak"), 1)}
    assert origins_of(deep) == origins_of(scorer) != {}


def test_a_registered_part_is_told_by_its_release(tmp_path):
    scorer = released(tmp_path)

    def of(version):
        registry = Registry.discovered()
        own = Registry(Origin("own", "dattri-own", version))
        own.part("scorer", "own", "own_scorer:Own", "An inner product")
        registry.merge(own)
        with using(registry):
            return origins_of(scorer)["own_scorer:Own"]

    assert of("1.0").startswith("dattri-own 1.0, ")
    assert of("1.1").startswith("dattri-own 1.1, ")


def test_a_run_that_was_stopped_is_not_gone_on_with_by_another_release(tmp_path):
    train, test = examples(300), examples(4, seed=300)

    reads = Counter()

    class Stops(Dataset):
        def __len__(self):
            return 300

        def __getitem__(self, at):
            reads[at] += 1
            if at == 296 and reads[at] == 2 and armed:  # the first is for the hash of the data
                raise KeyboardInterrupt
            return train[0][at], train[1][at]

    def run(sign):
        method = dattri.Method(scorer=released(tmp_path, sign))
        task = dattri.Task(mlp())
        return method.attribute(task, Stops(), test, memory="1MiB", out=tmp_path / "out")

    armed = False
    want = dattri.Method().attribute(dattri.Task(mlp()), train, test).values
    armed = True
    with pytest.raises(KeyboardInterrupt):
        run("")
    armed = False
    with pytest.raises(dattri.StoreError, match="own_scorer:Own"):
        run("-")
    assert torch.equal(torch.as_tensor(run("").values), want)
