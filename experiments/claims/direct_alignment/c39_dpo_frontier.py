"""C39: DPO reaches at least the reward of PPO at equal KL (Rafailov et al. 2023, Figure 2).

It also depends less on the sampling temperature. Both methods use the same rankings, DPO directly and PPO through a
reward model, each with three KL coefficients. Gold utility is compared at equal KL, interpolated between the policies
of each method and the SFT model, over the range of KL that both methods reach. One policy of each method is also
sampled at several temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.direct_alignment import dpo_stages
from claims.trial import Trial
from rlhf_jax import diagnostics, types
from rlhf_jax.report import plots

BETAS = (0.03, 0.1, 0.3)
"""Betas of DPO, in units of the labelers' utility."""
KL_COEFS = (0.01, 0.03, 0.1)
"""KL coefficients of PPO."""
MIDDLE = 1
"""Number of the coefficient whose policy is sampled at several temperatures."""
TEMPERATURES = (0.01, 0.25, 0.5, 0.75, 1.0)
SHARES = (0.25, 0.5, 0.75, 1.0)
"""KLs at which gold utility is compared, as shares of the largest KL that both methods reach."""


def answer_at(
    trial: Trial, policy: types.Params, start: types.Params, reward: types.Params, *, temperature: float
) -> np.ndarray:
    """Returns the gold utility of answers that are sampled at a temperature, one for each held-out prompt."""
    key = jax.random.fold_in(trial.key("evaluate"), 39)
    policy, prompts = policy.get("policy", policy), trial.task.eval_prompts
    return np.asarray(trial.sampler(policy, start, reward, prompts, key, temperature=temperature).gold.total)


def measure(trial: Trial) -> Measured:
    """Trains both methods; returns gold utility and KL of each policy, and win rates by temperature."""
    recipe, own = ms.Recipe(trial), slice(0, 2 if trial.quick else None)
    inputs = (recipe.start, recipe.reward)
    policies = {
        "DPO": [trial.result(dpo_stages.train_dpo, recipe.start, recipe.compared, beta=beta) for beta in BETAS[own]],
        "PPO": [trial.result(ms.train_policy, *inputs, kl_coef=coef) for coef in KL_COEFS[own]],
    }
    start = trial.result(ms.answer, recipe.start, *inputs).value["gold"]
    measured = {}
    for name, trained in policies.items():
        answers = [trial.result(ms.answer, policy, *inputs).value for policy in trained]
        wins = []
        for temperature in TEMPERATURES[:: 4 if trial.quick else 1]:
            gold = trial.result(answer_at, trained[MIDDLE], *inputs, temperature=temperature).value
            wins.append(float(np.mean(diagnostics.win_outcomes(gold, start, tie_tolerance=1e-5))))
        measured[name] = {
            "kl": [0.0, *(float(np.mean(each["kl"])) for each in answers)],
            "gold": [float(np.mean(start)), *(float(np.mean(each["gold"])) for each in answers)],
            "wins": wins,
        }
    return measured


def at_kl(kl: Sequence[float], gold: Sequence[float], at: np.ndarray) -> np.ndarray:
    """Interpolates gold utility linearly between policies, in the order of their KL."""
    order = np.argsort(kl)
    return np.interp(at, np.asarray(kl)[order], np.asarray(gold)[order])


def frontier_difference(measured: Measured) -> float:
    """Returns the gold utility of DPO minus that of PPO at equal KL, averaged over KLs that both reach."""
    common = min(max(measured[name]["kl"]) for name in ("DPO", "PPO"))
    dpo, ppo = (
        at_kl(measured[name]["kl"], measured[name]["gold"], common * np.array(SHARES)) for name in ("DPO", "PPO")
    )
    return float(np.mean(dpo - ppo))


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the frontiers and the ranges of win rates over temperatures."""
    ranges_SA = np.array([[np.ptp(measured[name]["wins"]) for name in ("DPO", "PPO")] for measured in measured_S])
    return [
        verdicts.above("gold utility at equal KL, DPO − PPO", [frontier_difference(each) for each in measured_S]),
        verdicts.below("range of win rates over temperatures, DPO − PPO", ranges_SA[:, 0] - ranges_SA[:, 1]),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws gold utility against KL."""
    with plots.axes(height=2.8) as (svg, (ax,)):
        for name, color in (("DPO", "other"), ("PPO", "ppo")):
            for number, measured in enumerate(measured_S):
                kl, gold = (np.array(measured[name][each]) for each in ("kl", "gold"))
                label = name if number == 0 else None
                ax.plot(np.sort(kl), gold[np.argsort(kl)], ".-", color=plots.color(color), alpha=0.7, label=label)
        ax.set_xlabel("KL in nats")
        ax.set_ylabel("gold utility")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C39",
    paper="Rafailov et al. 2023, Figure 2",
    claim="DPO reaches at least the reward of PPO at equal KL, and depends less on the sampling temperature.",
    published="TL;DR: DPO wins 61.7 % at temperature 0, PPO 57.0 % at its best temperature and near the base at 1",
    differs="PPO uses a learned reward model, unlike in the paper's left figure, which has the true reward. "
    "KLs are means over one answer per prompt. Win rates are by gold utility against the SFT model at temperature 1.",
    measure=measure,
    decide=decide,
    plot=plot,
)
