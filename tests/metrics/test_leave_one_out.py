"""Leave-one-out correlation against ridge regression, whose leave-one-out is known exactly."""

import numpy as np
import pytest
from attrs import field, frozen
from dattri_metrics import Bootstrap, loo_correlation, top_k_overlap
from dattri_metrics.leave_one_out import LeaveOneOutPearson, LeaveOneOutSpearman
from dattri_metrics.overlap import TopKOverlap
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from toy_world import Additive, effects, evidence_of

from dattri_core import InputError


@frozen(eq=False)
class Ridge:
    """Squared error of ridge regression, refitted on every mask; a fixed L2 term."""

    x: np.ndarray
    y: np.ndarray
    test: tuple
    l2: float = 0.7
    asked: list = field(factory=list)
    targets = {"loss": False}

    @property
    def n_train(self):
        return len(self.x)

    @property
    def n_test(self):
        return len(self.test[1])

    def fit(self, mask):
        x, y = self.x[mask], self.y[mask]
        return np.linalg.solve(x.T @ x + self.l2 * np.eye(x.shape[1]), x.T @ y)

    def outcomes(self, counterfactuals, target):
        self.asked.extend(counterfactuals)
        x, y = self.test
        return np.stack([(x @ self.fit(c.mask) - y) ** 2 / 2 for c in counterfactuals])

    def hat_effects(self):
        """Rise of each test loss when i is left out, without a refit: the hat-matrix formula."""
        everyone = np.ones(len(self.x), dtype=bool)
        inverse = np.linalg.inv(self.x.T @ self.x + self.l2 * np.eye(self.x.shape[1]))
        theta = self.fit(everyone)
        hat = np.einsum("ni,ij,nj->n", self.x, inverse, self.x)
        residual = self.y - self.x @ theta
        moved = -(self.x @ inverse) * (residual / (1 - hat))[:, None]  # theta without i - theta
        x, y = self.test
        before = x @ theta - y
        after = before[None, :] + moved @ x.T
        return (after**2 - before**2) / 2


def ridge(n=30, m=7, d=4):
    random = np.random.default_rng(0)
    x, test = random.normal(size=(n, d)), random.normal(size=(m, d))
    truth = random.normal(size=d)
    return Ridge(x, x @ truth + random.normal(size=n), (test, test @ truth + random.normal(size=m)))


@pytest.mark.parametrize("part", [LeaveOneOutPearson, LeaveOneOutSpearman])
def test_the_hat_matrix_agrees_with_refits_perfectly(part):
    world = ridge()
    found = part().measure(evidence_of(world.hat_effects(), world))
    assert (found.value, found.high) == pytest.approx((1, 1), abs=1e-9)
    assert 0.99 < found.low < 1
    against = part().measure(evidence_of(-world.hat_effects(), world))
    assert against.value == pytest.approx(-1, abs=1e-9)
    assert len(world.asked) == 60
    assert sorted(int(np.flatnonzero(~c.mask)[0]) for c in world.asked[:30]) == list(range(30))
    assert {c.mask.sum() for c in world.asked} == {29}
    assert len({c.seed for c in world.asked}) == 1


def test_equals_a_loop_with_scipy_and_first_order_influence_is_close():
    world = ridge()
    x, (test, y) = world.x, world.test
    theta = world.fit(np.ones(30, bool))
    inverse = np.linalg.inv(x.T @ x + world.l2 * np.eye(4))
    gradients = x * (x @ theta - world.y)[:, None]
    scores = gradients @ inverse @ (test * (test @ theta - y)[:, None]).T  # the influence function
    truth = world.hat_effects()
    for kind, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        found = loo_correlation(scores, truth, higher_is_better=False, correlation=kind)
        each = [function(scores[:, j], truth[:, j]).statistic for j in range(7)]
        assert found.value == pytest.approx(np.mean(each), abs=1e-12)
        assert found.value > 0.9
        assert found.low < found.value < found.high <= 1


def test_the_direction_of_the_outcome():
    scores = effects()
    for higher, outcomes in ((False, scores), (True, -scores)):
        assert loo_correlation(scores, outcomes, higher_is_better=higher).value == pytest.approx(1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["pearson", "spearman"]))
def test_order_and_scale_do_not_matter(seed, kind):
    random = np.random.default_rng(seed)
    scores, outcomes = random.normal(size=(2, 12, 4))
    given_ = {"higher_is_better": False, "correlation": kind, "bootstrap": Bootstrap(100)}
    want = loo_correlation(scores, outcomes, **given_)
    rows, tests = random.permutation(12), random.permutation(4)
    moved = 5 * outcomes + 3 if kind == "pearson" else np.exp(outcomes)
    found = loo_correlation(2.5 * scores[rows][:, tests], moved[rows][:, tests], **given_)
    assert (found.value, found.low, found.high) == pytest.approx(
        (want.value, want.low, want.high), abs=1e-9
    )


