"""LDS: closed forms, laws, and intervals and ceilings that hold what they say."""

import numpy as np
import pytest
from dattri_metrics import Bootstrap, lds
from dattri_metrics.datamodels import LinearDatamodelingScore
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from toy_world import Additive, effects, evidence_of

from dattri_core import InputError


def subsets(random, r, n):
    return np.stack([random.permutation(n) < n // 2 for _ in range(r)])


def case(seed=0, r=20, n=16, m=5):
    random = np.random.default_rng(seed)
    masks, scores = subsets(random, r, n), random.normal(size=(n, m))
    return scores, masks, masks @ scores + random.normal(size=(r, m))


SHORT = Bootstrap(200)


def ends(result):
    return result.value, result.low, result.high


def test_additive_outcomes_give_exactly_one():
    scores, masks, _ = case()
    for higher, outcomes in ((True, masks @ scores), (False, 7 - masks @ scores)):
        found = lds(scores, masks, outcomes, higher_is_better=higher)
        assert (found.value, found.high) == (1.0, 1.0)
        assert 0.99 < found.low < 1  # twenty subsets do not prove it of all
        mirrored = lds(-scores, masks, outcomes, higher_is_better=higher)
        assert ends(mirrored) == (-1.0, -1.0, pytest.approx(-found.low))
    assert (found.chance, found.ceiling, found.higher_is_better) == (0.0, None, True)


def test_equals_a_loop_with_scipy():
    scores, masks, outcomes = case()
    each = [
        stats.spearmanr((masks * scores[:, j]).sum(1), -outcomes[:, j]).statistic for j in range(5)
    ]
    found = lds(scores, masks, outcomes, higher_is_better=False)
    assert found.value == pytest.approx(np.mean(each), abs=1e-12)


def test_scores_without_information_give_chance():
    inside = 0
    for seed in range(200):
        _, masks, outcomes = case(seed, r=30, m=20)
        scores = np.random.default_rng(1000 + seed).normal(size=(16, 20))
        found = lds(scores, masks, outcomes, higher_is_better=True, bootstrap=Bootstrap(300))
        inside += found.low <= found.chance <= found.high
    assert 0.91 <= inside / 200 <= 0.985


def population(random, r, m, level, spread, shared):
    """Sums and outcomes with correlation tanh(level + spread z_j), partly shared by the tests."""
    c = np.tanh(level + spread * random.normal(size=m))
    sums, noise = (
        np.sqrt(shared) * random.normal(size=(r, 1))
        + np.sqrt(1 - shared) * random.normal(size=(r, m))
        for _ in range(2)
    )
    return sums, c * sums + np.sqrt(1 - c * c) * noise


@pytest.mark.parametrize(
    ("r", "m", "level", "spread", "shared"),
    [(50, 40, 0.5, 0.2, 0.0), (20, 30, 0.4, 0.1, 0.5), (50, 8, 0.5, 0.4, 0.3)],
)
def test_intervals_cover_the_score_of_the_population(r, m, level, spread, shared):
    """Over tests and subsets: Spearman's of a normal pair is (6 / pi) arcsin(c / 2)."""
    from dattri_metrics.bootstrap import summary
    from dattri_metrics.correlation import correlate

    z = np.random.default_rng(1).normal(size=400_000)
    truth = (6 / np.pi * np.arcsin(np.tanh(level + spread * z) / 2)).mean()
    covered = 0
    for seed in range(300):
        sums, outcomes = population(np.random.default_rng(seed), r, m, level, spread, shared)
        found = summary(
            correlate("lds", "spearman", sums, outcomes), 0.0, Bootstrap(300, seed=seed)
        )
        covered += found.low <= truth <= found.high
    assert 0.915 <= covered / 300 <= 0.98


def test_true_scores_reach_the_ceiling_and_not_more():
    """With noise, scores that are exactly right agree with one training by sqrt(reliability)."""
    random = np.random.default_rng(0)
    scores, masks = random.normal(size=(60, 40)), subsets(random, 400, 60)
    clean = masks @ scores
    first, second = (clean + 3 * random.normal(size=clean.shape) for _ in range(2))
    found = lds(scores, masks, first, higher_is_better=True, again=second)
    assert found.value == pytest.approx(found.ceiling, abs=0.01)
    retrained = np.mean(
        [stats.spearmanr(a, b).statistic for a, b in zip(first.T, second.T, strict=True)]
    )
    assert found.ceiling == pytest.approx(np.sqrt(retrained))
    assert found.value > retrained + 0.1


def test_sums_that_are_equal_but_for_rounding_are_ties():
    random = np.random.default_rng(0)
    masks, outcomes = subsets(random, 12, 30), random.normal(size=(12, 2))
    found = lds(np.full((30, 2), 0.1), masks, outcomes, higher_is_better=True)
    assert ends(found) == (0.0, 0.0, 0.0)
    assert lds(np.zeros((30, 2)), masks, outcomes, higher_is_better=True).value == 0.0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_order_scale_and_monotone_maps_do_not_matter(seed, random):
    scores, masks, outcomes = case(seed)
    want = ends(lds(scores, masks, outcomes, higher_is_better=True, bootstrap=SHORT))

    def shuffled(n):
        order = list(range(n))
        random.shuffle(order)
        return np.array(order)

    rows, tests, train = shuffled(20), shuffled(5), shuffled(16)
    found = lds(
        3.7 * scores[train][:, tests],
        masks[rows][:, train],
        np.exp(outcomes[rows][:, tests]),
        higher_is_better=True,
        bootstrap=SHORT,
    )
    assert ends(found) == pytest.approx(want, abs=1e-9)
    negative = lds(-scores, masks, outcomes, higher_is_better=True, bootstrap=SHORT).value
    assert negative == pytest.approx(-want[0])
    loss = lds(scores, masks, -outcomes, higher_is_better=False, bootstrap=SHORT)
    assert ends(loss) == want


def test_bad_input_is_named():
    scores, masks, outcomes = case()
    good = {"scores": scores, "masks": masks, "outcomes": outcomes, "higher_is_better": True}

    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            lds(**{**good, **changes})

    refused(r"masks \(20, 15\)", masks=masks[:, :15])
    refused(r"outcomes \(19, 5\)", outcomes=outcomes[:19])
    refused(r"outcomes \(20, 4\)", outcomes=outcomes[:, :4])
    refused(
        r"scores\[0, 3\] is nan", scores=np.where(np.indices((16, 5)).sum(0) == 3, np.nan, scores)
    )
    refused("masks holds other values", masks=masks * 0.5)
    refused("masks has shape", masks=masks[0])
    positions = [np.flatnonzero(mask) for mask in masks]
    refused(r"positions become truth values by numpy\.stack", masks=positions)
    refused("rows of different lengths.*numpy.isin", masks=[*positions[1:], [0, 1]])
    for flag in (None, "False", 0):
        refused(f"higher_is_better is {flag!r}; give True or False", higher_is_better=flag)
    refused("all 20 masks are the same", masks=np.ones((20, 16), bool))
    refused("no outcome varies", outcomes=np.ones((20, 5)))
    refused("shapes differ.*again", again=outcomes[:3])
    refused("scores is object|scores is <U", scores=[["a"] * 5] * 16)


def test_the_part_trains_subsets_and_their_twins():
    truth = effects()
    retraining = Additive(truth)
    assert LinearDatamodelingScore(12).measure(evidence_of(truth, retraining)).value == 1
    assert len(retraining.asked) == 12
    assert all(c.mask.sum() == 12 for c in retraining.asked)
    noisy = Additive(truth, noise=1.0)
    part = LinearDatamodelingScore(subsets=40, fraction=0.25, ceiling=True)
    found = part.measure(evidence_of(truth, noisy))
    first, second = noisy.asked[:40], noisy.asked[40:]
    assert all(c.mask.sum() == 6 for c in first)
    assert all(
        (a.mask == b.mask).all() and a.seed != b.seed for a, b in zip(first, second, strict=True)
    )
    assert len({c.seed for c in noisy.asked}) == 80
    assert 0 < found.value < 1
    assert 0 < found.ceiling < 1
    assert part.measure(evidence_of(truth, noisy)) == found
    assert part.measure(evidence_of(truth, noisy, seed=1)) != found  # other subsets
    gain = part.measure(evidence_of(truth, noisy, target="gain"))
    assert gain == found  # minus the loss, more is better


def test_one_seed_trains_the_same_subsets_from_the_start_of_the_model():
    truth = effects()
    each, one = Additive(truth, noise=1.0), Additive(truth, noise=1.0)
    LinearDatamodelingScore(30).measure(evidence_of(truth, each, seed=4))
    LinearDatamodelingScore(30, one_seed=True).measure(evidence_of(truth, one, seed=4))
    assert [c.mask.tolist() for c in one.asked] == [c.mask.tolist() for c in each.asked]
    assert {c.seed for c in one.asked} == {4}
    with pytest.raises(InputError, match="one_seed=true allows one"):
        LinearDatamodelingScore(ceiling=True, one_seed=True)


def test_scores_in_tenths_have_the_ties_of_whole_numbers():
    random = np.random.default_rng(0)
    whole = random.integers(-3, 4, size=(30, 8)).astype(float)
    masks, outcomes = subsets(random, 40, 30), random.normal(size=(40, 8))
    want = lds(whole, masks, outcomes, higher_is_better=True)
    order = random.permutation(30)
    tenths = lds(0.1 * whole[order], masks[:, order], outcomes, higher_is_better=True)
    assert ends(tenths) == pytest.approx(ends(want), abs=1e-12)
