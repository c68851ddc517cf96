"""C08: a pretraining loss repairs the alignment tax, and a larger KL penalty does not (Ouyang et al. 2022, Fig. 33).

PPO-ptx is trained with several weights of the pretraining loss, and PPO with several coefficients of the KL penalty.
The regression is that of the loss on held-out pretraining text, which is more precise than the accuracy of skills. A
policy is repaired if its loss exceeds that of the SFT model by at most 0.005 nats. Of each sweep, the repaired policy
with the highest gold utility is chosen on the other seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax.report import plots

PTX = (0.1, 0.3, 1.0)
KL = (0.1, 0.3, 1.0, 3.0)
TOLERANCE = 0.005
SHARE = 0.5
"""Share of PPO's gain in gold utility above which a KL penalty counts as leaving a gain."""


def measure(trial: Trial) -> Measured:
    """Trains both sweeps; returns the loss on pretraining text and the gold utility of each policy."""
    recipe = ms.Recipe(trial)
    policies = {"start": recipe.start, "ppo": trial.result(ms.train_policy, recipe.start, recipe.reward)}
    for coef in PTX:
        policies[f"ptx {coef:g}"] = trial.result(ms.train_policy, recipe.start, recipe.reward, ptx_coef=coef)
    for coef in KL:
        policies[f"kl {coef:g}"] = trial.result(ms.train_policy, recipe.start, recipe.reward, kl_coef=coef)
    return {
        name: {
            "loss": trial.result(ms.probe, policy).value["pretraining_loss"],
            "gold": float(np.mean(trial.result(ms.answer, policy, recipe.start, recipe.reward).value["gold"])),
        }
        for name, policy in policies.items()
    }


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the gains of the repaired policies, and the loss that a KL penalty leaves with that of SFT."""
    S, ptx, kl = len(measured_S), [f"ptx {coef:g}" for coef in PTX], [f"kl {coef:g}" for coef in KL]
    gains_S, losses_S = np.zeros(S), np.zeros(S)
    for s, each in enumerate(measured_S):
        others = [other for o, other in enumerate(measured_S) if o != s or S == 1]
        chosen = [best_repaired(others, names) for names in (ptx, kl)]
        gains_S[s] = each[chosen[0]]["gold"] - each[chosen[1]]["gold"]
        losses_S[s] = each[lowest_loss(others, kl)]["loss"] - each["start"]["loss"]
    return [
        verdicts.above("gold utility of the best repaired policy, pretraining loss − KL penalty", gains_S),
        verdicts.above("loss with a KL penalty that leaves half of the gain − of SFT", losses_S),
    ]


def best_repaired(measured_S: Sequence[Measured], names: Sequence[str]) -> str:
    """Returns the policy with the highest gold utility among those with the loss of ``start``, or else ``start``."""
    mean = _means(measured_S)
    repaired = [name for name in names if mean[name]["loss"] <= mean["start"]["loss"] + TOLERANCE]
    return max(["start", *repaired], key=lambda name: mean[name]["gold"])


def lowest_loss(measured_S: Sequence[Measured], names: Sequence[str]) -> str:
    """Returns the policy with the lowest loss among those with at least `SHARE` of PPO's gain, or else ``ppo``."""
    mean = _means(measured_S)
    least = mean["start"]["gold"] + SHARE * (mean["ppo"]["gold"] - mean["start"]["gold"])
    return min(["ppo", *(n for n in names if mean[n]["gold"] >= least)], key=lambda name: mean[name]["loss"])


def _means(measured_S: Sequence[Measured]) -> Measured:
    return {
        name: {number: np.mean([each[name][number] for each in measured_S]) for number in ("loss", "gold")}
        for name in measured_S[0]
    }


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the means of the loss against those of gold utility, one line per sweep."""
    mean = _means(measured_S)
    lines = {"pretraining loss": ("ppo_ptx", [f"ptx {coef:g}" for coef in PTX])}
    lines["KL penalty"] = ("ppo", [f"kl {coef:g}" for coef in KL])
    with plots.axes(height=2.8) as (svg, (ax,)):
        for label, (color, names) in lines.items():
            gold, loss = ([mean[name][number] for name in ["ppo", *names]] for number in ("gold", "loss"))
            ax.plot(gold, loss, "o-", color=plots.color(color), label=label)
        ax.plot(mean["start"]["gold"], mean["start"]["loss"], "s", color=plots.color("sft"), label="SFT")
        ax.axhline(mean["start"]["loss"], color=plots.color("other"), linewidth=0.8)
        ax.set_xlabel("gold utility")
        ax.set_ylabel("loss on pretraining text, nats per token")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C08",
    paper="Ouyang et al. 2022, Figures 33 and 34",
    claim="A pretraining loss fixes the regressions with little loss of reward; raising the KL penalty cannot.",
    published="weights of 20 and more fix them; KL coefficients up to 2, 100 times the default, do not",
    differs="The regression is that of the loss on text, not of benchmarks. The weights are not those of the paper, "
    "since the losses are normalised differently. With the largest KL penalty, a policy hardly differs from the SFT "
    "model, so the second statistic is about penalties that leave half of the gain.",
    measure=measure,
    decide=decide,
    plot=plot,
)
