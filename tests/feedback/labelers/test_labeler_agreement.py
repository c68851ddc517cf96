"""Agreement of labelers: small examples, plain loops, statsmodels, and coverage of the intervals by simulation."""

import itertools
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rlhf_jax.feedback.labelers import labeler_agreement as agreement

NAN = math.nan
votes = arrays.arrays(
    np.float64,
    st.tuples(st.integers(1, 6), st.integers(2, 6)),
    elements=st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0, NAN]),
)


def given_votes(test):
    return hypothesis.settings(max_examples=40, deadline=None)(hypothesis.given(votes)(test))


def choice(vote):
    return "first" if vote > 0.5 else "second" if vote < 0.5 else "tie"


def chosen(row):
    """Returns the choices about a pair as ``{labeler: choice}``."""
    return {m: choice(vote) for m, vote in enumerate(row) if not math.isnan(vote)}


def only_mode(said):
    counts = {each: list(said).count(each) for each in said}
    best = [each for each, count in counts.items() if count == max(counts.values())]
    return best[0] if len(best) == 1 else None


def assert_share(rate, hits, trials):
    assert rate.count == trials
    if trials:
        np.testing.assert_allclose(rate.share.mean, hits / trials, rtol=1e-12)
        assert rate.share.lo <= rate.share.mean <= rate.share.hi
    else:
        assert math.isnan(rate.share.mean) and rate.share[1:] == (0, 1)


# ------------------------------------------------------------------------------------------------------ small examples


def test_ties_agree_with_ties_only_and_probabilities_count_as_choices():
    found = agreement.pairwise_agreement([[0.5, 0.5, 1.0], [0.8, 1.0, NAN]])
    assert (found.share.mean, found.count) == (2 / 4, 4)


def test_each_labeler_is_compared_with_the_majority_of_the_others():
    votes_NM = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [0.5, 0.5, 1, NAN]])
    np.testing.assert_array_equal(agreement.mode(votes_NM), [1, NAN, 0.5])
    np.testing.assert_array_equal(
        agreement.mode_of_others(votes_NM), [[1, 1, 1, 1], [0, 1, 0, 1], [NAN, NAN, 0.5, 0.5]]
    )
    found = agreement.agreement_with(votes_NM, agreement.mode_of_others(votes_NM))
    assert [(each.share.mean, each.count) for each in found] == [(0.5, 2), (0.5, 2), (1 / 3, 3), (0.0, 2)]
    # A researcher is compared with the other researchers.
    np.testing.assert_array_equal(
        agreement.mode_of_others(votes_NM, [True, True, False, False]),
        [[1, 1, 1, 1], [0, 1, NAN, NAN], [0.5, 0.5, 0.5, 0.5]],
    )


def test_the_majority_of_three_agrees_more_often_with_a_fourth():
    # Of three labelers who are right with probability p, the majority is right with probability p^3 + 3 p^2 (1 - p).
    rng, p = np.random.default_rng(0), 0.85
    found = agreement.modal_of_three((rng.random((20_000, 5)) < p).astype(float))
    three = p**3 + 3 * p**2 * (1 - p)
    assert found.one.share.mean == pytest.approx(p**2 + (1 - p) ** 2, abs=0.005)
    assert found.three.share.mean == pytest.approx(p * three + (1 - p) * (1 - three), abs=0.005)
    assert found.three.share.mean > found.one.share.mean + 0.03


def test_groups_and_their_difference():
    votes_NM = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]])
    found = agreement.group_agreement(votes_NM, [True, True, False, False])
    assert [each.share.mean for each in found[:3]] == [1.0, 2 / 3, 2 / 12]
    assert [each.count for each in found[:3]] == [3, 3, 12]
    assert found.difference.mean == pytest.approx(10 / 12) and found.difference.lo > 0


def test_a_pool_without_common_pairs_has_no_agreement():
    votes_NM = [[1, NAN], [NAN, 0]]
    assert agreement.pairwise_agreement(votes_NM).count == 0
    assert math.isnan(agreement.fleiss_kappa(votes_NM).mean)
    assert math.isnan(agreement.fleiss_kappa([[1, 1], [1, 1]]).mean)  # chance agrees, too
    assert agreement.modal_of_three(votes_NM).three.count == 0
    assert math.isnan(agreement.group_agreement(votes_NM, [True, False]).difference.mean)


