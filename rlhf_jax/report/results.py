"""Prepares results.json for display: ordered policies, columns, intervals, formatted numbers and the headline.

The terminal table and the HTML report both use this module, so they show the same numbers. Fields that are missing or
null for every policy have no column. This module does not import a plotting library.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data import errors

POLICIES = {
    "base": "base",
    "sft": "SFT",
    "sft_mix": "SFT-mix",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "best_of_n": "best-of-n",
    "helpful": "helpful-only",
    "sl_cai": "SL-CAI",
    "rl_cai": "RL-CAI",
}
"""Known policies in display order, with their display names."""

DIRECT_METHODS = {
    "dpo": "DPO",
    "cdpo": "cDPO",
    "robust": "robust DPO",
    "ipo": "IPO",
    "hinge": "hinge",
    "kto": "KTO",
    "orpo": "ORPO",
    "simpo": "SimPO",
    "dpo-sft": "DPO with SFT",
    "dpo-norm": "length-normalised DPO",
}
"""Methods without reinforcement learning in display order, with their display names. They follow PPO in the report."""

MAIN_POLICIES = ("ppo_ptx", "ppo", *DIRECT_METHODS, "best_of_n")
"""The headline describes the first of these policies that has a win rate or, if none has one, a reward."""

MOST_HEADLINES = 6
"""Maximum number of sentences about policies and judges in the headline."""

FEW_CLUSTERS = 20
"""Number of independent clusters, such as conversations, below which `rough_intervals` warns about intervals.

Student's t accounts for few clusters only if these are alike, and the jackknife variance of few clusters is noisy."""

MISSING = "–"


class Interval(NamedTuple):
    """A number and its 95 % interval; an unknown bound is None."""

    mean: float
    low: float | None = None
    high: float | None = None


class Column(NamedTuple):
    """A column of the results table; ``short`` is its heading in a terminal, "" if only the HTML report shows it.

    The HTML report shows the intervals of all columns; a terminal shows those for which ``intervals`` is True.
    """

    key: str
    title: str
    short: str
    percent: bool = False
    digits: int = 1
    intervals: bool = False


COLUMNS = (
    Column("score", "Score", "score", digits=3),
    Column("win_rate", "Wins vs the baseline (%)", "wins, %", percent=True, intervals=True),
    Column("length_controlled_win_rate", "Wins vs the baseline at equal length (%)", "", percent=True),
    Column("gold_win_rate_vs_sft", "Wins vs SFT, gold utility (%)", "wins vs SFT, %", percent=True, intervals=True),
    Column("length_controlled_win_rate_vs_sft", "Wins vs SFT at SFT's length, gold (%)", "", percent=True),
    Column("labeler_win_rate_vs_sft", "Wins vs SFT, training labelers (%)", "", percent=True),
    Column(
        "heldout_win_rate_vs_sft", "Wins vs SFT, held-out labelers (%)", "held-out, %", percent=True, intervals=True
    ),
    Column("gold", "Gold utility", "gold", digits=3),
    Column("gap_closed", "Gap closed (%)", "", percent=True),
    Column("reward", "RM score", "RM\nscore", digits=2),
    Column("kl", "KL (nats per answer)", "KL/seq\nnats", digits=2),
    Column("kl_bound", "Upper bound of the KL (nats per answer)", "", digits=2),
    Column("skill_accuracy", "Skill accuracy (%)", "skills\n%", percent=True),
    Column("pretraining_loss", "Pretraining loss (nats per token)", "LM\nloss", digits=3),
    Column("harmlessness", "Harmlessness, red-team prompts", "harm-\nless", digits=3),
    Column("helpfulness", "Helpfulness, benign prompts", "help-\nful", digits=3),
    Column("refusal_rate_harmful", "Refusals, red-team prompts (%)", "refused\nharm, %", percent=True),
    Column("refusal_rate_benign", "Refusals, benign prompts (%)", "refused\nbenign, %", percent=True),
    Column("truthful_rate", "Truthful (%)", "truth\n%", percent=True),
    Column("harm_rate", "Harmful (%)", "harm\n%", percent=True),
    Column("length", "Length (tokens)", "len", digits=1),
    Column("diversity", "Distinct pairs (share)", "", digits=3),
    Column("self_bleu", "Self-BLEU", "", digits=3),
    Column("entropy", "Entropy (nats per token)", "", digits=3),
    Column("entropy_ratio", "Entropy relative to the initial model", "", digits=3),
    Column("matched_temperature", "Relative temperature of the initial model with this entropy", "", digits=2),
)


