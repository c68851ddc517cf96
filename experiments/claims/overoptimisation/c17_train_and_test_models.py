"""C17: the reward model that RL optimises and one trained on other comparisons part late (Bai et al. 2022, Fig. 4).

The comparisons are split in halves. RL optimises the model of one half without a KL penalty; the model of the other
half scores the same answers. Their gains agree after 10 % of the run and differ at its end. The win rate against the
SFT model that the scores imply, ``sigmoid(r - r_SFT)`` before normalisation, is then too high: the labelers, whose
choices the model learnt to predict, prefer the policy's answers less often (Figure 35). All numbers are averaged over
two runs, in which the halves change places, so that a difference in scale between the two models does not count.

With one run per seed, the claim was not shown with the seeds 0 to 4: the interval of the gap at the end contained 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from claims import model_stages as ms
from claims import trajectories, verdicts
from claims.claim import Claim, Measured
from claims.result_store import Result
from claims.trial import Trial
from rlhf_jax import diagnostics
from rlhf_jax.report import plots
from rlhf_jax.simulation import labelers

HALVES = ("first half", "second half")
AT = (0, 3, 6, 10, 16, 23, 30)
EARLY = 1
"""Index of the checkpoint at 10 % of the run."""


def measure(trial: Trial) -> Measured:
    """Returns the gain under each judge, and the win rate against SFT that it implies, at each checkpoint."""
    recipe = ms.Recipe(trial)
    models = [trial.result(ms.train_reward_model, recipe.start, recipe.compared, part=half) for half in HALVES]
    runs = [one_run(trial, recipe, train, test) for train, test in (models, models[::-1])]
    return jax.tree.map(lambda *numbers_C: np.mean(numbers_C, axis=0), *runs)


def one_run(trial: Trial, recipe: ms.Recipe, train: Result, test: Result) -> Measured:
    """Optimises ``train`` and returns what `measure` does, for this run."""
    at = trajectories.iterations(trial, AT)
    run = trial.result(trajectories.follow, recipe.start, train, test, at=at, kl_coef=0.0).value
    halves = diagnostics.split_halves(run["score"], run["test_score"])
    noise = jnp.float32(recipe.compared.value[1]["labeler_temperature"])
    assert trial.task.world is not None
    pool = trial.task.world.pool.replace(temperature=noise)  # type: ignore[attr-defined]
    chosen_C = [
        float(np.mean(labelers.choice_share(pool, features_NF, run["features"][0]))) for features_NF in run["features"]
    ]
    gold_C = trajectories.means(run)["gold"]
    return {
        "train model": {"gain": halves.train, "win_rate": implied(run["score"], train.value)},
        "test model": {"gain": halves.test, "win_rate": implied(run["test_score"], test.value)},
        "labelers": {"gain": (gold_C - gold_C[0]) / np.std(run["gold"][0]), "win_rate": np.array(chosen_C)},
    }


def implied(score_CN: np.ndarray, reward: dict) -> np.ndarray:
    """Returns the win rate against the first checkpoint that a reward model implies, ``[C]``.

    The gain of its head is the factor by which its scores were normalised.
    """
    return special.expit((score_CN - score_CN[0]) / float(reward["head"]["gain"])).mean(axis=1)


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the gains of both models, and the implied win rate with that of the labelers."""
    gap_SC = np.array([each["train model"]["gain"] - each["test model"]["gain"] for each in measured_S])
    over_SC = np.array([each["train model"]["win_rate"] - each["labelers"]["win_rate"] for each in measured_S])
    early_S, end_S = gap_SC[:, EARLY], gap_SC[:, -1]
    return [
        verdicts.between("gain under the train model − under the test model at 10 % of the run", early_S, -0.1, 0.1),
        verdicts.above("gain under the train model − under the test model at the end", end_S),
        verdicts.above("win rate implied by the train model − by labelers at the end", over_SC[:, -1]),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the gain under each judge in the course of the run."""
    colors = {"train model": "reward_model", "test model": "best_of_n", "labelers": "ppo"}
    with plots.axes(height=2.6) as (svg, (ax,)):
        for name, color in colors.items():
            gain_SC = np.array([each[name]["gain"] for each in measured_S])
            share_C = np.array(AT) / AT[-1]
            ax.plot(share_C, gain_SC.T, ".", color=plots.color(color), alpha=0.35)
            ax.plot(
                share_C, gain_SC.mean(axis=0), color=plots.color(color), label=name.replace("labelers", "gold utility")
            )
        ax.set_xlabel("share of the run")
        ax.set_ylabel("gain (standard deviations of SFT answers)")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C17",
    paper="Bai et al. 2022, Figures 4 and 35",
    claim="The score of the model that RL optimises and that of a model trained on other comparisons agree early and "
    "then part; the score overstates the win rate.",
    published="the scores part after about 150,000 samples (figure)",
    differs="Choices of simulated labelers replace the Elo scores from crowdworkers. An interval cannot prove "
    "equality, so the gap at 10 % of the run must be less than 0.1 standard deviations.",
    measure=measure,
    decide=decide,
    plot=plot,
)