def test_intervals_cover_pearson_over_tests_and_train_examples():
    covered = 0
    for seed in range(150):
        random = np.random.default_rng(seed)
        common = random.normal(size=(60, 1))
        scores = common + random.normal(size=(60, 15))
        truth = common + random.normal(size=(60, 15))  # correlation 1 / 2 in each column
        found = loo_correlation(
            scores, truth, higher_is_better=False, bootstrap=Bootstrap(300, seed=seed)
        )
        covered += found.low <= 0.5 <= found.high
    assert 0.90 <= covered / 150 <= 0.985


def test_some_examples_and_the_ceiling():
    truth = effects(40, 6)
    noisy = Additive(truth, noise=1.0)
    part = LeaveOneOutPearson(examples=15, ceiling=True)
    found = part.measure(evidence_of(truth, noisy))
    assert len(noisy.asked) == 30
    assert len({c.seed for c in noisy.asked}) == 2
    left_out = [int(np.flatnonzero(~c.mask)[0]) for c in noisy.asked]
    assert left_out[:15] == left_out[15:] == sorted(set(left_out))
    # the noise of a seed is the same for all train sets here, so it drops out of the correlation
    assert found.value == pytest.approx(1)
    assert found.ceiling == pytest.approx(1)
    with pytest.raises(InputError, match="examples is 41 of 40"):
        LeaveOneOutPearson(examples=41).measure(evidence_of(truth, noisy))


def test_a_noisy_truth_has_a_ceiling_that_true_scores_reach():
    random = np.random.default_rng(0)
    truth = random.normal(size=(4000, 10))
    first, second = (truth + 2 * random.normal(size=truth.shape) for _ in range(2))
    found = loo_correlation(truth, first, higher_is_better=False, again=second)
    assert found.ceiling == pytest.approx(1 / np.sqrt(5), abs=0.02)
    assert found.value == pytest.approx(found.ceiling, abs=0.02)


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"loo-spearman: shapes differ: scores \(4, 2\)"):
        loo_correlation(np.eye(4)[:, :2], np.eye(4), higher_is_better=True, correlation="spearman")
    with pytest.raises(InputError, match="over 2 rows"):
        loo_correlation(np.eye(2), np.eye(2), higher_is_better=True)
    with pytest.raises(InputError, match=r"outcomes\[0, 0\] is inf"):
        loo_correlation(np.eye(4), np.diag([np.inf, 1, 1, 1]), higher_is_better=True)
    with pytest.raises(InputError, match="correlation is 'kendall'; give 'pearson' or 'spearman'"):
        loo_correlation(np.eye(4), np.eye(4), higher_is_better=True, correlation="kendall")
    with pytest.raises(InputError, match="higher_is_better is None"):
        loo_correlation(np.eye(4), np.eye(4), higher_is_better=None)
    wrong_size = evidence_of(effects(9, 9), Additive(effects()))
    for part in (LeaveOneOutPearson(), TopKOverlap()):
        with pytest.raises(InputError, match="the world has 24 train and 6 test"):
            part.measure(wrong_size)


# --- top-k overlap --------------------------------------------------------------------------------
def test_top_k_overlap_by_hand():
    one = np.array([[5.0, 1], [4, 2], [3, 3], [2, 4], [1, 5]])
    two = np.array([[5.0, 5], [1, 4], [4, 3], [2, 2], [3, 1]])
    found = top_k_overlap(one, two, k=2)
    assert found.value == pytest.approx((1 / 2 + 0) / 2)
    assert found.chance == pytest.approx(2 / 5)
    assert top_k_overlap(one, one, k=3).value == 1.0
    assert top_k_overlap(one, -one, k=2).value == 0.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_ties_give_the_mean_over_random_ties(seed, k):
    random = np.random.default_rng(seed)
    one, two = random.integers(0, 3, size=(2, 6, 1)).astype(float)
    draws = 3000
    tops = []
    for scores in (one, two):
        broken = scores + 1e-3 * random.random((6, draws))
        tops.append(np.argsort(np.argsort(-broken, axis=0), axis=0) < k)
    each = (tops[0] & tops[1]).sum(0) / k
    found = top_k_overlap(one, two, k=k)
    assert found.value == pytest.approx(each.mean(), abs=5 * each.std() / draws**0.5 + 1e-9)
    assert top_k_overlap(np.ones((6, 1)), two, k=k).value == pytest.approx(found.chance)


def test_the_part_of_top_k_and_a_bad_k():
    truth = effects()
    assert TopKOverlap(k=5).measure(evidence_of(truth, Additive(truth))).value == 1.0
    assert TopKOverlap(k=5).measure(evidence_of(-truth, Additive(truth))).value == 0.0
    retraining = Additive(truth)
    with pytest.raises(InputError, match="k is 24 of 24"):
        TopKOverlap(k=24).measure(evidence_of(truth, retraining))
    assert not retraining.asked
    with pytest.raises(InputError, match="k is 0"):
        top_k_overlap(truth, truth, k=0)
