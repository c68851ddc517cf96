"""Simulated labelers: weights, rankings, ties, lapses, and agreement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.simulation import gold, labelers

F = len(labelers.FEATURES)
N, K, R = 20_000, 4, 8
KEY = jax.random.key(0)
ranked = jax.jit(jax.vmap(labelers.rank, in_axes=(0, None, 0, 0, 0)))


def pool(rng=KEY, n=R, **changes):
    return labelers.make_pool(rng, n, **changes)


def answers(n=N, k=2, seed=0):
    """Returns random features [n, k, F] of answers."""
    return np.random.default_rng(seed).uniform(0, 1, size=(n, k, F)).astype(np.float32)


def picks(people, features_NKF, labeler_N, seed=1):
    """Returns bool [N]: whether each labeler ranks the first of two answers first."""
    where = jnp.ones(features_NKF.shape[:2], bool)
    keys = jax.random.split(jax.random.key(seed), len(features_NKF))
    ranks = ranked(keys, people, jnp.asarray(labeler_N), jnp.asarray(features_NKF), where)
    return np.asarray(ranks[:, 0] < ranks[:, 1])


def utilities(people, features_NKF):
    return [np.asarray(labelers.utilities(people, jnp.asarray(features_NKF[:, k]))) for k in (0, 1)]


def three_labelers(seed=2):
    """Returns [N, 3]: three different labelers for each pair."""
    return np.argsort(np.random.default_rng(seed).random((N, R)), axis=1)[:, :3]


def test_features_are_the_gold_components_and_the_labelers_preferences():
    parts = {name: jnp.full(2, 0.1 * i) for i, name in enumerate(gold.COMPONENTS)}
    zeros, no = jnp.zeros(2), jnp.zeros(2, bool)
    judged = gold.Utility(
        zeros,
        zeros,
        jnp.array([1.0, 0.4]),
        parts,
        zeros,
        zeros,
        no,
        no,
        no,
        jnp.array([2, 30]),
        jnp.array([5, 20]),
        ~no,
    )
    got = labelers.features(judged)
    assert labelers.FEATURES[-3:] == ("harmless", "polite_words", "length") and got.shape == (2, F)
    expected = [[0.1 * i for i in range(len(gold.COMPONENTS))]] * 2
    np.testing.assert_allclose(got[:, :-3], expected, rtol=1e-6)
    np.testing.assert_allclose(got[:, -3:], [[1.0, 0.5, 0.25], [0.4, 1.5, 1.0]], rtol=1e-6)


def test_weights_vary_by_labeler_and_by_group():
    same = pool(spread=0.0)
    np.testing.assert_array_equal(same.weights_RF, np.broadcast_to(same.weights_RF[:1], (R, F)))
    np.testing.assert_allclose(same.weights_RF[0, : len(gold.WEIGHTS)], gold.WEIGHTS, rtol=1e-6)
    assert float(pool(spread=0.0, length_taste=0.3).weights_RF[0, -1]) == pytest.approx(0.3)

    many = pool(n=4000, spread=0.25, length_taste=0.1).weights_RF / pool(n=1, spread=0.0, length_taste=0.1).weights_RF
    np.testing.assert_allclose(many.mean(0), 1.0, atol=0.02)
    np.testing.assert_allclose(many.std(0), 0.25, atol=0.02)

    grouped = pool(n_groups=2, spread=0.0, group_spread=0.3)
    np.testing.assert_array_equal(grouped.group_R, np.arange(R) % 2)
    np.testing.assert_array_equal(grouped.weights_RF[0], grouped.weights_RF[2])
    assert (grouped.weights_RF[0, :7] != grouped.weights_RF[1, :7]).all()


def test_two_labelers_agree_at_the_rate_of_the_closed_form():
    people, pairs = pool(temperature=0.15), answers()
    first, second, _ = three_labelers().T
    agree = picks(people, pairs, first, seed=1) == picks(people, pairs, second, seed=2)
    expected = labelers.agreement(*utilities(people, pairs), temperature=0.15)
    assert 0.6 < expected < 0.9
    assert abs(agree.mean() - expected) < 0.015
    # The closed form equals the mean over all pairs of labelers.
    a, b = (u[:50] for u in utilities(people, pairs))
    p = 1 / (1 + np.exp((b - a).astype(np.float64) / 0.15))
    by_hand = [p[:, i] * p[:, j] + (1 - p[:, i]) * (1 - p[:, j]) for i in range(R) for j in range(R) if i != j]
    assert labelers.agreement(a, b, temperature=0.15) == pytest.approx(np.mean(by_hand))


@pytest.mark.parametrize("target", [0.65, 0.73])
def test_the_calibrated_temperature_gives_the_target_agreement(target):
    people, pairs = pool(), answers(seed=3)
    noise = labelers.calibrated_temperature(*utilities(people, pairs), target=target)
    assert labelers.agreement(*utilities(people, pairs), temperature=noise) == pytest.approx(target, abs=1e-6)
    people = people.replace(temperature=jnp.float32(noise))  # type: ignore[attr-defined]
    first, second, _ = three_labelers().T
    agree = picks(people, pairs, first, seed=1) == picks(people, pairs, second, seed=2)
    assert abs(agree.mean() - target) < 0.015


def test_unreachable_agreement_is_an_error():
    a, b = utilities(pool(), answers(50))
    for target in (0.4, 1.0):
        with pytest.raises(ValueError, match="agree"):
            labelers.calibrated_temperature(a, b, target=target)
    with pytest.raises(ValueError, match="agree"):
        labelers.calibrated_temperature(a, a, target=0.7)


def test_a_majority_of_three_labelers_agrees_with_gold_more_often_than_one_labeler():
    people, pairs = pool(polite_taste=0.0), answers(seed=4)
    noise = labelers.calibrated_temperature(*utilities(people, pairs), target=0.73)
    people = people.replace(temperature=jnp.float32(noise))  # type: ignore[attr-defined]
    gold_a, gold_b = (u[:, 0] for u in utilities(pool(n=1, spread=0.0, polite_taste=0.0), pairs))
    votes = np.stack([picks(people, pairs, labeler, seed=i) for i, labeler in enumerate(three_labelers().T)])
    right = votes == (gold_a > gold_b)
    one, modal = right.mean(), (right.sum(0) >= 2).mean()
    assert modal - one > 0.02
    assert one > 0.73, "a labeler agrees more with gold than with a second labeler"


def test_pairs_of_a_ranking_follow_the_bradley_terry_model():
    people = pool(temperature=0.5)
    labeler = jnp.array(3)
    features_KF = answers(1, K)[0]
    utility_K = features_KF.astype(np.float64) @ np.asarray(people.weights_RF[labeler], np.float64)
    keys = jax.random.split(jax.random.key(5), N)
    ranks = jax.jit(jax.vmap(lambda key: labelers.rank(key, people, labeler, features_KF, jnp.ones(K, bool))))(keys)
    ranks = np.asarray(ranks)
    assert (np.sort(ranks, axis=1) == np.arange(1, K + 1)).all()
    for i in range(K):
        for j in range(i):
            expected = 1 / (1 + np.exp((utility_K[j] - utility_K[i]) / 0.5))
            assert abs((ranks[:, i] < ranks[:, j]).mean() - expected) < 0.015


def test_at_a_low_temperature_a_ranking_is_the_order_of_utility():
    people = pool(temperature=1e-4)
    features = answers(2000, K)
    labeler = np.arange(2000) % R
    keys = jax.random.split(KEY, 2000)
    ranks = np.asarray(ranked(keys, people, labeler, features, np.ones((2000, K), bool)))
    utility = np.einsum("nkf,nf->nk", features, np.asarray(people.weights_RF)[labeler])
    expected = 1 + np.argsort(np.argsort(-utility, axis=1), axis=1)
    assert (ranks == expected).all(axis=1).mean() > 0.98  # two utilities can still be closer than the noise


def test_missing_answers_come_last():
    people = pool(temperature=10.0, tie_width=0.5)
    features = answers(2000, K)
    where = np.random.default_rng(0).random((2000, K)) < 0.6
    features[~where] = 100.0
    ranks = np.asarray(ranked(jax.random.split(KEY, 2000), people, np.zeros(2000, int), features, where))
    best_missing = np.where(where, K + 1, ranks).min(axis=1)
    worst_there = np.where(where, ranks, 0).max(axis=1)
    assert (worst_there < best_missing).all()
    assert (np.where(where, ranks, 1).min(axis=1) == 1).all()
    features[~where] = -100.0
    again = np.asarray(ranked(jax.random.split(KEY, 2000), people, np.zeros(2000, int), features, where))
    np.testing.assert_array_equal(ranks[where], again[where])


def test_neighbours_closer_than_the_tie_width_tie():
    features = answers(2000, K)
    arguments = (np.zeros(2000, int), features, np.ones((2000, K), bool))
    keys = jax.random.split(KEY, 2000)
    plain, tied, all_tied = (
        np.asarray(ranked(keys, pool(temperature=0.1, tie_width=width), *arguments)) for width in (0.0, 0.05, 100.0)
    )
    assert (np.sort(plain, axis=1) == np.arange(1, K + 1)).all()
    assert (all_tied == 1).all()
    distinct = np.array([len(set(row)) for row in tied])
    assert 0.1 < (distinct < K).mean() < 0.9
    assert (tied.max(axis=1) == distinct).all(), "ranks have no gaps"
    # With the same noise, ties join neighbours but do not reverse any pair.
    i, j = np.triu_indices(K, 1)
    assert ((plain[:, i] < plain[:, j]) == (tied[:, i] < tied[:, j]))[tied[:, i] != tied[:, j]].all()

    # Two equal answers tie if a logistic variable is below the tie width.
    pairs = np.repeat(answers(1), N, axis=0)
    pairs[:, 1] = pairs[:, 0]
    ranks = ranked(
        jax.random.split(KEY, N), pool(temperature=0.1, tie_width=0.05), np.zeros(N, int), pairs, np.ones((N, 2), bool)
    )
    assert abs((ranks[:, 0] == ranks[:, 1]).mean() - np.tanh(0.5 * 0.05 / 0.1)) < 0.015


def test_a_lapse_is_a_random_ranking():
    features = np.repeat(answers(1, 3), N, axis=0)
    arguments = (np.zeros(N, int), features, np.ones((N, 3), bool))
    keys = jax.random.split(KEY, N)
    ranks = np.asarray(ranked(keys, pool(temperature=1e-3, lapse=1.0), *arguments))
    _, counts = np.unique(ranks, axis=0, return_counts=True)
    assert len(counts) == 6
    np.testing.assert_allclose(counts / N, 1 / 6, atol=0.015)
    half = np.asarray(ranked(keys, pool(temperature=1e-3, lapse=0.5), *arguments))
    _, counts = np.unique(half, axis=0, return_counts=True)
    assert abs(counts.max() / N - (0.5 + 0.5 / 6)) < 0.015


def test_the_choice_share_is_the_share_of_the_ranks_choices():
    """With noise, ties and lapses, against ranks of pairs that many labelers draw."""
    people, n = pool(temperature=0.05, lapse=0.4, tie_width=0.05), 4000
    pair_2F = answers(1, 2)[0]
    keys, who = jax.random.split(KEY, n), np.arange(n) % people.weights_RF.shape[0]
    ranks = np.asarray(ranked(keys, people, who, np.repeat(pair_2F[None], n, axis=0), np.ones((n, 2), bool)))
    wins = np.where(ranks[:, 0] < ranks[:, 1], 1.0, np.where(ranks[:, 0] == ranks[:, 1], 0.5, 0.0))
    share = float(labelers.choice_share(people, pair_2F[0], pair_2F[1]))
    assert abs(wins.mean() - share) < 4 * 0.5 / np.sqrt(n)
    assert share + float(labelers.choice_share(people, pair_2F[1], pair_2F[0])) == pytest.approx(1.0)


def test_the_preference_share_counts_labelers_without_noise():
    people = pool(n=3, spread=0.0).replace(  # type: ignore[attr-defined]
        weights_RF=jnp.zeros((3, F)).at[:, 0].set(jnp.array([1.0, -1.0, 0.0]))
    )
    a, b = jnp.zeros((4, F)).at[:, 0].set(jnp.array([1.0, 0.0, 1.0, 1.0 + 1e-7])), jnp.zeros((4, F)).at[2:, 0].set(1.0)
    np.testing.assert_allclose(labelers.preference_share(people, a, b), [0.5] * 4)
    two = people.replace(weights_RF=people.weights_RF[jnp.array([0, 2])])
    np.testing.assert_allclose(labelers.preference_share(two, a, b), [0.75, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(labelers.preference_share(two, b, a), [0.25, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(labelers.preference_share(people, a, b, tolerance=2.0), [0.5] * 4)
