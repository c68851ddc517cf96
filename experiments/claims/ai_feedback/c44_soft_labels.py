"""C44: soft labels beat hard ones, and chains of thought need clamping (Bai et al. 2022, Constitutional AI, 4.3).

A simulated judge of known calibration labels pairs of answers of SL-CAI to red-team prompts. The preference model is
trained on these labels, together with labelers' comparisons of helpfulness, and SL-CAI is trained on its scores. The
arms differ only in the labels of the judge: its calibrated probabilities (soft), the preferred answers (hard), and the
probabilities of the same judge after a chain of thought, which makes it overconfident, unclamped and clamped. Pairs
between which the judge does not choose are left out in all arms. The statistics are the gold harmlessness of the policy
on held-out red-team prompts, the standard deviation of the scores of the preference model, and the share of all
held-out prompts that the policy refuses.

The KL coefficient was chosen with seed 100: with the usual one, 0.055, all policies refuse nearly all prompts, and with
0.2 and 0.5, nearly all red-team prompts, so that the arms with soft and with hard labels cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.ai_feedback import cai_stages
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots

PAIRS = 800
STRENGTH = 2.0
"""The judge is right about 76 % of the pairs that differ by 1 in gold harmlessness."""
OVERCONFIDENCE = 8.0
KL_COEF = 1.0
ARMS: dict[str, dict[str, Any]] = {
    "soft": {},
    "hard": {"hard": True},
    "chain of thought": {"overconfidence": OVERCONFIDENCE},
    "chain of thought, 40–60": {"overconfidence": OVERCONFIDENCE, "clamp": [0.4, 0.6]},
}
SOFT, HARD, UNCLAMPED, CLAMPED = ARMS


def measure(trial: Trial) -> Measured:
    """Trains a preference model and a policy for each arm; returns what their answers are worth."""
    base = ms.Recipe(trial).base
    helpful = trial.result(cai_stages.train_helpful, base)
    sl_cai = trial.result(cai_stages.train_sl_cai, base, helpful)
    helpfulness = trial.result(cai_stages.compare_helpfulness, helpful, sl_cai)
    measured, rewards = {}, []
    for name, options in ARMS.items():
        reward = trial.result(
            cai_stages.train_preference_model, sl_cai, helpfulness, pairs=PAIRS, strength=STRENGTH, **options
        )
        policy = trial.result(cai_stages.train_rl_cai, sl_cai, reward, kl_coef=KL_COEF)
        measured[name] = trial.result(cai_stages.measure_policy, policy, sl_cai, reward).value
        rewards.append(reward)
    measured["SL-CAI"] = trial.result(cai_stages.measure_policy, sl_cai, sl_cai, rewards[0]).value
    return measured


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares soft with hard labels, and clamped with unclamped ones."""

    def difference(metric: str, one: str, other: str) -> np.ndarray:
        return np.array([each[one][metric] - each[other][metric] for each in measured_S])

    return [
        verdicts.above("gold harmlessness, soft − hard", difference("harmlessness", SOFT, HARD)),
        verdicts.below(
            "standard deviation of scores, clamped − unclamped chain of thought",
            difference("deviation", CLAMPED, UNCLAMPED),
        ),
        verdicts.below("refusal rate, clamped − unclamped chain of thought", difference("refused", CLAMPED, UNCLAMPED)),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws gold harmlessness on red-team prompts and the refusal rate for each arm."""
    names = [*ARMS, "SL-CAI"]
    with plots.axes(height=3.2) as (svg, (ax,)):
        for metric, color, label in (("harmlessness", "ppo", "gold harmlessness"), ("refused", "sft", "refusal rate")):
            for number, each in enumerate(measured_S):
                values = [each[name][metric] for name in names]
                ax.plot(values, range(len(names)), "o", color=plots.color(color), label=None if number else label)
        plots.label_rows(ax, names)
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C44",
    paper="Bai et al. 2022, Constitutional AI, section 4.3 and Figure 9",
    claim="Soft labels of a judge beat hard ones, and a chain of thought needs clamping, without which policies are "
    "extreme.",
    published="clamping to 20–80 % helps slightly, to 40–60 % more; no other numbers",
    differs="The judge is simulated: after a chain of thought it is as accurate as before and only overconfident. PPO "
    "runs for the same number of iterations with each kind of label, with a KL coefficient of 1. The refusal rate is "
    "that of all held-out prompts; half of them are red-team prompts, which should be refused.",
    measure=measure,
    decide=decide,
    plot=plot,
)
