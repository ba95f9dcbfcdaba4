"""Semivalues by sampling: closed games within their error bars, and the sum over all 2^n sets."""

from __future__ import annotations

import numpy as np
import pytest
from closed_games import (
    Additive,
    Airport,
    Majority,
    enumerate_banzhaf,
    enumerate_semivalue,
    random_game,
)
from dattri_retrain import (
    Stopping,
    banzhaf,
    beta_weights,
    data_oob,
    leave_one_out_values,
    semivalue,
)
from dattri_retrain.permutations import _permutation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import comb

from dattri_core import InputError, RandomStream

BARS = 4.5  # standard errors; one of 10^5 normal numbers lies further out
ROUNDING = 1e-12
GAMES = {
    "additive": Additive(12, 3),
    "majority": Majority(9),
    "majority of many": Majority(31),
    "airport": Airport([1, 2, 2, 5, 9, 9.5, 20]),
    "airport of many": Airport(np.arange(1, 41) ** 1.5),
}


def size_of(game):
    return len(game.shapley())


def within(estimate, exact, bars=BARS):
    return (np.abs(estimate.values - exact) <= bars * estimate.errors + ROUNDING).all()


# --- closed games ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shapley_values_of_closed_games_lie_within_their_error_bars(name, seed):
    game = GAMES[name]
    n = size_of(game)
    found = semivalue(game, n, stopping=Stopping(budget=2 + 400 * (n - 1)), seed=seed)
    assert found.values.shape == found.errors.shape == game.shapley().shape
    assert within(found, game.shapley())
    assert (found.draws, found.evaluations, found.stopped) == (400, 2 + 400 * (n - 1), "budget")


def test_an_additive_game_is_exact_and_stops_at_once():
    game = GAMES["additive"]
    found = semivalue(game, 12, stopping=Stopping(1e-9, 10_000))
    assert np.allclose(found.values, game.shapley(), atol=1e-12)
    assert found.errors.max() < 1e-9
    assert (found.draws, found.stopped) == (20, "tolerance")


@pytest.mark.parametrize("estimator", [semivalue, banzhaf])
@pytest.mark.parametrize("tolerance", [0.1, 0.03])
def test_sampling_stops_when_every_error_is_below_the_tolerance(estimator, tolerance):
    game = random_game(6, 2, seed=3)
    exact = (
        enumerate_banzhaf(game, 6)
        if estimator is banzhaf
        else enumerate_semivalue(game, 6, np.ones(6))
    )
    found = estimator(game, 6, stopping=Stopping(tolerance, 200_000), seed=1)
    assert found.stopped == "tolerance"
    assert found.errors.max() <= tolerance
    assert within(found, exact)
    fewer = estimator(game, 6, stopping=Stopping(tolerance, found.evaluations - 100), seed=1)
    assert fewer.stopped == "budget"
    assert fewer.errors.max() > tolerance * 0.9


def test_a_rare_contribution_is_not_taken_for_none():
    # Player 0 adds 100 where it is the last of 60, in one permutation of 60; the others add 1.
    def game(masks):
        return (masks[:, 1:].sum(1) + 100.0 * masks.all(1))[:, None]

    found = semivalue(game, 60, stopping=Stopping(0.5, 2 + 20 * 59), seed=0)
    exact = np.full((60, 1), 1.0)
    exact[0] = 0.0
    exact += 100 / 60
    never = found.values[:, 0] < exact[:, 0] - 1  # those who were last in none of the 20
    assert never.sum() >= 30
    assert within(found, exact, bars=3)
    assert found.stopped == "budget"


@pytest.mark.parametrize("estimator", [semivalue, banzhaf])
def test_error_bars_are_as_long_as_the_errors(estimator):
    game = random_game(7, 3, seed=5)
    exact = (
        enumerate_banzhaf(game, 7)
        if estimator is banzhaf
        else enumerate_semivalue(game, 7, np.ones(7))
    )
    scores, mean_scores = [], []
    for seed in range(60):
        found = estimator(game, 7, stopping=Stopping(budget=602), seed=seed)
        scores.append((found.values - exact) / found.errors)
        mean_scores.append((found.mean - exact.mean(1)) / found.mean_errors)
    for z in (np.array(scores), np.array(mean_scores)):
        assert 0.85 < np.sqrt((z**2).mean()) < 1.1
        assert abs(z.mean()) < 0.15


# --- all 2^n sets ---------------------------------------------------------------------------------
@settings(max_examples=20, deadline=None)
@given(
    st.integers(2, 8),
    st.integers(1, 3),
    st.integers(0, 1000),
    st.sampled_from([(1.0, 1.0), (4.0, 1.0), (1.0, 4.0), (2.5, 3.0)]),
)
def test_beta_shapley_values_agree_with_all_sets(n, m, seed, shape):
    game = random_game(n, m, seed)
    weights = beta_weights(n, *shape)
    exact = enumerate_semivalue(game, n, weights)
    found = semivalue(
        game, n, weights=weights, stopping=Stopping(budget=2 + 500 * (n - 1)), seed=seed
    )
    assert within(found, exact)
    assert np.allclose(found.mean, found.values.mean(1))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(0, 1000))
