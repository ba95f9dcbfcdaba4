"""Outcomes that come with the documentation: whole, and those of the setting as its code stands."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from dattri_benchmarks.fetch import data_folder
from dattri_parts.training import random_subsets
from dattri_retrain import CounterfactualStore, SettingRetraining
from dattri_retrain.facts import read_manifest
from dattri_retrain.shards import PATTERN, read_shard

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "outcomes"
CIFAR2 = FOLDER / "cifar2_resnet9_5000x500.tar.gz"
DATA = Path(os.environ.get("DATTRI_DATA", data_folder()))


def unpacked(archive, folder):
    with tarfile.open(archive) as held:
        held.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / "retrained"


@pytest.mark.parametrize("archive", sorted(FOLDER.glob("*.tar.gz")), ids=lambda path: path.name)
def test_kept_outcomes_are_whole_and_lie_under_their_fingerprint(archive, tmp_path):
    (folder,) = unpacked(archive, tmp_path).iterdir()
    facts = read_manifest(folder)
    assert folder.name == facts.fingerprint
    shards = [read_shard(path, facts) for path in folder.glob(PATTERN)]
    keys = {key for shard in shards for key in shard.keys}
    assert keys == {plan.key for plan in random_subsets(facts.n_train, len(keys))}
    for shard in shards:
        loss, margin, correct = (shard.outcomes[name] for name in ("loss", "margin", "correct"))
        np.testing.assert_allclose(loss, np.logaddexp(0, -margin), rtol=1e-12, atol=1e-12)
        assert np.array_equal(correct > 0, margin > 0)


def test_kept_outcomes_are_found_by_the_setting_as_it_stands(tmp_path, monkeypatch):
    if not (DATA / "cifar").is_dir():
        pytest.skip(f"no images below {DATA}")
    monkeypatch.setenv("DATTRI_DATA", str(DATA))
    retraining = SettingRetraining("cifar2-resnet9")
    said = "the outcomes are of another retraining: give them its fingerprint, or train them anew"
    store = CounterfactualStore(unpacked(CIFAR2, tmp_path), retraining)
    assert not store.missing(random_subsets(retraining.n_train, 50)), said
    assert store.outcomes(random_subsets(retraining.n_train, 2), "loss").shape == (2, 500)
