"""C36a: larger reward models are over-optimised less (Gao et al. 2023, Figures 3 and 13).

Policies are trained without a KL penalty against reward models of four sizes. Their gains in gold utility are fitted by
``d (alpha - beta log d)``, where d is the square root of the KL, with one alpha for all sizes, as in the paper. Beta
should fall with the size.

With 1,000 ranked prompts, the claim was not shown with the seeds 0 to 4: beta changed by -0.002 (-0.006 to 0.001) per
doubling.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import reward_sizes, trajectories, verdicts
from claims.claim import Claim, Measured
from claims.trial import MANY_COMPARISONS, Trial
from rlhf_jax.report import plots


def measure(trial: Trial) -> Measured:
    """Returns the gain in gold utility and the KL in the course of RL against the reward model of each size."""
    recipe, at, measured = ms.Recipe(trial), trajectories.iterations(trial), {}
    runs = {
        size: trial.result(reward_sizes.optimise, recipe.start, reward, size=size, at=at)
        for size, reward in reward_sizes.rewards_of_sizes(trial, recipe).items()
    }
    runs[ms.LARGEST] = trial.result(trajectories.follow, recipe.start, recipe.reward, at=at, kl_coef=0.0)
    for size, run in runs.items():
        means = trajectories.means(run.value)
        measured[size] = {"kl": means["kl"], "gain": means["gold"] - means["gold"][0]}
    return measured


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Computes the slope of beta against the logarithm of the size."""
    log_sizes = [ms.LOG_SIZES[size] for size in measured_S[0]]
    betas_SA = np.array([fit(list(each.values()))[1] for each in measured_S])
    slopes_S = np.polyfit(log_sizes, betas_SA.T, 1)[0]
    return [verdicts.below("beta of RL, per doubling of the reward model", slopes_S)]


def fit(runs: Sequence[dict[str, np.ndarray]]) -> tuple[float, np.ndarray]:
    """Returns alpha, which all runs share, and the beta of each run, from a least-squares fit to the gains."""
    blocks, gains = [], []
    for number, run in enumerate(runs):
        d_C = trajectories.root(run["kl"])[1:]
        block = np.zeros((len(d_C), 1 + len(runs)))
        block[:, 0], block[:, 1 + number] = d_C, -d_C * np.log(np.maximum(d_C, 1e-3))
        blocks.append(block)
        gains.append(run["gain"][1:])
    alpha, *betas = np.linalg.lstsq(np.concatenate(blocks), np.concatenate(gains), rcond=None)[0]
    return float(alpha), np.array(betas)


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the gain in gold utility against the square root of the KL, one color per size."""
    with plots.axes(height=3.0) as (svg, (ax,)):
        sizes = list(measured_S[0])
        for place, size in enumerate(sizes):
            for number, each in enumerate(measured_S):
                run, shown = each[size], None if number else size
                shade = 0.25 + 0.75 * place / max(len(sizes) - 1, 1)
                ax.plot(
                    trajectories.root(run["kl"]),
                    run["gain"],
                    ".-",
                    color=plots.color("reward_model"),
                    alpha=shade,
                    label=shown,
                )
        ax.set_xlabel("square root of the KL (nats)")
        ax.set_ylabel("gain in gold utility")
        ax.legend(title="size of the reward model")
    return svg[0]


CLAIM = Claim(
    id="C36a",
    paper="Gao et al. 2023, Figures 3 and 13",
    claim="Larger reward models are over-optimised less: beta falls with their size.",
    published="beta falls smoothly from 3M to 3B parameters, while alpha of RL is constant",
    differs="RL runs 24 iterations, and alpha is the same for all sizes by assumption. Labels are those of simulated "
    "labelers instead of the gold model.",
    measure=measure,
    decide=decide,
    plot=plot,
    changes=MANY_COMPARISONS,
)