def test_banzhaf_values_agree_with_all_sets(n, m, seed):
    game = random_game(n, m, seed)
    found = banzhaf(game, n, stopping=Stopping(budget=2000), seed=seed)
    assert within(found, enumerate_banzhaf(game, n))


def test_beta_weights_are_those_of_the_paper():
    """w_j = n C(n-1, j-1) int t^(j-1) (1-t)^(n-j) p(t) dt, p the density of Beta(beta, alpha)."""
    from scipy.integrate import quad
    from scipy.stats import beta as density

    assert np.allclose(beta_weights(9), 1.0)
    for alpha, beta in ((16.0, 1.0), (4.0, 1.0), (1.0, 4.0)):
        weights = beta_weights(9, alpha, beta)
        assert weights.mean() == pytest.approx(1.0)
        for j in (1, 5, 9):
            size = quad(
                lambda t, j=j, a=alpha, b=beta: (
                    t ** (j - 1) * (1 - t) ** (9 - j) * density(b, a).pdf(t)
                ),
                0,
                1,
            )[0]
            assert weights[j - 1] == pytest.approx(9 * comb(8, j - 1) * size)
    assert (np.diff(beta_weights(9, 16.0, 1.0)) < 0).all()
    assert (np.diff(beta_weights(9, 1.0, 16.0)) > 0).all()
    assert np.isfinite(beta_weights(100_000, 16.0, 1.0)).all()


