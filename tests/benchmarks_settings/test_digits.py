"""The embedded data set and the world made of it."""

import hashlib
import zipfile
from importlib.resources import files

import numpy as np
import pytest
import torch
from dattri_benchmarks import digits
from dattri_benchmarks.images import change_labels

from dattri_core.errors import InputError

PATH = files("dattri_benchmarks").joinpath("data", "digits.npz")


@pytest.fixture(scope="module")
def world():
    return digits.setting.load((300, 60), seed=3, wrong=0.05)


def test_the_shipped_file_is_the_known_one_and_holds_no_pickle():
    assert hashlib.sha256(PATH.read_bytes()).hexdigest() == digits.SHA256
    with zipfile.ZipFile(str(PATH)) as found:
        assert sorted(found.namelist()) == ["images.npy", "labels.npy"]
    images, labels = digits.read_digits()
    assert (images.shape, labels.shape) == ((1797, 8, 8), (1797,))
    assert images.max() == 16
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_the_file_equals_the_copy_in_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    images, labels = digits.read_digits()
    assert np.array_equal(images, found.images)
    assert np.array_equal(labels, found.target)


def test_the_licence_is_shipped_beside_it():
    text = files("dattri_benchmarks").joinpath("data", "digits.LICENSE.txt").read_text()
    assert "Alpaydin" in text
    assert "10.24432/C50P49" in text
    assert "CC BY 4.0" in text


def test_five_per_cent_of_train_labels_are_wrong_and_known(world):
    assert world.flipped.sum() == 15
    given = world.train[1].numpy()
    assert np.array_equal(given != world.true_labels, world.flipped)
    images, labels = digits.read_digits()
    for side, truth in ((0, world.true_labels), (1, world.test[1].numpy())):
        index = [int(i.removeprefix("digit-")) for i in (world.train_ids, world.test_ids)[side]]
        assert np.array_equal(labels[index], truth)
        inputs = (world.train, world.test)[side][0]
        assert np.array_equal(inputs.numpy() * 16, images[index])
    assert not set(world.train_ids) & set(world.test_ids)


def test_the_same_seed_gives_the_same_world_and_another_a_different_one(world):
    again = digits.setting.load((300, 60), seed=3, wrong=0.05)
    assert again.train_ids == world.train_ids
    assert np.array_equal(again.flipped, world.flipped)
    for name, tensor in world.task.model.state_dict().items():
        assert torch.equal(tensor, again.task.model.state_dict()[name])
    assert digits.setting.load((300, 60), seed=4).train_ids != world.train_ids


def test_loading_leaves_the_users_random_numbers_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    digits.setting.load((40, 20))
    assert torch.equal(torch.rand(3), want)


def test_the_network_learns_the_digits_and_the_checkpoints_are_its_run():
    world = digits.setting.load(wrong=0.05)
    assert world.facts["test_accuracy"] > 0.94
    assert world.facts["parameters"] == 1810
    model = world.task.model
    losses = []
    for checkpoint in world.trajectory.checkpoints:
        state = checkpoint.load(model)
        with torch.no_grad():
            out = torch.func.functional_call(model, state, world.test[0])
            losses.append(torch.nn.functional.cross_entropy(out, world.test[1]).item())
    assert losses[0] > 2 * losses[-1]
    rates = [c.learning_rate for c in world.trajectory.checkpoints]
    assert rates == sorted(rates, reverse=True)
    final = world.trajectory.checkpoints[-1].load(model)
    for name, tensor in world.task.checkpoints[0].load(model).items():
        assert torch.equal(tensor, final[name])


@pytest.mark.parametrize("size", [(1790, 60), (10, 60), (300, 0)])
def test_sizes_that_cannot_be_are_refused(size):
    with pytest.raises(InputError, match="digits"):
        digits.setting.load(size)


def test_flips_are_spread_over_the_other_classes():
    labels = np.zeros(10_000, dtype=np.uint8)
    noisy = change_labels(labels, 10, 0.5, seed=0)
    where = noisy != labels
    assert where.sum() == 5000
    counts = np.bincount(noisy[where], minlength=10)
    assert counts[0] == 0
    assert (abs(counts[1:] - 5000 / 9) < 5 * np.sqrt(5000 / 9)).all()
