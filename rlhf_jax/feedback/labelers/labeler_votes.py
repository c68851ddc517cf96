"""Comparisons of a store as arrays: votes, order on the screen, lengths, and wins of the policies.

A ranking of K completions becomes K (K - 1) / 2 pairs, which are dependent because they have the same prompt. Gold
questions and hidden duplicates are left out (see `screening`).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from rlhf_jax.feedback import judgements, store, store_rows


class Comparisons(NamedTuple):
    """N pairs of completions and the votes of M labelers. Lists have one entry per pair, except ``labelers``."""

    labelers: list[str]
    """Names of those who judged an item of any kind, sorted."""
    items: list[str]
    """Identifiers of the items."""
    prompts: list[str]
    """The prompts, as JSON: labels of clusters of pairs."""
    domains: list[str]
    categories: list[str]
    policies: list[tuple[str, str]]
    """Names of the policies that wrote both completions."""
    length_N2: np.ndarray
    """Number of characters of both completions."""
    votes_NM: np.ndarray
    """float64, as in `labeler_agreement`."""
    first_shown_NM: np.ndarray
    """float64, 1 if the first completion was shown before the second, 0 if after; NaN without an assignment."""

    @property
    def longer_N(self) -> np.ndarray:
        """Which completion is longer, as a vote: 1 for the first, 0 for the second; NaN if both are equally long."""
        difference_N = self.length_N2[:, 0] - self.length_N2[:, 1]
        return np.where(difference_N == 0, np.nan, (difference_N > 0).astype(np.float64))


class PolicyWins(NamedTuple):
    """How often each policy was preferred to each other, for `diagnostics.bradley_terry`."""

    policies: list[str]
    """Names of M policies, sorted."""
    wins_CMM: np.ndarray
    """float64, for each of C prompts, the number of votes for policy i against policy j; a tie is half a vote."""


def answers(judgement: judgements.Judgement, n: int) -> np.ndarray:
    """Returns a judgement of n completions as votes, each on one question; NaN if there is no answer.

    The questions about a pair or a ranking are which completion of each two is better, in the order (0, 1), (0, 2), ...
    (n - 2, n - 1). Those about a single completion are the flags in the order of `judgements.FLAGS`, with 1 for yes.
    """
    if n == 1:
        return np.array([float(judgement.flags.get(flag, np.nan)) for flag in judgements.FLAGS])
    if n == 2 and judgement.ranks is None:
        return np.array([judgement.vote])
    pairs = list(itertools.combinations(range(n), 2))
    if judgement.ranks is None:
        return np.full(len(pairs), np.nan)
    ranks = judgement.ranks
    return np.array([(np.sign(ranks[j] - ranks[i]) + 1) / 2 for i, j in pairs])


def comparisons(opened: store.Store, set_name: str | None = None) -> Comparisons:
    """Returns the latest votes on the pairs and rankings of a set, or of all sets."""
    with opened.transaction():
        items, latest, orders = opened.items(set_name), opened.latest(set_name), opened.orders(set_name)
    compared = {
        id: item
        for id, item in items.items()
        if item.kind != judgements.LIKERT and item.duplicate_of is None and item.expected is None
    }
    rows = [
        (id, i, j) for id, item in compared.items() for i, j in itertools.combinations(range(len(item.completions)), 2)
    ]
    start = {id: n for n, (id, *_) in reversed(list(enumerate(rows)))}  # the first row of each item
    labelers = sorted({each.labeler for each in latest})
    column = {name: m for m, name in enumerate(labelers)}
    votes_NM, first_shown_NM = (np.full((len(rows), len(labelers)), np.nan) for _ in range(2))
    for said in latest:
        if said.item not in compared:
            continue
        n = len(compared[said.item].completions)
        own = slice(start[said.item], start[said.item] + n * (n - 1) // 2), column[said.labeler]
        votes_NM[own] = answers(said.judgement, n)
        if (order := orders.get((said.labeler, said.item))) is not None:
            first_shown_NM[own] = [order.index(i) < order.index(j) for i, j in itertools.combinations(range(n), 2)]
    pairs = [(compared[id], [compared[id].completions[each] for each in (i, j)]) for id, i, j in rows]
    return Comparisons(
        labelers=labelers,
        items=[id for id, *_ in rows],
        prompts=[store_rows.to_json(item.prompt.messages) for item, _ in pairs],
        domains=[item.prompt.domain for item, _ in pairs],
        categories=[item.prompt.category for item, _ in pairs],
        policies=[(first.policy, second.policy) for _, (first, second) in pairs],
        length_N2=np.array([[len(each.text) for each in both] for _, both in pairs], int).reshape(-1, 2),
        votes_NM=votes_NM,
        first_shown_NM=first_shown_NM,
    )


def policy_wins(found: Comparisons) -> PolicyWins:
    """Returns the votes for each policy against each other, by prompt.

    Completions without the name of a policy, and two completions of the same policy, are not compared.

        wins = labeler_votes.policy_wins(labeler_votes.comparisons(opened, "round 1"))
        strengths = diagnostics.bradley_terry(wins.wins_CMM, clusters=True)
        print(dict(zip(wins.policies, strengths.elo(reference=0))))
    """
    wins_N2 = np.stack([np.nansum(found.votes_NM, axis=1), np.nansum(1 - found.votes_NM, axis=1)], axis=1)
    used = [n for n, (a, b) in enumerate(found.policies) if wins_N2[n].any() and a and b and a != b]
    policies = sorted({name for n in used for name in found.policies[n]})
    prompts = list(dict.fromkeys(found.prompts[n] for n in used))
    cluster = {prompt: c for c, prompt in enumerate(prompts)}
    wins_CMM = np.zeros((len(prompts), len(policies), len(policies)))
    for n in used:
        i, j = map(policies.index, found.policies[n])
        wins_CMM[cluster[found.prompts[n]], [i, j], [j, i]] += wins_N2[n]
    return PolicyWins(policies, wins_CMM)
