"""All statistics on the labelers of a comparison store."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import diagnostics
from rlhf_jax.diagnostics import intervals
from rlhf_jax.feedback import store
from rlhf_jax.feedback.labelers import labeler_agreement, labeler_biases, labeler_votes, screening
from rlhf_jax.feedback.labelers.labeler_agreement import Rate


class LabelerRow(NamedTuple):
    """Statistics on one labeler."""

    name: str
    judgements: int
    """Number of items that the labeler judged."""
    others: Rate
    """Agreement with the most frequent choice of the others."""
    below_others: intervals.Estimate
    """Agreement of the others with each other, minus the agreement of the labeler with them."""
    position: labeler_biases.PositionBias
    length: labeler_biases.LengthPreference
    seconds: np.ndarray
    """Times of the judgements that have one, in seconds."""
    times: labeler_biases.JudgementTimes
    screening: screening.Screening
    flags: tuple[str, ...]
    """What to check about the labeler, of "agreement", "position", "length" and "screening"."""


class Report(NamedTuple):
    """Statistics on the labelers of a store. Intervals treat prompts as independent."""

    set_name: str | None
    pairs: int
    """Number of pairs with at least one vote; a ranking consists of a pair for each two completions."""
    prompts: int
    """Number of prompts of these pairs."""
    labelers: list[LabelerRow]
    """One row for each labeler, sorted by name."""
    agreement: Rate
    """`labeler_agreement.pairwise_agreement`."""
    kappa: intervals.Estimate
    """`labeler_agreement.fleiss_kappa`."""
    matrix: labeler_agreement.AgreementMatrix
    modal: labeler_agreement.ModalAgreement
    """`labeler_agreement.modal_of_three`."""
    researchers: labeler_agreement.GroupAgreement | None
    """Agreement of researchers (inside) and other labelers (outside); None without researchers."""
    held_out: labeler_agreement.GroupAgreement | None
    """Agreement of held-out labelers (outside) and others (inside); None without held-out labelers."""
    by_category: dict[Hashable, Rate]
    """Rate of disagreement by category of the prompt."""
    by_domain: dict[Hashable, Rate]
    """Rate of disagreement by domain of the prompt."""
    elo: dict[str, intervals.Estimate]
    """Elo score of each policy relative to the first; empty if it is not determined."""
    elo_error: str | None
    """Why there are no scores; None if there are, or if no two policies are compared."""
    min_agreement: float
    min_score: float
    min_seconds: float


def report(
    opened: store.Store,
    set_name: str | None = None,
    *,
    researchers: Sequence[str] = (),
    held_out: Sequence[str] = (),
    min_agreement: float = 0.75,
    min_score: float = 6.0,
    least: int = 10,
    min_seconds: float = 2.0,
    confidence: float = 0.95,
) -> Report:
    """Returns statistics on the labelers of a set, or of all sets.

    A labeler has the flag "agreement" if they agree less with the others than the others do with each other;
    "position", if they choose the first or the last completion too often; "length", if they choose the longer
    completion more often than others do; and "screening", if an interval of theirs is below its cut-off. The first
    three are tests at the level ``1 - confidence`` divided by the number of labelers (Bonferroni).

    Args:
        opened: The store.
        set_name: The set; None for all.
        researchers: Labelers whose most frequent choice is a reference for the others.
        held_out: Labelers of a second group, such as those who made no training data.
        min_agreement: See `screening.screen`.
        min_score: See `screening.screen`.
        least: See `screening.screen`.
        min_seconds: A judgement that took less time was not made with care.
        confidence: Coverage of the intervals.

    Returns:
        The statistics.

    Raises:
        StoreError: The set is unknown or has no judgement, or nobody of the name of a researcher or of a held-out
            labeler has made one.
    """
    with opened.transaction():
        if set_name is not None and set_name not in (sets := opened.sets()):
            raise store.StoreError(f"{opened.path} has no set {set_name!r}; it has {', '.join(sets) or 'none'}")
        items, latest = opened.items(set_name), opened.latest(set_name)
        found = labeler_votes.comparisons(opened, set_name)
    if not latest:
        raise store.StoreError(
            f"{opened.path} has no judgement{'' if set_name is None else f' in the set {set_name!r}'}"
        )
    for name in (*researchers, *held_out):
        if name not in found.labelers:
            who = ", ".join(found.labelers)
            raise store.StoreError(f"{opened.path} has no judgement of {name!r}; it has those of {who}")

    votes_NM, M = found.votes_NM, len(found.labelers)
    options: dict[str, Any] = {"clusters": found.prompts, "confidence": confidence}
    is_researcher_M, is_held_out_M = (np.isin(found.labelers, list(names)) for names in (researchers, held_out))
    voted_N = ~np.isnan(votes_NM).all(axis=1)
    elo, elo_error = _elo(found, confidence)
    return Report(
        set_name=set_name,
        pairs=int(voted_N.sum()),
        prompts=len({found.prompts[n] for n in np.flatnonzero(voted_N)}),
        labelers=_rows(
            found,
            latest,
            screening.screen(
                items,
                latest,
                _agreement_with_researchers(found, is_researcher_M, options),
                min_agreement=min_agreement,
                min_score=min_score,
                least=least,
                confidence=confidence,
            ),
            options,
            min_seconds=min_seconds,
            flagged=1 - (1 - confidence) / M,
        ),
        agreement=labeler_agreement.pairwise_agreement(votes_NM, **options),
        kappa=labeler_agreement.fleiss_kappa(votes_NM, **options),
        matrix=labeler_agreement.agreement_matrix(votes_NM, **options),
        modal=labeler_agreement.modal_of_three(votes_NM, **options),
        researchers=labeler_agreement.group_agreement(votes_NM, is_researcher_M, **options) if researchers else None,
        held_out=labeler_agreement.group_agreement(votes_NM, ~is_held_out_M, **options) if held_out else None,
        by_category=labeler_agreement.disagreement_by(votes_NM, found.categories, **options),
        by_domain=labeler_agreement.disagreement_by(votes_NM, found.domains, **options),
        elo=elo,
        elo_error=elo_error,
        min_agreement=min_agreement,
        min_score=min_score,
        min_seconds=min_seconds,
    )


def _agreement_with_researchers(
    found: labeler_votes.Comparisons, is_researcher_M: np.ndarray, options: dict[str, Any]
) -> dict[str, Rate]:
    reference_NM = labeler_agreement.mode_of_others(found.votes_NM, is_researcher_M)
    return dict(zip(found.labelers, labeler_agreement.agreement_with(found.votes_NM, reference_NM, **options)))


def _rows(
    found: labeler_votes.Comparisons,
    latest: Sequence[store.Recorded],
    screened: dict[str, screening.Screening],
    options: dict[str, Any],
    *,
    min_seconds: float,
    flagged: float,
) -> list[LabelerRow]:
    """Returns the statistics on each labeler, with flags at the confidence ``flagged``."""
    votes_NM, others_NM = found.votes_NM, labeler_agreement.mode_of_others(found.votes_NM)
    strict: dict[str, Any] = {**options, "confidence": flagged}
    others = labeler_agreement.agreement_with(votes_NM, others_NM, **options)
    positions = labeler_biases.position_bias(votes_NM, found.first_shown_NM, items=found.items, **options)
    lengths, strict_lengths = (
        labeler_biases.length_preference(votes_NM, found.longer_N, **each) for each in (options, strict)
    )
    rows = []
    for m, name in enumerate(found.labelers):
        own = [each.judgement for each in latest if each.labeler == name]
        seconds = np.array([each.seconds for each in own if each.seconds is not None], np.float64)
        below, strict_below = (
            labeler_agreement.group_agreement(votes_NM, np.arange(votes_NM.shape[1]) != m, **each).difference
            for each in (options, strict)
        )
        flags = {
            "agreement": strict_below.lo > 0,
            "position": positions[m].p_value < 1 - flagged,
            "length": strict_lengths[m].beyond_others.lo > 0,
            "screening": screened[name].clearly_below,
        }
        rows.append(
            LabelerRow(
                name=name,
                judgements=len(own),
                others=others[m],
                below_others=below,
                position=positions[m],
                length=lengths[m],
                seconds=seconds,
                times=labeler_biases.judgement_times(seconds, min_seconds=min_seconds),
                screening=screened[name],
                flags=tuple(flag for flag, raised in flags.items() if raised),
            )
        )
    return rows


def _elo(found: labeler_votes.Comparisons, confidence: float) -> tuple[dict[str, intervals.Estimate], str | None]:
    policies, wins_CMM = labeler_votes.policy_wins(found)
    if not policies:
        return {}, None
    try:
        scores = diagnostics.bradley_terry(wins_CMM, clusters=True).elo(reference=0, confidence=confidence)
    except ValueError as error:
        return {}, f"{error}; the models are {', '.join(f'{m}: {name}' for m, name in enumerate(policies))}"
    return dict(zip(policies, scores)), None
