"""How results.json is read: policies in order, columns, intervals, numbers as text, and the headline in words.

The terminal table and the report both read results through this module, so that they agree on what is shown and on
what is left out. A field that is absent or null in every row has no column; nothing here needs a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

POLICIES = {
    "base": "base",
    "sft": "SFT",
    "sft_mix": "SFT-mix",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "best_of_n": "best-of-n",
}
"""Known policies in the order in which they are shown, and their names in print."""

DIRECT = {
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
"""Methods without reinforcement learning, which stand where PPO stands."""

LEARNT = ("ppo_ptx", "ppo", *DIRECT, "best_of_n")
"""What a run is about: the first of them that is there."""

MISSING = "–"


class Interval(NamedTuple):
    """A number and, where it is known, its 95 % interval; an end that is None has no bound."""

    mean: float
    low: float | None = None
    high: float | None = None


class Column(NamedTuple):
    """One column of the results table; ``short`` is its heading in a terminal, empty to leave it out there."""

    key: str
    title: str
    short: str
    percent: bool = False
    digits: int = 1


COLUMNS = (
    Column("gold_win_rate_vs_sft", "Wins vs SFT, gold utility (%)", "wins vs SFT, %", percent=True),
    Column("length_controlled_win_rate_vs_sft", "Wins vs SFT at SFT's length, gold (%)", "", percent=True),
    Column("labeler_win_rate_vs_sft", "Wins vs SFT, training labelers (%)", "", percent=True),
    Column("heldout_win_rate_vs_sft", "Wins vs SFT, held-out labelers (%)", "held-out, %", percent=True),
    Column("gold", "Gold utility", "gold", digits=3),
    Column("gap_closed", "Gap closed (%)", "", percent=True),
    Column("reward", "RM score", "RM\nscore", digits=2),
    Column("kl", "KL (nats per answer)", "KL/seq\nnats", digits=2),
    Column("skill_accuracy", "Skill accuracy (%)", "skills\n%", percent=True),
    Column("pretraining_loss", "Pretraining loss (nats per token)", "LM\nloss", digits=3),
    Column("truthful_rate", "Truthful (%)", "truth\n%", percent=True),
    Column("harm_rate", "Harmful (%)", "harm\n%", percent=True),
    Column("length", "Length (tokens)", "len", digits=1),
    Column("diversity", "Diversity", "", digits=3),
)


def interval(value: Any) -> Interval | None:
    """``None``, a number or ``[mean, low, high]`` as an Interval; anything else is not a number and gives None."""
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
    """As `interval`, but None also for NaN and infinity, which a table must show and a plot cannot.

    An end that is not finite is None, the other one stays: an interval may have one side.
    """
    found = interval(value)
    if found is None or not math.isfinite(found.mean):
        return None
    return Interval(found.mean, *(x if x is not None and math.isfinite(x) else None for x in (found.low, found.high)))


def label(policy: str) -> str:
    """The name of a policy in print."""
    return (POLICIES | DIRECT).get(policy, policy.replace("_", " "))


def policies(results: Mapping[str, Any]) -> list[str]:
    """The policies that results hold: the known ones in their order, then the others as they come."""
    found = results.get("policies") or {}
    order = [*(n for n in POLICIES if n != "best_of_n"), *DIRECT, "best_of_n"]
    return [name for name in order if name in found] + [name for name in found if name not in order]


def value(results: Mapping[str, Any], policy: str, key: str) -> Any:
    """One field of one policy, or None; ``gap_closed`` stands beside the policies, not inside them."""
    if key == "gap_closed":
        return (results.get("gap_closed") or {}).get(policy)
    return ((results.get("policies") or {}).get(policy) or {}).get(key)


def columns(results: Mapping[str, Any]) -> list[Column]:
    """The columns that at least one policy has a number for."""
    return [c for c in COLUMNS if any(interval(value(results, p, c.key)) for p in policies(results))]


def other_columns(results: Mapping[str, Any]) -> list[Column]:
    """Numbers of the policies that `COLUMNS` does not name, so that nothing measured goes unseen."""
    known = {c.key for c in COLUMNS}
    rows = [(results.get("policies") or {}).get(p) or {} for p in policies(results)]
    names = dict.fromkeys(key for row in rows for key, v in row.items() if key not in known and interval(v))
    return [Column(name, name.replace("_", " "), "", digits=3) for name in names]


def format_number(x: float, *, percent: bool = False, digits: int = 1) -> str:
    """A number in print: percentages with one decimal, a true minus sign, no minus zero."""
    if not math.isfinite(x):
        return str(x)
    text = f"{100 * x:.1f}" if percent else f"{x:.{digits}f}"
    if not text.strip("-0."):
        text = text.lstrip("-")
    return text.replace("-", "−")


def format_parts(found: Any, *, percent: bool = False, digits: int = 1) -> tuple[str, str]:
    """A value in print, and its interval: ``"1.0–2.0"``, ``"from 1.0"``, ``"up to 2.0"``, or ``""`` for none."""
    it = interval(found)
    if it is None:
        return MISSING, ""
    mean = format_number(it.mean, percent=percent, digits=digits)
    low, high = (
        format_number(x, percent=percent, digits=digits) if x is not None and math.isfinite(x) else ""
        for x in (it.low, it.high)
    )
    if not (low and high):
        return mean, f"from {low}" if low else f"up to {high}" if high else ""
    # "−3.0 to −1.0": between negative numbers a dash would read as a minus.
    return mean, f"{low} to {high}" if "−" in low + high else f"{low}–{high}"


def seconds_text(seconds: float) -> str:
    """A duration in print: 9.4 s, 4:07, 1:02:03."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def run_facts(results: Mapping[str, Any]) -> list[str]:
    """What the run was, in a few words each: preset, seed, time, memory."""
    facts = [f"{name} {results[name]}" for name in ("preset", "seed") if results.get(name) is not None]
    if (seconds := _number(results.get("seconds"))) is not None:
        facts.append(seconds_text(seconds))
    if (megabytes := _number(results.get("peak_rss_mb"))) is not None:
        facts.append(f"peak memory {megabytes / 1024:.1f} GiB")
    return facts