def interval(value: Any) -> Interval | None:
    """Converts a number or ``[mean, low, high]`` to an `Interval`; returns None for anything else."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3:
        mean, low, high = (_number(part) for part in value)
        return None if mean is None else Interval(mean, low, high)
    mean = _number(value)
    return None if mean is None else Interval(mean)


def _number(value: Any) -> float | None:
    if isinstance(value, (bool, str)) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def finite(value: Any) -> Interval | None:
    """Converts a value as `interval` does, but returns None for NaN and infinity, which plots cannot show.

    A bound that is not finite becomes None; the other bound is kept.
    """
    parsed = interval(value)
    if parsed is None or not math.isfinite(parsed.mean):
        return None
    ends = (x if x is not None and math.isfinite(x) else None for x in (parsed.low, parsed.high))
    return Interval(parsed.mean, *ends)


def label(policy: str) -> str:
    """Returns the display name of a policy or a stage."""
    # Names with a space, such as "sample sft_a", contain names that users chose, which are kept.
    return (POLICIES | DIRECT_METHODS).get(policy, policy if " " in policy else policy.replace("_", " "))


def number_text(number: float) -> str:
    """Returns a number with at least four digits, and with thousands separators instead of an exponent.

    >>> from rlhf_jax.report import results
    >>> [results.number_text(each) for each in (18794.6, 999.96, 21.812, 0.00002)]
    ['18,795', '1,000', '21.81', '2e-05']
    """
    return f"{number:,.0f}" if abs(number) >= 999.95 else f"{number:.4g}"


def policies(results: Mapping[str, Any]) -> list[str]:
    """Returns the policies in the results: known policies in display order, then the others in order of appearance."""
    names = results.get("policies") or {}
    order = [*(n for n in POLICIES if n != "best_of_n"), *DIRECT_METHODS, "best_of_n"]
    return [name for name in order if name in names] + [name for name in names if name not in order]


def value(results: Mapping[str, Any], policy: str, key: str) -> Any:
    """Returns a field of a policy, such as ``"kl"`` or, in a nested dict, ``"skills.copy"``; None if it is missing."""
    found: Any = (results.get("policies") or {}).get(policy)
    for name in key.split("."):
        found = (found or {}).get(name)
    return found


def columns(results: Mapping[str, Any]) -> list[Column]:
    """Returns the columns of `COLUMNS` for which at least one policy has a number."""
    return [c for c in COLUMNS if any(interval(value(results, p, c.key)) for p in policies(results))]


def other_columns(results: Mapping[str, Any]) -> list[Column]:
    """Returns columns for the numbers of policies that `COLUMNS` does not contain, including accuracies by skill."""
    known = {c.key for c in COLUMNS}
    names: dict[str, None] = {}
    for row in ((results.get("policies") or {}).get(p) or {} for p in policies(results)):
        fields = row | {f"skills.{skill}": v for skill, v in (row.get("skills") or {}).items()}
        names |= dict.fromkeys(key for key, v in fields.items() if key not in known and interval(v))
    return [Column(name, name.replace("skills.", "skill: ").replace("_", " "), "", digits=3) for name in names]


def format_number(x: float, *, percent: bool = False, digits: int = 1) -> str:
    """Formats a number with a Unicode minus sign and without a negative zero; percentages have one decimal.

    Example:
        >>> from rlhf_jax.report import results
        >>> results.format_number(-1.236, digits=2)
        '−1.24'
        >>> results.format_number(0.7825, percent=True)
        '78.2'
    """
    if not math.isfinite(x):
        return str(x)
    text = f"{100 * x:.1f}" if percent else f"{x:.{digits}f}"
    if not text.strip("-0."):
        text = text.lstrip("-")
    return text.replace("-", "−")


def rough_intervals(results: Mapping[str, Any]) -> list[str]:
    """Returns a sentence about each result whose intervals rest on fewer than `FEW_CLUSTERS` independent clusters.

    The numbers of clusters by result are ``clusters`` in the results; those of evaluations and of reward models are
    also read from their own fields. Strata have their own numbers of clusters (see `is_rough`).

    Example:
        >>> from rlhf_jax.report import results
        >>> results.rough_intervals({"clusters": {"held-out loss": 6, "accuracy": 20}})
        ['the intervals of the held-out loss are rough: they rest on only 6 independent conversations (below 20)']
    """
    counts = {
        "evaluation": (results.get("held_out") or {}).get("asked"),
        "reward model": (results.get("reward_model") or {}).get("held_out_asked"),
        **(results.get("clusters") or {}),
    }
    return [
        f"the intervals of the {name} are rough: they rest on only {n} independent conversations (below {FEW_CLUSTERS})"
        if n > 1
        else f"the {name} has no intervals, because it rests on a single independent conversation"
        for name, n in counts.items()
        if n and n < FEW_CLUSTERS
    ]


def is_rough(stratum: Mapping[str, Any]) -> bool:
    """Returns whether the interval of a stratum rests on fewer than `FEW_CLUSTERS` independent clusters."""
    return (stratum.get("clusters") or FEW_CLUSTERS) < FEW_CLUSTERS


ROUGH_MARK, ROUGH_NOTE = "*", f"* fewer than {FEW_CLUSTERS} independent conversations: the interval is rough"
"""Mark of strata for which `is_rough` is true, and its explanation."""


def format_parts(value: Any, *, percent: bool = False, digits: int = 1) -> tuple[str, str]:
    """Returns a value and its interval as strings; without an interval, the second string is empty.

    The intervals from 0 to 1 and from 0 to infinity, which are those of a rate and of a positive ratio in a single
    cluster, count as none.

    Example:
        >>> from rlhf_jax.report import results
        >>> results.format_parts([0.78, 0.76, 0.8], percent=True)
        ('78.0', '76.0–80.0')
        >>> results.format_parts([3.0, 2.1, None])
        ('3.0', 'from 2.1')
        >>> results.format_parts(16, digits=3)  # a count
        ('16', '')
    """
    parsed = interval(value)
    if parsed is None:
        return MISSING, ""
    digits = 0 if isinstance(value, numbers.Integral) else digits
    mean = format_number(parsed.mean, percent=percent, digits=digits)
    low, high = (
        format_number(x, percent=percent, digits=digits) if x is not None and math.isfinite(x) else ""
        for x in (parsed.low, parsed.high)
    )
    if parsed.low == 0 and parsed.high in (1.0, math.inf, None):
        return mean, ""
    if not (low and high):
        return mean, f"from {low}" if low else f"up to {high}" if high else ""
    # "−3.0 to −1.0", because a dash between negative numbers looks like a minus sign.
    return mean, f"{low} to {high}" if "−" in low + high else f"{low}–{high}"


def seconds_text(seconds: float) -> str:
    """Formats a duration, such as 9.4 s, 4:07 or 1:02:03."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def run_facts(results: Mapping[str, Any]) -> list[str]:
    """Returns short strings that describe the run: preset, published settings, seed, duration and peak memory."""
    facts = [f"{name} {results[name]}" for name in ("preset", "published", "seed") if results.get(name) is not None]
    if (seconds := _number(results.get("seconds"))) is not None:
        facts.append(f"duration {seconds_text(seconds)}")
    if (megabytes := _number(results.get("peak_rss_mb"))) is not None:
        facts.append(f"peak memory {megabytes / 1024:.1f} GiB")
    return facts


