"""C21: RLHF on helpfulness alone gives more helpful policies that are easier to red-team (Bai et al. 2022, Figure 1).

One preference model is trained on helpfulness pairs, another one on as many and as many harmlessness pairs. Policies
are trained with the first on ordinary prompts, and with the second on prompts of which none or half are requests for
help with harm. Helpfulness is measured on ordinary held-out prompts, harmlessness on harmful ones. The second claim is
that harmlessness saturates before helpfulness, when half of the prompts are harmful.

The KL coefficient was chosen with seed 100: with the usual one, 0.055, the policy that is trained for helpfulness only
over-optimises its preference model within 10 iterations and ends below the SFT model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import trajectories, verdicts
from claims.claim import Claim, Measured
from claims.helpful_harmless import c19_tension, hh_stages
from claims.trial import Trial
from rlhf_jax.report import plots

HELPFUL, BOTH = "helpful only", "both, 50 % harmful prompts"
ARMS = {HELPFUL: (0, 0.0), "both, no harmful prompts": (1, 0.0), BOTH: (1, 0.5)}
"""Preference model, and share of harmful prompts in RL."""
KL_COEF = 0.2
AT = (0, 2, 4, 6, 9, 12, 16, 20, 24)
DOMAINS = ("helpful", "harmless")


def measure(trial: Trial) -> Measured:
    """Returns the mean gold helpfulness and harmlessness of each policy in the course of training."""
    recipe = ms.Recipe(trial)
    sets = trial.result(hh_stages.collect, recipe.start, **c19_tension.DRAWN)
    n = 32 if trial.quick else c19_tension.PAIRS
    models = [trial.result(hh_stages.train, recipe.start, sets, helpful=n, harmless=harmless) for harmless in (0, n)]
    rewards = [trial.result(hh_stages.as_reward, recipe.start, model) for model in models]
    measured = {}
    for name, (reward, red_team) in ARMS.items():
        at = trajectories.iterations(trial, AT[:: 3 if trial.quick else 1])
        options = {"red_team": red_team, "at": at, "kl_coef": KL_COEF}
        course = trial.result(hh_stages.follow, recipe.start, rewards[reward], **options).value
        measured[name] = {domain: course[domain].mean(axis=1, dtype=np.float64) for domain in DOMAINS}
    return measured


def saturation(course_C: np.ndarray) -> float:
    """Returns the first iteration with 90 % of the final gain; the final value is the mean of the last two.

    A policy without a gain does not saturate, and the number of iterations is returned.
    """
    gain_C, at = course_C - course_C[0], np.array(AT[: len(course_C)], float)
    share_C = gain_C / max(float(np.mean(gain_C[-2:])), 1e-9)
    if np.mean(gain_C[-2:]) <= 0 or not (share_C >= 0.9).any():
        return float(at[-1])
    first = int(np.argmax(share_C >= 0.9))
    before, after = share_C[first - 1], share_C[first]
    return float(at[first - 1] + (0.9 - before) / (after - before) * (at[first] - at[first - 1]))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the final policies, and when both objectives saturate."""
    end = {
        domain: np.array([each[HELPFUL][domain][-1] - each[BOTH][domain][-1] for each in measured_S])
        for domain in DOMAINS
    }
    later_S = [saturation(each[BOTH]["helpful"]) - saturation(each[BOTH]["harmless"]) for each in measured_S]
    return [
        verdicts.above("gold helpfulness, trained for helpfulness only − for both", end["helpful"]),
        verdicts.below("gold harmlessness, trained for helpfulness only − for both", end["harmless"]),
        verdicts.above("iterations to 90 % of the final gain, helpfulness − harmlessness", later_S),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws harmlessness against helpfulness in the course of training."""
    with plots.axes(height=3.0) as (svg, (ax,)):
        for name, color in zip(ARMS, ("sft", "sft_mix", "ppo"), strict=True):
            x, y = (np.mean([each[name][domain] for each in measured_S], axis=0) for domain in DOMAINS)
            ax.plot(x, y, ".-", color=plots.color(color), label=name)
            ax.plot(x[-1], y[-1], "o", color=plots.color(color))
        ax.set_xlabel("gold helpfulness on ordinary prompts")
        ax.set_ylabel("gold harmlessness on harmful requests")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C21",
    paper="Bai et al. 2022, Figures 1 and 14, and section 4.4",
    claim="Training for helpfulness alone gives more helpful policies that are easier to red-team; harmlessness "
    "saturates before helpfulness.",
    published="figures",
    differs="Gold utilities replace Elo scores. 4,000 pairs of each kind instead of 44,000 and 42,000. The KL "
    "coefficient is 0.2. The policy that is trained on both kinds of pairs without harmful prompts is drawn and not "
    "tested.",
    measure=measure,
    decide=decide,
    plot=plot,
)
