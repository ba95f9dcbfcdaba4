"""Class, subclass, shortcut and mixed-source detection, by hand and against scikit-learn."""

import numpy as np
import pytest
import torch
from attrs import evolve
from dattri_metrics import Bootstrap, class_detection, mixed_source_detection, shortcut_detection
from dattri_metrics.classes import ClassDetection, SubclassDetection
from dattri_metrics.origins import MixedSourceDetection, ShortcutDetection
from toy_world import Additive, effects, evidence_of

from dattri_core import InputError

CLASSES = np.array([0, 0, 1, 1, 1, 2])


def same(train, test):
    return (train[:, None] == test).astype(float)


def test_class_detection_by_hand():
    test = np.array([0, 1, 1])
    best = same(CLASSES, test)
    found = class_detection(best, CLASSES, test, k=2)
    assert found.value == 1.0
    assert found.chance == pytest.approx((2 / 6 + 3 / 6 + 3 / 6) / 3)
    assert class_detection(-best, CLASSES, test, k=2).value == 0.0
    silent = class_detection(np.zeros((6, 3)), CLASSES, test, k=2)
    assert silent.value == pytest.approx(silent.chance)
    mixed = best + np.array([[9.0, 0, 0]] * 6) * (np.arange(6) == 5)[:, None]
    assert class_detection(mixed, CLASSES, test, k=2).value == pytest.approx((0.5 + 1 + 1) / 3)


def test_a_class_that_is_smaller_than_k_bounds_it():
    test = np.array([0, 2])
    found = class_detection(same(CLASSES, test), CLASSES, test, k=2)
    assert found.value == found.ceiling == pytest.approx((1 + 0.5) / 2)


def test_labels_may_be_text_and_tensors():
    names = np.array(["cat", "dog", "cat", "dog"])
    scores = torch.from_numpy(same(names, names))
    assert class_detection(scores, names.tolist(), names.tolist()).value == 1.0
    numbers = torch.tensor([3, 4, 3, 4])
    assert class_detection(scores, numbers, numbers).value == 1.0


def average_precisions(scores, positive):
    from sklearn.metrics import average_precision_score

    columns = range(scores.shape[1])
    return np.mean([average_precision_score(positive[:, j], scores[:, j]) for j in columns])


def test_shortcut_and_source_detection_equal_scikit_learn():
    random = np.random.default_rng(0)
    scores = np.round(random.normal(size=(30, 8)), 1)
    marked, asked = random.random(30) < 0.3, random.random(8) < 0.6
    found = shortcut_detection(scores, marked, asked)
    positive = np.repeat(marked[:, None], asked.sum(), axis=1)
    assert found.value == pytest.approx(average_precisions(scores[:, asked], positive))
    train, test = random.integers(0, 3, 30), random.integers(0, 3, 8)
    found = mixed_source_detection(scores, train, test)
    assert found.value == pytest.approx(average_precisions(scores, same(train, test) > 0))
    perfect = mixed_source_detection(same(train, test), train, test)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert 0.3 < perfect.low < 1


def test_scores_without_information_give_chance():
    train, test = np.arange(40) % 4, np.arange(20) % 4
    marked, asked = np.arange(40) % 5 == 0, np.arange(20) % 2 == 0
    values = np.zeros((3, 400))
    for seed in range(400):
        scores = np.random.default_rng(seed).normal(size=(40, 20))
        short = Bootstrap(1)
        found = [
            mixed_source_detection(scores, train, test, bootstrap=short),
            shortcut_detection(scores, marked, asked, bootstrap=short),
            class_detection(scores, train, test, k=3, bootstrap=short),
        ]
        values[:, seed] = [f.value - f.chance for f in found]
    assert (np.abs(values.mean(1)) < 4 * values.std(1) / 20).all()


def test_the_interval_covers_the_mean_precision_of_the_population():
    def drawn(random, n, m):
        marked = random.random(n) < 0.3
        return 1.5 * marked[:, None] + random.normal(size=(n, m)), marked

    scores, marked = drawn(np.random.default_rng(10**6), 40_000, 12)
    truth = shortcut_detection(scores, marked, np.ones(12)).value
    covered = 0
    for seed in range(150):
        scores, marked = drawn(np.random.default_rng(seed), 150, 15)
        short = Bootstrap(300, seed=seed)
        found = shortcut_detection(scores, marked, np.ones(15), bootstrap=short)
        covered += found.low <= truth <= found.high
    assert 0.89 <= covered / 150 <= 0.985


def test_parts_read_the_world():
    random = np.random.default_rng(4)
    scores = random.normal(size=(24, 6))
    evidence = evidence_of(scores, Additive(effects()))
    world = evidence.world
    seed = Bootstrap(seed=evidence.seed)
    labels = world.train[-1].numpy(), world.test[-1].numpy()
    assert ClassDetection(k=2).measure(evidence) == class_detection(
        scores, *labels, k=2, bootstrap=seed
    )
    for part, function, name in (
        (SubclassDetection(), class_detection, "subclasses"),
        (ShortcutDetection(), shortcut_detection, "shortcut"),
        (MixedSourceDetection(), mixed_source_detection, "sources"),
    ):
        train, test = world.facts[name]["train"], world.facts[name]["test"]
        assert part.measure(evidence) == function(scores, train, test, bootstrap=seed)
        assert part.needs == {f"fact:{name}"}
        bare = evolve(evidence, world=evolve(world, facts={}))
        with pytest.raises(InputError, match=f"the world's facts have no '{name}'"):
            part.measure(bare)
    texts = evolve(evidence, world=evolve(world, train=world.train[0]))
    with pytest.raises(InputError, match="no labels as their last tensor"):
        ClassDetection().measure(texts)


def test_bad_input_is_named():
    scores = np.eye(6)[:, :3]
    with pytest.raises(InputError, match="train_labels is int64 of shape"):
        class_detection(scores, CLASSES[:4], CLASSES[:3])
    with pytest.raises(InputError, match="test_labels is float64"):
        class_detection(scores, CLASSES, [0.5, 1, 2])
    texts = ["0", "1", "2"]
    message = r"train_labels are numbers \(0 first\), test_labels texts \('0' first\).*same kind"
    with pytest.raises(InputError, match=message):
        class_detection(scores, CLASSES, texts)
    with pytest.raises(InputError, match=r"train_sources are texts.*test_sources numbers"):
        mixed_source_detection(scores, CLASSES.astype(str), CLASSES[:3])
    with pytest.raises(InputError, match="no test example has one that occurs in the train set"):
        class_detection(scores, CLASSES, [7, 8, 9])
    some = class_detection(scores, CLASSES, [0, 8, 9])  # one class is known
    assert some.chance == pytest.approx(2 / 6 / 3)
    with pytest.raises(InputError, match="all train labels are"):
        class_detection(scores, np.ones(6, int), CLASSES[:3])
    with pytest.raises(InputError, match="none of 3 tests has the shortcut"):
        shortcut_detection(scores, np.arange(6) < 2, np.zeros(3))
    with pytest.raises(InputError, match="6 of 6 train examples have the shortcut"):
        shortcut_detection(scores, np.ones(6), np.ones(3))
    with pytest.raises(
        InputError, match=r"expected \[n_train, n_test\], \[n_train\] and \[n_test\]"
    ):
        shortcut_detection(scores, np.ones(5), np.ones(3))
    with pytest.raises(InputError, match="0 of 6 train examples have the source of test 1"):
        mixed_source_detection(scores, CLASSES, [0, 7, 2])