def headline(results: Mapping[str, Any]) -> str:
    """Returns the main result in one sentence; its wording depends on the interval of the win rate.

    Without a win rate, the sentence describes reward-model scores; without policies, the reward model's accuracy.
    """
    return headlines(results)[0]


def headlines(results: Mapping[str, Any]) -> list[str]:
    """Returns the main result, with one sentence per policy and judge if policies are compared with a baseline.

    If there are more than `MOST_HEADLINES`, only the best policy of each judge has a sentence. Results can have their
    own ``headlines``.
    """
    return results.get("headlines") or _against_baseline(results) or [_distilled(results) or _main_result(results)]


def _distilled(results: Mapping[str, Any]) -> str:
    """Returns a sentence about the KL from the teacher; "" without held-out rows or another kind of run."""
    found = results.get("distillation") or {}
    before, after = (finite(found.get(name)) for name in ("kl_before", "kl_after"))
    if before is None or after is None:
        return ""
    numbers = (format_number(each.mean, digits=3) for each in (before, after))
    return "Distillation changes the KL from the teacher to the student from {} to {} nats per token.".format(*numbers)


def _main_result(results: Mapping[str, Any]) -> str:
    names = policies(results)
    for name in MAIN_POLICIES:
        rate = finite(value(results, name, "gold_win_rate_vs_sft")) if name in names else None
        if rate is not None:
            strict = finite(value(results, name, "gold_strict_wins_vs_sft"))
            ties = "" if strict is None else f" {format_number(strict.mean, percent=True)} % are strict wins."
            return (
                f"{label(name)} {_verdict(rate)} of held-out prompts{_interval_text(rate)}, counting a tie as half a "
                f"win.{ties}"
            )
    for name in MAIN_POLICIES:
        score, start = finite(value(results, name, "reward")), finite(value(results, "sft", "reward"))
        if score is not None and start is not None:
            kl = finite(value(results, name, "kl"))
            spent = f" at a KL of {format_number(kl.mean)} nats per answer" if kl else ""
            return (
                f"{label(name)} changes the mean reward-model score from {format_number(start.mean, digits=2)} (SFT) "
                f"to {format_number(score.mean, digits=2)}{spent}."
            )
    if not names and (sentence := _reward_model(results)):
        return sentence
    return f"Results of {errors.counted(len(names), 'policies')}."


