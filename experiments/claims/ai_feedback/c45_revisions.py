"""C45: each revision raises harmlessness and lowers pure helpfulness (Bai et al. 2022, Constitutional AI, Figures 5-7).

Answers of a helpful-only policy to held-out red-team prompts are revised four times by an editor, a language model that
was trained to criticise and revise. The statistics are the rank correlations of gold harmlessness and of gold
helpfulness with the number of revisions, over all answers, and the differences in gold harmlessness after the last
revision between 16 principles, here wordings of the request for a critique, and each smaller number. Whether critiques
help a small editor, with one layer, is drawn and not tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from claims import model_stages as ms
from claims import verdicts
from claims.ai_feedback import editor_models
from claims.ai_feedback.cai_stages import train_helpful
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots

SMALL = "1 x 32"
COUNTS = (1, 4, 16)
"""Numbers of principles."""
MARGIN = 0.05
"""Largest difference in gold harmlessness between numbers of principles that counts as none."""
LARGE_CRITIQUE, SMALL_CRITIQUE, SMALL_DIRECT = f"{ms.LARGEST}, critique", f"{SMALL}, critique", f"{SMALL}, direct"


def measure(trial: Trial) -> Measured:
    """Trains the editors; returns gold harmlessness and helpfulness of each answer after each revision."""
    recipe = ms.Recipe(trial)
    helpful = trial.result(train_helpful, recipe.base)
    measured = {}
    for name in (LARGE_CRITIQUE, SMALL_CRITIQUE, SMALL_DIRECT):
        size, mode = name.split(", ")
        options = {"critique": mode == "critique", "size": size}
        trained = trial.result(editor_models.train_editor, recipe.base_of(size), helpful, **options)
        measured[name] = trial.result(editor_models.revise_with_model, trained, helpful, **options).value
        for count in COUNTS[:-1] if name == LARGE_CRITIQUE else ():
            found = trial.result(editor_models.revise_with_model, trained, helpful, principles=count, **options)
            measured[f"{count} principles"] = found.value
    return measured


def correlation(values_RN: np.ndarray) -> float:
    """Returns Spearman's correlation of values with the number of revisions, over all answers; 0 if all are equal."""
    if np.ptp(values_RN) == 0:
        return 0.0
    steps_RN = np.broadcast_to(np.arange(len(values_RN))[:, None], values_RN.shape)
    return float(stats.spearmanr(steps_RN.ravel(), np.asarray(values_RN).ravel()).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def last(measured: Measured, name: str) -> float:
    """Returns the mean gold harmlessness after the last revision."""
    return float(np.mean(measured[name]["harmless"][-1]))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Computes the correlations and the effect of the number of principles."""
    harmless_S, helpful_S = (
        [correlation(each[LARGE_CRITIQUE][metric]) for each in measured_S] for metric in ("harmless", "helpful")
    )

    def principles(count: int) -> verdicts.Part:
        difference_S = [last(each, LARGE_CRITIQUE) - last(each, f"{count} principles") for each in measured_S]
        name = f"harmlessness after four revisions, {COUNTS[-1]} − {count} principles"
        return verdicts.between(name, difference_S, -MARGIN, MARGIN)

    return [
        verdicts.above("rank correlation of harmlessness and number of revisions", harmless_S),
        verdicts.below("rank correlation of helpfulness and number of revisions", helpful_S),
        *(principles(count) for count in COUNTS[:-1]),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws gold harmlessness and helpfulness against the number of revisions."""
    with plots.axes(height=4.2, rows=(1, 1)) as (svg, axes):
        for metric, ax in zip(("harmless", "helpful"), axes):
            for name in measured_S[0]:
                color = "ppo" if "critique" in name else "sft" if "direct" in name else "other"
                mean = np.mean([np.mean(each[name][metric], axis=1) for each in measured_S], axis=0)
                style = "--" if name.startswith(SMALL) else "-"
                ax.plot(mean, style, marker="o", color=plots.color(color), label=name)
            ax.set_ylabel(f"gold {metric}")
        axes[-1].set_xlabel("number of revisions")
        axes[-1].legend(fontsize=6)
    return svg[0]


CLAIM = Claim(
    id="C45",
    paper="Bai et al. 2022, Constitutional AI, Figures 5, 6 and 7",
    claim="Each revision raises harmlessness and lowers pure helpfulness; the number of principles does not matter.",
    published="figures only: scores of preference models for 0 to 4 revisions, 1 to 16 principles, and 0.8B to 52B "
    "parameters",
    differs="Editors have up to 0.3 million parameters and learn from flawless revisions by a simulated editor, while "
    "the paper prompts its models. Principles are wordings of the same request. Gold utilities replace the scores of "
    "preference models. The paper also finds that critiques help small models, which is drawn and not tested.",
    measure=measure,
    decide=decide,
    plot=plot,
)
