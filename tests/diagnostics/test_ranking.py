"""Bradley-Terry strengths and Elo scores: exact numbers, against choix, and coverage of the intervals by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import diagnostics
from rlhf_jax.diagnostics import ranking


def test_two_models_have_the_log_odds_as_difference():
    found = diagnostics.bradley_terry([[0, 75], [25, 0]])
    assert found.difference(0, 1).mean == pytest.approx(np.log(3))
    # The variance of log-odds is 1 / wins + 1 / losses.
    half = 1.959964 * np.sqrt(1 / 75 + 1 / 25)
    assert found.difference(0, 1).hi - found.difference(0, 1).mean == pytest.approx(half, rel=1e-5)


def test_elo_of_a_win_rate_of_ten_elevenths_is_400():
    first, second = diagnostics.bradley_terry([[0, 10], [1, 0]]).elo(reference=1)
    assert first.mean == pytest.approx(400)
    assert first.lo < 400 < first.hi
    assert second == (0, 0, 0)


@given(seed=st.integers(0, 10_000), models=st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_strengths_solve_the_likelihood_equations(seed, models):
    wins = np.random.default_rng(seed).integers(1, 30, size=(models, models)).astype(float)
    value = diagnostics.bradley_terry(wins).value_M
    for i in range(models):
        games = [wins[i, j] + wins[j, i] for j in range(models)]
        expected = sum(games[j] / (1 + np.exp(value[j] - value[i])) for j in range(models) if j != i)
        assert expected == pytest.approx(sum(wins[i, j] for j in range(models) if j != i), rel=1e-9)
    assert value.sum() == pytest.approx(0, abs=1e-9)


def test_agreement_with_choix():
    choix = pytest.importorskip("choix")
    wins = np.random.default_rng(0).integers(1, 50, size=(5, 5))
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j for _ in range(wins[i, j])]
    expected = choix.ilsr_pairwise(5, pairs, alpha=0.0, tol=1e-12)
    np.testing.assert_allclose(diagnostics.bradley_terry(wins).value_M, expected - np.mean(expected), atol=1e-6)


def simulate(rng, strengths, *, games):
    """Returns the wins of independent comparisons, ``games`` for each pair of models."""
    wins = np.zeros((len(strengths), len(strengths)))
    for i in range(len(strengths)):
        for j in range(i):
            wins[i, j] = rng.binomial(games, 1 / (1 + np.exp(strengths[j] - strengths[i])))
            wins[j, i] = games - wins[i, j]
    return wins


def test_intervals_of_independent_comparisons_cover_the_truth():
    rng, truth = np.random.default_rng(0), np.array([0.8, 0.2, 0.0, -1.0])
    found = [diagnostics.bradley_terry(simulate(rng, truth, games=60)).elo(reference=2) for _ in range(400)]
    for m in (0, 1, 3):
        covered = np.mean([each[m].lo <= ranking.ELO_PER_NAT * truth[m] <= each[m].hi for each in found])
        assert 0.925 < covered < 0.975


def test_clustered_intervals_cover_the_truth_when_comparisons_of_a_prompt_are_dependent():
    # Each prompt is asked ten times with the same outcome, so that the intervals of the likelihood are too narrow.
    rng, truth, covered = np.random.default_rng(1), np.array([0.5, 0.0, -0.5]), {True: 0, False: 0}
    for _ in range(300):
        wins = np.array([10 * simulate(rng, truth, games=1) for _ in range(60)])
        for clusters in covered:
            estimate = diagnostics.bradley_terry(wins if clusters else wins.sum(axis=0), clusters=clusters).difference(
                0, 2
            )
            covered[clusters] += estimate.lo <= 1.0 <= estimate.hi
    assert 0.91 < covered[True] / 300 < 0.98
    assert covered[False] / 300 < 0.6


def test_clusters_do_not_change_the_strengths_and_ties_narrow_their_intervals():
    rng = np.random.default_rng(2)
    won = rng.random(200) < 0.6
    wins = np.zeros((200, 2, 2))
    wins[:, 0, 1], wins[:, 1, 0] = won, ~won
    ties = np.full((200, 2, 2), 0.5)
    alone, tied = (diagnostics.bradley_terry(each, clusters=True) for each in (wins, np.concatenate([wins, ties])))
    np.testing.assert_allclose(alone.value_M, diagnostics.bradley_terry(wins.sum(axis=0)).value_M)
    whole = diagnostics.bradley_terry(np.concatenate([wins, ties]).sum(axis=0))
    np.testing.assert_allclose(tied.value_M, whole.value_M)
    assert tied.covariance_MM[0, 0] < 0.7 * whole.covariance_MM[0, 0]  # a tie carries no noise


@pytest.mark.parametrize(
    "wins", [[[0, 5], [0, 0]], [[0, 1, 0], [1, 0, 0], [0, 0, 0]], np.zeros((2, 2)), [[0, 3, 2], [1, 0, 1], [0, 0, 0]]]
)
def test_models_without_finite_strengths_are_named(wins):
    with pytest.raises(ValueError, match="neither directly nor through others"):
        diagnostics.bradley_terry(wins)


@pytest.mark.parametrize("wins", [[[0, -1], [1, 0]], [[0]], np.zeros((2, 3))])
def test_wrong_matrices_are_refused(wins):
    with pytest.raises(ValueError, match="wins must be"):
        diagnostics.bradley_terry(wins)