def _against_baseline(results: Mapping[str, Any]) -> list[str]:
    """Returns a sentence about the win rate of each policy against the policy that the results call the baseline."""
    if not (other := label(str(results.get("baseline") or ""))):
        return []
    found: dict[str, list[tuple[float, str]]] = {}
    for name in policies(results):
        for judge in results.get("judges") or [""]:
            row = (value(results, name, "judges") or {}).get(judge) if judge else results["policies"][name]
            rate = finite((row or {}).get("win_rate"))
            if rate is not None:
                text = f"{label(name)} {_verdict(rate, other)} of answers{_interval_text(rate)}"
                found.setdefault(judge, []).append((rate.mean, f"{text}, judged by {judge}." if judge else f"{text}."))
    if sum(map(len, found.values())) <= MOST_HEADLINES:
        return [text for sentences in found.values() for _, text in sentences]
    return [f"The best of {len(sentences)} policies: {max(sentences)[1]}" for sentences in found.values()]


def _verdict(rate: Interval, other: str = "SFT") -> str:
    percent = f"{format_number(rate.mean, percent=True)} %"
    low, high = (rate.low, rate.high) if rate.low is not None and rate.high is not None else (rate.mean, rate.mean)
    if low > 0.5:
        return f"beats {other} on {percent}"
    if high < 0.5:
        return f"loses to {other}: it wins on {percent}"
    return f"does not differ significantly from {other}: it wins on {percent}"


def _interval_text(rate: Interval) -> str:
    _, bounds = format_parts(rate, percent=True)
    return f" (95 % interval {bounds})" if bounds else ""


def summary(results: Mapping[str, Any]) -> list[str]:
    """Returns further sentences about the results; sentences whose numbers are missing are omitted."""
    reward_model = _reward_model(results) if policies(results) else ""  # otherwise it is the headline
    sentences = (_heldout(results), _gap_closed(results), reward_model, _implicit_reward(results))
    rough = [f"{text[0].upper()}{text[1:]}." for text in rough_intervals(results)]
    return [s for s in (*rough, *sentences, _alignment_tax(results), _ptx(results)) if s]