def headline(results: Mapping[str, Any]) -> str:
    """The result in one sentence, weaker where the interval says so, and about scores where nobody judged."""
    found = policies(results)
    for name in LEARNT:
        rate = finite(value(results, name, "gold_win_rate_vs_sft")) if name in found else None
        if rate is not None:
            return f"{label(name)} {_verdict(rate)} of held-out prompts{_interval_words(rate)}."
    for name in LEARNT:
        score, start = finite(value(results, name, "reward")), finite(value(results, "sft", "reward"))
        if score is not None and start is not None:
            kl = finite(value(results, name, "kl"))
            spent = f", at a KL of {format_number(kl.mean)} nats per answer" if kl else ""
            return (
                f"{label(name)} moves the mean reward-model score from {format_number(start.mean, digits=2)} (SFT) "
                f"to {format_number(score.mean, digits=2)}{spent}."
            )
    if not found and (told := _reward_model(results)):
        return told
    return f"Results of {len(found)} {'policy' if len(found) == 1 else 'policies'}."


def _verdict(rate: Interval) -> str:
    percent = f"{format_number(rate.mean, percent=True)} %"
    low, high = (rate.low, rate.high) if rate.low is not None and rate.high is not None else (rate.mean, rate.mean)
    if low > 0.5:
        return f"beats SFT on {percent}"
    if high < 0.5:
        return f"loses to SFT: it wins on {percent}"
    return f"cannot be told from SFT: it wins on {percent}"


def _interval_words(rate: Interval) -> str:
    _, bounds = format_parts(rate, percent=True)
    return f" (95 % interval {bounds})" if bounds else ""


def summary(results: Mapping[str, Any]) -> list[str]:
    """Further sentences in words, each only where its numbers are there."""
    judged = _reward_model(results) if policies(results) else ""  # else it is the headline
    return [s for s in (_heldout(results), judged, _tax(results), _ptx(results)) if s]


def _first(results: Mapping[str, Any], names: Iterable[str], key: str) -> tuple[str, Interval] | None:
    for name in names:
        if (found := finite(value(results, name, key))) is not None:
            return name, found
    return None


def _heldout(results: Mapping[str, Any]) -> str:
    found = _first(results, LEARNT, "heldout_win_rate_vs_sft")
    if found is None:
        return ""
    name, rate = found
    share = format_number(rate.mean, percent=True)
    return (
        f"Judged by labelers whose comparisons the reward model never saw, {label(name)} wins on {share} %"
        f"{_interval_words(rate)}."
    )


def _reward_model(results: Mapping[str, Any]) -> str:
    model = results.get("reward_model") or {}
    accuracy = finite(model.get("accuracy"))
    if accuracy is None:
        return ""
    text = f"The reward model ranks {format_number(accuracy.mean, percent=True)} % of held-out comparisons as labeled"
    text += _interval_words(accuracy)
    if (agreement := finite(model.get("label_agreement"))) is not None:
        text += f"; two labelers agree on {format_number(agreement.mean, percent=True)} %"
    return text + "."


def _known(results: Mapping[str, Any], names: Iterable[str]) -> bool:
    return any(name in (results.get("policies") or {}) for name in names)


def _tax(results: Mapping[str, Any]) -> str:
    start = finite(value(results, "sft_mix", "skill_accuracy"))
    ends = [(p, finite(value(results, p, "skill_accuracy"))) for p in ("ppo", "ppo_ptx", *DIRECT)]
    told = [f"{label(p)} at {format_number(end.mean, percent=True)} %" for p, end in ends if end]
    if start is None or not told:
        return ""
    method = "PPO" if _known(results, ("ppo", "ppo_ptx")) else "training"
    before = f"{label('sft_mix')}, where {method} starts, at {format_number(start.mean, percent=True)} %"
    return f"Skill accuracy: {', '.join([before, *told])}."


def _ptx(results: Mapping[str, Any]) -> str:
    found = [finite((results.get("ptx_coef") or {}).get(name)) for name in ("per_token", "per_sequence")]
    if found[0] is None or found[1] is None:
        return ""
    token, sequence = (format_number(each.mean, digits=3) for each in found if each)
    return (
        f"PPO-ptx weighs the pretraining loss by {token} where both losses are means over tokens, which is {sequence} "
        "where both are sums over a sequence."
    )