@pytest.mark.parametrize("seed", range(3))
def test_shapley_values_sum_to_the_utility_of_all_whatever_the_draws(seed):
    game = random_game(8, 3, seed)
    ends = game(np.array([[False] * 8, [True] * 8]))
    for truncation in (None, 0.0):
        found = semivalue(game, 8, truncation=truncation, stopping=Stopping(budget=200), seed=seed)
        assert np.allclose(found.values.sum(0), ends[1] - ends[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_equals_get_equal_values_and_who_adds_nothing_gets_none(seed):
    inner = random_game(4, 2, seed)

    def game(masks):  # players 0 and 1 are exchangeable, player 4 adds nothing
        swapped = masks[:, [1, 0, 2, 3]]
        return inner(masks[:, :4]) + inner(swapped)

    found = semivalue(game, 5, stopping=Stopping(budget=4000), seed=seed)
    assert np.abs(found.values[4]).max() < 1e-12
    gap = np.abs(found.values[0] - found.values[1])
    assert (gap <= BARS * (found.errors[0] + found.errors[1]) + ROUNDING).all()
    other = banzhaf(game, 5, stopping=Stopping(budget=2000), seed=seed)
    assert (np.abs(other.values[4]) <= BARS * other.errors[4]).all()


def test_leave_one_out_values_are_exact():
    game = random_game(7, 2, 0)
    found = leave_one_out_values(game, 7)
    full = np.ones((1, 7), bool)
    for i in range(7):
        without = full.copy()
        without[0, i] = False
        assert np.array_equal(found.values[i], (game(full) - game(without))[0])
    assert (found.errors == 0).all()
    assert (found.evaluations, found.stopped) == (8, "exact")


# --- truncation, budget, draws --------------------------------------------------------------------
def test_truncation_saves_sets_and_errs_by_less_than_itself():
    asked = []

    def game(masks):  # all that counts comes with the first few
        asked.append(len(masks))
        return (1 - 0.5 ** masks.sum(1))[:, None]

    n, budget = 30, 2 + 40 * 29
    whole = semivalue(game, n, stopping=Stopping(budget=budget))
    asked.clear()
    short = semivalue(game, n, truncation=0.01, stopping=Stopping(budget=budget))
    assert sum(asked) == short.evaluations <= budget
    assert short.draws > 3 * whole.draws  # 7 sets of 30 come as near as 0.01
    exact = (1 - 0.5**n) / n
    assert (np.abs(short.values - exact) <= BARS * short.errors + 0.01 / n).all()


@pytest.mark.parametrize("truncation", [None, 0.2, 0.6, 1.5])
def test_values_are_those_of_walking_along_the_permutations_one_by_one(truncation):
    game, n = random_game(7, 2, seed=8), 7
    weights = beta_weights(n, 3.0, 1.0)
    found = semivalue(
        game, n, weights=weights, truncation=truncation, stopping=Stopping(budget=300), seed=3
    )
    empty, whole = game(np.array([[False] * n, [True] * n]))

    def is_near(utility):  # of both columns and of their mean
        both = np.append(utility - whole, (utility - whole).mean())
        return truncation is not None and np.abs(both).max() <= truncation

    gains, asked = np.zeros((found.draws, n, 2)), 2
    for k in range(found.draws):
        mask, utility = np.zeros(n, bool), empty
        for place, player in enumerate(_permutation(RandomStream(3, "permutations"), n, k)):
            if is_near(utility):
                break
            mask[player] = True
            after = game(mask[None])[0]
            asked += place < n - 1
            gains[k, player] = weights[place] * (after - utility)
            utility = after
    assert np.allclose(found.values, gains.mean(0))
    lowest = np.abs(gains - gains[0]).max((0, 1)) / found.draws
    usual = gains.std(0, ddof=1) / np.sqrt(found.draws)
    assert np.allclose(found.errors, np.maximum(usual, lowest))
    assert found.evaluations == asked


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(0, 300), st.sampled_from([None, 0.0, 0.5, 3.0]))
def test_the_budget_is_never_exceeded(n, more, truncation):
    asked = []
    inner = Additive(n, 2)

    def game(masks):
        asked.append(len(masks))
        return inner(masks)

    budget = 2 + 20 * (n - 1) + more
    found = semivalue(game, n, truncation=truncation, stopping=Stopping(1e-30, budget))
    assert sum(asked) == found.evaluations <= budget


def test_more_draws_begin_with_the_same_ones():
    seen: list[list[bytes]] = []
    inner = random_game(6, 1, 0)

    def game(masks):
        seen[-1].extend(mask.tobytes() for mask in masks)
        return inner(masks)

    for estimator in (semivalue, banzhaf):
        seen.clear()
        for budget in (152, 302):
            seen.append([])
            estimator(game, 6, stopping=Stopping(budget=budget), seed=4)
        assert set(seen[0]) <= set(seen[1])
        if estimator is banzhaf:
            assert seen[1][:152] == seen[0]
        first, second = (
            estimator(game, 6, stopping=Stopping(budget=152), seed=s).values for s in (4, 5)
        )
        again = estimator(game, 6, stopping=Stopping(budget=152), seed=4).values
        assert np.array_equal(first, again)
        assert not np.array_equal(first, second)


def test_progress_is_told_every_set():
    told: list[int] = []
    for estimator in (semivalue, banzhaf):
        told.clear()
        found = estimator(GAMES["majority"], 9, stopping=Stopping(budget=300), advance=told.append)
        assert sum(told) == found.evaluations


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda g: semivalue(g, 1), "2 examples or more"),
        (lambda g: semivalue(g, 5, weights=np.ones(4)), r"shape \(4,\).*\(5,\)"),
        (lambda g: semivalue(g, 5, truncation=-1.0), "truncation is -1"),
        (lambda g: semivalue(g, 5, stopping=Stopping(budget=81)), "which ask for 82"),
        (lambda g: banzhaf(g, 5, stopping=Stopping(budget=99)), "below 100"),
        (lambda g: semivalue(lambda m: m.sum(1), 5), r"gave shape \(2,\)"),
        (lambda g: semivalue(lambda m: np.full((len(m), 1), np.nan), 5), "finite"),
        (lambda g: beta_weights(5, 0.0), "above 0"),
    ],
)
def test_bad_input_is_refused(act, message):
    with pytest.raises(InputError, match=message):
        act(Additive(5))


@pytest.mark.parametrize("estimator", [semivalue, banzhaf])
def test_a_utility_that_changes_its_number_of_columns_is_refused(estimator):
    calls = []

    def utility(masks):
        calls.append(len(masks))
        return np.ones((len(masks), 2 if len(calls) == 1 else 1))

    with pytest.raises(InputError, match=r"shape \(\d+, 1\) .* expected \(\d+, 2\): it gave 2"):
        estimator(utility, 5, stopping=Stopping(budget=500))
    assert len(calls) == 2


# --- Data-OOB -------------------------------------------------------------------------------------
def test_data_oob_is_the_mean_over_the_models_without_the_example():
    random = np.random.default_rng(0)
    masks = random.random((40, 6)) < 0.6
    utilities = random.normal(size=(40, 6))
    found = data_oob(masks, utilities)
    for i in range(6):
        own = utilities[~masks[:, i], i]
        assert found.mean[i] == pytest.approx(own.mean())
        assert found.mean_errors[i] == pytest.approx(own.std(ddof=1) / np.sqrt(len(own)))
    assert np.array_equal(found.values[:, 0], found.mean)


def test_data_oob_refuses_outcomes_on_other_examples_and_too_few_models():
    masks = np.array([[True, False], [False, True], [True, False]])
    with pytest.raises(InputError, match=r"both \[k, n_train\]"):
        data_oob(masks, np.zeros((3, 5)))
    with pytest.raises(InputError, match="example 0 was left out of 1 of 3"):
        data_oob(masks, np.zeros((3, 2)))
