"""C37: the size of the policy does not move the KL of the peak, and RL spends more KL than best of n (Gao et al. 2023).

Policies of two sizes are optimised against one reward model, by RL without a KL penalty and by best of n. Compared are
the distances of the peaks of the curves ``d (a - b log d)`` fitted to gold utility in RL, each at most the largest
distance that its run reaches; the KLs at which RL and best of n reach one score, the highest that both reach; and the
gain in gold utility by best of n (Figures 7 and 8).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from claims import model_stages as ms
from claims import trajectories, verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import diagnostics
from rlhf_jax.diagnostics import overoptimisation
from rlhf_jax.report import plots

SMALL = {"layers": 1, "width": 48, "mlp": 128}
"""A size of C16."""
NS = (1, 2, 4, 8, 16, 32, 64)
SAMPLES = 128


def measure(trial: Trial) -> Measured:
    """Returns KL, score and gold utility of RL and of best of n for both sizes."""
    recipe, at = ms.Recipe(trial), trajectories.iterations(trial)
    pools = {"small": 16 if trial.quick else 64, "large": 16 if trial.quick else 256}
    small = trial.result(trajectories.start_of, size=SMALL)
    runs = {
        "small": trial.result(trajectories.follow, small, recipe.reward, at=at, kl_coef=0.0, size=SMALL),
        "large": trial.result(trajectories.follow, recipe.start, recipe.reward, at=at, kl_coef=0.0),
    }
    answers = {
        "small": trial.result(
            trajectories.answer_often, small, recipe.reward, size=SMALL, prompts=pools["small"], samples=SAMPLES
        ),
        "large": trial.result(
            ms.answer_often, recipe.start, recipe.start, recipe.reward, prompts=pools["large"], samples=SAMPLES
        ),
    }
    prompts = min(pools.values())
    return {
        name: {
            "rl": trajectories.means(runs[name].value),
            "best of n": best_of_n(answers[name].value["score"][:prompts], answers[name].value["gold"][:prompts]),
        }
        for name in runs
    }


def best_of_n(score_PN: np.ndarray, gold_PN: np.ndarray) -> dict[str, np.ndarray]:
    """Returns KL, score and gold utility for each of `NS`. Equal answers may differ in rounding."""
    score_PN = np.round(score_PN, 4)
    return {
        "kl": np.mean([diagnostics.best_of_n_kl_estimate(score_N, NS) for score_N in score_PN], axis=0),
        "score": diagnostics.best_of_n_mean(score_PN, score_PN, NS).mean(axis=0),
        "gold": diagnostics.best_of_n_mean(score_PN, gold_PN, NS).mean(axis=0),
    }


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the peaks, the KLs at one score, and the gains."""
    peaks_S, ratios_S, gains_S = [], [], []
    for measured in measured_S:
        small, large = measured["small"], measured["large"]
        peaks_S.append(peak(small["rl"]) / peak(large["rl"]) - 1)
        ratios_S.append(np.mean([kl_ratio(each["rl"], each["best of n"]) for each in (small, large)]))
        small_gain, large_gain = (
            each["best of n"]["gold"][-1] - each["best of n"]["gold"][0] for each in (small, large)
        )
        gains_S.append(small_gain - large_gain)
    return [
        verdicts.between("distance of the peak of the small policy / of the large one − 1", peaks_S, -0.2, 0.2),
        verdicts.above("log of the KL of RL / of best of n at one score", ratios_S),
        verdicts.above(f"gain in gold utility by best of {NS[-1]}, small policy − large one", gains_S),
    ]


def peak(run: dict[str, np.ndarray]) -> float:
    """Returns the distance of the peak of the fitted curve, at most the largest distance of the run."""
    kl_C, gain_C = np.maximum(run["kl"][1:], 1e-6), run["gold"][1:] - run["gold"][0]
    fit = overoptimisation.fit(kl_C, gain_C, form=overoptimisation.REINFORCEMENT)
    return float(min(fit.peak_distance.mean, np.sqrt(kl_C.max())))


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
    claim="The size of the policy does not move the KL of the peak; RL spends more KL than best of n for the same "
    "score; a larger policy gains less.",
    published="policies of 1.2 and 6 billion parameters (figures)",
    differs="The policies have 30,000 and 400,000 parameters. A run may end before its peak, whose distance is then at "
    "least that of its end; both peaks are compared as far as the runs go.",
    measure=measure,
    decide=decide,
    plot=plot,
    minutes=6.0,
)
