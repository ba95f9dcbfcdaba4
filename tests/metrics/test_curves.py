"""Removal and insertion curves of additive outcomes, whose best order is known."""

import numpy as np
import pytest
from dattri_metrics import Curve, curve
from dattri_metrics.curves import InsertionCurve, RemovalCurve
from toy_world import Additive, effects, evidence_of

from dattri_core import InputError


def test_the_curve_is_what_retraining_gives_in_order_of_the_mean_score():
    truth = effects()
    retraining = Additive(truth)
    made = RemovalCurve(shares=(0.0, 0.25, 0.5)).curve(evidence_of(truth, retraining))
    assert isinstance(made, Curve)
    gains = np.sort(truth.mean(axis=1))[::-1]
    want = [gains[k:].sum() - 10 for k in (0, 6, 12)]
    assert made.mean == pytest.approx(want)
    assert made.goodness.shape == (3, 1, 6)
    made = InsertionCurve(shares=(0.25, 0.5)).curve(evidence_of(truth, retraining))
    assert made.mean == pytest.approx([gains[:k].sum() - 10 for k in (6, 12)])
    assert [int(c.mask.sum()) for c in retraining.asked] == [24, 18, 12] * 2 + [6, 12] * 2


def test_the_area_is_that_under_straight_lines():
    shares = [0.0, 0.1, 0.5]
    heights = np.array([[4.0, 2.0], [3.0, 0.0], [1.0, 0.0]])  # [q, n_test]
    control = np.ones((3, 2, 2))
    made = curve("removal", shares, heights[:, None], control, higher_is_better=True)
    each = [(0.1 * 3.5 + 0.4 * 2.0) / 0.5, (0.1 * 1.0 + 0.4 * 0.0) / 0.5]  # by hand
    found = made.area()
    assert found.value == pytest.approx(np.mean(each))
    assert found.chance == pytest.approx(1.0)
    assert not found.higher_is_better
    loss = curve("insertion", [0.1, 0.2, 0.5], -heights[:, None], -control, higher_is_better=False)
    assert loss.mean == pytest.approx(heights.mean(1))
    orders = np.arange(12.0).reshape(3, 2, 2)
    random = curve("removal", shares, -heights[:, None], -orders, higher_is_better=False)
    assert random.control_mean == pytest.approx([1.5, 5.5, 9.5])
    assert loss.area().higher_is_better


@pytest.mark.parametrize("part", [RemovalCurve, InsertionCurve])
def test_no_order_is_better_than_that_of_the_effects(part):
    truth = effects()

    def area(scores):
        return part(orders=3).measure(evidence_of(scores, Additive(truth)))

    best, worst = area(truth), area(-truth)
    random = area(np.random.default_rng(1).normal(size=truth.shape))
    sign = 1 if best.higher_is_better else -1
    assert sign * best.value > sign * random.value > sign * worst.value
    assert sign * best.value > sign * best.chance > sign * worst.value
    assert best.chance == worst.chance
    assert best.low < best.value < best.high


def test_repeats_are_other_seeds_and_the_interval_is_over_both():
    truth = np.repeat(effects()[:, :1], 50, axis=1)  # all tests alike but for noise
    retraining = Additive(truth, noise=1.0)
    part = RemovalCurve(shares=(0.0, 0.5), repeats=4, orders=2)
    found = part.measure(evidence_of(truth, retraining))
    assert len(retraining.asked) == 2 * (4 + 2)
    assert len({c.seed for c in retraining.asked[:8]}) == 4
    assert found.low < found.value < found.high
    assert part.measure(evidence_of(truth, retraining)) == found


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("removal", (0.0,)),
        ("removal", (0.2, 0.1)),
        ("removal", (0.0, 1.0)),
        ("removal", (-0.1, 0.5)),
        ("insertion", (0.0, 0.5)),
        ("insertion", (0.5, 1.1)),
    ],
)
def test_bad_shares(kind, shares):
    part = {"removal": RemovalCurve, "insertion": InsertionCurve}[kind](shares=shares)
    retraining = Additive(effects())
    with pytest.raises(InputError, match=f"{kind}-curve: shares are"):
        part.measure(evidence_of(effects(), retraining))
    assert not retraining.asked


def test_bad_arrays():
    good = np.zeros((2, 1, 3))
    with pytest.raises(InputError, match=r"outcomes \(3, 1, 3\)"):
        curve("removal", [0, 0.5], np.zeros((3, 1, 3)), good, higher_is_better=True)
    with pytest.raises(InputError, match="expected 'removal'"):
        curve("removals", [0, 0.5], good, good, higher_is_better=True)
    with pytest.raises(InputError, match="repeats is 0"):
        RemovalCurve(repeats=0).measure(evidence_of(effects(), Additive(effects())))