def gap_closed(results: Mapping[str, Any]) -> str:
    """Returns which share of the gap between SFT's gold utility and the maximum each trained policy closes, or ""."""
    texts = []
    for name in policies(results):
        if name not in ("base", "sft", "sft_mix") and (share := finite(value(results, name, "gap_closed"))):
            _, bounds = format_parts(share, percent=True)
            percent = format_number(share.mean, percent=True)
            texts.append(f"{label(name)} {percent} %" + (f" ({bounds})" if bounds else ""))
    return ", ".join(texts)


def _gap_closed(results: Mapping[str, Any]) -> str:
    shares, best = gap_closed(results), finite(results.get("best_possible_gold"))
    if not shares:
        return ""
    maximum = "the maximum" if best is None else f"the maximum of {format_number(best.mean, digits=3)}"
    return f"Share of the gap between SFT's gold utility and {maximum} that a policy closes: {shares}."


def best_of_n_differs(results: Mapping[str, Any]) -> str:
    """Returns how the evaluation of best-of-n differs from that of the other policies, or "" if it does not."""
    few, prompts = value(results, "best_of_n", "prompts"), (results.get("held_out") or {}).get("prompts")
    temperature = results.get("temperature") or {}
    own, others = temperature.get("best_of_n"), temperature.get("policies")
    texts = [f"answers {few} of {prompts} prompts"] if few and prompts and few < prompts else []
    texts += [f"samples at a temperature of {own:g} instead of {others:g}"] if own and others and own != others else []
    return f"best-of-n {' and '.join(texts)}" if texts and value(results, "best_of_n", "n") else ""


def _implicit_reward(results: Mapping[str, Any]) -> str:
    if (accuracy := finite(results.get("implicit_accuracy"))) is None:
        return ""
    percent = format_number(accuracy.mean, percent=True)
    return f"The implicit reward agrees with {percent} % of held-out comparisons{_interval_text(accuracy)}."


def _heldout(results: Mapping[str, Any]) -> str:
    for name in MAIN_POLICIES:
        if (rate := finite(value(results, name, "heldout_win_rate_vs_sft"))) is not None:
            return (
                "Held-out labelers, whose comparisons were not used to train the reward model, prefer the answer of "
                f"{label(name)} to that of SFT with probability {format_number(rate.mean, percent=True)} %"
                f"{_interval_text(rate)}; the noise of their choices is included."
            )
    return ""


def _reward_model(results: Mapping[str, Any]) -> str:
    model = results.get("reward_model") or {}
    accuracy = finite(model.get("accuracy"))
    if accuracy is None:
        return ""
    text = f"The reward model agrees with {format_number(accuracy.mean, percent=True)} % of held-out comparisons"
    text += _interval_text(accuracy)
    if (agreement := finite(model.get("label_agreement"))) is not None:
        text += f"; two labelers agree with each other on {format_number(agreement.mean, percent=True)} %"
    return text + "."


def _alignment_tax(results: Mapping[str, Any]) -> str:
    start = finite(value(results, "sft_mix", "skill_accuracy"))
    ends = [(p, finite(value(results, p, "skill_accuracy"))) for p in ("ppo", "ppo_ptx", *DIRECT_METHODS)]
    texts = [f"{label(p)} {format_number(end.mean, percent=True)} %" for p, end in ends if end]
    if start is None or not texts:
        return ""
    method = "PPO" if {"ppo", "ppo_ptx"} & set(results.get("policies") or {}) else "training"
    before = f"{label('sft_mix')} (the start of {method}) {format_number(start.mean, percent=True)} %"
    return f"Skill accuracy: {', '.join([before, *texts])}."


def _ptx(results: Mapping[str, Any]) -> str:
    coefs = [finite((results.get("ptx_coef") or {}).get(name)) for name in ("per_token", "per_sequence")]
    if coefs[0] is None or coefs[1] is None:
        return ""
    token, sequence = (format_number(coef.mean, digits=3) for coef in coefs if coef)
    return (
        f"In PPO-ptx, the pretraining loss has the coefficient {token} if this loss and the PPO loss are means over "
        f"tokens. The equivalent coefficient for sums over a sequence is {sequence}."
    )
