"""C37: the size of the policy does not move the KL of the peak, and RL spends more KL than best of n (Gao et al. 2023).

Policies of two sizes are optimised against one reward model, which has seen few comparisons, by best of n and by RL
without a KL penalty. Compared are the distances of the peaks of the curves ``d (a - b d)`` fitted to gold utility in
best of n, and the KLs at which RL and best of n reach one score, the highest that both reach (Figures 7 and 8). That a
larger policy gains less is drawn and not tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import sample_pool, trajectories, verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import diagnostics
from rlhf_jax.diagnostics import overoptimisation
from rlhf_jax.report import plots

SIZES = {"small": "2 x 64", "large": ms.LARGEST}
NS = (1, 2, 4, 8, 16, 32, 64, 128)


def measure(trial: Trial) -> Measured:
    """Returns KL, score and gold utility of RL and of best of n for both sizes."""
    recipe, at, measured = ms.Recipe(trial), trajectories.iterations(trial), {}
    weak = trial.result(ms.train_reward_model, recipe.start, recipe.compared, part="quarter 1")
    for name, size in SIZES.items():
        start, sized = recipe.start_of(size), {} if size == ms.LARGEST else {"size": size}
        run = trial.result(trajectories.follow, start, weak, at=at, kl_coef=0.0, **sized)
        pool = sample_pool.pool(trial, recipe, size=size)
        scores_PN = trial.result(sample_pool.score, weak, pool).value
        measured[name] = {
            "rl": trajectories.means(run.value),
            "best of n": best_of_n(scores_PN, pool.value["gold"]),
        }
    return measured


def best_of_n(score_PN: np.ndarray, gold_PN: np.ndarray) -> dict[str, np.ndarray]:
    """Returns KL, score and gold utility for each of `NS`."""
    return {
        "kl": np.mean([diagnostics.best_of_n_kl_estimate(score_N, NS) for score_N in score_PN], axis=0),
        "score": diagnostics.best_of_n_mean(score_PN, score_PN, NS).mean(axis=0),
        "gold": diagnostics.best_of_n_mean(score_PN, gold_PN, NS).mean(axis=0),
    }


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the peaks, and the KLs at one score."""
    distance_SA = np.array([[peak(each[name]["best of n"]) for name in SIZES] for each in measured_S])
    ratios_S = [np.mean([kl_ratio(each[name]["rl"], each[name]["best of n"]) for name in SIZES]) for each in measured_S]
    return [
        verdicts.between(
            "distance of the peak of the small policy / of the large one − 1",
            distance_SA[:, 0] / distance_SA[:, 1] - 1,
            -0.2,
            0.2,
        ),
        verdicts.above("log of the KL of RL / of best of n at one score", ratios_S),
    ]


def peak(best: dict[str, np.ndarray]) -> float:
    """Returns the distance of the peak of the fitted curve, at most the largest distance measured."""
    curve = overoptimisation.fit(best["kl"], best["gold"] - best["gold"][0], form=overoptimisation.BEST_OF_N)
    return float(min(curve.peak_distance.mean, np.sqrt(best["kl"][-1])))


def kl_ratio(rl: dict[str, np.ndarray], best: dict[str, np.ndarray]) -> float:
    """Returns the logarithm of the KL of RL divided by that of best of n, at the highest score that both reach."""
    score = min(rl["score"].max(), best["score"].max())
    rl_root, best_root = (max(first_root(run, score), 1e-3) for run in (rl, best))
    return float(2 * np.log(rl_root / best_root))


def first_root(run: dict[str, np.ndarray], score: float) -> float:
    """Returns the square root of the KL at which a run first reaches a score, interpolated between its points."""
    last = max(int(np.argmax(run["score"] >= score)), 1)
    between = slice(last - 1, last + 1)
    return float(np.interp(score, run["score"][between], trajectories.root(run["kl"][between])))


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the gain in gold utility against the square root of the KL."""
    colors = {("small", "rl"): "sft_mix", ("large", "rl"): "ppo", ("small", "best of n"): "sft"}
    colors[("large", "best of n")] = "best_of_n"
    with plots.axes(height=2.8) as (svg, (ax,)):
        for (size, method), color in colors.items():
            for number, measured in enumerate(measured_S):
                run = measured[size][method]
                shown = None if number else f"{method.replace('rl', 'RL')}, {size} policy"
                gain_C = run["gold"] - run["gold"][0]
                ax.plot(trajectories.root(run["kl"]), gain_C, ".-", color=plots.color(color), alpha=0.6, label=shown)
        ax.set_xlabel("square root of the KL")
        ax.set_ylabel("gain in gold utility")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C37",
    paper="Gao et al. 2023, Figures 7 and 8",
    claim="The size of the policy does not move the KL of the peak, and RL spends more KL than best of n for the same "
    "score.",
    published="policies of 1.2 and 6 billion parameters (figures)",
    differs="The sizes of the policies differ by a factor of four. The peaks are those of best of n.",
    measure=measure,
    decide=decide,
    plot=plot,
)
