"""Screening of labelers: how well each answers the questions whose answers are known (Ouyang et al. 2022, B.1).

Ouyang et al. select labelers by their agreement with researchers about sensitive content and about rankings, and by the
quality of their demonstrations. Their soft cut-offs are an agreement of 75 % and a score of 6 of 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.diagnostics import intervals
from rlhf_jax.feedback import judgements, store
from rlhf_jax.feedback.labelers import labeler_agreement, labeler_votes
from rlhf_jax.feedback.labelers.labeler_agreement import Rate

PASSES, BELOW, TOO_FEW = "passes", "below", "too few"


class Screening(NamedTuple):
    """Results of a labeler."""

    gold: Rate
    """Agreement with the answers of gold questions."""
    researchers: Rate
    """Agreement with the most frequent choice of the researchers."""
    consistency: Rate
    """Agreement with the labeler's own answers about hidden duplicates."""
    demonstrations: Rate
    """Mean rating, from 1 to 7, that others give the labeler's demonstrations; (NaN, 1, 7) without ratings."""
    verdict: str
    """`PASSES`, `BELOW` or `TOO_FEW`."""
    clearly_below: bool
    """Whether the interval of an agreement or of the mean rating is below its cut-off."""


def screen(
    items: Mapping[str, judgements.Item],
    latest: Sequence[store.Recorded],
    researchers: Mapping[str, Rate],
    *,
    min_agreement: float = 0.75,
    min_score: float = 6.0,
    least: int = 10,
    confidence: float = 0.95,
) -> dict[str, Screening]:
    """Returns the results and the verdict of each labeler.

    A labeler passes if each of their agreement with gold questions, their agreement with researchers and the score of
    their demonstrations is at least its cut-off, and is below if one of them is not. Consistency has no cut-off.

    Args:
        items: The items by identifier, `store.Store.items`.
        latest: The judgements, `store.Store.latest`.
        researchers: Agreement of labelers with researchers, such as that of `labeler_agreement.agreement_with`.
        min_agreement: Cut-off of the agreement with gold questions and with researchers.
        min_score: Cut-off of the mean rating of demonstrations.
        least: Rates over fewer comparisons, and means over fewer ratings, are not compared with the cut-offs.
        confidence: Coverage of the intervals.

    Returns:
        The results by name.
    """
    gold = gold_agreement(items, latest, confidence=confidence)
    same = consistency(items, latest, confidence=confidence)
    scores = demonstration_scores(items, latest, confidence=confidence)
    nothing = Rate(intervals.Estimate(np.nan, 0.0, 1.0), 0)
    found = {}
    for name in sorted({each.labeler for each in latest}):
        own_gold, own_researchers = gold.get(name, nothing), researchers.get(name, nothing)
        score = scores.get(name, Rate(intervals.Estimate(np.nan, 1.0, 7.0), 0))
        cut_offs = [(own_gold, min_agreement), (own_researchers, min_agreement), (score, min_score)]
        found[name] = Screening(
            gold=own_gold,
            researchers=own_researchers,
            consistency=same.get(name, nothing),
            demonstrations=score,
            verdict=verdict(cut_offs, least=least),
            clearly_below=any(each.count >= least and each.share.hi < cut_off for each, cut_off in cut_offs),
        )
    return found


def verdict(cut_offs: Sequence[tuple[Rate, float]], *, least: int) -> str:
    """Returns `BELOW` if a rate is below its cut-off, else `PASSES`; `TOO_FEW` if all counts are below ``least``."""
    known = [each.share.mean >= cut_off for each, cut_off in cut_offs if each.count >= max(least, 1)]
    return TOO_FEW if not known else PASSES if all(known) else BELOW


def gold_agreement(
    items: Mapping[str, judgements.Item], latest: Sequence[store.Recorded], *, confidence: float = 0.95
) -> dict[str, Rate]:
    """Returns the agreement of each labeler with the answers of gold questions, ``Item.expected``.

    A ranking consists of a question for each two completions. Of a rating, only the flags that the answer has are
    compared, such as those of sensitive content.
    """
    compared = [
        (each.labeler, *_compared(each.judgement, expected, len(items[each.item].completions)))
        for each in latest
        if (expected := items[each.item].expected) is not None
    ]
    return _rates(compared, confidence)


def consistency(
    items: Mapping[str, judgements.Item], latest: Sequence[store.Recorded], *, confidence: float = 0.95
) -> dict[str, Rate]:
    """Returns the agreement of each labeler's answers about hidden duplicates with those about the originals.

    The completions of a duplicate may have another order, so they are recognised by their contents. Items with other
    completions than their originals are left out, and so are originals that are not among the items.
    """
    by_item = {(each.labeler, each.item): each.judgement for each in latest}
    compared = []
    for each in latest:
        original = items[each.item].duplicate_of
        first = by_item.get((each.labeler, original or ""))
        if original is None or first is None or original not in items:
            continue
        shown, own = ([(c.text, c.extra) for c in item.completions] for item in (items[each.item], items[original]))
        if len(shown) == len(own) and all(content in own for content in shown):
            again = each.judgement.in_item_order([own.index(content) for content in shown])
            compared.append((each.labeler, *_compared(again, first, len(own))))
    return _rates(compared, confidence)


def demonstration_scores(
    items: Mapping[str, judgements.Item], latest: Sequence[store.Recorded], *, confidence: float = 0.95
) -> dict[str, Rate]:
    """Returns the mean rating of the demonstrations of each labeler, with Student's t interval over demonstrations.

    A demonstration is an item of a single completion whose policy is the name of a labeler. Ratings by its author do
    not count.
    """
    ratings: dict[str, list[tuple[str, int]]] = {}
    for each in latest:
        author = items[each.item].completions[0].policy
        if each.judgement.rating is not None and author and author != each.labeler:
            ratings.setdefault(author, []).append((each.item, each.judgement.rating))
    means = {
        author: intervals.clustered_mean(
            [rating for _, rating in found], [id for id, _ in found], confidence=confidence
        )
        for author, found in ratings.items()
    }
    return {
        author: Rate(mean._replace(lo=max(mean.lo, 1.0), hi=min(mean.hi, 7.0)), len(ratings[author]))
        for author, mean in means.items()
    }


def _compared(said: judgements.Judgement, expected: judgements.Judgement, n: int) -> tuple[int, int]:
    """Returns the number of equal answers and of questions that both judgements answer."""
    a, b = (labeler_agreement.choices(labeler_votes.answers(each, n)) for each in (said, expected))
    return int((a == b).sum()), int((~np.isnan(a) & ~np.isnan(b)).sum())


def _rates(compared: Sequence[tuple[str, int, int]], confidence: float) -> dict[str, Rate]:
    names = dict.fromkeys(name for name, *_ in compared)
    of = {name: [counts for who, *counts in compared if who == name] for name in names}
    return {name: labeler_agreement.rate(*zip(*counts), confidence=confidence) for name, counts in of.items()}