def test_perfect_agreement_on_few_pairs_is_uncertain():
    kappa = agreement.fleiss_kappa([[1, 1], [0, 0], [1, 1]])
    assert kappa.mean == kappa.hi == 1 and kappa.lo < 0.5


@pytest.mark.parametrize("wrong", [-0.1, 1.5])
def test_votes_outside_the_range_are_refused(wrong):
    with pytest.raises(ValueError, match="each vote must be from 0"):
        agreement.choices([[wrong, 1.0]])


# -------------------------------------------------------------------------------------------------------- plain loops


@given_votes
def test_pairwise_agreement_equals_a_loop(votes_NM):
    both = [
        (a, b, said[a] == said[b]) for said in map(chosen, votes_NM) for a, b in itertools.combinations(sorted(said), 2)
    ]
    assert_share(agreement.pairwise_agreement(votes_NM), sum(same for *_, same in both), len(both))
    matrix = agreement.agreement_matrix(votes_NM)
    for a, b in itertools.combinations(range(votes_NM.shape[1]), 2):
        own = [same for *who, same in both if who == [a, b]]
        for i, j in ((a, b), (b, a)):
            assert matrix.count_MM[i, j] == len(own)
            np.testing.assert_allclose(matrix.share_MM[i, j], np.mean(own) if own else NAN)
            assert (matrix.lo_MM[i, j], matrix.hi_MM[i, j]) == (matrix.lo_MM[j, i], matrix.hi_MM[j, i])
    assert np.isnan(np.diag(matrix.share_MM)).all()


@given_votes
def test_kappa_equals_a_loop(votes_NM):
    members, same = [], []  # one entry for each ordered two labelers of a pair
    for said in map(chosen, votes_NM):
        for a, b in itertools.permutations(said, 2):
            members.append(said[a])
            same.append(said[a] == said[b])
    chance = sum((members.count(each) / len(members)) ** 2 for each in ("first", "second", "tie")) if members else 1
    found = agreement.fleiss_kappa(votes_NM)
    if chance > 1 - 1e-12:
        assert math.isnan(found.mean) and found[1:] == (-1, 1)
    else:
        np.testing.assert_allclose(found.mean, (np.mean(same) - chance) / (1 - chance), atol=1e-12)
        assert found.lo <= found.mean <= found.hi + 1e-12


@given_votes
def test_agreement_with_others_equals_a_loop(votes_NM):
    found = agreement.agreement_with(votes_NM, agreement.mode_of_others(votes_NM))
    for m, rate in enumerate(found):
        outcomes = []
        for said in map(chosen, votes_NM):
            others = [each for other, each in said.items() if other != m]
            if m in said and others and only_mode(others) is not None:
                outcomes.append(said[m] == only_mode(others))
        assert_share(rate, sum(outcomes), len(outcomes))


@given_votes
def test_modal_of_three_equals_a_loop_over_all_subsets(votes_NM):
    one, three, weight = [], 0.0, 0.0
    for said in map(chosen, votes_NM):
        if len(said) < 4:
            continue
        one.append(np.mean([said[a] == said[b] for a, b in itertools.combinations(said, 2)]))
        subsets = [
            (said[m], only_mode([said[other] for other in others]))
            for m in said
            for others in itertools.combinations([other for other in said if other != m], 3)
        ]
        three += sum(own == best for own, best in subsets) / len(subsets)
        weight += sum(best is not None for _, best in subsets) / len(subsets)
    found = agreement.modal_of_three(votes_NM)
    assert found.one.count == found.three.count == len(one)
    if one:
        np.testing.assert_allclose(found.one.share.mean, np.mean(one), atol=1e-12)
        np.testing.assert_allclose(found.three.share.mean, three / weight, atol=1e-12)


@given_votes
def test_groups_equal_a_loop(votes_NM):
    inside_M = np.arange(votes_NM.shape[1]) % 2 == 0
    outcomes = {kind: [] for kind in ("inside", "outside", "between")}
    for said in map(chosen, votes_NM):
        for a, b in itertools.combinations(said, 2):
            kind = "between" if inside_M[a] != inside_M[b] else "inside" if inside_M[a] else "outside"
            outcomes[kind].append(said[a] == said[b])
    found = agreement.group_agreement(votes_NM, inside_M)
    for kind, own in outcomes.items():
        assert_share(getattr(found, kind), sum(own), len(own))
    if outcomes["inside"] and outcomes["between"]:
        difference = np.mean(outcomes["inside"]) - np.mean(outcomes["between"])
        np.testing.assert_allclose(found.difference.mean, difference, atol=1e-12)


