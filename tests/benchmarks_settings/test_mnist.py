"""MNIST from a folder, a mirror, or nowhere; the network of the published benchmarks."""

import gzip
import hashlib
import io
import itertools
import os
import struct
import urllib.error
import urllib.request
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from dattri_benchmarks import fetch as fetching
from dattri_benchmarks import mnist, models

from dattri_core import Counterfactual
from dattri_core.errors import InputError, StoreError

REAL = Path(os.environ.get("DATTRI_DATA", fetching.data_folder()))
have_mnist = pytest.mark.skipif(
    not (REAL / "mnist" / "train-images-idx3-ubyte.gz").exists(),
    reason="no mnist/ in the folder that DATTRI_DATA names",
)


def idx(array):
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A data set of the same format, with its own checksums, served by a fake network."""
    rng = np.random.default_rng(0)
    web, sums, arrays = {}, {}, {}
    for part, count in (("train", 90), ("t10k", 40)):
        for what, array in (
            ("images", rng.integers(0, 256, (count, 28, 28))),
            ("labels", np.arange(count) % 10),
        ):
            name = f"{part}-{what}-idx{array.ndim}-ubyte.gz"
            web[mnist.MIRRORS[1] + name] = gzip.compress(idx(array))
            sums[f"{part}-{what}"] = hashlib.sha256(idx(array)).hexdigest()
            arrays[f"{part}-{what}"] = array
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        if url not in web:
            raise urllib.error.URLError("no route")
        return io.BytesIO(web[url])

    monkeypatch.setattr(mnist, "SHA256", sums)
    monkeypatch.setenv("DATTRI_DATA", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return tmp_path / "mnist", web, asked, arrays


def test_a_missing_file_is_downloaded_once_from_the_mirror_that_answers(small):
    folder, _, asked, arrays = small
    images, labels = mnist.read_mnist("train")
    assert np.array_equal(images, arrays["train-images"])
    assert np.array_equal(labels, arrays["train-labels"])
    assert [url.startswith(mnist.MIRRORS[0]) for url in asked] == [True, False, True, False]
    asked.clear()
    assert np.array_equal(mnist.read_mnist("train")[0], images)
    assert asked == []
    assert sorted(p.name for p in folder.iterdir()) == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]


def test_without_a_network_the_error_says_what_to_do(small):
    folder, web, _, _ = small
    web.clear()
    with pytest.raises(InputError, match="DATTRI_DATA") as caught:
        mnist.read_mnist("train")
    assert all(mirror in str(caught.value) for mirror in mnist.MIRRORS)
    assert not folder.exists()


def test_a_mirror_that_serves_something_else_is_not_believed(small):
    folder, web, _, _ = small
    for url in web:
        web[url] = gzip.compress(b"another file")
    with pytest.raises(InputError, match="SHA-256"):
        mnist.read_mnist("t10k")
    assert not folder.exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"<html>", lambda b: b""])
def test_a_damaged_file_in_the_folder_is_refused_by_name(small, damage):
    folder, _, _, _ = small
    mnist.read_mnist("train")
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StoreError, match=r"train-labels-idx1-ubyte\.gz"):
        mnist.read_mnist("train")


def test_the_world_of_a_small_mnist(small):
    world = mnist.mlp_setting.load((60, 30), seed=1, wrong=0.05)
    _, _, _, arrays = small
    index = [int(i.removeprefix("train-")) for i in world.train_ids]
    pixels = arrays["train-images"][index]
    assert np.array_equal(world.pictures[0], pixels)
    assert np.allclose(world.train[0].numpy(), (pixels / 255 - 0.1307) / 0.3081, atol=1e-6)
    assert np.array_equal(world.true_labels, arrays["train-labels"][index])
    assert world.flipped.sum() == 3
    with pytest.raises(InputError, match="there are 90"):
        mnist.mlp_setting.load((91, 30))


def test_the_networks_have_the_published_sizes():
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(models.mnist_mlp()) == 109_386
    assert count(models.mnist_logistic_regression()) == 7_850


def test_the_folder_of_data(monkeypatch, tmp_path):
    monkeypatch.setenv("DATTRI_DATA", str(tmp_path / "named"))
    assert fetching.data_folder() == tmp_path / "named"
    monkeypatch.delenv("DATTRI_DATA")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert fetching.data_folder() == tmp_path / "cache" / "dattri"


@have_mnist
def test_real_mnist():
    md5 = {}
    for part in ("train", "t10k"):
        images, labels = mnist.read_mnist(part)
        assert images.shape == ({"train": 60_000, "t10k": 10_000}[part], 28, 28)
        assert set(np.unique(labels)) == set(range(10))
        md5[part] = hashlib.md5(idx(images)).hexdigest()
    assert md5 == {
        "train": "6bbc9ace898e44ae57da46a324031adb",
        "t10k": "2646ac647ad5339dbf082846283269ea",
    }


@pytest.mark.slow
@have_mnist
def test_logistic_regression_is_at_its_one_optimum():
    """The gradient of mean loss + (l2 / 2) |theta|^2 vanishes, whatever the seed of the start."""
    ends = []
    for seed in (0, 1):
        setting = mnist.lr_setting
        world = setting.load((300, 50), seed=0)
        whole = Counterfactual(np.ones(300, dtype=bool), seed)
        (state,) = world.retraining.train([whole])
        x, y = world.train[0].double().flatten(1), world.train[1]
        weight, bias = (state[f"1.{name}"].double() for name in ("weight", "bias"))
        error = (x @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(y, 10)
        slope = torch.cat(
            [error.T @ x / 300 + mnist.L2 * weight, (error.mean(0) + mnist.L2 * bias)[:, None]], 1
        )
        assert slope.norm() < 1e-6
        ends.append(weight)
    assert (ends[0] - ends[1]).abs().max() < 1e-6
    assert world.damping == mnist.L2


def test_plain_steps_are_those_of_the_published_benchmark(small):
    """theta' = theta - 0.01 times the gradient of the mean loss of 32 images, 20 times over all."""
    world = mnist.lr_sgd_setting.load((64, 30), seed=1)
    points = world.steps().checkpoints
    steps = [point for point in points if point.step.batch.numel()]
    assert [len(point.step.batch) for point in steps] == [32] * 40
    for at, after in itertools.pairwise(points):
        weight, bias = (at.source[f"1.{name}"] for name in ("weight", "bias"))
        images, labels = (part[at.step.batch] for part in world.train)
        error = (images.flatten(1) @ weight.T + bias).softmax(1)
        error -= torch.nn.functional.one_hot(labels, 10)
        moved = weight - 0.01 * error.T @ images.flatten(1) / 32
        assert torch.allclose(after.source["1.weight"], moved, atol=1e-6)
        assert torch.allclose(after.source["1.bias"], bias - 0.01 * error.mean(0), atol=1e-6)
    mask = np.arange(64) != 5
    retraining = mnist.lr_sgd_setting.retraining((64, 30), seed=1)
    without = retraining.steps(Counterfactual(mask, 1))
    pairs = zip(steps, without, strict=False)
    shared = [
        len(set(one.step.batch.tolist()) & set(two.step.batch.tolist())) for one, two in pairs
    ]
    assert min(shared) >= 31  # of 32: the order of the images is shared
    assert world.damping == pytest.approx(1 / (0.01 * 20 * np.ceil(5000 / 32)), rel=0.1)
    half = Counterfactual(np.arange(64) % 2 == 0, 1)
    long = attrs.evolve(mnist.lr_sgd_setting, length="steps").retraining((64, 30), seed=1)
    assert [len(made.steps(half)) - 1 for made in (retraining, long)] == [20, 40]


@pytest.mark.slow
@have_mnist
@pytest.mark.parametrize(
    ("name", "least"), [("lr_setting", 0.88), ("lr_sgd_setting", 0.88), ("mlp_setting", 0.93)]
)
def test_networks_learn_at_full_size(name, least):
    world = getattr(mnist, name).load()
    assert world.facts["test_accuracy"] > least
    assert world.facts["n_test"] == 500
