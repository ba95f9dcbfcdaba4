"""Subsets of CIFAR-10: from a file of their own or from the official archive, the same arrays."""

import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from dattri_benchmarks import cifar
from dattri_benchmarks import fetch as fetching

from dattri_core.errors import InputError, StoreError

REAL = Path(os.environ.get("DATTRI_DATA", fetching.data_folder())) / "cifar"


def tar_of(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An archive of the official form with 12 records a file, a fake network that serves it."""
    random = np.random.default_rng(0)
    records = random.integers(0, 256, (72, 1 + cifar.PIXELS)).astype(np.uint8)
    records[:, 0] = [*random.permutation(60) % 10, *random.permutation(12) % 10]
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    parts = {n: records[12 * k : 12 * k + 12].tobytes() for k, n in enumerate(names)}
    packed = tar_of(parts)
    web = {cifar.ARCHIVE.urls[0]: packed}

    def urlopen(url, timeout):
        if url not in web:
            raise urllib.error.URLError("no route")
        return io.BytesIO(web[url])

    archive = attrs.evolve(cifar.ARCHIVE, sha256=hashlib.sha256(packed).hexdigest())
    subset = cifar.Subset("two.npz", (3, 5), 4, 1, "")
    monkeypatch.setattr(cifar, "RECORDS", 12)
    found = cifar._digest(cifar._from_archive(subset, packed))
    monkeypatch.setattr(cifar, "ARCHIVE", archive)
    monkeypatch.setattr(cifar, "SUBSETS", {"two": attrs.evolve(subset, sha256=found)})
    monkeypatch.setenv("DATTRI_DATA", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return tmp_path / "cifar", web, records, parts


def test_the_archive_is_downloaded_once_and_gives_the_first_of_each_class(small):
    folder, web, records, _ = small
    train, test = cifar.read_cifar("two")
    web.clear()
    again, _ = cifar.read_cifar("two")
    assert np.array_equal(again.images, train.images)
    assert [p.name for p in folder.iterdir()] == ["cifar-10-binary.tar.gz"]
    want = [i for i in range(60) if records[i, 0] in (3, 5)]
    first = sorted([i for c in (3, 5) for i in [j for j in want if records[j, 0] == c][:4]])
    assert train.index.tolist() == first
    assert train.labels.tolist() == [{3: 0, 5: 1}[records[i, 0]] for i in first]
    for image, i in zip(train.images, first, strict=True):
        for row, column, channel in ((0, 0, 0), (31, 2, 1), (7, 30, 2)):
            at = 1 + channel * 1024 + row * 32 + column
            assert image[row, column, channel] == records[i, at]
    assert len(test.index) == 2
    assert (test.images.shape, test.images.dtype) == ((2, 32, 32, 3), np.uint8)


def test_the_world_of_an_archive(small, monkeypatch):
    """Inputs, pictures, labels and ids are those of the records."""
    _, _, records, _ = small
    pool = records[:60]
    test = np.concatenate([records[60:], records[60:]])
    images = pool[:, 1:].reshape(-1, 3, 32, 32)
    packed = tuple(
        cifar.Images(part[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), part[:, 0], at)
        for part, at in ((pool, np.arange(60)), (test, np.arange(24)))
    )
    monkeypatch.setattr(cifar, "read_cifar", lambda name: packed)
    quick = attrs.evolve(
        cifar.cifar10_setting, recipe=cifar.Recipe(epochs=2, batch=20, learning_rate=0.01)
    )
    world = quick.load((50, 20), seed=1)
    at = np.array([int(i.removeprefix("train-")) for i in world.train_ids])
    assert np.array_equal(world.true_labels, pool[at, 0])
    assert np.array_equal(world.pictures[0].transpose(0, 3, 1, 2), images[at])
    mean = np.array([0.4914, 0.4822, 0.4465])[:, None, None]
    deviation = np.array([0.2470, 0.2435, 0.2616])[:, None, None]
    assert np.allclose(world.train[0].numpy(), (images[at] / 255 - mean) / deviation, atol=1e-6)
    with pytest.raises(InputError, match="61 are asked for, and there are 60"):
        quick.load((61, 20))
    # The same network whatever the threads around it.
    before, fingerprints = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            task = quick.load((50, 20), seed=1).task
            fingerprints.add(task.checkpoints[-1].fingerprint(task.model))
    finally:
        torch.set_num_threads(before)
    assert len(fingerprints) == 1


def test_the_size_decides_the_network():
    for setting, classes in ((cifar.cifar2_setting, 2), (cifar.cifar10_setting, 10)):
        (small, _), (full, _) = setting.sizes["small"], setting.sizes["full"]
        for n, width in ((small, 8), (full, 64)):
            network = setting.network(n)
            assert f"width {width}" in network.title
            assert network.threads == (1 if n == small else None)
            model = network.build()
            assert model[-1].weight.shape == (classes, 8 * width)


def test_a_file_of_the_subset_is_preferred_and_checked(small):
    folder, web, _, _ = small
    train, test = cifar.read_cifar("two")
    arrays = {
        f"{what}_{name}": values
        for name, part in (("train", train), ("test", test))
        for what, values in (("x", part.images), ("y", part.labels), ("idx", part.index))
    }
    (folder / cifar.ARCHIVE.name).unlink()
    web.clear()
    np.savez(folder / "two.npz", **arrays)
    assert np.array_equal(cifar.read_cifar("two")[0].images, train.images)
    arrays["x_train"] = arrays["x_train"].copy()
    arrays["x_train"][0, 0, 0, 0] ^= 1
    np.savez(folder / "two.npz", **arrays)
    with pytest.raises(StoreError, match=r"two\.npz.*SHA-256.*delete it"):
        cifar.read_cifar("two")
    del arrays["y_test"]
    np.savez(folder / "two.npz", **arrays)
    with pytest.raises(StoreError, match="y_test"):
        cifar.read_cifar("two")
    (folder / "two.npz").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(StoreError, match=r"two\.npz"):
        cifar.read_cifar("two")


def test_a_pickle_in_place_of_the_file_is_not_loaded(small):
    folder, _, _, _ = small
    folder.mkdir()
    np.save(folder / "two.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "two.npy").rename(folder / "two.npz")
    with pytest.raises(StoreError, match=r"two\.npz"):
        cifar.read_cifar("two")


def test_without_either_the_error_says_what_to_do(small):
    _, web, _, _ = small
    web.clear()
    with pytest.raises(InputError, match="DATTRI_DATA"):
        cifar.read_cifar("two")


def test_another_archive_is_not_believed(small, monkeypatch):
    folder, web, _, parts = small
    url = next(iter(web))
    web[url] = tar_of({**parts, "test_batch": b"short"})
    with pytest.raises(InputError, match="SHA-256"):
        cifar.read_cifar("two")
    assert not folder.exists()
    known = attrs.evolve(cifar.ARCHIVE, sha256=hashlib.sha256(web[url]).hexdigest())
    monkeypatch.setattr(cifar, "ARCHIVE", known)
    with pytest.raises(StoreError, match=r"test_batch\.bin.*5 bytes"):
        cifar.read_cifar("two")


@pytest.mark.parametrize(
    ("name", "train", "test"), [("cifar2", [2500] * 2, [250] * 2), ("cifar10", [500] * 10, None)]
)
def test_real_subsets(name, train, test):
    if not (REAL / cifar.SUBSETS[name].name).exists():
        pytest.skip(f"no cifar/{cifar.SUBSETS[name].name} in the folder that DATTRI_DATA names")
    parts = cifar.read_cifar(name)
    assert parts[0].images.shape == (5000, 32, 32, 3)
    assert np.bincount(parts[0].labels).tolist() == train
    assert np.bincount(parts[1].labels).tolist() == (test or [100] * 10)
    labels = REAL / "cifar10n_human_labels.npz"
    if labels.exists():  # the official labels of all train images
        with np.load(labels, allow_pickle=False) as found:
            given = found["clean_label"]
        classes, count = cifar.SUBSETS[name].classes, cifar.SUBSETS[name].train
        first = np.sort(np.concatenate([np.flatnonzero(given == c)[:count] for c in classes]))
        assert np.array_equal(parts[0].index, first)
        assert np.array_equal(np.array(classes)[parts[0].labels], given[first])