@given_votes
def test_disagreement_by_category_equals_the_agreement_on_its_pairs(votes_NM):
    labels = [f"kind {n % 2}" for n in range(len(votes_NM))]
    clusters = [n // 2 for n in range(len(votes_NM))]
    for name, rate in agreement.disagreement_by(votes_NM, labels, clusters=clusters).items():
        own = [n for n, label in enumerate(labels) if label == name]
        same = agreement.pairwise_agreement(votes_NM[own], clusters=[clusters[n] for n in own])
        assert rate.count == same.count
        if rate.count:
            np.testing.assert_allclose(rate.share, 1 - np.array(same.share)[[0, 2, 1]], atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ oracles


@pytest.mark.parametrize("ties", [0.0, 0.2])
def test_kappa_equals_that_of_statsmodels(ties):
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater")
    rng = np.random.default_rng(0)
    for labelers in (2, 3, 7):
        votes_NM = np.where(rng.random((40, labelers)) < ties, 0.5, rng.random((40, labelers)) < 0.7)
        table, _ = inter_rater.aggregate_raters((2 * votes_NM).astype(int), 3)
        expected = inter_rater.fleiss_kappa(table, method="fleiss")
        np.testing.assert_allclose(agreement.fleiss_kappa(votes_NM).mean, expected, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- intervals


def simulate(rng, n, *, labelers=4, asked=1.0):
    """Returns votes on pairs whose probabilities vary, and the probabilities of agreement and of each choice."""
    p_N = rng.beta(2, 1, size=n)
    votes_NM = (rng.random((n, labelers)) < p_N[:, None]).astype(float)
    return np.where(rng.random(votes_NM.shape) < asked, votes_NM, NAN)


# For p ~ Beta(2, 1): E[p] = 2/3, E[p^2] = 1/2, E[p^3] = 2/5, E[p^4] = 1/3.
SAME = 2 * (1 / 2) - 2 * (2 / 3) + 1
KAPPA = 1 - (1 - SAME) / (2 * (2 / 3) * (1 / 3))


@pytest.mark.parametrize("asked", [1.0, 0.6])
def test_intervals_cover_the_truth(asked):
    rng, covered = np.random.default_rng(0), np.zeros(3)
    for _ in range(300):
        votes_NM = simulate(rng, 80, asked=asked)
        pairwise = agreement.pairwise_agreement(votes_NM).share
        kappa = agreement.fleiss_kappa(votes_NM)
        difference = agreement.group_agreement(votes_NM, [True, True, False, False]).difference
        truths = ((pairwise, SAME), (kappa, KAPPA), (difference, 0.0))
        covered += [each.lo <= truth <= each.hi for each, truth in truths]
    assert (covered > 0.92 * 300).all() and (covered < 0.985 * 300).all(), covered


def test_the_variance_of_kappa_is_that_of_leaving_out_pairs():
    rng = np.random.default_rng(2)
    votes_NM = np.where(rng.random((300, 4)) < 0.1, NAN, rng.random((300, 4)) < rng.beta(4, 0.5, size=(300, 1)))
    found = agreement.fleiss_kappa(votes_NM)
    without_N = np.array([agreement.fleiss_kappa(np.delete(votes_NM, n, axis=0)).mean for n in range(300)])
    error = math.sqrt(299 / 300 * np.square(without_N - without_N.mean()).sum())
    assert (found.hi - found.mean) / 1.968 == pytest.approx(error, rel=0.04)


def test_intervals_with_clusters_cover_the_truth():
    """Each prompt has five pairs with the same votes: without clusters, the intervals are too narrow."""
    rng, covered = np.random.default_rng(1), {True: 0, False: 0}
    for _ in range(200):
        votes_NM = np.repeat(simulate(rng, 40), 5, axis=0)
        for clustered in covered:
            clusters = np.repeat(np.arange(40), 5).tolist() if clustered else None
            for estimate, truth in (
                (agreement.pairwise_agreement(votes_NM, clusters=clusters).share, SAME),
                (agreement.fleiss_kappa(votes_NM, clusters=clusters), KAPPA),
            ):
                covered[clustered] += estimate.lo <= truth <= estimate.hi
    assert 0.91 < covered[True] / 400 < 0.985
    assert covered[False] / 400 < 0.7
